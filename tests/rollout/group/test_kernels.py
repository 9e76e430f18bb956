"""Kernels of decoding steps: in Triton, on a GPU or in its interpreter (`TRITON_INTERPRET=1`), and in C++ on a CPU."""

import importlib
import logging
from typing import Any, NamedTuple

import pytest
import torch
from torch.nn.functional import gelu, silu

from grpo_trl.gpu_kernels import triton_works
from grpo_trl.rollout.group import cache, cpu_kernels, engine, fused_layers
from grpo_trl.rollout.group.cpu_kernels import modules
from grpo_trl.rollout.group.engine import GroupEngine
from grpo_trl.rollout.group.norms import HeadNorms, Norm
from grpo_trl.rollout.group.step import LayerMemory, Reach
from tests.helpers.families import FAMILIES, make_family

from .test_engine import ids, make_options, make_prompts, make_request, sample
from .test_fused_layers import CASES


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
QUERIES, KEY_HEADS = 3, 2
FEW: dict[str, Any] = {"prompts": make_prompts(9, 2), "num_generations": 2, "rows": 3, "max_completion_length": 4}
"""Rows in flight: too few for all, so that slots change hands."""


@pytest.fixture(autouse=True)
def seeded(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(engine, "TOKENS", 2)  # of the comparison with plain forwards


@pytest.fixture(params=["kernels", "cpu_kernels"], autouse=True)
def kernels(request, monkeypatch):
    """Those of one language, which decoding uses inside."""
    if request.param == "kernels" and not triton_works(DEVICE, torch.float32):
        pytest.skip("needs a GPU or TRITON_INTERPRET=1")
    if request.param == "cpu_kernels" and (DEVICE != "cpu" or cpu_kernels.compiled() is None):
        pytest.skip("needs g++, and no GPU")
    module = importlib.import_module(f"grpo_trl.rollout.group.{request.param}")
    use(monkeypatch, module)
    return module


def use(monkeypatch, kernels):
    for module in (cache, fused_layers):
        monkeypatch.setattr(module, "kernels_for", lambda *of: kernels)


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def make_reach(slots, group, rows, first, stop):
    """Rows are spread over slots, as many as `group` in one."""
    rows_XG = torch.full((slots, group), -1)
    order = torch.randperm(slots * group)[:rows].sort().values
    rows_XG.view(-1)[order] = torch.randperm(rows)
    return Reach.of(*(x.to(DEVICE) for x in (rows_XG, torch.tensor(first), torch.tensor(stop))))


class Keys(NamedTuple):
    memory: torch.Tensor
    reach: Reach


class Reaching:
    """A step as attention sees it."""

    def __init__(self, *reaches):
        self.reaches = lambda window: reaches
        self.lines = lambda columns: torch.zeros(len(reaches[0].stop_R), dtype=torch.long, device=DEVICE)
        self.shared = lambda key, make: make()


def attended(kernels, query, keys, size, scaling=0.4, softcap=None):
    """Keys of prompts, and of rows."""
    prompts, own = keys
    layer = LayerMemory(prompts.memory, own.memory, KEY_HEADS, size, scaling, None, softcap)
    return kernels.attend(query, layer, Reaching(own.reach, prompts.reach))


def plain(query_RHD, keys, value_size, scaling, softcap):
    """In float64, over all that a row sees of `keys`."""
    rows, _, size = query_RHD.shape
    scores, values = [], []
    for memory, reach in keys:
        slot_R = torch.empty(rows, dtype=torch.long)
        for slot, members in enumerate(reach.rows_XG.tolist()):
            slot_R[[row for row in members if row >= 0]] = slot
        lines = memory.double()[slot_R].nan_to_num()
        key, value = lines.split([KEY_HEADS * size, KEY_HEADS * value_size], dim=-1)
        query = query_RHD.double().unflatten(1, (KEY_HEADS, -1))
        score = torch.einsum("rkqd,rjkd->rkqj", query, key.unflatten(-1, (KEY_HEADS, -1))) * scaling
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        j = torch.arange(memory.shape[1], device=DEVICE)
        seen = (j >= reach.first_R[:, None]) & (j < reach.stop_R[:, None])
        scores.append(score.masked_fill(~seen[:, None, None], -torch.inf))
        values.append(value.unflatten(-1, (KEY_HEADS, -1)))
    shares = torch.cat(scores, dim=-1).softmax(-1)
    return torch.einsum("rkqj,rjkd->rkqd", shares, torch.cat(values, dim=1)).flatten(1)


def make_keys(slots, group, columns, first, stop, width):
    """Memory in which what nobody sees is not a number, and who sees what of it."""
    reach = make_reach(slots, group, len(stop), first, stop)
    memory = randn(slots + 1, columns, width)
    for slot, rows_G in enumerate(reach.rows_XG.tolist()):
        memory[slot, max([stop[row] for row in rows_G if row >= 0], default=0) :] = torch.nan
    return Keys(memory, reach)


@pytest.mark.parametrize("window, softcap", [(None, None), (7, None), (None, 1.5), (80, 1.5)], ids=str)
@pytest.mark.parametrize("group", [1, 2, 30])
@pytest.mark.parametrize("size, value_size", [(16, 16), (20, 9), (8, 6), (130, 130)])
def test_attention_is_that_of_plain_products(kernels, window, softcap, group, size, value_size, monkeypatch):
    if hasattr(kernels, "attention"):  # Triton's, by several programs
        monkeypatch.setattr(kernels.attention, "CHUNK", 64)
    stops = [1, 150, 64, 65, 63, 128, 5, 70, 149], [9, 1, 17, 64, 70, 2, 65, 3, 16]
    starts = [[0 if window is None else last - window for last in stop] for stop in stops]
    starts[0][3] = 200  # has left its prompt behind
    width, rows = KEY_HEADS * (size + value_size), len(stops[0])
    keys = [
        make_keys(max(4, -(-rows // group)), group, 150, starts[0], stops[0], width),
        make_keys(rows, 1, 70, starts[1], stops[1], width),
    ]
    query = randn(rows, QUERIES * KEY_HEADS, size)
    output = attended(kernels, query, keys, size, softcap=softcap)
    expected = plain(query, keys, value_size, 0.4, softcap)
    assert torch.allclose(output.double(), expected, atol=1e-5, rtol=1e-5)


def test_what_a_row_gets_does_not_depend_on_the_others(kernels):
    """But for the order of sums: fewer queries take more lanes each on a CPU."""
    query, width = randn(8, QUERIES * KEY_HEADS, 16), 2 * KEY_HEADS * 16
    memory, own = randn(4, 96, width), randn(8, 16, width)
    reach = make_reach(4, 2, 8, [0] * 8, [96, 3, 40, 70, 1, 33, 64, 65])
    mine = make_reach(8, 1, 8, [0] * 8, [3] * 8)
    together = attended(kernels, query, [Keys(memory, reach), Keys(own, mine)], 16)
    for slot, rows in enumerate(reach.rows_XG.tolist()):
        for row in rows:
            one = torch.tensor([[0]], device=DEVICE)
            place = (mine.rows_XG == row).nonzero()[0, 0]
            alone = attended(
                kernels,
                query[row, None].contiguous(),
                [
                    Keys(memory[slot, None], Reach.of(one, reach.first_R[row, None], reach.stop_R[row, None])),
                    Keys(own[place, None], Reach.of(one, mine.first_R[row, None], mine.stop_R[row, None])),
                ],
                16,
            )
            assert torch.allclose(alone[0], together[row], atol=1e-6, rtol=1e-6)
            if DEVICE == "cuda":
                assert torch.equal(alone[0], together[row])


triton_only = pytest.mark.parametrize("kernels", ["kernels"], indirect=True)


@triton_only
def test_sums_norms_and_gates_are_those_of_plain_formulas(kernels):
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


@triton_only
@pytest.mark.parametrize("turned", [16, 8])
@pytest.mark.parametrize("normed", [False, True])
def test_queries_and_keys_are_rotated_and_stored(kernels, turned, normed):
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
    use(monkeypatch, None)
    for completion, other in zip(mine, sample(model, **FEW).completions, strict=True):
        assert completion.ids == other.ids
        assert completion.sampler_logps == pytest.approx(other.sampler_logps, abs=1e-5)


@pytest.mark.parametrize("family", ["qwen2", "olmo2", "gemma3"])
def test_many_rows_of_odd_sizes_are_computed_as_by_torch(family, monkeypatch):
    sizes = {"hidden_size": 36, "intermediate_size": 51, "num_attention_heads": 6, "num_key_value_heads": 3}
    model = make_family(family, **sizes, head_dim=6).to(DEVICE)
    wide = {"prompts": make_prompts(9, 2, 4, 7, 1), "num_generations": 8, "rows": 40, "max_completion_length": 5}
    mine = sample(model, **wide).completions
    use(monkeypatch, None)
    monkeypatch.setattr(modules, "_forward_of", lambda module: None)
    for completion, other in zip(mine, sample(model, **wide).completions, strict=True):
        assert completion.ids == other.ids
        assert completion.sampler_logps == pytest.approx(other.sampler_logps, abs=1e-5)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(CASES)))
def test_layers_of_other_families_attend_by_the_kernels(kernels, family, monkeypatch):
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
