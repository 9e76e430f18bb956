"""`generation_kwargs`: which names set options, which are options of transformers, and which cannot work."""

import difflib
from dataclasses import fields
from typing import Any

from transformers import GenerationConfig

from .values import convert_values


OPTIONS = {
    "max_new_tokens": "max_completion_length",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
}
"""Options of transformers.GenerationConfig that have an option of their own, and its name."""

REFUSED = {
    "do_sample": "a group needs completions that differ; lower temperature instead",
    "num_return_sequences": "set num_generations",
    "num_beams": "beams are searched, and have no probability under the policy; sample with temperature and top_p",
    "num_beam_groups": "beams are searched, and have no probability under the policy; sample with temperature and top_p",
    "max_length": "set max_completion_length, which does not count the prompt",
    "eos_token_id": "set model.generation_config.eos_token_id before the trainer is made",
    "pad_token_id": "set the tokenizer's pad_token",
    "return_dict_in_generate": "leave it out",
    **dict.fromkeys(("early_stopping", "length_penalty", "diversity_penalty"), "it is of beams; leave it out"),
    **dict.fromkeys(
        ("assistant_early_exit", "dola_layers", "penalty_alpha", "prompt_lookup_num_tokens", "token_healing"),
        "leave it out: completions are sampled token by token",
    ),
    **dict.fromkeys(
        ("output_attentions", "output_hidden_states", "output_logits", "output_scores"),
        "leave it out: nobody reads them",
    ),
    "max_time": "it would cut completions off by the clock; set max_completion_length",
}
"""Options of transformers.GenerationConfig that cannot work, and what to use."""

MOOT = {
    **{"do_sample": True, "num_return_sequences": 1, "num_beams": 1, "num_beam_groups": 1},
    **{"early_stopping": False, "length_penalty": 1.0, "diversity_penalty": 0.0, "token_healing": False},
    **dict.fromkeys(("output_attentions", "output_hidden_states", "output_logits", "output_scores"), False),
}
"""Values that ask for what is done anyway."""

OTHER_SAMPLERS = {
    "stop": "stop_strings",
    "max_tokens": "max_new_tokens",
    "n": "num_return_sequences",
    "bad_words": "bad_words_ids",
    "min_tokens": "min_new_tokens",
    "frequency_penalty": "repetition_penalty",
    "presence_penalty": "repetition_penalty",
}
"""Names that vLLM's SamplingParams have, and the nearest of transformers."""


def resolve_generation_kwargs(args: Any) -> None:
    """Move what `generation_kwargs` says of options that have a name of their own to these options; `top_k=-1` is off.

    Raises:
        ValueError: A name is unknown or cannot work, or contradicts the option.
    """
    given = {name: value for name, value in dict(args.generation_kwargs or {}).items() if value is not None}
    defaults = {field.name: field.default for field in fields(args)}
    kept = {}
    for name, value in given.items():
        _check_name(name, value)
        if name not in OPTIONS:
            if name not in MOOT:
                kept[name] = value
            continue
        option = OPTIONS[name]
        if getattr(args, option) not in (value, defaults[option]):
            raise ValueError(
                f"generation_kwargs sets {name}={value!r}, and {option}={getattr(args, option)!r}; set {option} alone."
            )
        setattr(args, option, value)
    args.generation_kwargs = kept or None
    convert_values(args)
    if args.top_k == -1:  # as vLLM has it
        args.top_k = 0


def _check_name(name: str, value: Any) -> None:
    known = GenerationConfig().to_dict().keys() | vars(GenerationConfig()).keys()
    if name not in known:
        nearest = OTHER_SAMPLERS.get(name) or next(iter(difflib.get_close_matches(name, known, n=1)), None)
        hint = f"did you mean {nearest}?" if nearest else "it takes options of transformers.GenerationConfig."
        raise ValueError(f"generation_kwargs has {name}={value!r}, which transformers does not have; {hint}")
    if name in REFUSED and value != MOOT.get(name):
        raise ValueError(f"generation_kwargs has {name}={value!r}, which cannot work: {REFUSED[name]}.")
