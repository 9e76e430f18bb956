"""Kernels of decoding steps, on a GPU or in Triton's interpreter (`TRITON_INTERPRET=1`)."""

import logging
from typing import Any

import pytest
import torch
from torch.nn.functional import gelu, silu

from grpo_trl.gpu_kernels import triton_works
from grpo_trl.rollout.group import cache, engine, fused_layers
from grpo_trl.rollout.group.engine import GroupEngine
from grpo_trl.rollout.group.norms import HeadNorms, Norm
from grpo_trl.rollout.group.step import Reach
from tests.helpers.families import FAMILIES, make_family

from .test_engine import ids, make_options, make_prompts, make_request, sample
from .test_fused_layers import CASES


pytest.importorskip("triton")
from grpo_trl.rollout.group import kernels
from grpo_trl.rollout.group.kernels import attention


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(not triton_works(DEVICE, torch.float32), reason="needs a GPU or TRITON_INTERPRET=1")
QUERIES, KEY_HEADS = 3, 2
FEW: dict[str, Any] = {"prompts": make_prompts(9, 2), "num_generations": 2, "rows": 3, "max_completion_length": 4}
"""Rows in flight: too few for all, so that slots change hands."""


@pytest.fixture(autouse=True)
def seeded(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(engine, "TOKENS", 2)  # of the comparison with plain forwards


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def make_reach(slots, group, rows, first, stop):
    """Rows are spread over slots, as many as `group` in one."""
    rows_XG = torch.full((slots, group), -1)
    order = torch.randperm(slots * group)[:rows].sort().values
    rows_XG.view(-1)[order] = torch.randperm(rows)
    return Reach.of(*(x.to(DEVICE) for x in (rows_XG, torch.tensor(first), torch.tensor(stop))))


def plain(query_RHD, memory, reach, value_size, scaling, softcap):
    """In float64; rows that see nothing give NaN."""
    size = query_RHD.shape[2]
    slot_R = torch.full((len(query_RHD),), -1, device=DEVICE)
    for slot, rows in enumerate(reach.rows_XG.tolist()):
        slot_R[[row for row in rows if row >= 0]] = slot
    lines = memory.double()[slot_R].nan_to_num()
    keys, values = lines.split([KEY_HEADS * size, KEY_HEADS * value_size], dim=-1)
    keys, values = (x.unflatten(-1, (KEY_HEADS, -1)) for x in (keys, values))
    scores = torch.einsum("rkqd,rjkd->rkqj", query_RHD.double().unflatten(1, (KEY_HEADS, -1)), keys) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    j = torch.arange(memory.shape[1], device=DEVICE)
    seen = (j >= reach.first_R[:, None]) & (j < reach.stop_R[:, None])
    shares = scores.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1)
    return torch.einsum("rkqj,rjkd->rkqd", shares, values).flatten(1)


def attended(query, memories, reaches, value_size, scaling=0.4, softcap=None):
    firsts = [0, kernels.chunks_of(memories[0].shape[1])]
    partial = kernels.Partial.empty(firsts[1] + kernels.chunks_of(memories[-1].shape[1]), query, value_size)
    for memory, reach, first in zip(memories, reaches, firsts, strict=False):
        kernels.attend(query, memory, KEY_HEADS, reach, partial, first, scaling, softcap)
    return kernels.merged(partial, query.dtype)


@pytest.mark.parametrize("chunk", [64, 512])
@pytest.mark.parametrize("window, softcap", [(None, None), (7, None), (None, 1.5)], ids=str)
@pytest.mark.parametrize("size, value_size", [(16, 16), (20, 9), (130, 130)])
def test_attention_is_that_of_plain_products(chunk, window, softcap, size, value_size, monkeypatch):
    monkeypatch.setattr(attention, "CHUNK", chunk)
    rows, columns = 9, 150
    stop = [1, 150, 64, 65, 63, 128, 5, 70, 149]
    first = [0 if window is None else last - window for last in stop]
    reach = make_reach(4, 30, rows, first, stop)
    memory = randn(5, columns, KEY_HEADS * (size + value_size))
    for slot, rows_G in enumerate(reach.rows_XG.tolist()):  # what nobody sees is not read
        memory[slot, max([stop[row] for row in rows_G if row >= 0], default=0) :] = torch.nan
    query = randn(rows, QUERIES * KEY_HEADS, size)
    expected = plain(query, memory, reach, value_size, 0.4, softcap)
    output = attended(query, [memory], [reach], value_size, softcap=softcap)
    assert torch.allclose(output.double(), expected, atol=1e-5, rtol=1e-5)


def test_two_memories_are_attended_to_as_one():
    rows, size = 6, 16
    query = randn(rows, QUERIES * KEY_HEADS, size)
    own = randn(rows, 32, 2 * KEY_HEADS * size)
    prompts = randn(2, 48, 2 * KEY_HEADS * size)
    own_reach = make_reach(rows, 1, rows, [0] * rows, [1, 32, 7, 9, 16, 17])
    prompt_reach = make_reach(2, 3, rows, [0] * rows, [48] * rows)
    parts = [attended(query, [m], [r], size) for m, r in ((own, own_reach), (prompts, prompt_reach))]
    both = attended(query, [own, prompts], [own_reach, prompt_reach], size)
    joined = torch.cat([own[_slots(own_reach)], prompts[_slots(prompt_reach)]], dim=1)
    joined = torch.stack(
        [torch.cat([x[:stop], x[32:], x[stop:32]]) for x, stop in zip(joined, own_reach.stop_R.tolist(), strict=True)]
    )
    whole = make_reach(rows, 1, rows, [0] * rows, [stop + 48 for stop in own_reach.stop_R.tolist()])
    whole = whole._replace(rows_XG=torch.arange(rows, device=DEVICE, dtype=torch.int32)[:, None])
    assert torch.allclose(both.double(), plain(query, joined, whole, size, 0.4, None), atol=2e-6, rtol=1e-5)
    assert not torch.allclose(both, parts[0], atol=1e-2)


def _slots(reach):
    slots = torch.empty(len(reach.stop_R), dtype=torch.long)
    for slot, rows in enumerate(reach.rows_XG.tolist()):
        slots[[row for row in rows if row >= 0]] = slot
    return slots


def test_what_a_row_gets_does_not_depend_on_the_others():
    query, memory = randn(8, QUERIES * KEY_HEADS, 16), randn(4, 96, 2 * KEY_HEADS * 16)
    reach = make_reach(4, 2, 8, [0] * 8, [96, 3, 40, 70, 1, 33, 64, 65])
    together = attended(query, [memory], [reach], 16)
    for slot, rows in enumerate(reach.rows_XG.tolist()):
        for row in rows:
            one = Reach.of(torch.tensor([[0]], device=DEVICE), reach.first_R[row, None], reach.stop_R[row, None])
            alone = attended(query[row, None].contiguous(), [memory[slot, None]], [one], 16)
            assert torch.equal(alone[0], together[row])


def test_sums_norms_and_gates_are_those_of_plain_formulas():
    hidden, change = randn(3, 20), randn(3, 20)
    after, before = Norm(randn(20), 1e-2, False), Norm(randn(20), 1e-3, False)
    double = [Norm(norm.weight.double(), norm.eps, False) for norm in (after, before)]
    for with_change in (False, True):
        for with_after in (False, True):
            for with_before in (False, True):
                added, normed = kernels.add_and_norm(
                    hidden,
                    change if with_change else None,
                    after if with_after else None,
                    before if with_before else None,
                    0.6,
                    torch.float32,
                )
                expected = hidden.double()
                if with_change:
                    expected = expected + 0.6 * (double[0](change.double()) if with_after else change.double())
                assert torch.allclose(added.double(), expected, atol=1e-6)
                expected = double[1](expected) if with_before else expected
                assert torch.allclose(normed.double(), expected, atol=2e-6)
    gates = randn(3, 2 * 1100)
    gate, up = gates.double().chunk(2, dim=-1)
    for name, function in (("SiLU", silu), ("GELUTanh", lambda x: gelu(x, approximate="tanh"))):
        assert torch.allclose(kernels.gated(gates, kernels.ACTIVATIONS[name]).double(), function(gate) * up, atol=2e-6)


@pytest.mark.parametrize("turned", [16, 8])
@pytest.mark.parametrize("normed", [False, True])
def test_queries_and_keys_are_rotated_and_stored(turned, normed):
    rows, heads, size = 4, QUERIES * KEY_HEADS, 16
    product = randn(rows, (heads + 2 * KEY_HEADS) * size)
    cos, sin = randn(rows, 1, turned), randn(rows, 1, turned)
    norms = HeadNorms(Norm(randn(size), 1e-2, False), Norm(randn(size), 1e-2, False), whole=False) if normed else None
    memory = torch.zeros(5, 6, 2 * KEY_HEADS * size, device=DEVICE)
    lines = torch.tensor([4, 6, 17, 29], device=DEVICE)
    query = kernels.rotate_and_store(product, memory, lines, heads, size, (cos, sin), norms)

    parts = product.double().unflatten(1, (-1, size))
    if normed:
        doubled = [Norm(norm.weight.double(), norm.eps, False) for norm in (norms.query, norms.key)]
        turning = HeadNorms(*doubled, whole=False)(parts[:, :-KEY_HEADS], heads)
        parts = torch.cat([turning, parts[:, -KEY_HEADS:]], dim=1)
    turning = fused_layers._rotated(parts[:, :-KEY_HEADS], cos.double(), sin.double())
    assert torch.allclose(query.double(), turning[:, :heads], atol=2e-6)
    stored = torch.cat([turning[:, heads:], parts[:, -KEY_HEADS:]], dim=1).flatten(1)
    expected = torch.zeros(30, 2 * KEY_HEADS * size, dtype=torch.float64, device=DEVICE)
    expected[lines] = stored
    assert torch.allclose(memory.flatten(0, 1).double(), expected, atol=2e-6)


@pytest.mark.parametrize("family, changes", CASES.values(), ids=CASES)
def test_completions_are_those_of_torchs_own_kernels(family, changes, monkeypatch, caplog):
    if "partial_rotary_factor" in changes:
        changes = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, **changes}}
    if family == "gemma2":  # whose soft cap some versions leave out elsewhere
        changes = changes | {"attn_implementation": "eager"}
    model = make_family(family, **changes).to(DEVICE)
    with caplog.at_level(logging.WARNING):
        mine = sample(model, **FEW).completions
    assert not caplog.messages
    for module in (cache, fused_layers):
        monkeypatch.setattr(module, "kernels_for", lambda *of: None)
    for completion, other in zip(mine, sample(model, **FEW).completions, strict=True):
        assert completion.ids == other.ids
        assert completion.sampler_logps == pytest.approx(other.sampler_logps, abs=1e-5)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(CASES)))
def test_layers_of_other_families_attend_by_the_kernels(family, monkeypatch):
    model = make_family(family).float().to(DEVICE)
    calls, attend = [], kernels.attend
    monkeypatch.setattr(kernels, "attend", lambda *args: calls.append(1) or attend(*args))
    sample(model, **FEW)
    assert calls


def test_guesses_are_attended_to_place_by_place():
    model, request = make_family("qwen3").to(DEVICE), make_request(make_prompts(5, 3), 2)
    completions = [
        GroupEngine(model, make_options(max_completion_length=8), max_rows_in_flight=4, **options).rollout(request)
        for options in ({}, {"speculative_ngrams": 1})
    ]
    assert ids(completions[0]) == ids(completions[1])
    assert completions[1].computed_tokens > completions[0].computed_tokens  # guesses, too
