"""Values of options: numbers that come as text or as another kind of number, and None for off."""

import json
import math
from dataclasses import fields
from numbers import Real
from types import NoneType
from typing import Any, get_args, get_type_hints

import numpy as np
from transformers.trainer_utils import HubStrategy, IntervalStrategy, SaveStrategy, SchedulerType
from transformers.training_args import OptimizerNames


OFF = {
    "beta": 0.0,
    "label_smoothing_factor": 0.0,
    "max_grad_norm": 0.0,
    "max_steps": -1,
    "repetition_penalty": 1.0,
    "reward_retries": 0,
    "reward_workers": 0,
    "top_k": 0,
    "top_p": 1.0,
    "warmup_steps": 0,
    "weight_decay": 0.0,
}
"""What None means for a number that another number switches off."""

CHOICES = {
    "eval_strategy": IntervalStrategy,
    "hub_strategy": HubStrategy,
    "logging_strategy": IntervalStrategy,
    "lr_scheduler_type": SchedulerType,
    "optim": OptimizerNames,
    "save_strategy": SaveStrategy,
}
"""Options of transformers that have one of some values."""

WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
KINDS = {bool: "True or False", int: "a whole number", float: "a number"}


def convert_values(args: Any) -> None:
    """Convert, in place, numbers and switches to their type: YAML reads 1e-6 as text, 4.0 as no count, and no as False.

    Raises:
        ValueError: A value is none of its type; the message names one that is.
    """
    if args.report_to in (None, "None"):
        args.report_to = "none"
    for name in args._VALID_DICT_FIELDS:
        _check_json(name, getattr(args, name))
    for name, choices in CHOICES.items():
        known = [str(choice.value) for choice in choices]  # type: ignore[var-annotated]
        setattr(args, name, choices(_chosen(name, getattr(args, name), known)))
    hints = get_type_hints(type(args))
    for field in fields(args):
        types = set(get_args(hints[field.name]) or (hints[field.name],))
        value = getattr(args, field.name, None)
        kind = next((k for k in KINDS if types in ({k}, {k, NoneType})), None)
        if kind is None or (value is None and NoneType in types):
            continue
        value = OFF.get(field.name) if value is None else value
        try:
            setattr(args, field.name, _converted(value, kind))
        except (KeyError, ValueError, TypeError, OverflowError):
            example = "or None" if field.default is None else f"e.g. {field.default!r}"
            raise ValueError(f"{field.name}={value!r} cannot work; it must be {KINDS[kind]}, {example}.") from None


def _check_json(name: str, value: Any) -> None:
    """Refuse a text that begins as a dict and is none; other texts may be paths."""
    if isinstance(value, str) and value.startswith("{"):
        try:
            json.loads(value)
        except ValueError as error:
            raise ValueError(f"{name}={value!r} is no JSON ({error}); write it as '{{\"key\": 1}}'.") from None


def _chosen(name: str, value: Any, choices: list[str]) -> Any:
    if value in (None, False) and "no" in choices:
        return "no"
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; use one of {', '.join(map(repr, choices))}.")
    return value


def _converted(value: Any, kind: type) -> Any:
    if kind is bool:
        return _switch(value)
    if isinstance(value, (bool, np.bool_)):
        raise TypeError("it is a switch")
    if isinstance(value, str):
        value = float(value)
    if not isinstance(value, Real):
        raise TypeError("it is no number")
    number = float(value)
    if math.isnan(number) or (kind is int and value != math.floor(value)):
        raise ValueError("it is not a number, or has a fraction")
    if kind is int:
        return math.floor(value)
    return value if isinstance(value, (int, float)) else number


def _switch(value: Any) -> bool:
    if isinstance(value, str):
        return WORDS[value.strip().lower()]
    if value not in (0, 1):
        raise ValueError("it is no switch")
    return bool(value)
