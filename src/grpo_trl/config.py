"""Every option once, and every check that needs no model and no data.

Options keep the names, meanings and defaults of TRL 1.16's `GRPOConfig`; `docs/options.md` lists the differences.
"""

import math
import os
from dataclasses import dataclass, field
from types import NoneType
from typing import Any, Literal, cast

from transformers import TrainingArguments

from .data import CONTEXT, OVERFLOW_POLICIES, PromptLimit, Schedule
from .geometry import Geometry
from .guards import DEAD_RUN_ACTIONS
from .launch import check_bf16, check_launcher, gpu_has_bf16
from .objective import LOSS_LEVELS
from .objective.advantages import SCALES
from .rollout import SamplingOptions
from .sharding import check_engine_config, start_engine


OWN_SAMPLING_OPTIONS = (
    "max_new_tokens",
    "do_sample",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "num_return_sequences",
    "pad_token_id",
    "eos_token_id",
    "return_dict_in_generate",
)


@dataclass
class GRPOConfig(TrainingArguments):
    r"""All options of `GRPOTrainer`: those of `transformers.TrainingArguments` and the ones below.

    `per_device_train_batch_size` counts completions. `per_device_train_batch_size * steps_per_generation` must be a
    multiple of `num_generations`, so that a rank owns whole groups; the batch size alone need not be.

    Raises:
        ValueError: An option has a value that cannot work; the message names the option, its value and one that would.
    """

    _VALID_DICT_FIELDS = [  # noqa: RUF012 - transformers reads it from the class
        *TrainingArguments._VALID_DICT_FIELDS,
        "model_init_kwargs",
        "generation_kwargs",
        "chat_template_kwargs",
    ]

    # Defaults of TrainingArguments that GRPO changes
    learning_rate: float = field(default=1e-6, metadata={"help": "The initial learning rate of the optimizer."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many optimizer steps."})
    gradient_checkpointing: bool | None = field(
        default=None,
        metadata={"help": "Recompute activations in the backward pass: less memory, slower training. Default: True."},
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

    # The objective
    loss_level: str = field(
        default="token",
        metadata={
            "help": "The published objective: 'token' is DeepSeekMath's (arXiv 2402.03300), a ratio and a KL per token; "
            "'sequence' is that of DeepSeek-V2 and V3 (arXiv 2405.04434, 2412.19437), a ratio and a KL per completion.",
            "choices": list(LOSS_LEVELS),
        },
    )
    beta: float = field(
        default=0.0, metadata={"help": "Weight of the KL term to the reference. 0: no reference is kept or evaluated."}
    )
    epsilon: float = field(default=0.2, metadata={"help": "The ratio is clipped below 1 - epsilon."})
    epsilon_high: float | None = field(
        default=None, metadata={"help": "The ratio is clipped above 1 + epsilon_high. Default: epsilon."}
    )
    scale_rewards: str = field(
        default="group",
        metadata={
            "help": "What advantages are divided by: the standard deviation of the 'group', of the 'batch' (the whole "
            "window on all ranks), or nothing ('none').",
            "choices": list(SCALES),
        },
    )
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "One weight per reward function. Default: all 1."}
    )

    # Rewards and guards
    reward_workers: int = field(
        default=0,
        metadata={
            "help": "Processes in which reward functions run, on each rank. 0: they run in the training process."
        },
    )
    reward_timeout: float | None = field(
        default=None, metadata={"help": "Seconds that a call of a reward function may take. Needs reward_workers."}
    )
    reward_retries: int = field(
        default=0, metadata={"help": "How often a call of a reward function that failed is made anew as it is."}
    )
    reward_memory_limit: float = field(
        default=4.0, metadata={"help": "GiB of memory that a process of reward_workers may take (on Linux)."}
    )
    on_reward_error: Literal["exclude", "raise"] = field(
        default="exclude",
        metadata={
            "help": "What becomes of a completion that a reward function fails on: it has no reward and no advantage "
            "('exclude'), or the run is saved and stops ('raise').",
        },
    )
    max_reward_failure_rate: float = field(
        default=0.5,
        metadata={"help": "Save and stop when a reward function fails on more than this share of a window."},
    )
    max_nonfinite_steps: int = field(
        default=5,
        metadata={
            "help": "Save and stop after so many optimizer steps in a row whose loss or gradient is not finite; such "
            "steps change no weights."
        },
    )
    dead_run_patience: int | None = field(
        default=20,
        metadata={
            "help": "So many windows in a row in which no group has rewards that differ, or every completion is cut off, "
            "are a dead run. None: never."
        },
    )
    on_dead_run: str = field(
        default="warn",
        metadata={
            "help": "Say that a run is dead ('warn'), or save and stop ('stop').",
            "choices": list(DEAD_RUN_ACTIONS),
        },
    )
    phase_warning_seconds: float | None = field(
        default=600, metadata={"help": "Say which phase, of which rank, takes longer than this. None: never."}
    )

    # Geometry
    num_generations: int = field(default=8, metadata={"help": "Completions per prompt, at least 2."})
    num_iterations: int = field(default=1, metadata={"help": "How often each window is trained on."})
    steps_per_generation: int | None = field(
        default=None,
        metadata={"help": "Micro-steps that one window of completions lasts. Default: gradient_accumulation_steps."},
    )
    generation_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Completions of a window over all ranks; the other way to say steps_per_generation. Default: "
            "per_device_train_batch_size * world size * steps_per_generation."
        },
    )
    max_tokens_per_piece: int | None = field(
        default=None,
        metadata={
            "help": "Tokens that one forward and backward computes at most, each group's prompt counted once. An optimizer "
            "step has as many of them as that needs; by default, each has per_device_train_batch_size completions."
        },
    )
    shared_prefix: str = field(  # or a bool
        default="auto",
        metadata={
            "help": "Compute a prompt once for all of its completions: 'auto' does so wherever the model can be served, "
            "true makes a model that cannot an error, false pads instead.",
        },
    )
    shuffle_dataset: bool = field(default=True, metadata={"help": "Shuffle the prompts in each epoch."})

    # Sampling
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
    prompt_overflow: str = field(
        default="error",
        metadata={
            "help": "What happens to a prompt that leaves no room for max_completion_length tokens in the model's context: "
            "'error' stops before training, 'drop' leaves it out, 'truncate_left' keeps its end.",
            "choices": list(OVERFLOW_POLICIES),
        },
    )

    # Model and reference
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Arguments of from_pretrained for a model given as a path, as JSON."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run the code that comes with a model or tokenizer given as a path."}
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

    # Evaluation and logging
    num_generations_eval: int | None = field(
        default=None, metadata={"help": "Completions per prompt in evaluation. Default: num_generations."}
    )
    log_completions: bool = field(
        default=False,
        metadata={"help": "Print a table of completions at every log, and write it to output_dir/completions."},
    )
    num_completions_to_print: int | None = field(
        default=None, metadata={"help": "Rows of that table, drawn at random. Default: all."}
    )
    log_unique_prompts: bool = field(default=False, metadata={"help": "One row per prompt in that table."})

    def __post_init__(self) -> None:
        check_launcher(self.deepspeed, os.environ)
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and gpu_has_bf16()
        if self.bf16:
            check_bf16(self.use_cpu)
        self._resolve_checkpointing()
        if self.metric_for_best_model is None and self.load_best_model_at_end:
            self.metric_for_best_model = "eval_reward"
        super().__post_init__()
        if self.deepspeed_plugin is not None:
            check_engine_config(self.deepspeed_plugin.hf_ds_config)
            start_engine(self.device.type)
        self.shared_prefix = {"true": True, "1": True, "false": False, "0": False}.get(
            str(self.shared_prefix).lower(), self.shared_prefix
        )  # type: ignore[assignment]
        self._check_choices()
        self._check_ranges()
        self._resolve_window()

    @property
    def eval_generations(self) -> int:
        """Completions per prompt in evaluation."""
        return self.num_generations if self.num_generations_eval is None else self.num_generations_eval

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

    def sampling_options(self, pad_token_id: int, eos_token_ids: tuple[int, ...]) -> SamplingOptions:
        """The options of sampling, for a tokenizer's ids."""
        return SamplingOptions(
            max_completion_length=self.max_completion_length,
            pad_token_id=pad_token_id,
            eos_token_ids=eos_token_ids,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            generation_kwargs=cast("dict[str, Any]", self.generation_kwargs or {}),
        )

    def prompt_limit(self, context: int | None, trained_on: bool = False) -> PromptLimit:
        """How long a prompt may be in a model of `context` positions (None: not known, no limit).

        What is `trained_on` must fit into `max_tokens_per_piece` too.

        Raises:
            ValueError: `max_completion_length` fills the context.
        """
        length = self.max_completion_length
        if context is not None and length >= context:
            raise ValueError(
                f"max_completion_length={length} leaves no room for a prompt in the model's context of {context} tokens; "
                f"use at most {context - 1}, less the length of the prompts."
            )
        rooms = {
            CONTEXT: context,
            "max_tokens_per_piece": self.max_tokens_per_piece if trained_on else None,
        }
        name, room = min(rooms.items(), key=lambda item: math.inf if item[1] is None else item[1])
        return PromptLimit(None if room is None else room - length, length, self.prompt_overflow, name)

    def schedule(self, num_prompts: int) -> Schedule:
        """The windows and optimizer steps of a run over `num_prompts` prompts."""
        assert self.steps_per_generation is not None
        return Schedule(
            num_prompts=num_prompts,
            num_generations=self.num_generations,
            batch_size=self.per_device_train_batch_size,
            accumulation=self.gradient_accumulation_steps,
            steps_per_generation=self.steps_per_generation,
            num_iterations=self.num_iterations,
            world_size=self.world_size,
            seed=self.seed if self.data_seed is None else self.data_seed,
            shuffle=self.shuffle_dataset,
        )

    def _resolve_checkpointing(self) -> None:
        """On by default, under either of its names: transformers renames gradient to activation checkpointing."""
        renamed = hasattr(self, "activation_checkpointing")
        if self.gradient_checkpointing is None:
            self.gradient_checkpointing = True
        if renamed and self.activation_checkpointing is None:  # else transformers warns of the old names
            self.activation_checkpointing = self.gradient_checkpointing
        if renamed and self.activation_checkpointing_kwargs is None:
            self.activation_checkpointing_kwargs = self.gradient_checkpointing_kwargs

    def _check_choices(self) -> None:
        for name, choices in (
            ("loss_level", tuple(LOSS_LEVELS)),
            ("scale_rewards", SCALES),
            ("prompt_overflow", OVERFLOW_POLICIES),
            ("on_reward_error", ("exclude", "raise")),
            ("on_dead_run", DEAD_RUN_ACTIONS),
            ("shared_prefix", ("auto", True, False)),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is unknown; use one of {', '.join(map(repr, choices))}."
                )
        if self.auto_find_batch_size:
            raise ValueError(
                "auto_find_batch_size=True would cut groups in two when it shrinks the batch; set it to False and lower "
                "per_device_train_batch_size."
            )
        if self.save_on_each_node and self.world_size > 1:
            raise ValueError(
                "save_on_each_node=True would split a checkpoint over machines, since each rank writes a part of it; set "
                "it to False, and have output_dir on a file system that all machines share."
            )
        if self.reward_timeout is not None and not self.reward_workers:
            raise ValueError(
                f"reward_timeout={self.reward_timeout} needs reward_workers=1 or more: a call in the training process "
                "cannot be stopped."
            )
        if self.sync_ref_model and not self.beta:
            raise ValueError("sync_ref_model=True needs a reference, and beta=0.0 keeps none; set beta, e.g. to 0.04.")
        clash = sorted(set(self.generation_kwargs or {}) & set(OWN_SAMPLING_OPTIONS))
        if clash:
            raise ValueError(
                f"generation_kwargs={self.generation_kwargs} sets {', '.join(clash)}, which the trainer sets itself; use "
                "the options max_completion_length, temperature, top_p, top_k, min_p, repetition_penalty and "
                "num_generations; further end tokens go to model.generation_config.eos_token_id."
            )

    def _check_ranges(self) -> None:
        def check(name: str, ok: bool, remedy: str) -> None:
            if not ok:
                raise ValueError(f"{name}={getattr(self, name)} cannot work; {remedy}.")

        check("learning_rate", math.isfinite(self.learning_rate), "it must be a finite number such as 1e-6")
        check("num_generations", self.num_generations >= 2, "a group needs at least 2 completions to compare, e.g. 8")
        check("num_iterations", self.num_iterations >= 1, "use at least 1")
        check("per_device_train_batch_size", self.per_device_train_batch_size >= 1, "use at least 1, e.g. 8")
        check("gradient_accumulation_steps", self.gradient_accumulation_steps >= 1, "use at least 1")
        check(
            "steps_per_generation",
            self.steps_per_generation is None or self.steps_per_generation >= 1,
            "use at least 1",
        )
        check("max_completion_length", (self.max_completion_length or 0) >= 1, "use at least 1, e.g. 512")
        room = (self.max_completion_length or 0) + 1
        check(
            "max_tokens_per_piece",
            self.max_tokens_per_piece is None or self.max_tokens_per_piece >= room,
            f"with max_completion_length={self.max_completion_length} it must be {room} or more, and the prompt's length",
        )
        check("temperature", 0 < self.temperature < math.inf, "it must be above 0, e.g. 1.0")
        check("top_p", 0 < self.top_p <= 1, "it must be above 0 and at most 1")
        check("top_k", self.top_k >= 0, "use 0 (all tokens) or more")
        check("min_p", self.min_p is None or 0 <= self.min_p <= 1, "it must be between 0 and 1")
        check("max_rows_in_flight", self.max_rows_in_flight is None or self.max_rows_in_flight >= 1, "use at least 1")
        check("repetition_penalty", self.repetition_penalty > 0, "it must be above 0; 1.0 changes nothing")
        check("beta", 0 <= self.beta < math.inf, "it must be 0 or more, e.g. 0.04")
        check("epsilon", 0 < self.epsilon < 1, "it must be between 0 and 1, e.g. 0.2")
        check("epsilon_high", self.epsilon_high is None or self.epsilon_high > 0, "it must be above 0, e.g. 0.28")
        check("num_generations_eval", self.eval_generations >= 1, "use at least 1")
        check("ref_model_sync_steps", self.ref_model_sync_steps >= 1, "use at least 1")
        check("ref_model_mixup_alpha", 0 <= self.ref_model_mixup_alpha <= 1, "it must be between 0 and 1")
        check("reward_workers", self.reward_workers >= 0, "use 0 (none) or more")
        check(
            "reward_weights", _are_weights(self.reward_weights), "it must be a list of finite numbers, e.g. [1.0, 0.5]"
        )
        check("reward_retries", self.reward_retries >= 0, "use 0 or more")
        check("reward_memory_limit", self.reward_memory_limit > 0, "it must be above 0, e.g. 4.0")
        check("max_reward_failure_rate", 0 <= self.max_reward_failure_rate <= 1, "it must be between 0 and 1")
        check("max_nonfinite_steps", self.max_nonfinite_steps >= 1, "use at least 1")
        for name in ("reward_timeout", "dead_run_patience", "phase_warning_seconds"):
            check(name, getattr(self, name) is None or getattr(self, name) > 0, "it must be above 0, or None")
        for name in ("model_init_kwargs", "generation_kwargs", "chat_template_kwargs"):
            check(name, isinstance(getattr(self, name), (dict, NoneType)), "it must be a dict, as JSON '{\"key\": 1}'")

    def _resolve_window(self) -> None:
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


def _are_weights(weights: Any) -> bool:
    is_list = isinstance(weights, (list, tuple))
    return weights is None or (is_list and all(isinstance(w, (int, float)) and math.isfinite(w) for w in weights))
