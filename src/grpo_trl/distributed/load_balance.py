"""Which rank trains on which completions, by the tokens they cost.

The gradient does not depend on how an optimizer step's completions are cut, over ranks as little as over micro-batches.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..logprobs.packing import GroupSize, group_by_prompt
from ..types import Completion, Ranks


MIN_GAIN = 0.02
"""Share of the mean load by which a move must lower the largest one: below that, no prompt is computed twice."""

Key = tuple[int, int]
"""A group, wherever its completions are: the rank that sampled it, and its index there."""

Assignment = dict[Key, list[int]]
"""The groups that a rank trains on, and for each the completions of the group, by index."""


# ---- Moving completions ----
@dataclass(frozen=True)
class Balancer:
    """Moves completions between ranks, in step with the other ranks.

    Args:
        ranks: Gathers the sizes of groups.
        exchange: From one object for each rank to the objects that all ranks have for this one.
    """

    ranks: Ranks
    exchange: Callable[[list[Any]], list[Any]]

    def meet(
        self, completions: Sequence[Completion], rows: Sequence[tuple[int, int]], owners: Mapping[int, int]
    ) -> list[Completion]:
        """Bring the completions of each group together on one rank; return those that meet here, group after group.

        Args:
            completions: Of this rank.
            rows: The group of each, and its place there.
            owners: The rank of each group.
        """
        outgoing: list[list[tuple[tuple[int, int], Completion]]] = [[] for _ in range(self.ranks.world_size)]
        for row, completion in zip(rows, completions, strict=True):
            outgoing[owners[row[0]]].append((row, completion))
        incoming = itertools.chain.from_iterable(self.exchange(outgoing))
        return [completion for _, completion in sorted(incoming, key=lambda entry: entry[0])]

    def balance(
        self,
        mini_batches: Sequence[Sequence[Completion]],
        trains: Callable[[Completion], bool],
        group_size: Callable[[Sequence[Completion]], GroupSize],
    ) -> list[list[Completion]]:
        """Return this rank's part of each mini-batch, after those that train were assigned to ranks by their tokens.

        Args:
            mini_batches: This rank's part of each before; work moves within a mini-batch.
            trains: Whether a completion is computed at all; others stay.
            group_size: What the completions of a group cost; see `Packer.group_size`.
        """
        groups = [_groups(mini_batch, trains) for mini_batch in mini_batches]
        sizes = [
            [group_size([mini_batch[i] for i in group]) for group in groups_of_mini_batch]
            for mini_batch, groups_of_mini_batch in zip(mini_batches, groups, strict=True)
        ]
        reports = self.ranks.gather([sizes])
        assignments = [assign([report[number] for report in reports]) for number in range(len(mini_batches))]
        outgoing: list[list[list[Completion]]] = [[[] for _ in mini_batches] for _ in range(self.ranks.world_size)]
        balanced = []
        for number, (mini_batch, assignment) in enumerate(zip(mini_batches, assignments, strict=True)):
            leaving = _leaving(groups[number], assignment, self.ranks.rank)
            for rank, indices in leaving.items():
                outgoing[rank][number] = [mini_batch[i] for i in indices]
            gone = {i for indices in leaving.values() for i in indices}
            balanced.append([completion for i, completion in enumerate(mini_batch) if i not in gone])
        if any(map(_has_moves, assignments)):
            for incoming in self.exchange(outgoing):
                for mini_batch, received in zip(balanced, incoming, strict=True):
                    mini_batch += received
        return balanced


def _groups(mini_batch: Sequence[Completion], trains: Callable[[Completion], bool]) -> list[list[int]]:
    """Return the indices of the completions that train, by prompt."""
    indices = [i for i, completion in enumerate(mini_batch) if trains(completion)]
    return [[indices[j] for j in group] for group in group_by_prompt([mini_batch[i] for i in indices])]


def _leaving(groups: list[list[int]], assignments: list[Assignment], own_rank: int) -> dict[int, list[int]]:
    """Return which of this rank's completions, by index, leave for each other rank."""
    leaving = {}
    for rank, assignment in enumerate(assignments):
        if rank == own_rank:
            continue
        moved = sorted(
            (group, members) for (source_rank, group), members in assignment.items() if source_rank == own_rank
        )
        leaving[rank] = [groups[group][member] for group, members in moved for member in members]
    return leaving


def _has_moves(assignments: list[Assignment]) -> bool:
    return any(source_rank != rank for rank, assignment in enumerate(assignments) for source_rank, _ in assignment)


# ---- Planning the moves ----
def assign(sizes: Sequence[Sequence[GroupSize]]) -> list[Assignment]:
    """Choose which completions each rank trains on.

    A group, or a part of it, moves from the rank with most tokens to the one with fewest, whichever leaves the larger of
    both loads smallest, until no move gains enough. What is balanced already stays where it is.

    Args:
        sizes: The groups that each rank has sampled.

    >>> assign([[GroupSize(5, (4, 4)), GroupSize(5, (1, 1))], [GroupSize(5, (2, 2))]])
    [{(0, 0): [0, 1]}, {(1, 0): [0, 1], (0, 1): [0, 1]}]
    >>> assign([[GroupSize(1, (9, 9, 9, 9))], []])
    [{(0, 0): [0, 1]}, {(0, 0): [2, 3]}]
    """
    groups = {(rank, i): group for rank, of_rank in enumerate(sizes) for i, group in enumerate(of_rank)}
    assignments: list[Assignment] = [
        {(rank, i): list(range(len(group.completions))) for i, group in enumerate(of_rank)}
        for rank, of_rank in enumerate(sizes)
    ]
    loads = [sum(group.prompt + sum(group.completions) for group in of_rank) for of_rank in sizes]
    min_gain = max(1.0, MIN_GAIN * sum(loads) / len(loads))
    while True:
        heavy, light = loads.index(max(loads)), loads.index(min(loads))
        move = _best_move(assignments[heavy], assignments[light], groups, loads[heavy], loads[light])
        if move is None or loads[heavy] - max(move.loads) < min_gain:
            return assignments
        loads[heavy], loads[light] = move.loads
        _apply(move, assignments[heavy], assignments[light])


@dataclass(frozen=True)
class _Move:
    key: Key
    members: tuple[int, ...]
    loads: tuple[int, int]
    """Of the rank that gives and of the one that takes, after the move."""


def _apply(move: _Move, giver: Assignment, taker: Assignment) -> None:
    left = [member for member in giver.pop(move.key) if member not in move.members]
    if left:
        giver[move.key] = left
    taker[move.key] = sorted([*taker.get(move.key, []), *move.members])


def _best_move(
    giver: Assignment, taker: Assignment, groups: dict[Key, GroupSize], heavy: int, light: int
) -> _Move | None:
    """Find the move that leaves the larger load smallest; None if there is nothing to move."""
    moves = (
        move for key, members in giver.items() for move in _moves(key, members, groups[key], key in taker, heavy, light)
    )
    return min(moves, key=lambda move: (max(move.loads), sum(move.loads), move.key), default=None)


def _moves(
    key: Key, members: list[int], group: GroupSize, taker_has_prompt: bool, heavy: int, light: int
) -> Iterator[_Move]:
    """Move all completions of a group that are here, or some of its largest or smallest ones."""
    taken = 0 if taker_has_prompt else group.prompt
    by_size = sorted(members, key=lambda member: group.completions[member])
    for order in (by_size[::-1], by_size):
        moved = 0
        for count, member in enumerate(order, start=1):
            moved += group.completions[member]
            freed = moved + (group.prompt if count == len(members) else 0)
            yield _Move(key, tuple(order[:count]), (heavy - freed, light + taken + moved))
