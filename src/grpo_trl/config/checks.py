"""Checks of options that need no model and no data."""

import inspect
import math
from dataclasses import fields
from types import NoneType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint
from transformers import get_scheduler
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType

from ..distributed.launch import fsdp_was_asked_for
from ..objective import make_objective
from .vllm import check_vllm_options


OF_RENDERING = (
    *("add_generation_prompt", "continue_final_message", "conversation", "max_length", "padding"),
    *("return_assistant_tokens_mask", "return_dict", "return_tensors", "tokenize", "truncation"),
)
"""Arguments of `apply_chat_template` that are none of the template."""


def check_options(args: Any) -> None:
    """Check every option and every pair of options.

    Raises:
        ValueError: One cannot work.
    """
    _check_choices(args)
    _check_trackers(args)
    _check_scheduler(args)
    _check_checkpointing(args)
    _check_ranges(args)
    _check_combinations(args)
    args.check_objective()
    make_objective(args)  # raises where options do not go together
    check_vllm_options(args)


def check_dicts(args: Any) -> None:
    """Check the options that hold further options by name.

    Raises:
        ValueError: One is no dict.
    """
    for name in ("model_init_kwargs", "generation_kwargs", "chat_template_kwargs"):
        value = getattr(args, name)
        if not isinstance(value, (dict, NoneType)):
            raise ValueError(f"{name}={value} cannot work; it must be a dict, as JSON '{{\"key\": 1}}'.")
    for name in args.chat_template_kwargs or {}:
        if name in OF_RENDERING:
            raise ValueError(
                f"chat_template_kwargs has {name}={args.chat_template_kwargs[name]!r}, which the trainer sets itself; "
                "leave it out."
            )


def _check_choices(args: Any) -> None:
    """Check the options whose type is a Literal."""
    hints = get_type_hints(type(args))
    choices = {f.name: _choices(hints[f.name]) for f in fields(args) if _choices(hints[f.name])}
    choices["shared_prefix"] = ("auto", True, False)
    for name, allowed in choices.items():
        if getattr(args, name) not in allowed:
            raise ValueError(f"{name}={getattr(args, name)!r} is unknown; use one of {', '.join(map(repr, allowed))}.")


def _choices(hint: Any) -> tuple[Any, ...]:
    """List the values of a Literal, and None if it is optional; nothing for other types."""
    parts = get_args(hint) if get_origin(hint) is Union else (hint,)
    literals = [value for part in parts if get_origin(part) is Literal for value in get_args(part)]
    return (*literals, *([None] if NoneType in parts else [])) if literals else ()


def _check_trackers(args: Any) -> None:
    for name in args.report_to:
        if name not in INTEGRATION_TO_CALLBACK:
            raise ValueError(
                f"report_to={args.report_to!r} has {name!r}, which is unknown; use 'none', or a list of "
                f"{', '.join(sorted(INTEGRATION_TO_CALLBACK))}."
            )


def _check_checkpointing(args: Any) -> None:
    known = {*inspect.signature(checkpoint).parameters, "preserve_rng_state"} - {"function", "args", "kwargs"}
    for name, value in (args.gradient_checkpointing_kwargs or {}).items():
        if name not in known:
            raise ValueError(
                f"gradient_checkpointing_kwargs has {name}={value!r}, which torch.utils.checkpoint does not take; it takes "
                f"{', '.join(sorted(known))}."
            )


def _check_scheduler(args: Any) -> None:
    """Build the scheduler once, for an optimizer of nothing."""
    name, options = SchedulerType(args.lr_scheduler_type), args.lr_scheduler_kwargs
    if options and name in (SchedulerType.CONSTANT, SchedulerType.CONSTANT_WITH_WARMUP):
        raise ValueError(
            f"lr_scheduler_kwargs={options!r} has no effect with lr_scheduler_type={name.value!r}; remove it."
        )
    optimizer = SGD([torch.zeros(1)], lr=1.0)
    try:
        get_scheduler(name, optimizer, num_warmup_steps=0, num_training_steps=10, scheduler_specific_kwargs=options)
    except Exception as error:
        raise ValueError(
            f"lr_scheduler_kwargs={options!r} cannot work with lr_scheduler_type={name.value!r}: {error}"
        ) from error


def _check_combinations(args: Any) -> None:
    if args.save_strategy == SaveStrategy.BEST and args.eval_strategy == IntervalStrategy.NO:
        raise ValueError(
            "save_strategy='best' saves after an evaluation, and eval_strategy='no' makes none; set eval_strategy='steps' "
            "or 'epoch'."
        )
    if args.auto_find_batch_size:
        raise ValueError(
            "auto_find_batch_size=True would split groups when it shrinks the batch; set it to False and lower "
            "per_device_train_batch_size."
        )
    if args.log_completions_hub_repo is not None and not args.log_completions:
        raise ValueError(
            f"log_completions_hub_repo={args.log_completions_hub_repo!r} needs log_completions=True, which writes what is "
            "uploaded."
        )
    if args.fp16 and args.device.type == "cpu":
        raise ValueError(
            "fp16=True cannot work on a CPU; set fp16=False to train in float32, or bf16=True with use_cpu=True."
        )
    if args.save_on_each_node and args.world_size > 1:
        raise ValueError(
            "save_on_each_node=True would split a checkpoint over machines, since each rank writes a part of it; set "
            "it to False, and put output_dir on a file system that all machines share."
        )
    if args.ddp_broadcast_buffers:
        raise ValueError(
            "ddp_broadcast_buffers=True would make ranks wait for each other in each forward, of which they make different "
            "numbers; set it to False. The buffers of language models are the same on all ranks."
        )
    if args.reward_timeout is not None and not args.reward_workers:
        raise ValueError(
            f"reward_timeout={args.reward_timeout} needs reward_workers=1 or more: a call in the training process "
            "cannot be stopped."
        )
    _check_moving_reference(args)


def _check_moving_reference(args: Any) -> None:
    if not args.sync_ref_model:
        return
    if not args.beta:
        raise ValueError("sync_ref_model=True needs a reference, and beta=0.0 keeps none; set beta, e.g. to 0.04.")
    if is_deepspeed_zero3_enabled() or fsdp_was_asked_for(args.fsdp):
        raise ValueError(
            "sync_ref_model=True needs unsharded weights on each rank, and ZeRO-3 and FSDP shard them; use ZeRO-2, or "
            "set sync_ref_model=False."
        )


def _check_ranges(args: Any) -> None:
    def check(name: str, ok: bool, remedy: str) -> None:
        if not ok:
            raise ValueError(f"{name}={getattr(args, name)} cannot work; {remedy}.")

    check("learning_rate", 0 <= args.learning_rate < math.inf, "it must be a finite number such as 1e-6")
    check("seed", 0 <= args.seed < 2**32, "it must be from 0 to 2**32 - 1")
    check("num_generations", args.num_generations >= 2, "a group needs at least 2 completions to compare, e.g. 8")
    check("num_iterations", args.num_iterations >= 1, "use at least 1")
    check("per_device_train_batch_size", args.per_device_train_batch_size >= 1, "use at least 1, e.g. 8")
    check("gradient_accumulation_steps", args.gradient_accumulation_steps >= 1, "use at least 1")
    check(
        "steps_per_generation",
        args.steps_per_generation is None or args.steps_per_generation >= 1,
        "use at least 1",
    )
    check("max_completion_length", (args.max_completion_length or 0) >= 1, "use at least 1, e.g. 512")
    room = (args.max_completion_length or 0) + 1
    check(
        "max_tokens_per_micro_batch",
        args.max_tokens_per_micro_batch is None or args.max_tokens_per_micro_batch >= room,
        f"with max_completion_length={args.max_completion_length} it must be {room} or more, and the prompt's length",
    )
    check("temperature", 0 < args.temperature < math.inf, "it must be above 0, e.g. 1.0")
    check("top_p", 0 < args.top_p <= 1, "it must be above 0 and at most 1")
    check("top_k", args.top_k >= 0, "use 0 (all tokens) or more")
    check("min_p", args.min_p is None or 0 <= args.min_p <= 1, "it must be between 0 and 1")
    check("max_rows_in_flight", args.max_rows_in_flight is None or args.max_rows_in_flight >= 1, "use at least 1")
    check("speculative_ngrams", args.speculative_ngrams >= 0, "use 0 for no guesses, or 1 or more")
    check("repetition_penalty", args.repetition_penalty > 0, "it must be above 0; 1.0 changes nothing")
    check("num_generations_eval", args.eval_generations >= 1, "use at least 1")
    check("ref_model_sync_steps", args.ref_model_sync_steps >= 1, "use at least 1")
    check("ref_model_mixup_alpha", 0 <= args.ref_model_mixup_alpha <= 1, "it must be between 0 and 1")
    check("reward_workers", args.reward_workers >= 0, "use 0 (none) or more")
    check("reward_weights", _are_weights(args.reward_weights), "it must be a list of finite numbers, e.g. [1.0, 0.5]")
    check("reward_retries", args.reward_retries >= 0, "use 0 or more")
    check("reward_memory_limit", args.reward_memory_limit > 0, "it must be above 0, e.g. 4.0")
    check("max_reward_failure_rate", 0 <= args.max_reward_failure_rate <= 1, "it must be between 0 and 1")
    check("max_nonfinite_steps", args.max_nonfinite_steps >= 1, "use at least 1")
    for name in ("reward_timeout", "dead_run_patience", "phase_warning_seconds"):
        check(name, getattr(args, name) is None or getattr(args, name) > 0, "it must be above 0, or None")


def _are_weights(weights: Any) -> bool:
    is_list = isinstance(weights, (list, tuple))
    return weights is None or (is_list and all(isinstance(w, (int, float)) and math.isfinite(w) for w in weights))
