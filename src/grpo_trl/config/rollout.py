"""Options of sampling and prompts."""

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass
class RolloutOptions:
    """Sampling."""

    max_completion_length: int = field(default=512, metadata={"help": "Tokens that a completion has at most."})
    temperature: float = field(
        default=1.0, metadata={"help": "Sampling temperature, above 0; log-probabilities are taken at it too."}
    )
    top_p: float = field(
        default=1.0, metadata={"help": "Sample among the likeliest tokens that hold this probability."}
    )
    top_k: int = field(default=0, metadata={"help": "Sample among this many likeliest tokens. 0: among all."})
    min_p: float | None = field(
        default=None, metadata={"help": "Sample among tokens at least this likely, relative to the likeliest."}
    )
    repetition_penalty: float = field(default=1.0, metadata={"help": "Above 1: repeated tokens get less likely."})
    generation_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Further options of transformers.GenerationConfig, as JSON."}
    )
    max_rows_in_flight: int | None = field(
        default=None,
        metadata={
            "help": "Completions that are decoded at a time, at most; the others wait. Bounds the memory of their keys and "
            "values, and changes nothing in what is sampled, up to rounding. Default: 256, on a CPU 128."
        },
    )
    speculative_ngrams: int = field(
        default=0,
        metadata={
            "help": "Above 0: where the last so many tokens of a completion have occurred in its group before, the next "
            "ones are guessed, and checked in one forward. It changes nothing in what is sampled, up to rounding. "
            "0: no guesses."
        },
    )
    ds3_gather_for_generation: bool = field(
        default=True,
        metadata={
            "help": "Under ZeRO-3, gather all weights on each rank while completions are written. False: gather each layer "
            "at each token, for models that do not fit on one GPU; much slower."
        },
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Further arguments of apply_chat_template, as JSON."}
    )
    prompt_overflow: Literal["error", "drop", "truncate_left"] = field(
        default="error",
        metadata={
            "help": "What happens to a prompt that leaves no room for max_completion_length tokens in the model's context: "
            "'error' stops before training, 'drop' leaves it out, 'truncate_left' keeps its end.",
        },
    )
