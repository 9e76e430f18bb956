"""Which rank trains on which completions, by the tokens that they cost.

The gradient does not depend on how an optimizer step's completions are cut, over ranks as little as over pieces.
"""

from collections.abc import Sequence
from dataclasses import dataclass


WORTH = 0.02
"""Share of the mean load by which a move must lower the largest one: for less no prompt is computed twice."""

Key = tuple[int, int]
"""A group, wherever its completions are: the rank that sampled it, and its number there."""


@dataclass(frozen=True)
class GroupSize:
    """Tokens that a group costs the rank that trains on it."""

    prompt: int
    """Once, however many of its completions are there."""
    completions: tuple[int, ...]


def deal(shares: Sequence[Sequence[GroupSize]]) -> list[dict[Key, list[int]]]:
    """Which completions each rank trains on: for each group some of which it has, their places in the group.

    From the rank with most tokens to the one with fewest a group is moved, or a part of it, whichever leaves the larger of
    both loads smallest, until no move is worth it. So what is balanced already stays where it is.

    Args:
        shares: The groups that each rank has sampled.

    >>> deal([[GroupSize(5, (4, 4)), GroupSize(5, (1, 1))], [GroupSize(5, (2, 2))]])
    [{(0, 0): [0, 1]}, {(1, 0): [0, 1], (0, 1): [0, 1]}]
    >>> deal([[GroupSize(1, (9, 9, 9, 9))], []])
    [{(0, 0): [0, 1]}, {(0, 0): [2, 3]}]
    """
    groups = {(rank, i): group for rank, share in enumerate(shares) for i, group in enumerate(share)}
    held: list[dict[Key, list[int]]] = [
        {(rank, i): list(range(len(group.completions))) for i, group in enumerate(share)}
        for rank, share in enumerate(shares)
    ]
    loads = [sum(group.prompt + sum(group.completions) for group in share) for share in shares]
    worth = max(1.0, WORTH * sum(loads) / len(loads))
    while True:
        heavy, light = loads.index(max(loads)), loads.index(min(loads))
        move = _best_move(held[heavy], held[light], groups, loads[heavy], loads[light])
        if move is None or loads[heavy] - max(move.loads) < worth:
            return held
        loads[heavy], loads[light] = move.loads
        left = [member for member in held[heavy].pop(move.key) if member not in move.members]
        if left:
            held[heavy][move.key] = left
        held[light][move.key] = sorted([*held[light].get(move.key, []), *move.members])


@dataclass(frozen=True)
class _Move:
    key: Key
    members: tuple[int, ...]
    loads: tuple[int, int]
    """Of the rank that gives and of the one that takes, after it."""


def _best_move(
    giver: dict[Key, list[int]], taker: dict[Key, list[int]], groups: dict[Key, GroupSize], heavy: int, light: int
) -> _Move | None:
    """The move that leaves the larger load smallest; None if there is nothing to move.

    Of a group, all that is there may move, or some of its largest or smallest completions.
    """
    moves = []
    for key, members in giver.items():
        group = groups[key]
        taken = 0 if key in taker else group.prompt
        by_size = sorted(members, key=lambda member: group.completions[member])
        for order in (by_size[::-1], by_size):
            moved = 0
            for count, member in enumerate(order, start=1):
                moved += group.completions[member]
                freed = moved + (group.prompt if count == len(members) else 0)
                moves.append(_Move(key, tuple(order[:count]), (heavy - freed, light + taken + moved)))
    return min(moves, key=lambda move: (max(move.loads), sum(move.loads), move.key), default=None)
