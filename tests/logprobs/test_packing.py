import itertools
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_trl.attention.layout import Layout
from grpo_trl.logprobs.packing import Packer, group_by_prompt
from grpo_trl.types import Completion, Ranks
from tests.helpers.families import make_completions


PACKED = pytest.mark.parametrize("shared_prefix", [True, False], ids=["packed", "padded"])
SETTINGS = settings(max_examples=100, deadline=None, derandomize=True)


def make_packer(shared_prefix=True, batch_size=None, max_tokens=None, **options):
    """By count, by tokens, or by both; by four completions where neither is given."""
    batch_size = 4 if batch_size is None and max_tokens is None else batch_size
    return Packer(batch_size, max_tokens, pad_token_id=0, shared_prefix=shared_prefix, **options)


def group(first, prompt_length, lengths):
    """Completions of `lengths` tokens, all trained, of the prompt (first, 1, 1, ...)."""
    prompt = [first] + [1] * (prompt_length - 1)
    return [Completion(prompt, [2] * n, [True] * n) for n in lengths]


@st.composite
def lists_of_completions(draw, min_size=0, max_size=12, max_prompts=5):
    """Completions of few prompts in any order, with ragged masks; every token occurs once, but for those of prompts."""
    prompts = [[100 * p + t for t in range(draw(st.integers(1, 7)))] for p in range(1, 1 + max_prompts)]
    drawn = st.tuples(st.sampled_from(prompts), st.one_of(st.lists(st.booleans(), max_size=9), trained_throughout()))
    made, token = [], 1000
    for prompt, mask in draw(st.lists(drawn, min_size=min_size, max_size=max_size)):
        made.append(Completion(list(prompt), list(range(token, token + len(mask))), mask))
        token += len(mask)
    return made


def trained_throughout():
    return st.integers(0, 9).map(lambda n: [True] * n)


def read(completion):
    """The completion's tokens that a model reads: those before the last trained one."""
    trained = [t for t, trained in enumerate(completion.mask) if trained]
    return completion.ids[: max(trained, default=0)]


def grouped(completions):
    """`completions` with those of one prompt behind each other."""
    firsts = [c.prompt_ids for c in completions]
    return sorted(completions, key=lambda c: firsts.index(c.prompt_ids))


def computed(completions, shared_prefix):
    """Tokens that a model computes for `completions` in one micro-batch."""
    lengths = [(tuple(c.prompt_ids), len(read(c))) for c in completions]
    if shared_prefix:
        return sum(map(len, {prompt for prompt, _ in lengths})) + sum(length for _, length in lengths)
    return len(lengths) * max(len(prompt) + length for prompt, length in lengths)


def chosen(completions, indices):
    return [completions[i] for i in indices]


# ---- Layout ----
groups_of_lengths = st.lists(
    st.tuples(st.integers(1, 5), st.lists(st.integers(0, 4), max_size=4)), min_size=1, max_size=4
)


def labels_of(groups):
    """(group, branch, position) of every token; branch 0 is the prompt."""
    return [
        (g, b, position)
        for g, (prompt_length, branches) in enumerate(groups)
        for b, (first, length) in enumerate([(0, prompt_length), *((prompt_length, n) for n in branches)])
        for position in range(first, first + length)
    ]


def test_a_layout_counts_through_prompts_and_branches():
    layout = Layout.of([(3, [2, 0, 1]), (1, [4]), (2, [])])
    assert [group.prompt.slice for group in layout.groups] == [slice(0, 3), slice(6, 7), slice(11, 13)]
    branches = [[(branch.start, branch.stop) for branch in group.branches] for group in layout.groups]
    assert branches == [[(3, 5), (5, 5), (5, 6)], [(7, 11)], []]
    assert [(g.all_branches.start, g.all_branches.stop) for g in layout.groups] == [(3, 6), (7, 11), (13, 13)]
    assert layout.num_tokens == 13
    assert layout.positions == [0, 1, 2, 3, 4, 3, 0, 1, 2, 3, 4, 0, 1]


def test_segments_are_the_prompts_and_the_branches_that_have_tokens():
    layout = Layout.of([(3, [2, 0, 1]), (1, [0]), (2, [])])
    assert [(s.start, s.stop, s.length) for s in layout.segments] == [
        *[(0, 3, 3), (3, 5, 2), (5, 6, 1)],
        (6, 7, 1),
        (7, 9, 2),
    ]
    assert [(b.slice, p.slice) for b, p in layout.crossings] == [(slice(3, 6), slice(0, 3))]


@pytest.mark.parametrize(
    "groups, longest",
    [
        ([(3, [])], 3),
        ([(3, [0])], 3),
        ([(3, [1, 4, 2])], 7),
        ([(3, [2]), (9, [0, 0]), (2, [6])], 9),
        ([(3, [2]), (2, [6, 1])], 8),
    ],
)
def test_longest_is_that_of_a_prompt_with_its_longest_branch(groups, longest):
    assert Layout.of(groups).longest == longest


@given(groups=groups_of_lengths)
@SETTINGS
def test_segments_and_crossings_together_say_who_sees_whom(groups):
    layout, labels = Layout.of(groups), labels_of(groups)
    assert layout.num_tokens == len(labels)
    assert layout.positions == [position for _, _, position in labels]
    assert layout.longest == 1 + max(position for _, _, position in labels)
    seen = [(q, k) for s in layout.segments for q in range(s.start, s.stop) for k in range(s.start, q + 1)]
    seen += [(q, k) for b, p in layout.crossings for q in range(b.start, b.stop) for k in range(p.start, p.stop)]
    expected = [
        (q, k)
        for q, (query_group, query_branch, query_position) in enumerate(labels)
        for k, (key_group, key_branch, key_position) in enumerate(labels)
        if query_group == key_group and key_branch in (0, query_branch) and key_position <= query_position
    ]
    assert sorted(seen) == expected


# ---- Groups ----
def test_completions_are_grouped_by_their_whole_prompt_in_the_order_of_the_first():
    prompts = [[5, 6], [7], [5, 6], [5], [7], [6, 5], [5, 6, 7]]
    completions = [Completion(prompt, [1] * i, [True] * i) for i, prompt in enumerate(prompts)]
    assert group_by_prompt(completions) == [[0, 2], [1, 4], [3], [5], [6]]
    assert group_by_prompt([]) == []


@pytest.mark.parametrize(
    "mask, inputs",
    [
        ([], []),
        ([True], []),
        ([False], []),
        ([True, True, True], [1, 2]),
        ([True, True, False], [1]),
        ([False, False, True], [1, 2]),
        ([True, False, True, False], [1, 2]),
        ([True, False, False], []),
        ([False, False, False], []),
    ],
)
def test_a_model_reads_what_stands_before_the_last_trained_token(mask, inputs):
    assert Completion([9], [1, 2, 3, 4][: len(mask)], mask).inputs == inputs


# ---- The cut ----
@PACKED
@given(completions=lists_of_completions(), batch_size=st.integers(1, 13), extra=st.none() | st.integers(0, 60))
@SETTINGS
def test_every_completion_is_in_one_micro_batch_and_no_micro_batch_is_too_large(
    shared_prefix, completions, batch_size, extra
):
    largest = max((computed([c], shared_prefix) for c in completions), default=1)
    packer = make_packer(shared_prefix, batch_size, None if extra is None else largest + extra)
    cut = packer.cut(completions)
    assert sorted(i for indices in cut for i in indices) == list(range(len(completions)))
    assert all(cut) or (cut == [[]] and not completions)
    by_count = make_packer(shared_prefix, batch_size).cut(completions)
    sizes = [packer.micro_batch(chosen(completions, indices), 1).input_ids_RS.numel() for indices in cut]
    if extra is None:
        assert len(cut) == max(1, math.ceil(len(completions) / batch_size))
    else:
        assert max(sizes) <= packer.max_tokens
        fits = max(packer.micro_batch(chosen(completions, indices), 1).input_ids_RS.numel() for indices in by_count)
        assert cut == by_count or fits > packer.max_tokens
        assert len(cut) >= len(make_packer(shared_prefix, None, packer.max_tokens).cut(completions))


@PACKED
@pytest.mark.parametrize("max_tokens", [None, 1, 4, 100])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 5])
def test_completions_that_are_not_read_are_cut_too(shared_prefix, max_tokens, batch_size):
    completions = group(1, 3, [1, 0, 1, 1]) + group(2, 1, [1])
    cut = make_packer(shared_prefix, batch_size, max_tokens).cut(completions)
    assert sorted(i for indices in cut for i in indices) == list(range(5))
    if max_tokens is None:
        assert len(cut) == math.ceil(5 / batch_size)


@given(
    groups=st.lists(
        st.tuples(st.integers(1, 9), st.lists(st.integers(0, 20), min_size=1, max_size=3)), min_size=1, max_size=20
    ),
    room=st.integers(0, 100),
)
@SETTINGS
def test_with_small_groups_there_are_few_more_micro_batches_than_the_tokens_need(groups, room):
    completions = [c for first, (length, rest) in enumerate(groups) for c in group(first, length, rest)]
    sizes = [computed(group(0, length, rest), True) for length, rest in groups]
    total, largest = sum(sizes), max(sizes)
    max_tokens = 4 * largest + room
    count = len(make_packer(max_tokens=max_tokens).cut(completions))
    assert math.ceil(total / max_tokens) <= count
    # micro-batches differ by a group at most, so that the largest has no more than (total - largest) / count + largest
    # tokens
    assert count <= max(1, math.ceil((total - largest) / (max_tokens - largest)))


@pytest.mark.parametrize(
    "max_tokens, count", [(40, 4), (39, 6), (79, 3), (80, 2), (159, 2), (160, 1), (1000, 1), (10, 16)]
)
def test_there_are_as_few_micro_batches_as_hold_groups_of_one_size(max_tokens, count):
    completions = [c for first in range(16) for c in group(first, 4, [3, 5])]  # 4 + 2 + 4 tokens
    assert len(make_packer(max_tokens=max_tokens).cut(completions)) == count


@PACKED
def test_there_is_one_micro_batch_where_all_fits(shared_prefix):
    completions = group(1, 4, [3, 5, 9]) + group(2, 2, [8])
    total = computed(completions, shared_prefix)
    assert total == {True: 4 + 2 + 4 + 8 + 2 + 7, False: 4 * 12}[shared_prefix]
    assert len(make_packer(shared_prefix, max_tokens=total).cut(completions)) == 1
    assert len(make_packer(shared_prefix, max_tokens=total - 1).cut(completions)) == 2


@pytest.mark.parametrize("limited", [True, False])
@given(
    groups=st.lists(
        st.tuples(st.integers(1, 9), st.lists(st.integers(0, 20), min_size=1, max_size=4)), min_size=1, max_size=12
    ),
    size=st.integers(1, 30),
)
@SETTINGS
def test_whole_groups_make_micro_batches_that_differ_by_the_largest_group_at_most(limited, groups, size):
    completions = [c for first, (length, rest) in enumerate(groups) for c in group(first, length, rest)]
    largest = max(computed(group(0, length, rest), True) for length, rest in groups)
    batch_size = max(size, math.ceil(len(completions) / len(groups)))  # not more micro-batches than groups
    packer = make_packer(batch_size=batch_size, max_tokens=largest + size if limited else None)
    cut = packer.cut(completions)
    assert_no_group_is_split(completions, cut)
    sizes = [computed(chosen(completions, indices), True) for indices in cut]
    assert max(sizes) - min(sizes) <= largest


def assert_no_group_is_split(completions, cut):
    prompts = [{tuple(c.prompt_ids) for c in chosen(completions, indices)} for indices in cut]
    assert sum(map(len, prompts)) == len(set().union(*prompts))


def test_micro_batches_are_balanced_by_tokens_and_not_by_completions():
    completions = group(1, 1, [3] * 4) + group(2, 1, [3] * 4) + group(3, 1, [5, 2]) + group(4, 1, [24])
    cut = make_packer(batch_size=6).cut(completions)  # 9, 9, 6 and 24 tokens
    assert sorted(map(sorted, cut)) == [list(range(10)), [10]]


@given(
    prompt_length=st.integers(1, 9),
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=16),
    batch_size=st.integers(1, 16),
)
@SETTINGS
def test_a_group_is_split_into_parts_of_like_size(prompt_length, lengths, batch_size):
    completions = group(1, prompt_length, lengths)
    cut = make_packer(batch_size=batch_size).cut(completions)
    sizes = [computed(chosen(completions, indices), True) for indices in cut]
    several = [size for size, indices in zip(sizes, cut, strict=True) if len(indices) > 1]
    assert max(several, default=0) <= 2 * min(sizes) + max(lengths)


def test_a_group_of_like_completions_is_split_evenly():
    completions = group(1, 6, [5] * 8)
    for batch_size, held in [(8, [8]), (4, [4, 4]), (2, [2] * 4), (1, [1] * 8)]:
        assert [len(indices) for indices in make_packer(batch_size=batch_size).cut(completions)] == held
    for max_tokens, held in [(38, [8]), (37, [4, 4]), (22, [4, 4]), (21, [2, 3, 3]), (18, [2, 3, 3]), (14, [2] * 4)]:
        cut = make_packer(max_tokens=max_tokens).cut(completions)
        assert sorted(len(indices) for indices in cut) == held


@given(completions=lists_of_completions(min_size=1), batch_size=st.integers(1, 13))
@SETTINGS
def test_without_a_limit_groups_are_split_no_more_than_makes_enough_micro_batches(completions, batch_size):
    cut = make_packer(batch_size=batch_size).cut(completions)
    parts = [(tuple(c.prompt_ids), place) for place, indices in enumerate(cut) for c in chosen(completions, indices)]
    groups = {prompt for prompt, _ in parts}
    assert len(set(parts)) == max(len(groups), len(cut))


@given(completions=lists_of_completions(min_size=1), extra=st.integers(0, 60))
@SETTINGS
def test_with_a_limit_only_groups_above_it_are_split(completions, extra):
    max_tokens = max(computed([c], True) for c in completions) + extra
    cut = make_packer(max_tokens=max_tokens).cut(completions)
    for prompt in {tuple(c.prompt_ids) for c in completions}:
        own = [c for c in completions if tuple(c.prompt_ids) == prompt]
        parts = sum(any(tuple(completions[i].prompt_ids) == prompt for i in indices) for indices in cut)
        if computed(own, True) <= max_tokens:
            assert parts == 1
        else:  # parts differ by a completion at most
            lengths = [len(read(c)) for c in own]
            room = max_tokens - len(prompt)
            fewest, longest = math.ceil(sum(lengths) / room), max(lengths)
            assert parts >= fewest
            assert parts <= (math.ceil((sum(lengths) - longest) / (room - longest)) if room > longest else len(own))


@given(
    completions=lists_of_completions(min_size=1), batch_size=st.integers(1, 13), extra=st.none() | st.integers(0, 60)
)
@SETTINGS
def test_padded_micro_batches_hold_completions_of_like_length_and_are_full(completions, batch_size, extra):
    max_tokens = None if extra is None else max(computed([c], False) for c in completions) + extra
    cut = make_packer(False, None if max_tokens else batch_size, max_tokens).cut(completions)
    lengths = [[computed([c], False) for c in chosen(completions, indices)] for indices in cut]
    for longer, shorter in itertools.pairwise(lengths):
        assert min(longer) >= max(shorter)
        if max_tokens is not None:
            assert (len(longer) + 1) * max(longer) > max_tokens
    if max_tokens is None:
        assert max(map(len, cut)) <= batch_size


@PACKED
@pytest.mark.parametrize("max_tokens", [None, 9])
def test_a_completion_above_the_limit_is_alone_in_its_micro_batch(shared_prefix, max_tokens):
    completions = group(1, 3, [40, 2]) + group(2, 2, [3])
    cut = make_packer(shared_prefix, 1, max_tokens).cut(completions)
    assert [0] in cut
    assert sorted(i for indices in cut for i in indices) == [0, 1, 2]


# ---- Agreement ----
@PACKED
@pytest.mark.parametrize("lengths", [[], [3, 2], [3, 2, 4, 4, 1]])
@pytest.mark.parametrize("others", [[], [0], [4, 9], [30]])
def test_ranks_agree_once_on_the_number_that_holds_a_batch_each_on_average(shared_prefix, lengths, others):
    asked = []
    packer = make_packer(
        shared_prefix, 2, ranks=Ranks(gather=lambda numbers: asked.extend(numbers) or [*numbers, *others])
    )
    completions = group(1, 3, lengths)
    expected = max(1, math.ceil(sum([len(lengths), *others]) / (1 + len(others)) / 2))
    cut = cut_in_step(packer, completions, expected, asked, len(lengths))
    assert sum(map(bool, cut)) >= min(expected, (len(lengths) + 1) // 2)


@PACKED
@pytest.mark.parametrize("lengths, own", [([], 0), ([3, 2], 1), ([3, 2, 4, 4, 1], 2)])
@pytest.mark.parametrize("other", [0, 1, 5])
def test_under_a_limit_ranks_agree_once_on_the_largest_number(shared_prefix, lengths, own, other):
    asked = []
    limit = 11 if shared_prefix else 18
    packer = make_packer(
        shared_prefix, None, limit, ranks=Ranks(gather=lambda numbers: asked.extend(numbers) or [*numbers, other])
    )
    cut = cut_in_step(packer, group(1, 3, lengths), max(1, own, other), asked, own)
    assert sum(map(bool, cut)) == own


def cut_in_step(packer, completions, number, asked, own):
    """Cut in two ways, both of which tell the others `own` once and make `number` micro-batches."""
    for cut in (packer.cut, lambda completions: packer.micro_batches(completions, divisor=5)):
        asked.clear()
        assert len(cut(completions)) == number
        assert asked == [own]
    cut = packer.cut(completions)
    assert sorted(i for indices in cut for i in indices) == list(range(len(completions)))
    micro_batches = packer.micro_batches(completions, divisor=5)
    assert [len(micro_batch.mask_BT) for micro_batch in micro_batches] == [len(indices) for indices in cut]
    assert [micro_batch.divisor for micro_batch in micro_batches] == [5] * len(cut)
    return cut


@PACKED
def test_a_micro_batch_without_completions_is_one_token_to_read(shared_prefix):
    packer = Packer(4, None, pad_token_id=7, shared_prefix=shared_prefix)
    (micro_batch,) = packer.micro_batches([], divisor=3)
    assert micro_batch.input_ids_RS.tolist() == [[7]]
    assert (micro_batch.layout is not None) == (micro_batch.position_ids_RS is not None) == shared_prefix
    if shared_prefix:
        assert (micro_batch.layout, micro_batch.position_ids_RS.tolist()) == (Layout.of([(1, [0])]), [[0]])
    assert micro_batch.mask_BT.shape[0] == micro_batch.advantages_BU.shape[0] == 0
    assert (micro_batch.positions_M.shape, micro_batch.targets_M.shape) == ((0,), (0,))
    assert (micro_batch.positions_M.dtype, micro_batch.targets_M.dtype) == (torch.long, torch.long)
    assert micro_batch.divisor == 3


# ---- Micro-batches ----
def tensors_by_loops(completions, shared_prefix, pad_token_id):
    """What a micro-batch holds, token by token: input ids, positions, places that predict, targets and mask."""
    rows, predictors, targets = [], [], []
    prompt, prompt_end = None, None
    for completion in completions:
        if not shared_prefix:
            rows.append([])
        elif not rows:
            rows = [[]]
        row = rows[-1]
        if not shared_prefix or completion.prompt_ids != prompt:
            prompt = completion.prompt_ids
            for position, token in enumerate(prompt):
                row.append((token, position))
            prompt_end = len(row) - 1
        before = prompt_end
        for t, (token, trained) in enumerate(zip(completion.ids, completion.mask, strict=True)):
            if trained:
                predictors.append((len(rows) - 1, before))
                targets.append(token)
            if any(completion.mask[t + 1 :]):
                row.append((token, len(prompt) + t))
                before = len(row) - 1
    width = max(map(len, rows))
    longest = max([1, *(len(c.ids) for c in completions)])
    return {
        "input_ids": [[token for token, _ in row] + [pad_token_id] * (width - len(row)) for row in rows],
        "positions": [[position for _, position in row] for row in rows] if shared_prefix else None,
        "predictors": [row * width + column for row, column in predictors],
        "targets": targets,
        "mask": [c.mask + [False] * (longest - len(c.mask)) for c in completions],
    }


@PACKED
@given(completions=lists_of_completions(min_size=1))
@SETTINGS
def test_a_micro_batch_holds_what_a_slow_reading_finds(shared_prefix, completions):
    completions = grouped(completions) if shared_prefix else completions
    micro_batch = Packer(1, None, pad_token_id=7, shared_prefix=shared_prefix).micro_batch(completions, divisor=9)
    assert {
        "input_ids": micro_batch.input_ids_RS.tolist(),
        "positions": None if micro_batch.position_ids_RS is None else micro_batch.position_ids_RS.tolist(),
        "predictors": micro_batch.positions_M.tolist(),
        "targets": micro_batch.targets_M.tolist(),
        "mask": micro_batch.mask_BT.tolist(),
    } == tensors_by_loops(completions, shared_prefix, pad_token_id=7)
    assert micro_batch.input_ids_RS.dtype == micro_batch.positions_M.dtype == micro_batch.targets_M.dtype == torch.long
    assert micro_batch.mask_BT.dtype == torch.bool
    assert micro_batch.divisor == 9
    if shared_prefix:
        lengths = Counter()
        branches: dict[tuple, list[int]] = {}
        for c in completions:
            lengths[tuple(c.prompt_ids)] = len(c.prompt_ids)
            branches.setdefault(tuple(c.prompt_ids), []).append(len(read(c)))
        assert micro_batch.layout == Layout.of([(lengths[prompt], rest) for prompt, rest in branches.items()])
    else:
        assert micro_batch.layout is None


@given(completions=lists_of_completions(min_size=1), batch_size=st.integers(1, 5))
@SETTINGS
def test_what_a_predictor_sees_is_what_stands_before_its_target(completions, batch_size):
    packer = make_packer(batch_size=batch_size)
    for indices, micro_batch in zip(packer.cut(completions), packer.micro_batches(completions, 1), strict=True):
        tokens, seen_before = micro_batch.input_ids_RS[0].tolist(), []
        for place in micro_batch.positions_M.tolist():
            (segment,) = [s for s in micro_batch.layout.segments if s.start <= place < s.stop]
            prompts = [p for branches, p in micro_batch.layout.crossings if branches.start <= place < branches.stop]
            seen = [token for prompt in prompts for token in tokens[prompt.slice]] + tokens[segment.start : place + 1]
            seen_before.append((seen, micro_batch.position_ids_RS[0, place].item()))
        expected = [
            (c.prompt_ids + c.ids[:t], len(c.prompt_ids) + t - 1)
            for c in chosen(completions, indices)
            for t in range(len(c.ids))
            if c.mask[t]
        ]
        assert seen_before == expected
        ids = [c.ids[t] for c in chosen(completions, indices) for t in range(len(c.ids)) if c.mask[t]]
        assert micro_batch.targets_M.tolist() == ids


@PACKED
def test_a_micro_batch_keeps_the_advantages_in_the_order_of_its_completions(shared_prefix):
    completions = [Completion([i // 2], [5] * i, [True] * i, advantage=i / 4) for i in range(6)]
    packer = make_packer(shared_prefix, batch_size=2)
    for indices, micro_batch in zip(packer.cut(completions), packer.micro_batches(completions, 6), strict=True):
        assert micro_batch.advantages_BU.flatten().tolist() == [i / 4 for i in indices]
        assert micro_batch.mask_BT.sum(1).tolist() == indices
        assert micro_batch.advantages_BU.dtype == torch.float32


@PACKED
@pytest.mark.parametrize("name", ["old_logps", "ref_logps", "sampler_logps", "drawn_logps"])
def test_a_micro_batch_has_optional_tensors_only_where_every_completion_does(shared_prefix, name):
    def completion(ids, values):
        values = torch.tensor(values) if name in ("old_logps", "ref_logps") and values is not None else values
        return Completion([1], ids, [True] * len(ids), **{name: values})

    packer = make_packer(shared_prefix)
    both = [completion([2], [-1.0]), completion([2, 3], [-1.5, -2.0]), completion([], [])]
    micro_batch = packer.micro_batch(both, divisor=7)
    values = getattr(micro_batch, name + "_BT")
    assert values.tolist() == [[-1.0, 0.0], [-1.5, -2.0], [0.0, 0.0]]
    assert values.dtype == torch.float32
    others = {"old_logps_BT", "ref_logps_BT", "sampler_logps_BT", "drawn_logps_BT"} - {name + "_BT"}
    assert [getattr(micro_batch, other) for other in others] == [None, None, None]
    assert micro_batch.divisor == 7
    assert getattr(packer.micro_batch([both[0], completion([2], None)], 2), name + "_BT") is None


@PACKED
def test_all_tensors_of_a_micro_batch_are_on_its_device(shared_prefix):
    values = torch.tensor([-1.0, -2.0])
    completion = Completion([5], [6, 7], [True] * 2, [-1.0, -2.0], old_logps=values, ref_logps=values)
    for micro_batch in make_packer(
        shared_prefix, 1, device="meta", ranks=Ranks(gather=lambda numbers: [*numbers, 3])
    ).micro_batches([completion], 1):
        tensors = {name: value for name, value in vars(micro_batch).items() if name.rpartition("_")[2].isupper()}
        assert set(tensors) == set(vars(micro_batch)) - {"layout", "divisor"}
        assert {t.device.type for t in tensors.values() if t is not None} == {"meta"}


class Counted(list):
    """Token ids that count how often they are read."""

    reads = 0

    def __iter__(self):
        Counted.reads += 1
        return super().__iter__()


@pytest.mark.parametrize("max_tokens", [None, 32])
def test_a_cut_reads_each_prompt_once(max_tokens, monkeypatch):
    """Prompts are long, and there are many cuts to choose from."""
    completions = make_completions([(9, [5] * 8), (7, [8, 3] * 4), (5, [2] * 8)])
    completions = [replace(c, prompt_ids=Counted(c.prompt_ids)) for c in completions]
    monkeypatch.setattr(Counted, "reads", 0)
    assert len(Packer(1, max_tokens, 0).cut(completions)) >= 5
    assert Counted.reads == len(completions)
