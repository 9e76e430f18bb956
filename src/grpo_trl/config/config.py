"""`GRPOConfig`: the options of `transformers.TrainingArguments` and those of this folder.

Options keep the names, meanings and defaults of TRL 1.16's `GRPOConfig`; `docs/from-trl.md` lists the differences.
"""

import os
from dataclasses import dataclass, field, fields
from typing import Any, cast

from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.trainer_utils import SaveStrategy

from ..data.geometry import Geometry
from ..distributed.launch import check_bf16, check_launcher, gpu_has_bf16
from ..distributed.sharding import check_backend_config, start_backend
from ..objective import ObjectiveOptions
from .batches import BatchOptions
from .checks import check_dicts, check_options
from .evaluation import EvaluationOptions
from .inherited import check_accelerator, check_inherited
from .model import ModelOptions
from .names import TodaysNames, current_model_kwargs
from .reliability import ReliabilityOptions
from .rewards import RewardOptions
from .rollout import RolloutOptions
from .sampling import resolve_generation_kwargs
from .values import convert_values
from .vllm import VLLMOptions


SCHEDULE = {"per_device_train_batch_size", "gradient_accumulation_steps", "seed", "data_seed"}
"""Options of transformers from which the schedule and the noise of a run are built."""
FOLLOWS_A_METRIC = ("reduce_lr_on_plateau", "greedy")
"""Values of `lr_scheduler_type` whose rate follows `metric_for_best_model`."""


@dataclass
class GRPOConfig(
    EvaluationOptions,
    ReliabilityOptions,
    RewardOptions,
    ModelOptions,
    VLLMOptions,
    RolloutOptions,
    BatchOptions,
    ObjectiveOptions,
    TrainingArguments,
    metaclass=TodaysNames,
):
    r"""All options of `GRPOTrainer`: those of `transformers.TrainingArguments` and those of the classes above.

    `per_device_train_batch_size` counts completions. The generation batch over all ranks must hold whole groups:
    `per_device_train_batch_size * world_size * steps_per_generation` is a multiple of `num_generations`.

    Raises:
        ValueError: An option has a value that cannot work; the message names the option, its value and one that would.
    """

    _VALID_DICT_FIELDS = [  # noqa: RUF012 - transformers reads it from the class
        *TrainingArguments._VALID_DICT_FIELDS,
        "model_init_kwargs",
        "generation_kwargs",
        "chat_template_kwargs",
    ]

    learning_rate: float = field(default=1e-6, metadata={"help": "The initial learning rate of the optimizer."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many optimizer steps."})
    gradient_checkpointing: bool | None = field(
        default=None,
        metadata={
            "help": "Recompute activations in the backward pass: less memory, slower training. Default: where a "
            "micro-batch does not fit into memory otherwise."
        },
    )
    bf16: bool | None = field(  # type: ignore[assignment]  # None until the hardware is known
        default=None,
        metadata={"help": "Train in bfloat16 mixed precision. Default: where the GPU supports it, unless fp16 is set."},
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Show reward functions the column 'prompt' alone."}
    )

    ddp_broadcast_buffers: bool | None = field(
        default=False,
        metadata={"help": "Send the first rank's buffers to all in each step; language models need it not."},
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Replace a loss that is not finite by the mean of those before it in the log."}
    )

    def __post_init__(self) -> None:
        convert_values(self)
        check_inherited(self)
        check_launcher(self.deepspeed, os.environ)
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and gpu_has_bf16()
        if self.bf16:
            check_bf16(self.use_cpu)
        leaves_open = self._resolve_checkpointing()
        self._choose_metric()
        super().__post_init__()
        check_accelerator(cast("AcceleratorConfig", self.accelerator_config))
        if leaves_open:
            self._leave_checkpointing_open()
        self._direct_scheduler()
        if self.deepspeed_plugin is not None:
            check_backend_config(self.deepspeed_plugin.hf_ds_config)
            start_backend(self.device.type)
        self.shared_prefix = {"true": True, "1": True, "false": False, "0": False}.get(
            str(self.shared_prefix).lower(), self.shared_prefix
        )  # type: ignore[assignment]
        self.scale_rewards = {"True": "group", "False": "none"}.get(str(self.scale_rewards), self.scale_rewards)  # type: ignore[assignment]
        check_dicts(self)
        self.model_init_kwargs = current_model_kwargs(cast("dict[str, Any]", self.model_init_kwargs or {})) or None
        resolve_generation_kwargs(self)
        check_options(self)
        self._resolve_generation_batch()

    @property
    def eval_generations(self) -> int:
        """Completions per prompt in evaluation."""
        return self.num_generations if self.num_generations_eval is None else self.num_generations_eval

    @property
    def fixed_at_construction(self) -> dict[str, Any]:
        """The options, by name, that parts of a trainer are built from, so that a later change would reach only some."""
        read_live = {
            f.name for kind in (TrainingArguments, EvaluationOptions, ReliabilityOptions) for f in fields(kind)
        }
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in read_live - SCHEDULE}

    @property
    def init_kwargs(self) -> dict[str, Any]:
        """Arguments of `from_pretrained` for models given as paths."""
        return {"trust_remote_code": self.trust_remote_code} | cast("dict[str, Any]", self.model_init_kwargs or {})

    @property
    def template_kwargs(self) -> dict[str, Any]:
        """Further arguments of `apply_chat_template`."""
        return cast("dict[str, Any]", self.chat_template_kwargs or {})

    @property
    def half_precision(self) -> bool:
        """Whether the policy computes in half precision, whatever its weights are."""
        return bool(self.bf16 or self.fp16)

    def _resolve_checkpointing(self) -> bool:
        """Read it under either of its names, gradient and activation checkpointing; return whether neither is set."""
        if not hasattr(self, "activation_checkpointing"):
            return self.gradient_checkpointing is None
        if self.activation_checkpointing is None:  # else transformers warns of the old names
            self.activation_checkpointing = self.gradient_checkpointing
        if self.activation_checkpointing_kwargs is None:
            self.activation_checkpointing_kwargs = self.gradient_checkpointing_kwargs
        return self.activation_checkpointing is None

    def _leave_checkpointing_open(self) -> None:
        """Keep None, which transformers has resolved to False, unless FSDP recomputes by its own option."""
        own = cast("dict[str, Any]", self.fsdp_config or {}).get("activation_checkpointing", False)
        self.gradient_checkpointing = None if str(own).lower() in ("false", "0") else False
        if hasattr(self, "activation_checkpointing"):
            self.activation_checkpointing = self.gradient_checkpointing
        if self.ddp_find_unused_parameters is None:  # which DDP decides before it is known whether activations are kept
            self.ddp_find_unused_parameters = False

    def _choose_metric(self) -> None:
        """What is held out is judged by its reward, wherever Trainer asks for a metric."""
        follows = self.lr_scheduler_type in FOLLOWS_A_METRIC
        best = self.save_strategy == SaveStrategy.BEST
        if self.metric_for_best_model is None and (follows or best or self.load_best_model_at_end):
            self.metric_for_best_model = "eval_reward"

    def _direct_scheduler(self) -> None:
        """Let a scheduler that follows the metric know which way is better; by default it takes less for better."""
        if self.lr_scheduler_type in FOLLOWS_A_METRIC:
            direction = {"mode": "max" if self.greater_is_better else "min"}
            self.lr_scheduler_kwargs = direction | cast("dict[str, Any]", self.lr_scheduler_kwargs or {})

    def _resolve_generation_batch(self) -> None:
        """Set both of `steps_per_generation` and `generation_batch_size`."""
        geometry = Geometry(
            self.per_device_train_batch_size,
            self.num_generations,
            self.gradient_accumulation_steps,
            self.num_iterations,
            self.world_size,
        )
        self.steps_per_generation = geometry.micro_steps(self.steps_per_generation, self.generation_batch_size)
        self.generation_batch_size = geometry.completions_per_micro_step * self.steps_per_generation
