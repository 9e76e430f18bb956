"""Options of `transformers.TrainingArguments` that mean nothing to GRPO, or something else."""

from dataclasses import fields
from typing import NamedTuple

from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from ..logging import get_logger


logger = get_logger(__name__)


class Inherited(NamedTuple):
    """An option that cannot be honored."""

    refused: bool
    """Whether a value other than the default is an error, since it would change the result; else it is a warning."""
    reason: str
    """Why, and what to use instead."""


_ROWS = Inherited(False, "rows are few and read when they are sampled from; no loader has workers")
_LABELS = Inherited(False, "evaluation samples and rewards completions; it has no labels and no batches of predictions")
_FULL_EVAL = Inherited(True, "evaluation samples with the policy as it is trained; set bf16=True or fp16=True")
_KERNELS = Inherited(
    True, "it replaces the forward that computes logprobs in slices; set model_init_kwargs={'use_kernels': True}"
)
_COMPILE = Inherited(True, "micro-batches differ in shape, and each would be compiled; leave it out")

INHERITED = {
    "average_tokens_across_devices": Inherited(False, "the loss is divided by counts over all ranks in any case"),
    "batch_eval_metrics": Inherited(True, "compute_metrics is called once with all completions; leave it out"),
    "bf16_full_eval": _FULL_EVAL,
    "dataloader_in_order": _ROWS,
    "dataloader_multiprocessing_context": _ROWS,
    "dataloader_num_workers": _ROWS,
    "dataloader_persistent_workers": _ROWS,
    "dataloader_prefetch_factor": _ROWS,
    "eval_accumulation_steps": _LABELS,
    "eval_do_concat_batches": _LABELS,
    "eval_use_gather_object": _LABELS,
    "fp16_full_eval": _FULL_EVAL,
    "ignore_data_skip": Inherited(False, "nothing is skipped: which prompts come next follows from the step"),
    "include_for_metrics": Inherited(True, "compute_metrics gets prompts, completions and rewards; leave it out"),
    "label_names": _LABELS,
    "label_smoothing_factor": Inherited(True, "GRPO has no labels to smooth; set it to 0.0"),
    "length_column_name": Inherited(False, "micro-batches are balanced by tokens, which are counted"),
    "liger_kernel_config": _KERNELS,
    "neftune_noise_alpha": Inherited(
        True, "the noise would be in one of the two forwards that ratio and KL compare; set it to None"
    ),
    "prediction_loss_only": _LABELS,
    "torch_compile": _COMPILE,
    "torch_compile_backend": _COMPILE,
    "torch_compile_mode": _COMPILE,
    "train_sampling_strategy": Inherited(
        True,
        "set shuffle_dataset=False for the order of the dataset; micro-batches are balanced by tokens in any order",
    ),
    "use_liger_kernel": _KERNELS,
}


ACCELERATOR = {
    "dispatch_batches": "each rank reads its own rows; leave it out",
    "gradient_accumulation_kwargs": "gradients are synchronized once per optimizer step; set gradient_accumulation_steps",
    "non_blocking": "mini-batches are made on the device; leave it out",
    "split_batches": "per_device_train_batch_size is that of one rank; leave it out",
    "use_seedable_sampler": "the order of prompts follows from data_seed in any case; leave it out",
}
"""Options of `accelerator_config` that are refused. Both values of `even_batches` mean the same: no row is repeated."""


def check_accelerator(config: AcceleratorConfig) -> None:
    """Refuse options of `accelerator_config` that have no effect.

    Raises:
        ValueError: One is set; the message says what to use.
    """
    for name, reason in ACCELERATOR.items():
        value = getattr(config, name)
        if bool(value) != bool(getattr(AcceleratorConfig, name)):
            raise ValueError(f"accelerator_config has {name}={value!r}, which cannot work: {reason}.")


def check_inherited(args: TrainingArguments) -> None:
    """Refuse options that would change the result and cannot, and warn of others without effect.

    Called before `TrainingArguments` replaces what was given.

    Raises:
        ValueError: Such an option is set; the message says what to use.
    """
    defaults = {field.name: field.default for field in fields(TrainingArguments) if field.name in INHERITED}
    for name, (refused, reason) in INHERITED.items():
        value = getattr(args, name, None)
        if value == defaults.get(name) or (refused and not value):
            continue
        if refused:
            raise ValueError(f"{name}={value!r} cannot work: {reason}.")
        logger.warning("%s=%r has no effect: %s.", name, value, reason)
    parallelism = args.parallelism_config
    if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
        raise ValueError(
            f"parallelism_config has cp_size={parallelism.cp_size} and sp_size={parallelism.sp_size}; set both to 1: a "
            "completion is computed on one rank."
        )
