"""What one forward and backward sees, and how an optimizer step is cut into such micro-batches.

Axes: B completions of the micro-batch, T completion tokens, M trained tokens, R rows of S tokens.
"""

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..attention.layout import Layout
from ..types import Completion, MicroBatch, Ranks


Read = Callable[[Completion], list[int]]
"""From a completion to its tokens that the model reads."""


@dataclass(frozen=True)
class GroupSize:
    """Tokens that a group costs the rank that trains on it."""

    prompt: int
    """Counted once, however many of its completions are there."""
    completions: tuple[int, ...]


@dataclass(frozen=True)
class Packer:
    """Cuts completions into micro-batches that are balanced by tokens.

    There are as many micro-batches as hold `batch_size` completions each, on average over the ranks that cut together, and
    more where one of them would have more than `max_tokens`; a limit that is None does not count. A group larger than a
    micro-batch is split, and its prompt repeated. These ranks make the same number of micro-batches: one that has too few
    completions adds empty ones, whose gradient is 0.
    """

    batch_size: int | None
    max_tokens: int | None
    pad_token_id: int
    device: torch.device | str = "cpu"
    shared_prefix: bool = True
    """Pack; pad otherwise."""
    reads_all: bool = False
    """Read tokens that predict no trained one too, e.g. the last of a completion: experts are balanced over them."""
    ranks: Ranks = field(default_factory=Ranks)
    """Those that cut together; they gather once per cut for each limit."""

    def micro_batches(self, completions: Sequence[Completion], divisor: float) -> list[MicroBatch]:
        """Build at least one micro-batch; `divisor` is that of the whole optimizer step's loss."""
        return [self.micro_batch([completions[i] for i in indices], divisor) for indices in self.cut(completions)]

    def cut(self, completions: Sequence[Completion]) -> list[list[int]]:
        """Indices of the completions of each micro-batch; the same number of micro-batches on every rank, at least one."""
        number = 1
        if self.batch_size is not None:
            counts = self.ranks.gather([len(completions)])
            number = math.ceil(sum(counts) / (len(counts) * self.batch_size))
        micro_batches = self._cut(completions, number)
        if self.max_tokens is not None:
            number = max(self.ranks.gather([len(micro_batches)]))
        return micro_batches + [[] for _ in range(max(1, number) - len(micro_batches))]

    def largest(self, completions: Sequence[Completion]) -> int:
        """Tokens of the largest micro-batch of `completions` on this rank by itself, padding included."""
        cut = replace(self, ranks=Ranks()).cut(completions)
        micro_batches = [[completions[i] for i in indices] for indices in cut if indices]
        if self.shared_prefix:
            return max((_tokens(p, self._read) for p in micro_batches), default=0)
        return max((len(p) * max(len(c.prompt_ids) + len(self._read(c)) for c in p) for p in micro_batches), default=0)

    def group_size(self, group: Sequence[Completion]) -> GroupSize:
        """What completions of one prompt cost."""
        lengths = [len(self._read(c)) for c in group]
        prompt = len(group[0].prompt_ids)
        if self.shared_prefix:
            return GroupSize(prompt, tuple(lengths))
        return GroupSize(0, tuple(prompt + length for length in lengths))

    def _read(self, completion: Completion) -> list[int]:
        """Return what the model reads of a completion."""
        return completion.ids if self.reads_all else completion.inputs

    def _cut(self, completions: Sequence[Completion], number: int) -> list[list[int]]:
        """Cut into `number` micro-batches, fewer if there are fewer completions, or into as many as `max_tokens` needs."""
        cut = _cut_packed if self.shared_prefix else _cut_padded
        return cut(completions, min(number, len(completions)), self.max_tokens, self._read) if completions else []

    def micro_batch(self, completions: Sequence[Completion], divisor: float = 1.0) -> MicroBatch:
        """Build one micro-batch of `completions`, which may be none."""
        present = completions or [Completion([self.pad_token_id], [], [])]
        rows = (
            _packed_rows(present, self._read)
            if self.shared_prefix
            else _padded_rows(present, self._read, self.pad_token_id)
        )
        places = rows.places[: len(completions)]
        masks = [torch.tensor(c.mask, dtype=torch.bool) for c in completions]
        positions = [place.predictors()[mask] for place, mask in zip(places, masks, strict=True)]
        targets = [torch.tensor(c.ids, dtype=torch.long)[mask] for c, mask in zip(completions, masks, strict=True)]
        width = max([1, *(len(c.ids) for c in completions)])

        def optional(name: str, dtype: torch.dtype = torch.float32) -> Tensor | None:
            values = [getattr(c, name) for c in completions]
            if any(v is None for v in values):
                return None
            return _right_pad(values, width, dtype).to(self.device)

        return MicroBatch(
            input_ids_RS=rows.input_ids_RS.to(self.device),
            position_ids_RS=None if rows.position_ids_RS is None else rows.position_ids_RS.to(self.device),
            layout=rows.layout,
            uses_RS=(rows.uses_RS if completions else torch.zeros_like(rows.uses_RS)).to(self.device),
            positions_M=_joined(positions).to(self.device),
            targets_M=_joined(targets).to(self.device),
            mask_BT=_right_pad(masks, width, torch.bool).to(self.device),
            advantages_BU=_advantages(completions, width).to(self.device),
            old_logps_BT=optional("old_logps"),
            ref_logps_BT=optional("ref_logps"),
            sampler_logps_BT=optional("sampler_logps"),
            drawn_logps_BT=optional("drawn_logps"),
            mask_policy_BT=optional("mask_policy", torch.bool),
            divisor=divisor,
        )


@dataclass(frozen=True)
class _Place:
    """Where, counted over all rows, a completion's prompt ends and its own tokens start."""

    prompt_end: int
    start: int
    length: int

    def predictors(self) -> Tensor:
        """For each token the place that predicts it: the token before, or the end of the prompt."""
        places = [self.prompt_end, *range(self.start, self.start + self.length - 1)]
        return torch.tensor(places[: self.length], dtype=torch.long)


@dataclass(frozen=True)
class _Rows:
    """The tokens of a micro-batch, and where each completion stands in them."""

    input_ids_RS: Tensor
    uses_RS: Tensor
    position_ids_RS: Tensor | None
    layout: Layout | None
    places: list[_Place]
    """In the order of the completions, wherever they stand."""


def _packed_rows(completions: Sequence[Completion], read: Read) -> _Rows:
    groups = group_by_prompt(completions)
    prompts = [completions[group[0]].prompt_ids for group in groups]
    branches = [[read(completions[i]) for i in group] for group in groups]
    layout = Layout.of([(len(p), [len(b) for b in bs]) for p, bs in zip(prompts, branches, strict=True)])
    tokens = [token for p, bs in zip(prompts, branches, strict=True) for ids in (p, *bs) for token in ids]
    places = {
        i: _Place(packed.prompt.stop - 1, branch.start, len(completions[i].ids))
        for packed, group in zip(layout.groups, groups, strict=True)
        for branch, i in zip(packed.branches, group, strict=True)
    }
    in_order = [places[i] for i in range(len(completions))]
    uses = [n for p, bs in zip(prompts, branches, strict=True) for n in [len(bs)] * len(p) + [1] * sum(map(len, bs))]
    return _Rows(
        torch.tensor([tokens]), torch.tensor([uses]).float(), torch.tensor([layout.positions]), layout, in_order
    )


def _padded_rows(completions: Sequence[Completion], read: Read, pad_token_id: int) -> _Rows:
    rows = [torch.tensor(c.prompt_ids + read(c)) for c in completions]
    width = max(map(len, rows))
    starts = [r * width + len(c.prompt_ids) for r, c in enumerate(completions)]
    places = [_Place(start - 1, start, len(c.ids)) for start, c in zip(starts, completions, strict=True)]
    uses_RS = _right_pad([[1.0] * len(row) for row in rows], width, torch.float32)
    return _Rows(_right_pad(rows, width, torch.long, pad_token_id), uses_RS, None, None, places)


def group_by_prompt(completions: Sequence[Completion]) -> list[list[int]]:
    """Indices of completions that have the same prompt, in the order in which prompts come first."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, completion in enumerate(completions):
        groups.setdefault(tuple(completion.prompt_ids), []).append(i)
    return list(groups.values())


def _tokens(completions: Sequence[Completion], read: Read) -> int:
    """Tokens that the model computes for `completions`, packed into one micro-batch."""
    groups = group_by_prompt(completions)
    return sum(len(completions[g[0]].prompt_ids) for g in groups) + sum(len(read(c)) for c in completions)


def _cut_packed(completions: Sequence[Completion], count: int, max_tokens: int | None, read: Read) -> list[list[int]]:
    """Put whole groups into `count` micro-batches, or into as many as `max_tokens` needs; split them where necessary."""
    size = _Sizes(completions, read)
    by_count = _balanced(_split_into(size, count), count, size)
    if max_tokens is None or max(map(size, by_count)) <= max_tokens:
        return by_count
    chunks = [chunk for group in size.groups for chunk in _fitting(size, group, max_tokens)]
    limit = max(max_tokens, *map(size, chunks))  # one completion may be too large by itself
    fewest = min(len(chunks), max(count, math.ceil(sum(map(size, chunks)) / limit)))
    cuts = (_balanced(chunks, number, size) for number in range(fewest, len(chunks) + 1))
    return next(cut for cut in cuts if max(map(size, cut)) <= limit)


class _Sizes:
    """Tokens of completions given by their indices, packed into one micro-batch; each prompt is read once."""

    def __init__(self, completions: Sequence[Completion], read: Read):
        self.groups = group_by_prompt(completions)
        self._group_of = {i: g for g, group in enumerate(self.groups) for i in group}
        self._prompts = [len(completions[group[0]].prompt_ids) for group in self.groups]
        self._own = [len(read(c)) for c in completions]

    def __call__(self, indices: Sequence[int]) -> int:
        return self.own(indices) + sum(self._prompts[g] for g in {self._group_of[i] for i in indices})

    def own(self, indices: Sequence[int]) -> int:
        """Count the tokens of completions without their prompts."""
        return sum(self._own[i] for i in indices)


def _split_into(size: _Sizes, count: int) -> list[list[int]]:
    """Split the largest groups until there are at least `count` chunks."""
    sizes, parts = list(map(size, size.groups)), [1] * len(size.groups)
    for _ in range(count - len(parts)):
        splittable = [g for g, group in enumerate(size.groups) if parts[g] < len(group)]
        parts[max(splittable, key=lambda g: sizes[g] / parts[g])] += 1
    return [chunk for group, n in zip(size.groups, parts, strict=True) for chunk in _split(size, group, n)]


def _fitting(size: _Sizes, group: list[int], max_tokens: int) -> list[list[int]]:
    """Split a group into the fewest chunks of at most `max_tokens`; into single completions where none fit."""
    for parts in range(1, len(group) + 1):
        chunks = _split(size, group, parts)
        if max(map(size, chunks)) <= max_tokens:
            return chunks
    return [[i] for i in group]


def _split(size: _Sizes, group: list[int], parts: int) -> list[list[int]]:
    return _balanced([[i] for i in group], parts, size.own)


def _cut_padded(completions: Sequence[Completion], count: int, max_tokens: int | None, read: Read) -> list[list[int]]:
    """Completions of like length together, so that little is padding."""

    def size(i: int) -> int:
        return len(completions[i].prompt_ids) + len(read(completions[i]))

    order = sorted(range(len(completions)), key=size, reverse=True)
    micro_batches: list[list[int]] = []
    most = rows = math.ceil(len(order) / count)
    for i in order:
        if micro_batches and max_tokens is not None:
            rows = min(most, max_tokens // size(micro_batches[-1][0]))  # 0 where one completion is too large by itself
        if not micro_batches or len(micro_batches[-1]) >= rows:
            micro_batches.append([])
        micro_batches[-1].append(i)
    return micro_batches


def _balanced(chunks: Sequence[list[int]], count: int, size: Callable[[list[int]], int]) -> list[list[int]]:
    """At most `count` unions of chunks of like size: the largest chunk first, each into the smallest union so far.

    >>> _balanced([[0, 1], [2], [3, 4, 5], [6, 7]], 2, len)
    [[2, 3, 4, 5], [0, 1, 6, 7]]
    """
    unions: list[list[int]] = [[] for _ in range(count)]
    heap = [(0, 0, place) for place in range(count)]
    for chunk in sorted(chunks, key=size, reverse=True):
        total, members, place = heapq.heappop(heap)
        unions[place] += chunk
        heapq.heappush(heap, (total + size(chunk), members + len(chunk), place))  # chunks may have no tokens
    return [sorted(union) for union in unions if union]


def _advantages(completions: Sequence[Completion], width: int) -> Tensor:
    """Return one advantage per completion, or per token where some completion has that."""
    advantages = [c.advantage for c in completions]
    if not any(isinstance(advantage, list) for advantage in advantages):
        return torch.tensor(advantages, dtype=torch.float32).unsqueeze(1)
    rows = [a if isinstance(a, list) else [a] * len(c.ids) for a, c in zip(advantages, completions, strict=True)]
    return _right_pad(rows, width, torch.float32)


def _joined(values: list[Tensor]) -> Tensor:
    return torch.cat([torch.zeros(0, dtype=torch.long), *values])


def _right_pad(rows: Sequence[Any], width: int, dtype: torch.dtype, value: float = 0) -> Tensor:
    padded = torch.full((len(rows), width), value, dtype=dtype)
    for row, values in enumerate(rows):
        padded[row, : len(values)] = torch.as_tensor(values, dtype=dtype)
    return padded
