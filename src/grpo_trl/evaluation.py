"""Evaluation: sampling and rewarding held-out prompts, each once, and nothing of the training's state."""

import math
from collections.abc import Callable
from typing import Any

from tqdm.auto import tqdm

from .data import PromptSet
from .metrics import MetricLog
from .notices import get_logger
from .rollout import RoundRunner
from .seeds import derive_seed
from .signals import together


logger = get_logger(__name__)


def evaluate_prompts(
    runner: RoundRunner,
    prompts: PromptSet,
    *,
    num_generations: int,
    batch_size: int,
    seed: int,
    rank: int,
    world_size: int,
    trainer_state: Any,
    gather: Callable[[list[Any]], list[Any]],
    show_progress: bool = False,
) -> dict[str, float]:
    """Sample `num_generations` completions of each prompt once, over all ranks, and reduce their metrics.

    The noise of a prompt follows from `seed` and its row: two evaluations of one run draw the same, whatever `batch_size`
    and `world_size` are.

    Args:
        runner: Samples and rewards.
        prompts: What is evaluated; rank r takes the prompts r, r + world_size, ...
        num_generations: Completions per prompt.
        batch_size: Completions that are sampled at a time (one group at least).
        seed: Of the run.
        rank: Of this process.
        world_size: How many there are.
        trainer_state: Shown to reward functions.
        gather: See `MetricLog.reduce`.
        show_progress: Draw a bar.

    Returns:
        TRL's metrics, without a prefix. Those of rewards are NaN if no completion has a reward.

    Raises:
        StopRequested, RunStopped, RuntimeError: See `together`.
    """
    metrics, unread = MetricLog(), MetricLog()
    own = range(rank, len(prompts), world_size)
    step = max(1, batch_size // num_generations)
    most = -(-len(prompts) // world_size)  # prompts of a rank
    for start in tqdm(range(0, most, step), desc="evaluation", leave=False, disable=not show_progress):
        batch = own[start : start + step]
        # A rank that has run out of prompts goes on with the first: sampling and reward models may be collective
        log = metrics if batch else unread

        def sample(batch: range = batch or range(1), log: MetricLog = log) -> None:
            sampled = runner.run(prompts.prompts(batch), num_generations, derive_seed(seed, "eval"), trainer_state, log)
            log.add_all(sampled.metrics())

        together(sample, rank, gather)
    means = ["reward", *(f"rewards/{name}/mean" for name in runner.rewards.names)]
    reduced = dict.fromkeys(means, math.nan) | metrics.reduce(gather)
    if math.isnan(reduced["reward"]):
        logger.warning(
            "No completion of the evaluation on %s has a reward: all reward functions returned None or failed (see "
            "rewards/NAME/failures). Its reward is NaN, which counts as no improvement.",
            prompts.name,
        )
    return reduced
