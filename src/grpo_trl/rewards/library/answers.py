"""Ready reward functions that compare a completion's final answer with the dataset's."""

import collections
import importlib.util
import os
import re
import threading
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from ..worker import GIB, CallRaised, CallTimedOut, Worker, WorkerDied, packed_call
from .format import text_of


# ---- GSM8K ----
# No alternative here can be left after more than a few characters, so that a search takes linear time.
_NUMBER = re.compile(
    r"(?P<minus>(?<![\w.)])[-\u2212])?(?:\$(?P<minus_after>[-\u2212])?)?"
    r"(?P<number>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\d)\.\d+)"
    r"(?P<power>[eE][+-]?\d{1,2}(?!\d))?(?P<over>/\d+)?",
    re.ASCII,
)
_LONGEST = 1000
"""Characters. Python takes quadratic time to read a number, and no right answer is that long."""


def gsm8k_answer(completions: list[Any], answer: list[Any], **kwargs: Any) -> list[float | None]:
    """Return 1 if the final number of a completion equals that of the column `answer`, else 0.

    The final number follows the last `####`; if there is none, the last `\\boxed{`; if there is none, the last "answer is";
    otherwise it is the last number of the text. Numbers are compared exactly: 18, 18.0, $18, "18%" and 36/2 are
    equal, and 1,234 is 1234. Takes time in proportion to the text's length.
    Source: the dataset's own format of an answer, arXiv 2110.14168.

    Args:
        completions: Strings, or lists of messages.
        answer: GSM8K's solutions ("... #### 1,234"), or numbers. None, and what has no number, gives None.

    >>> gsm8k_answer(["6 * 3 = 18 eggs.\\n#### 18", "The answer is $1,234.50."], answer=["#### 18", 1234.5])
    [1.0, 1.0]
    """
    return [_same_number(text_of(c), a) for c, a in zip(completions, answer, strict=True)]


def _same_number(text: str, answer: Any) -> float | None:
    gold = final_number("" if answer is None else str(answer))
    return None if gold is None else float(final_number(text) == gold)


def final_number(text: str) -> Fraction | None:
    """Return the number that a text ends with, or marks as its answer (see `gsm8k_answer`).

    >>> final_number("2 + 2 = 4, so \\\\boxed{-4.50}, and not 5.")
    Fraction(-9, 2)
    """
    for written in ("\\,", "\\!", "{,}"):  # LaTeX for thousands
        text = text.replace(written, "," if written == "{,}" else "")
    for marker in ("####", "\\boxed{", "answer is"):
        _, found, after = text.lower().rpartition(marker)
        if found:
            match = _NUMBER.search(after.partition("}")[0] if marker == "\\boxed{" else after)
            return match and _value(match)
    last = collections.deque(_NUMBER.finditer(text), maxlen=1)
    return _value(last[0]) if last else None


def _value(match: re.Match[str]) -> Fraction | None:
    if len(match[0]) > _LONGEST:
        return None
    number = Fraction(match["number"].replace(",", "") + (match["power"] or ""))
    divisor = int(match["over"][1:]) if match["over"] else 1
    if divisor == 0:
        return None
    return number / (-divisor if match["minus"] or match["minus_after"] else divisor)


# ---- math-verify ----
_STARTING = 120.0
"""Limit in seconds for importing math-verify, which does not count as a completion's time."""


@dataclass(frozen=True)
class MathAnswer:
    """A reward function: 1 if math-verify finds the answer of a completion equal to that of the column `solution`.

    0 if it is not equal, if there is none, and if the check takes longer than `timeout`. None ("does not apply") if
    math-verify finds no answer in the solution. The comparison runs in a separate process, so that the timeout holds in
    every thread and for every input.
    Source: github.com/huggingface/Math-Verify; TRL's `accuracy_reward`.

    Args:
        timeout: Seconds for one completion.

    Raises:
        ValueError: The timeout is not positive.

    >>> math_answer(["So it is $\\\\frac{1}{2}$.", "I get \\\\boxed{2}."], solution=["0.5", "$1$"])
    [1.0, 0.0]
    """

    timeout: float = 5.0
    __name__ = "math_answer"

    def __post_init__(self) -> None:
        if not self.timeout > 0:
            raise ValueError(f"timeout={self.timeout} must be a positive number of seconds, e.g. 5.")

    def __call__(self, completions: list[Any], solution: list[Any], **kwargs: Any) -> list[float | None]:
        if importlib.util.find_spec("math_verify") is None:
            raise ImportError("math_answer needs math-verify: pip install 'math-verify[antlr4_13_2]'")
        checker = _CHECKERS.setdefault(os.getpid(), _Checker())
        pairs = zip(completions, solution, strict=True)
        return [
            None if gold is None else checker.reward(str(gold), text_of(completion), self.timeout)
            for completion, gold in pairs
        ]


math_answer = MathAnswer()


class _Checker:
    """The worker that all calls of this process share, one at a time."""

    def __init__(self) -> None:
        self.worker = Worker(memory_limit=4 * GIB)
        self.lock = threading.Lock()

    def reward(self, gold: str, text: str, timeout: float) -> float | None:
        with self.lock:
            for _ in range(2):
                if self.worker.connection is None:
                    self.worker.call(packed_call(_is_equal, "1", "1"), _STARTING)
                try:
                    equal = self.worker.call(packed_call(_is_equal, gold, text), timeout)
                    return None if equal is None else float(equal)
                except WorkerDied:  # perhaps not of this text: it ends with the thread that started it
                    continue
                except (CallRaised, CallTimedOut):
                    return 0.0
        return 0.0


_CHECKERS: dict[int, _Checker] = {}
"""By process: after a fork, the child must not use its parent's worker or lock."""


def _is_equal(gold: str, text: str) -> bool | None:
    """Compare two answers, in the worker; None if math-verify finds none in the solution."""
    import logging

    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its timeout, which needs a signal, is off
    places = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())
    right = parse(_marked(gold), extraction_config=places, parsing_timeout=None)
    if not right:
        return None
    given = parse(text, extraction_config=places, parsing_timeout=None)
    return bool(verify(right, given, timeout_seconds=None))


def _marked(gold: str) -> str:
    """Mark a bare answer as one: unmarked, math-verify reads the first number in `2\\sqrt{3}`."""
    words = sum(len(word) > 1 and word.strip(".,:;").isalpha() for word in gold.split())
    is_bare = words < 3 and not any(mark in gold for mark in ("\\boxed", "$", "\\(", "\\[", "####"))
    return f"\\boxed{{{gold}}}" if is_bare and gold.strip() else gold
