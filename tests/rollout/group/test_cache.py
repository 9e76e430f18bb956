import math

import pytest
import torch

from grpo_trl.attention.layout import Layout
from grpo_trl.rollout.group import cache as cache_module
from grpo_trl.rollout.group.cache import GroupCache, attend_part, group_cache_attention, plain_part
from grpo_trl.rollout.group.step import Prefill, Step, hidden


SCALING = 0.7
HEADS = {
    "own keys": (2, 2, 4, 4),
    "shared keys": (6, 2, 4, 4),
    "one key head": (4, 1, 8, 8),
    "smaller values": (4, 2, 6, 3),
    "larger values": (2, 1, 3, 5),
}
"""Query heads, key heads, head size, and that of the values."""
HEAD = pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
SOFTCAP = pytest.mark.parametrize("softcap", [None, 1.5])
WITHIN = {torch.float64: 1e-10, torch.float32: 2e-5}


def draw(*shape: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def naive(query_LD, key_ND, value_NE, scaling, softcap):
    """Output and log-sum-exp of one head, a query and a key at a time; None where there is no key."""
    if not len(key_ND):
        return None
    outputs, lses = [], []
    for query in query_LD.tolist():
        scores = [scaling * sum(a * b for a, b in zip(query, key, strict=True)) for key in key_ND.tolist()]
        if softcap is not None:
            scores = [softcap * math.tanh(x / softcap) for x in scores]
        total = sum(math.exp(x) for x in scores)
        weights = [math.exp(x) / total for x in scores]
        outputs.append(sum(w * value for w, value in zip(weights, value_NE.double(), strict=True)))
        lses.append(math.log(total))
    return torch.stack(outputs), torch.tensor(lses, dtype=torch.float64)


# ---- A part ----
@pytest.mark.parametrize("attend", [attend_part, plain_part])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("value_size", [4, 3])
@pytest.mark.parametrize("mask_shape", [(2, 1, 1, 6), (2, 1, 5, 6), (2, 3, 5, 6)], ids=str)
@SOFTCAP
def test_a_part_is_a_softmax_over_the_keys_that_the_mask_leaves(attend, dtype, value_size, mask_shape, softcap):
    query, key = draw(2, 3, 5, 4, dtype=dtype), draw(2, 3, 6, 4, seed=1, dtype=dtype)
    value = draw(2, 3, 6, value_size, seed=2, dtype=dtype)
    seen = torch.rand(mask_shape, generator=torch.Generator().manual_seed(3)) < 0.6
    seen[..., 1] = True
    mask = torch.zeros(mask_shape, dtype=dtype).masked_fill(~seen, hidden(dtype))
    output, lse = attend(query, key, value, mask, SCALING, softcap)
    assert output.shape == (2, 3, 5, value_size)
    assert lse.shape == (2, 3, 5)
    assert output.dtype == dtype
    seen = seen.expand(2, 3, 5, 6)
    for b in range(2):
        for k in range(3):
            for i in range(5):
                keep = seen[b, k, i]
                expected, expected_lse = naive(
                    query[b, k, i : i + 1], key[b, k][keep], value[b, k][keep], SCALING, softcap
                )
                assert (output[b, k, i].double() - expected[0]).abs().max() < WITHIN[dtype]
                assert abs(lse[b, k, i].item() - expected_lse[0].item()) < WITHIN[dtype]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lengths", [(1, 1), (1, 40), (33, 16), (7, 300)], ids=str)
@SOFTCAP
def test_a_part_agrees_with_its_reference(dtype, lengths, softcap):
    queries, keys = lengths
    query, key, value = (draw(3, 2, n, 8, seed=i, dtype=dtype) for i, n in enumerate((queries, keys, keys)))
    seen = torch.rand(3, 1, queries, keys, generator=torch.Generator().manual_seed(4)) < 0.7
    seen[..., 0] = True
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, hidden(dtype))
    output, lse = attend_part(query, key, value, mask, SCALING, softcap)
    expected, expected_lse = plain_part(*(x.double() for x in (query, key, value)), mask.double(), SCALING, softcap)
    within = WITHIN.get(dtype, 0.05)
    assert (output.double() - expected).abs().max() < within
    assert (lse.double() - expected_lse).abs().max() < within


@pytest.mark.parametrize("attend", [attend_part, plain_part])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@SOFTCAP
def test_a_query_that_sees_nothing_is_finite_and_weightless(attend, dtype, softcap):
    query, key, value = (draw(2, 1, 3, 4, seed=i, dtype=dtype) for i in range(3))
    mask = torch.zeros(2, 1, 1, 3, dtype=dtype)
    mask[1] = hidden(dtype)
    output, lse = attend(query, key, value, mask, SCALING, softcap)
    assert output.isfinite().all()
    assert not lse.isnan().any()
    assert (lse[1] < -9e29).all()
    assert (lse[0] > -20).all()


# ---- Masks ----
def make_step(prompt_lengths, rows, prompt_columns=None, columns=None) -> Step:
    """`rows` are pairs of a prompt's slot and the number of tokens that are held already."""
    members = [[slot for slot, (prompt, _) in enumerate(rows) if prompt == n] for n in range(len(prompt_lengths))]
    most = max(map(len, members))
    rows_NG = [slots + [-1] * (most - len(slots)) for slots in members]
    return Step(
        tokens_R=torch.zeros(len(rows), dtype=torch.long),
        positions_R=torch.tensor([prompt_lengths[prompt] + held for prompt, held in rows]),
        lengths_R=torch.tensor([held for _, held in rows]),
        rows_NG=torch.tensor(rows_NG),
        prompt_R=torch.tensor([prompt for prompt, _ in rows]),
        place_R=torch.tensor([members[prompt].index(slot) for slot, (prompt, _) in enumerate(rows)]),
        row_R=torch.arange(len(rows)),
        prompt_lengths_N=torch.tensor(prompt_lengths),
        prompt_columns=prompt_columns or max(prompt_lengths),
        columns=columns or max(held for _, held in rows) + 1,
    )


PROMPT_LENGTHS = [4, 1, 7]
ROWS = [(0, 0), (2, 3), (0, 5), (2, 0), (1, 2), (2, 9)]


@pytest.mark.parametrize("window", [None, 1, 3, 6, 11, 1000])
@pytest.mark.parametrize("queries_per_row", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_masks_leave_what_stands_before_a_token_and_in_its_window(window, queries_per_row, dtype):
    step = make_step(PROMPT_LENGTHS, ROWS, prompt_columns=9, columns=12)
    own, prompt = step.masks(window, dtype, queries_per_row)
    assert own.dtype == prompt.dtype == dtype
    assert own.shape == (len(ROWS), 1, 1, 12)
    reach = math.inf if window is None else window
    for row, (slot, held) in enumerate(ROWS):
        for column in range(12):
            assert (own[row, 0, 0, column] == 0) == (column <= held and held - column < reach)
        for column in range(9):
            sees = column < PROMPT_LENGTHS[slot] and PROMPT_LENGTHS[slot] + held - column < reach
            place = step.place_R[row].item()
            for q in range(queries_per_row):
                query = 0 if prompt.shape[2] == 1 else place * queries_per_row + q
                assert (prompt[slot, 0, query, column] == 0) == sees
    assert set(torch.cat([own.flatten(), prompt.flatten()]).tolist()) == {
        0.0,
        -1e30 if dtype == torch.float64 else torch.tensor(-1e30, dtype=dtype).item(),
    }
    assert prompt.shape[2] in (1, step.rows_NG.shape[1] * queries_per_row)


def test_masks_are_made_once_for_layers_that_are_alike():
    step = make_step(PROMPT_LENGTHS, ROWS)
    first = step.masks(3, torch.float32, 2)
    assert step.masks(3, torch.float32, 2) is first
    assert step.masks(4, torch.float32, 2) is not first
    assert step.masks(3, torch.float64, 2)[0].dtype == torch.float64
    assert step.masks(3, torch.float32, 1)[1].shape != first[1].shape
    assert step.masks(None, torch.float32, 2) is step.masks(10_000, torch.float32, 2)


# ---- The whole ----
class Dense:
    """What each row has seen so far, kept apart, and attention over it by loops."""

    def __init__(self, heads, window, softcap):
        self.heads, self.window, self.softcap = heads, window, softcap

    def attend(self, query_HD, keys_NKD, values_NKE):
        num_heads, key_heads, _, value_size = self.heads
        first = 0 if self.window is None else max(0, len(keys_NKD) - self.window)
        output = torch.empty(num_heads, value_size, dtype=torch.float64)
        for h in range(num_heads):
            k = h // (num_heads // key_heads)
            output[h] = naive(query_HD[h : h + 1], keys_NKD[first:, k], values_NKE[first:, k], SCALING, self.softcap)[
                0
            ][0]
        return output


class Sequence:
    def __init__(self, prompt_slot, prompt):
        self.slot, self.prompt, self.own = prompt_slot, prompt, []

    def keys(self):
        return torch.stack([key for key, _ in [*self.prompt, *self.own]])

    def values(self):
        return torch.stack([value for _, value in [*self.prompt, *self.own]])


def start(cache, module, heads, prompt_lengths, seed=50):
    """Prefill prompts, into the slots in reverse order; their keys and values, each of shape (K, D)."""
    num_heads, key_heads, size, value_size = heads
    slots = list(range(len(prompt_lengths)))[::-1]
    layout = Layout.of([(prompt_lengths[slot], []) for slot in slots])
    cache.now = Prefill(slots)
    total = sum(prompt_lengths)
    query, key, value = (
        draw(1, n, total, d, seed=seed + i)
        for i, (n, d) in enumerate([(num_heads, size), (key_heads, size), (key_heads, value_size)])
    )
    output = cache.attend(module, query, key, value, SCALING, None, None, layout)
    prompts = {}
    for slot, packed in zip(slots, layout.groups, strict=True):
        places = range(packed.prompt.start, packed.prompt.stop)
        prompts[slot] = [(key[0, :, i], value[0, :, i]) for i in places]
    return query, output, prompts, layout


def assert_next_step_is_dense(cache, module, heads, sequences, prompt_lengths, window, softcap, seed, **columns):
    """One step of all sequences through the cache, compared with dense attention."""
    num_heads, key_heads, size, value_size = heads
    rows = len(sequences)
    query, key, value = (
        draw(rows, n, 1, d, seed=seed + 100 * i)
        for i, (n, d) in enumerate([(num_heads, size), (key_heads, size), (key_heads, value_size)])
    )
    cache.now = make_step(prompt_lengths, [(s.slot, len(s.own)) for s in sequences], **columns)
    cache._layers[module].window, cache._layers[module].softcap = window, softcap
    output = cache.attend(module, query, key, value, SCALING, window, softcap)
    assert output.shape == (rows, 1, num_heads, value_size)
    dense = Dense(heads, window, softcap)
    for row, sequence in enumerate(sequences):
        sequence.own.append((key[row, :, 0], value[row, :, 0]))
        expected = dense.attend(query[row, :, 0], sequence.keys(), sequence.values())
        assert (output[row, 0] - expected).abs().max() < 1e-9


@HEAD
@pytest.mark.parametrize("window", [None, 1, 4, 9])
@SOFTCAP
def test_merged_parts_are_dense_attention_over_prompt_and_own_tokens(heads, window, softcap):
    cache, module, lengths = GroupCache(6, 4, 16, 16), torch.nn.Identity(), [4, 1, 5, 7]
    _, _, prompts, _ = start(cache, module, heads, lengths)
    sequences = [Sequence(slot, prompts[slot]) for slot in (0, 3, 0, 3, 1)]
    arguments = cache, module, heads, sequences, lengths, window, softcap
    for step in range(3):
        assert_next_step_is_dense(*arguments, seed=step)
    sequences.append(Sequence(3, prompts[3]))
    for step in range(3, 7):  # as in steps that are recorded
        assert_next_step_is_dense(*arguments, seed=step, prompt_columns=16, columns=16)


def efficient_kernel(query, key, value, mask, scaling, softcap):
    """As CUDA's memory-efficient kernel computes in float32, and for a query that sees nothing.

    Source: kernel_forward.h of torch: products are counted in base 2, and a largest one of -inf gives an output and a
    log-sum-exp of 0.
    """
    log2e = torch.tensor(1.4426950408889634, dtype=torch.float32)
    scores = ((query.float() @ key.float().transpose(-1, -2)) * scaling + mask.float()) * log2e
    largest = scores.amax(-1, keepdim=True)
    weights = torch.exp2(scores - largest.nan_to_num(neginf=0.0))
    total = weights.sum(-1, keepdim=True)
    nothing = largest.isneginf()
    output = (weights @ value.float() / total.clamp(min=1e-30)).masked_fill(nothing, 0.0)
    lse = ((largest + total.log2()) / log2e).masked_fill(nothing, 0.0)
    return output.to(value.dtype), lse[..., 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [1, 4])
def test_rows_that_have_left_their_prompt_behind_are_right_on_cuda_too(monkeypatch, dtype, window):
    monkeypatch.setattr(cache_module, "attend_part", efficient_kernel)
    heads, lengths = HEADS["shared keys"], [4, 1, 7]
    cache, module = GroupCache(6, 4, 16, 16), torch.nn.Identity()
    start(cache, module, heads, lengths)
    layer = cache._layers[module]
    layer.prompts, layer.own, layer.window = layer.prompts.to(dtype), layer.own.to(dtype), window
    rows = [(0, 9), (2, 9), (1, 5)]
    held = {row: draw(held, 2, 4, seed=row + 7, dtype=dtype) for row, (_, held) in enumerate(rows)}
    for row, keys in held.items():
        layer.own[row, : len(keys)] = torch.cat([keys.flatten(1)] * 2, dim=1)
    query, key = draw(3, 6, 1, 4, seed=1, dtype=dtype), draw(3, 2, 1, 4, seed=2, dtype=dtype)
    cache.now = make_step(lengths, rows, columns=16)
    output = cache.attend(module, query, key, key, SCALING, window, None)
    dense = Dense(heads, window, None)
    for row, keys in held.items():
        seen = torch.cat([keys, key[row, :, 0][None]])
        expected = dense.attend(query[row, :, 0].double(), seen.double(), seen.double())
        assert (output[row, 0].double() - expected).abs().max() < (1e-5 if dtype == torch.float32 else 0.05)


def test_a_prefill_attends_within_each_prompt():
    heads, lengths = HEADS["shared keys"], [3, 5]
    cache = GroupCache(1, 2, 16, 16)
    query, output, prompts, layout = start(cache, torch.nn.Identity(), heads, lengths)
    dense = Dense(heads, None, None)
    for slot, packed in zip((1, 0), layout.groups, strict=True):
        for i in range(packed.prompt.length):
            place = packed.prompt.start + i
            keys, values = (torch.stack(x) for x in zip(*prompts[slot][: i + 1], strict=True))
            expected = dense.attend(query[0, :, place], keys, values)
            assert (output[0, place] - expected).abs().max() < 1e-9


def test_rows_and_prompts_that_move_take_their_tokens_along():
    heads, lengths = HEADS["smaller values"], [2, 5, 4]
    cache, module = GroupCache(4, 3, 16, 16), torch.nn.Identity()
    _, _, prompts, _ = start(cache, module, heads, lengths)
    sequences = [Sequence(slot, prompts[slot]) for slot in (0, 2, 1, 2)]
    for step in range(3):
        assert_next_step_is_dense(cache, module, heads, sequences, lengths, None, None, seed=step)
    cache.move_row(3, 0, 3)  # the only row of prompt 0 ends
    sequences[0] = sequences.pop()
    cache.move_prompt(2, 0, 4)
    for sequence in sequences:
        sequence.slot = 0 if sequence.slot == 2 else sequence.slot
    for step in range(3, 6):
        assert_next_step_is_dense(cache, module, heads, sequences, [4, 5], None, None, seed=step)


def test_a_slot_that_is_used_again_shows_nothing_of_who_had_it():
    heads = HEADS["own keys"]
    cache, module = GroupCache(2, 2, 16, 16), torch.nn.Identity()
    _, _, prompts, _ = start(cache, module, heads, [7, 6])
    sequences = [Sequence(slot, prompts[slot]) for slot in (0, 1)]
    for step in range(4):
        assert_next_step_is_dense(cache, module, heads, sequences, [7, 6], None, None, seed=step)
    _, _, prompts, _ = start(cache, module, heads, [3, 2], seed=80)
    sequences = [Sequence(slot, prompts[slot]) for slot in (0, 1)]
    for step in range(4, 7):
        assert_next_step_is_dense(
            cache, module, heads, sequences, [3, 2], None, None, seed=step, prompt_columns=16, columns=16
        )


def test_layers_have_memory_of_their_own():
    heads, lengths = HEADS["own keys"], [3]
    cache = GroupCache(1, 1, 16, 16)
    layers = [torch.nn.Identity(), torch.nn.Identity()]
    sequences = []
    for i, module in enumerate(layers):
        _, _, prompts, _ = start(cache, module, heads, lengths, seed=60 + i)
        sequences.append([Sequence(0, prompts[0])])
    for step in range(3):
        for i, module in enumerate(layers):
            assert_next_step_is_dense(cache, module, heads, sequences[i], lengths, None, None, seed=10 * step + i)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_bytes_are_those_of_keys_and_values_of_all_layers(dtype):
    cache = GroupCache(5, 3, 16, 32)
    assert cache.bytes_per_token == 0
    for module in (torch.nn.Identity(), torch.nn.Identity()):
        cache.now = Prefill([1])
        query, key, value = draw(1, 4, 4, 6, dtype=dtype), draw(1, 2, 4, 6, dtype=dtype), draw(1, 2, 4, 3, dtype=dtype)
        cache.attend(module, query, key, value, SCALING, None, None, Layout.of([(4, [])]))
    size = torch.finfo(dtype).bits // 8
    assert cache.bytes_per_token == 2 * 2 * (6 + 3) * size
    held = sum(part.nbytes for x in cache._layers.values() for part in (x.prompts, x.own))
    assert held == (5 * 32 + 3 * 16) * cache.bytes_per_token


# ---- As models call it ----
def attention_inputs():
    return torch.nn.Identity(), draw(1, 2, 3, 4), draw(1, 2, 3, 4), draw(1, 2, 3, 4), None


def test_a_model_that_does_not_pass_the_cache_on_is_refused():
    with pytest.raises(NotImplementedError, match="pass keywords"):
        group_cache_attention(*attention_inputs())


def test_attention_sinks_are_refused():
    with pytest.raises(NotImplementedError, match="sinks"):
        group_cache_attention(*attention_inputs(), group_cache=GroupCache(1, 1, 16, 16), s_aux=torch.zeros(2))


@pytest.mark.parametrize("scaling, expected", [(None, 0.5), (0.3, 0.3)])
def test_the_scaling_is_that_of_the_head_size_by_default(scaling, expected):
    outputs = []
    for given in (scaling, expected):
        cache = GroupCache(1, 1, 16, 16, now=Prefill([0]))
        layout = Layout.of([(3, [])])
        outputs.append(
            group_cache_attention(*attention_inputs(), scaling=given, group_cache=cache, shared_prefix=layout)[0]
        )
    assert torch.equal(*outputs)
    assert outputs[0].shape == (1, 3, 2, 4)
