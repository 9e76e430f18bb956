"""Evaluation: samples and rewards held-out prompts, each once, and leaves the training's state alone."""

import math
from typing import Any

from tqdm.auto import tqdm

from ..data.prompts import PromptSet
from ..distributed.collectives import run_on_all_ranks
from ..logging import get_logger
from ..metrics import MetricLog
from ..seeds import derive_seed
from ..types import Ranks
from .generation import RolloutRunner


logger = get_logger(__name__)


def evaluate_prompts(
    runner: RolloutRunner,
    prompts: PromptSet,
    *,
    num_generations: int,
    batch_size: int | None,
    seed: int,
    ranks: Ranks,
    trainer_state: Any,
    show_progress: bool = False,
) -> dict[str, float]:
    """Sample `num_generations` completions of each prompt once, over all ranks, and reduce their metrics.

    The noise of a prompt follows from `seed` and its row: two evaluations of one run sample the same completions, whatever
    `batch_size` and the number of ranks are.

    Args:
        runner: Samples and rewards.
        prompts: What is evaluated; rank r takes the prompts r, r + world_size, ...
        num_generations: Completions per prompt.
        batch_size: Completions that the engine is asked for at a time (one group at least); None: all of them.
        seed: Of the run.
        ranks: Of the run.
        trainer_state: Shown to reward functions.
        show_progress: Show a bar over the batches.

    Returns:
        TRL's metrics, without a prefix. Those of rewards are NaN if no completion has a reward.

    Raises:
        StopRequested, RunStopped, RuntimeError: See `run_on_all_ranks`.
    """
    metrics, unread = MetricLog(), MetricLog()
    own = range(ranks.rank, len(prompts), ranks.world_size)
    most = -(-len(prompts) // ranks.world_size)  # prompts of a rank
    step = most if batch_size is None else max(1, batch_size // num_generations)
    starts = range(0, most, step)
    for start in tqdm(starts, desc="evaluation", leave=False, disable=not show_progress or len(starts) == 1):
        batch = own[start : start + step]
        # A rank without a prompt left takes the first again: sampling and reward models may be collective
        log = metrics if batch else unread

        def sample(batch: range = batch or range(1), log: MetricLog = log) -> None:
            sampled = runner.run(prompts.prompts(batch), num_generations, derive_seed(seed, "eval"), trainer_state, log)
            log.add_all(sampled.metrics())

        run_on_all_ranks(sample, ranks)
    means = ["reward", *(f"rewards/{name}/mean" for name in runner.rewards.names)]
    reduced = dict.fromkeys(means, math.nan) | metrics.reduce(ranks.gather)
    if math.isnan(reduced["reward"]):
        logger.warning(
            "No completion of the evaluation on %s has a reward: all reward functions returned None or failed (see "
            "rewards/NAME/failures). Its reward is NaN, which counts as no improvement.",
            prompts.name,
        )
    return reduced
