"""Hints about what a chat template or a tokenizer does to completions, each in one line and once."""

import inspect
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..logging import get_logger
from ..types import Completion


logger = get_logger(__name__)

CUT_OFF, OCCURS = 0.99, 0.5
"""Shares of completions: that are cut off, and that a likely end token occurs in, before it is named."""
LIKELY_ENDS = (
    "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<turn|>", "<|eot|>", "<|return|>", "<|end_of_turn|>", "</s>",
    "<|endoftext|>", "<|end_of_text|>", "<eos>",
)  # fmt: skip
"""Tokens that end an answer in public chat templates, the most specific first."""


class Hints:
    """Looks at generation batches for mistakes that rewards alone do not show.

    Args:
        tokenizer: Of the policy.
        eos_token_ids: The tokens that end a completion.
        functions: The reward functions by name.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, eos_token_ids: Sequence[int], functions: Mapping[str, Any]):
        self._tokenizer = tokenizer
        self._ends = list(eos_token_ids)
        self._functions = functions
        self._looks_for_tag = self._looks_for_end = True

    def look(self, completions: Sequence[Completion], table: Mapping[str, list[Any]]) -> None:
        """Warn of what is found.

        Args:
            completions: Of a generation batch.
            table: Its columns: `"completion"`, and the rewards of each function by its name.
        """
        if self._looks_for_tag and completions:
            self._looks_for_tag = False
            self._look_for_tag(completions[0].prompt_ids, table)
        if self._looks_for_end and completions:
            self._look_for_end(completions)

    def _look_for_tag(self, prompt_ids: list[int], table: Mapping[str, list[Any]]) -> None:
        """A format reward that expects <think> is always 0 where the prompt ends with it."""
        opened = re.search(r"<(\w+)>\s*$", str(self._tokenizer.decode(prompt_ids[-16:])))
        if opened is None or any(f"<{opened[1]}>" in str(completion) for completion in table["completion"]):
            return
        for name, function in self._functions.items():
            if _mentions(function, opened[1]) and all(value == 0 for value in table[name]):
                logger.warning(
                    "Prompts end with <%s>, so completions begin after it, and %s, which looks for it, gave 0 to all of "
                    "them. Reward what follows the tag, or change the chat template, e.g. by chat_template_kwargs.",
                    opened[1],
                    name,
                )

    def _look_for_end(self, completions: Sequence[Completion]) -> None:
        cut = sum(not completion.ended for completion in completions)
        if cut < CUT_OFF * len(completions):
            return
        likely = self._likely_ends()
        counts = Counter(token for completion in completions for token in likely.keys() & set(completion.ids))
        found = max(counts, key=lambda token: (counts[token], -_rank(likely[token])), default=None)
        if found is None or counts[found] < OCCURS * len(completions):
            return
        self._looks_for_end = False
        logger.warning(
            "%d of %d completions were cut off, and %d contain %r, which ends none. If it ends an answer, set "
            "model.generation_config.eos_token_id=%s before the trainer is made.",
            cut,
            len(completions),
            counts[found],
            likely[found],
            [*self._ends, found],
        )

    def _likely_ends(self) -> dict[int, str]:
        """Special tokens that end no completion, by id."""
        known = self._tokenizer.get_vocab()
        special = [*self._tokenizer.all_special_tokens, *(token for token in LIKELY_ENDS if token in known)]
        not_ends = {*self._ends, *(getattr(self._tokenizer, f"{kind}_token_id") for kind in ("pad", "bos", "unk"))}
        return {known[token]: token for token in special if token in known and known[token] not in not_ends}


def _rank(token: str) -> int:
    return LIKELY_ENDS.index(token) if token in LIKELY_ENDS else len(LIKELY_ENDS)


def _mentions(function: Any, tag: str) -> bool:
    """Whether the source of a reward function has the tag, or it was made with its name."""
    function = getattr(function, "func", function)
    try:
        source = inspect.getsource(function if inspect.isroutine(function) else type(function))
    except (OSError, TypeError):
        source = ""
    return f"<{tag}" in source or repr(tag) in repr(function)
