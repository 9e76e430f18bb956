"""Options of the policy and the reference."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class ModelOptions:
    """Model and reference."""

    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Arguments of from_pretrained for a model given as a path, as JSON."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run the code that comes with a model or tokenizer given as a path."}
    )
    cast_lm_head_to_fp32: bool = field(
        default=False,
        metadata={
            "help": "Keep and compute the head of policy and reference in float32, under mixed precision too (ScaleRL, "
            "arXiv 2510.13786)."
        },
    )
    router_aux_loss_coef: float | None = field(
        default=0.0,
        metadata={
            "help": "Weight of the load-balancing loss of a mixture of experts; above 0 each optimizer step evaluates its "
            "completions once more. None: that of the model's configuration."
        },
    )
    disable_dropout: bool = field(default=False, metadata={"help": "Set the policy's dropout to 0."})
    sync_ref_model: bool = field(
        default=False, metadata={"help": "Move the reference towards the policy every ref_model_sync_steps steps."}
    )
    ref_model_mixup_alpha: float = field(
        default=0.6,
        metadata={"help": "Share of the policy in the reference after a sync; the rest is the old reference."},
    )
    ref_model_sync_steps: int = field(default=512, metadata={"help": "Optimizer steps between two syncs."})
