"""Builds the parts of a run from its configuration."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, cast

from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import IterableDataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..config import GRPOConfig
from ..data.prompt_set import EpochOrder, PromptSet
from ..data.prompt_stream import PromptStream, StreamOrder
from ..data.prompts import CONTEXT, PromptLimit, PromptOrder, Prompts
from ..data.schedule import Schedule
from ..distributed.launch import fsdp_was_asked_for
from ..distributed.sharding import (
    check_exchangeable,
    check_sharding,
    check_whole,
    loading_whole,
    prepare_frozen,
    unsharded,
)
from ..logprobs.evaluator import LogprobEvaluator
from ..logprobs.head import enable_logprobs
from ..logprobs.packing import Packer
from ..models import (
    add_adapter,
    check_checkpointing,
    compute_head_in_float32,
    disable_dropout,
    load_policy,
    load_tokenizer,
    train_in_float32,
)
from ..reference import Reference
from ..rewards import Rewards
from ..rollout.base import SamplingOptions
from ..rollout.group.engine import GroupEngine
from ..types import Ranks
from .advantages import AdvantageFunc, FunctionRule, GdpoRule, GroupRule
from .generation import Advantages
from .router import router_coefficient
from .runner import RewardedRollout


def make_ranks(args: GRPOConfig) -> Ranks:
    """Return this process among those of the run."""
    return Ranks(args.process_index, args.world_size, gather_object)


def make_policy(
    model: Any,
    processing_class: Any,
    peft_config: PeftConfig | None,
    args: GRPOConfig,
    quantization_config: Any = None,
) -> tuple[Any, PreTrainedTokenizerBase]:
    """Load the policy and its tokenizer, add the adapter, and let its forward compute logprobs.

    Raises:
        ValueError: `quantization_config` is given twice.
    """
    settings = args.init_kwargs if isinstance(model, str) else cast("dict[str, Any]", args.model_init_kwargs or {})
    if quantization_config is not None:
        if "quantization_config" in settings:
            raise ValueError(
                "quantization_config is an argument and in model_init_kwargs too; pass the argument alone."
            )
        settings = settings | {"quantization_config": quantization_config}
    halved = isinstance(model, str) and peft_config is not None and _freezes_in_half(args, settings)
    if halved:
        settings = {"dtype": "bfloat16" if args.bf16 else "float16"} | settings
    policy = load_policy(model, settings)
    revision = settings.get("revision") if isinstance(model, str) else None
    tokenizer = load_tokenizer(processing_class, policy, args.trust_remote_code, revision)
    check_sharding(policy, args.world_size)
    policy = add_adapter(policy, peft_config)
    if halved:
        train_in_float32(policy)
    if args.cast_lm_head_to_fp32:
        compute_head_in_float32(policy)
    enable_logprobs(policy)
    if args.disable_dropout:
        disable_dropout(policy)
    policy.add_model_tags(["grpo_trl", "grpo"])
    if args.gradient_checkpointing:
        check_checkpointing(policy)
        if isinstance(policy, PeftModel):
            policy.enable_input_require_grads()
    return policy, tokenizer


def _freezes_in_half(args: GRPOConfig, settings: dict[str, Any]) -> bool:
    """Whether a frozen base is loaded in the precision that the policy computes in; other backends cast it themselves."""
    chosen = {"dtype", "quantization_config"} & set(settings)
    sharded = args.deepspeed_plugin is not None or fsdp_was_asked_for(args.fsdp)
    return args.half_precision and not chosen and not sharded


def make_reference(
    policy: Any, model: Any, new_adapter: bool, args: GRPOConfig, accelerator: Accelerator
) -> Reference | None:
    """Freeze the policy as it is before training; None without a KL term. `model` is the trainer's argument."""
    if not args.beta:
        return None
    reload = partial(_load_again, model, args) if isinstance(model, str) else None
    reference = Reference(policy, new_adapter, reload, moves=args.sync_ref_model, unsharded=unsharded)
    check_exchangeable(reference.replaces_parameters, accelerator)
    if reference.model is not None:
        reference.model = prepare_frozen(reference.model, accelerator, moves=args.sync_ref_model)
    return reference


def _load_again(path: str, args: GRPOConfig) -> nn.Module:
    """Load the policy as it was at first."""
    policy = load_policy(path, args.init_kwargs)
    if args.cast_lm_head_to_fp32:
        compute_head_in_float32(policy)
    return policy


def make_rewards(reward_funcs: Any, processing_classes: Any, args: GRPOConfig) -> Rewards:
    """Build all reward functions, and the workers they run in.

    A reward model is unsharded on each rank, which rewards its own completions: sharded, it would wait for other ranks.
    """
    for func in reward_funcs if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]:
        if isinstance(func, nn.Module):
            check_whole(func, f"The reward model {type(func).__name__}")
    with loading_whole():
        return Rewards(
            reward_funcs,
            args.reward_weights,
            processing_classes,
            model_init_kwargs=args.init_kwargs,
            chat_template_kwargs=args.template_kwargs,
            batch_size=args.per_device_train_batch_size,
            workers=args.reward_workers,
            timeout=args.reward_timeout,
            retries=args.reward_retries,
            memory_limit=int(args.reward_memory_limit * 2**30),
            on_error=args.on_reward_error,
        )


def make_prompts(
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase,
    args: GRPOConfig,
    limit: PromptLimit,
    name: str,
    tokens: int | None,
) -> Prompts:
    """Build the prompts of the dataset that was passed as the argument `name`, for a model of so many `tokens`."""
    kind = PromptStream if isinstance(dataset, IterableDataset) else PromptSet
    return kind(
        dataset,
        tokenizer,
        limit,
        chat_template_kwargs=args.template_kwargs,
        prompt_only=args.remove_unused_columns,
        name=name,
        num_embeddings=tokens,
    )


def make_prompt_limit(args: GRPOConfig, context: int | None, trained_on: bool = False) -> PromptLimit:
    """Return how long a prompt may be in a model of `context` positions (None: unknown, no limit).

    Prompts that are `trained_on` must fit into `max_tokens_per_micro_batch` too.

    Raises:
        ValueError: `max_completion_length` fills the context.
    """
    length = args.max_completion_length
    if context is not None and length >= context:
        raise ValueError(
            f"max_completion_length={length} leaves no room for a prompt in the model's context of {context} tokens; "
            f"use at most {context - 1}, less the length of the prompts."
        )
    limits = {
        CONTEXT: context,
        "max_tokens_per_micro_batch": args.max_tokens_per_micro_batch if trained_on else None,
    }
    name, limit = min(limits.items(), key=lambda item: math.inf if item[1] is None else item[1])
    return PromptLimit(None if limit is None else limit - length, length, args.prompt_overflow, name)


def make_schedule(args: GRPOConfig, num_prompts: int | None) -> Schedule:
    """Build the schedule of a run over `num_prompts` prompts; None: over a stream.

    Raises:
        ValueError: They do not fill a generation batch.
    """
    assert args.steps_per_generation is not None
    schedule = Schedule(
        num_prompts=num_prompts,
        num_generations=args.num_generations,
        batch_size=args.per_device_train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        steps_per_generation=args.steps_per_generation,
        num_iterations=args.num_iterations,
        world_size=args.world_size,
    )
    schedule.check()
    return schedule


def make_order(args: GRPOConfig, prompts: Prompts, prompts_per_generation_batch: int) -> PromptOrder:
    """Choose the order in which `prompts` are trained on."""
    seed = args.seed if args.data_seed is None else args.data_seed
    if isinstance(prompts, PromptStream):
        return StreamOrder(prompts, prompts_per_generation_batch, seed, args.shuffle_dataset)
    assert isinstance(prompts, PromptSet)
    return EpochOrder(prompts, prompts_per_generation_batch, seed, args.shuffle_dataset)


def make_advantages(
    args: GRPOConfig, weights_F: Tensor, func: AdvantageFunc | None
) -> Callable[[RewardedRollout, Tensor], Advantages]:
    """Choose how completions get their advantages; `weights_F` are those of the reward functions."""
    if func is not None:
        return FunctionRule(func, make_ranks(args))
    if args.multi_objective_aggregation == "normalize_then_sum":
        return GdpoRule(weights_F, make_ranks(args))
    return GroupRule(args.scale_rewards)


def make_evaluator(
    model: Any, tokenizer: PreTrainedTokenizerBase, args: GRPOConfig, waits_in_forward: bool
) -> LogprobEvaluator:
    """Build what computes logprobs of `model`, not wrapped yet; ranks may wait for each other in every forward of it."""
    assert tokenizer.pad_token_id is not None
    balances_experts = router_coefficient(args.router_aux_loss_coef, model) != 0
    packer = Packer(
        batch_size=None if args.max_tokens_per_micro_batch else args.per_device_train_batch_size,
        max_tokens=args.max_tokens_per_micro_batch,
        pad_token_id=tokenizer.pad_token_id,
        device=args.device,
        reads_all=balances_experts,
        ranks=make_ranks(args) if waits_in_forward else Ranks(),
    )
    return LogprobEvaluator(
        model,
        packer,
        shared_prefix=args.shared_prefix,
        temperature=args.temperature,
        mixed_precision=args.half_precision,
        needs_all=args.beta > 0 or args.has_entropy_bonus or balances_experts,
        ranks=make_ranks(args),
        recovers=not waits_in_forward,
    )


def make_sampling_options(
    args: GRPOConfig, tokenizer: PreTrainedTokenizerBase, eos_token_ids: tuple[int, ...]
) -> SamplingOptions:
    """Collect the options of sampling."""
    assert tokenizer.pad_token_id is not None
    return SamplingOptions(
        max_completion_length=args.max_completion_length,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_ids=eos_token_ids,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        generation_kwargs=cast("dict[str, Any]", args.generation_kwargs or {}),
    )


def make_engine(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    args: GRPOConfig,
    eos_token_ids: tuple[int, ...],
    *,
    context: Callable[[], AbstractContextManager[None]],
    check: Callable[[], None],
    in_step: bool,
    show_progress: Callable[[], bool],
) -> GroupEngine:
    """Build the rollout engine; see `GroupEngine`."""
    return GroupEngine(
        model,
        make_sampling_options(args, tokenizer, eos_token_ids),
        max_rows_in_flight=args.max_rows_in_flight,
        tokenizer=tokenizer,
        context=context,
        mixed_precision=args.half_precision,
        gather=gather_object,
        show_progress=show_progress,
        check=check,
        in_step=in_step,
        speculative_ngrams=args.speculative_ngrams,
    )
