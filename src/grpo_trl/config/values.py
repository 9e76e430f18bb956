"""Values of options: numbers that come as text or as another kind of number, and None for off."""

from dataclasses import fields
from numbers import Real
from types import NoneType
from typing import Any, get_args, get_type_hints


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

WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
KINDS = {bool: "True or False", int: "a whole number", float: "a number"}


def convert_values(args: Any) -> None:
    """Convert, in place, numbers and switches to their type: YAML reads 1e-6 as text, and 4.0 as no count.

    Raises:
        ValueError: A value is none of its type; the message names one that is.
    """
    if args.report_to in (None, "None"):
        args.report_to = "none"
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
            raise ValueError(
                f"{field.name}={value!r} cannot work; it must be {KINDS[kind]}, e.g. {field.default!r}."
            ) from None


def _converted(value: Any, kind: type) -> Any:
    if isinstance(value, str):
        value = WORDS[value.strip().lower()] if kind is bool else float(value)
    if kind is int and value != int(value):
        raise ValueError("it has a fraction")
    if kind is int:
        return int(value)
    if not isinstance(value, Real):
        raise TypeError("it is no number")
    return value if isinstance(value, (int, float)) else float(value)
