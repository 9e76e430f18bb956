"""Names of options that TRL, transformers or scripts for them have, and this package does not.

A name is translated where an option of today means the same; otherwise a TypeError says what to use.
"""

import difflib
from collections.abc import Collection
from dataclasses import fields
from typing import Any, NamedTuple

from ..logging import get_logger


logger = get_logger(__name__)


class Absent(NamedTuple):
    """An option that is not here."""

    moot: tuple[Any, ...]
    """Values that ask for what is done anyway."""
    remedy: str
    """What to do instead of setting another value."""


RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "max_new_tokens": "max_completion_length",
    "no_cuda": "use_cpu",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "push_to_hub_model_id": "hub_model_id",
    "push_to_hub_token": "hub_token",
    "torch_dtype": "dtype",  # of a parser's ModelConfig; GRPOConfig has neither
    "use_transformers_paged": "use_transformers_continuous_batching",
    "vllm_guided_decoding_regex": "vllm_structured_outputs_regex",
    "vllm_importance_sampling_cap": "vllm_importance_sampling_clip_max",
    "vllm_max_model_len": "vllm_max_model_length",
    "wandb_log_unique_prompts": "log_unique_prompts",
    "warmup_ratio": "warmup_steps",  # below 1 it is a share of the run
}
"""Retired names of options that mean the same today."""

RETIRED = {
    "adafactor": Absent((False,), "set optim='adafactor'"),
    "dispatch_batches": Absent((None,), "remove it: each rank reads its own rows"),
    "dtype": Absent((), "set model_init_kwargs={'dtype': ...}"),
    "fp16_backend": Absent(("auto",), "set bf16 or fp16"),
    "fp16_opt_level": Absent(("O1",), "set bf16 or fp16"),
    "fsdp_min_num_params": Absent((0,), "set min_num_params in fsdp_config"),
    "fsdp_transformer_layer_cls_to_wrap": Absent((None,), "set transformer_layer_cls_to_wrap in fsdp_config"),
    "group_by_length": Absent((False,), "remove it: micro-batches are balanced by tokens, in any order of prompts"),
    "half_precision_backend": Absent(("auto",), "set bf16 or fp16"),
    "include_inputs_for_metrics": Absent((False,), "remove it: compute_metrics gets prompts and completions"),
    "include_tokens_per_second": Absent((False, True), "remove it"),
    "jit_mode_eval": Absent((False,), "remove it: evaluation samples with the policy as it is"),
    "logging_dir": Absent((None,), "set the environment variable TENSORBOARD_LOGGING_DIR"),
    "max_prompt_length": Absent(
        (None,),
        "remove it: prompts may fill the model's context less max_completion_length, and prompt_overflow='error', 'drop' "
        "or 'truncate_left' decides on longer ones. For a shorter limit, use train_dataset.filter",
    ),
    "overwrite_output_dir": Absent((False, True), "remove it: a run resumes only with resume_from_checkpoint"),
    "push_to_hub_organization": Absent((None,), "set hub_model_id='ORGANIZATION/NAME'"),
    "save_safetensors": Absent((True,), "remove it: weights are saved as safetensors"),
    "split_batches": Absent((None, False), "remove it: per_device_train_batch_size is that of one rank"),
    "torch_dtype": Absent((), "set model_init_kwargs={'dtype': ...}"),
    "torchdynamo": Absent((None,), "remove it"),
    "use_ipex": Absent((False,), "remove it"),
    "use_liger_loss": Absent((False, True), "remove it: logits are computed in slices in any case"),
    "use_mps_device": Absent((False, True), "remove it: the device is chosen by what is there"),
    "vllm_device": Absent(("auto",), "remove it: vLLM shares the GPUs of training, or is a server with its own"),
    "vllm_dtype": Absent(("auto",), "remove it: vLLM computes in the policy's precision"),
    "vllm_enable_prefix_caching": Absent((None, True), "remove it"),
    "vllm_sampling_params": Absent(
        (None,), "set temperature, top_p, top_k, min_p, repetition_penalty, generation_kwargs"
    ),
}
"""Options that TRL, transformers or their users' scripts had once."""

_TRACKER = "set the environment variable {}, under env of the configuration or before the run"

OF_SCRIPTS = {
    "benchmarks": Absent((None, []), "remove it: evaluate the model that is saved"),
    "callbacks": Absent((None, []), "remove it, or pass callbacks to the trainer in a script"),
    "chat_template": Absent((None,), "remove it: the template is that of the tokenizer, so save it with the tokenizer"),
    "dataset_configs": Absent((None,), "set dataset_config, to one name"),
    "dataset_id_or_path": Absent((None,), "set dataset_name"),
    "dataset_prompt_column": Absent((None,), "set prompt_template, to the column in braces: '{problem}'"),
    "hub_model_revision": Absent((None, "main"), "set hub_revision"),
    "overwrite_hub_revision": Absent((None, False), "remove it"),
    "push_to_hub_revision": Absent((None, False), "set push_to_hub and hub_revision"),
    "wandb_entity": Absent((None,), _TRACKER.format("WANDB_ENTITY")),
    "wandb_project": Absent((None,), _TRACKER.format("WANDB_PROJECT")),
    "wandb_run_group": Absent((None,), _TRACKER.format("WANDB_RUN_GROUP")),
}
"""Options of scripts around TRL, such as open-r1's, that stand in many configurations."""

_CONTINUOUS = "remove it: completions are decoded continuously in any case, max_rows_in_flight at a time"

NOT_HERE = {
    "cache_implementation": Absent(
        (None,),
        "set generation_kwargs={'cache_implementation': ...}, which samples with model.generate, or remove it: by default "
        "a group shares the keys and values of its prompt",
    ),
    "log_multimodal": Absent((True, False), "remove it: there are no images in the tables"),
    "max_tool_calling_iterations": Absent(
        (None,), "remove it: tools are called from a rollout_func, which counts itself"
    ),
    "pad_to_multiple_of": Absent((None, "auto"), "remove it: micro-batches are packed without padding"),
    "transformers_continuous_batching_config": Absent((None,), _CONTINUOUS),
    "use_transformers_continuous_batching": Absent((False, True), _CONTINUOUS),
}
"""Options of TRL 1.16 that are not here."""

ABSENT = RETIRED | OF_SCRIPTS | NOT_HERE


class TodaysNames(type):
    """The class of `GRPOConfig` and of classes derived from it: they are made with options under `current_names`."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **current_names(kwargs, [field.name for field in fields(cls)]))  # type: ignore[arg-type]


def current_names(given: dict[str, Any], known: Collection[str]) -> dict[str, Any]:
    """Return the options `given` by keyword under names that are `known`, with one line in the log for a retired name.

    Raises:
        TypeError: Options do not exist, or are given under two names; the message says of each what to use.
    """
    if refused := refusals(given, known):
        raise TypeError("\n".join(refused))
    return translated(given, known)


def translated(given: dict[str, Any], known: Collection[str]) -> dict[str, Any]:
    """Return the options `given` with retired names replaced by those of today; names that never existed stay.

    Raises:
        TypeError: Names are retired without one of today, or an option is given under two names.
    """
    ever = {name: value for name, value in given.items() if name in RENAMED or is_absent(name) or name in known}
    if refused := refusals(ever, known):
        raise TypeError("\n".join(refused))
    options: dict[str, Any] = {}
    for name, value in given.items():
        today = todays_name(name, known)
        if today != name:
            logger.warning("%s=%r is read as %s=%r, its name today.", name, value, today, value)
        if today in known or not is_absent(today):
            options[today] = value
        elif today not in NOT_HERE:
            logger.warning("%s=%r changes nothing; you can remove it.", today, value)
    return options


def refusals(given: dict[str, Any], known: Collection[str]) -> list[str]:
    """List, of each option `given` that cannot be taken where others are `known`, what to use instead."""
    reasons = {name: _refusal(name, value, given, known) for name, value in given.items()}
    return [f"{name}={given[name]!r} {reason}" for name, reason in reasons.items() if reason]


def _refusal(name: str, value: Any, given: dict[str, Any], known: Collection[str]) -> str | None:
    today = todays_name(name, known)
    if today != name and today in given:
        return f"is the retired name of {today}={given[today]!r}; give one of them."
    if name == "warmup_ratio" != today and value is not None and not 0 <= float(value) < 1:
        return "is no share of the run; set warmup_steps, in steps or as a share below 1."
    return None if today in known else _remedy(today, value, known)


def _remedy(name: str, value: Any, known: Collection[str]) -> str | None:
    if absent := ABSENT.get(name):
        moot = any(value is one or value == one for one in absent.moot)
        return None if moot else f"is no option; {absent.remedy}."
    nearest = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {nearest[0]}?" if nearest else "docs/options.md and docs/from-trl.md list the options."
    return f"is no option; {hint}"


def todays_name(name: str, known: Collection[str]) -> str:
    """Return the name of today of an option, among those that are `known`; the name itself if there is none."""
    today = RENAMED.get(name, name)
    return name if name in known or (today not in known and today not in NOT_HERE) else today


def is_absent(name: str) -> bool:
    """Whether an option is one of TRL, of transformers or of a script for them, or was, and is none here."""
    return name in ABSENT


def current_model_kwargs(given: dict[str, Any]) -> dict[str, Any]:
    """Return arguments of `from_pretrained` with `torch_dtype` under its name of today, which alone has an effect.

    Raises:
        ValueError: Both names are given.
    """
    if "torch_dtype" not in given:
        return given
    if "dtype" in given:
        raise ValueError(
            f"model_init_kwargs={given} has both dtype and torch_dtype, its retired name; give dtype alone."
        )
    logger.warning("model_init_kwargs: torch_dtype=%r is read as dtype, its name today.", given["torch_dtype"])
    return {"dtype" if name == "torch_dtype" else name: value for name, value in given.items()}
