"""Where the prompts and completions of a packed row stand."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property


@dataclass(frozen=True)
class Span:
    """The packed tokens `start` to `stop`, without `stop`."""

    start: int
    stop: int

    @property
    def length(self) -> int:
        return self.stop - self.start

    @property
    def slice(self) -> slice:
        return slice(self.start, self.stop)


@dataclass(frozen=True)
class PackedGroup:
    """A prompt and the branches that continue it, one behind the other: prompt, branch, branch, ..."""

    prompt: Span
    branches: tuple[Span, ...]

    @property
    def all_branches(self) -> Span:
        """The tokens of all branches."""
        return Span(self.prompt.stop, self.branches[-1].stop if self.branches else self.prompt.stop)


@dataclass(frozen=True)
class Layout:
    """A packed row: groups one behind the other.

    A prompt's token sees its prompt up to itself; a branch's token sees the whole prompt of its group and its own branch
    up to itself. A branch holds a completion but for its last token, which predicts nothing; it may be empty.

    >>> layout = Layout.of([(3, [2, 0]), (1, [4])])
    >>> [group.prompt.slice for group in layout.groups], layout.num_tokens, layout.longest
    ([slice(0, 3, None), slice(5, 6, None)], 10, 5)
    """

    groups: tuple[PackedGroup, ...]
    only_read: bool = False
    """Whether the outputs of prompts' tokens before the last are not read: attention may leave them 0."""

    @classmethod
    def of(cls, groups: list[tuple[int, list[int]]]) -> "Layout":
        """From the length of each group's prompt and those of its branches."""
        packed, end = [], 0
        for prompt_length, branch_lengths in groups:
            prompt = Span(end, end := end + prompt_length)
            branches = tuple(Span(end, end := end + length) for length in branch_lengths)
            packed.append(PackedGroup(prompt, branches))
        return cls(tuple(packed))

    @property
    def num_tokens(self) -> int:
        return self.groups[-1].all_branches.stop

    @property
    def positions(self) -> list[int]:
        """The position of each token in its completion's sequence, from 0."""
        return [
            position
            for group in self.groups
            for first, span in [(0, group.prompt), *((group.prompt.length, branch) for branch in group.branches)]
            for position in range(first, first + span.length)
        ]

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest prompt with one branch: how far apart query and key can be."""
        return max(g.prompt.length + max((b.length for b in g.branches), default=0) for g in self.groups)

    @cached_property
    def segments(self) -> list[Span]:
        """Every prompt and every branch, in order: the spans within which attention is causal."""
        return list(self._segments())

    @cached_property
    def crossings(self) -> list[tuple[Span, Span]]:
        """(branches, prompt) of every group with branches: all of the first see all of the second."""
        return [(g.all_branches, g.prompt) for g in self.groups if g.all_branches.length]

    @cached_property
    def unread_and_read(self) -> list[int]:
        """In turn: how many of a prompt's tokens predict nothing of a completion, all but its last, and how many follow.

        >>> Layout.of([(3, [2, 0]), (1, [4])]).unread_and_read
        [2, 3, 0, 5]
        """
        return [n for g in self.groups for n in (g.prompt.length - 1, 1 + g.all_branches.length)]

    @cached_property
    def read(self) -> "Layout":
        """The same with `only_read`."""
        return replace(self, only_read=True)

    def _segments(self) -> Iterator[Span]:
        for group in self.groups:
            yield group.prompt
            yield from (branch for branch in group.branches if branch.length)
