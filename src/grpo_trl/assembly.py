"""The parts of a run that follow from its configuration."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from accelerate.utils import gather_object
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from .config import GRPOConfig
from .data import PromptLimit, PromptSet
from .policy import Packer
from .rewards import Rewards
from .rollout import GroupEngine
from .scoring import Scorer
from .sharding import check_whole, loading_whole


def make_rewards(reward_funcs: Any, processing_classes: Any, args: GRPOConfig) -> Rewards:
    """All reward functions, and where they run.

    A reward model is whole on each rank, which judges its own completions: it would wait for others if it were sharded.
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
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, args: GRPOConfig, limit: PromptLimit, name: str
) -> PromptSet:
    """The prompts of the dataset that came as the argument `name`."""
    return PromptSet(
        dataset,
        tokenizer,
        limit,
        chat_template_kwargs=args.template_kwargs,
        prompt_only=args.remove_unused_columns,
        name=name,
    )


def make_scorer(model: Any, tokenizer: PreTrainedTokenizerBase, args: GRPOConfig, waits_in_forward: bool) -> Scorer:
    """How `model`, not wrapped yet, is scored; ranks may wait for each other in every forward of it."""
    assert tokenizer.pad_token_id is not None
    packer = Packer(
        batch_size=args.per_device_train_batch_size,
        max_tokens=args.max_tokens_per_piece,
        pad_token_id=tokenizer.pad_token_id,
        device=args.device,
        gather=(lambda number: gather_object([number])) if waits_in_forward else (lambda number: [number]),
    )
    return Scorer(
        model,
        packer,
        shared_prefix=args.shared_prefix,
        temperature=args.temperature,
        mixed_precision=args.half_precision,
        needs_all=args.beta > 0,
        gather=gather_object,
        recovers=not waits_in_forward,
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
    show_progress: bool,
) -> GroupEngine:
    """What writes the completions; see `GroupEngine`."""
    assert tokenizer.pad_token_id is not None
    return GroupEngine(
        model,
        args.sampling_options(tokenizer.pad_token_id, eos_token_ids),
        max_rows_in_flight=args.max_rows_in_flight,
        tokenizer=tokenizer,
        context=context,
        mixed_precision=args.half_precision,
        gather=gather_object,
        show_progress=show_progress,
        check=check,
        in_step=in_step,
    )
