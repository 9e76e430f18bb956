"""Evaluation: samples and rewards held-out prompts, each once, and leaves the training's state alone; and its engine."""

import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

from datasets import Dataset, IterableDataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import speed_metrics

from ..data.datasets import as_eval_datasets
from ..data.prompts import PromptLimit, Prompts, Share
from ..distributed.collectives import run_on_all_ranks
from ..distributed.sharding import GatheredWeights, move_to_device
from ..logging import get_logger
from ..metrics import MetricLog
from ..model_utils import evaluation_mode, set_optimizer_mode
from ..models import eos_token_ids, num_embeddings
from ..rewards.batch import OWN_ARGUMENTS
from ..rollout.base import RolloutEngine
from ..rollout.rollout_func import RolloutFuncEngine
from ..rollout.vllm.engine import PROBES
from ..seeds import derive_seed
from ..types import Ranks
from .ahead import SamplesAhead
from .build import make_engine, make_prompts
from .build_vllm import make_vllm_engine
from .noted import reduce_noted
from .resumable import ResumableTrainer
from .runner import RewardedRollout, RolloutRunner, make_request, reward_columns
from .weight_sync import WeightSync


logger = get_logger(__name__)

RECORDED_PROMPTS = 64
"""Of an evaluation, whose completions are recorded."""


@dataclass
class EvaluatedCompletions:
    """What `compute_metrics` gets: all completions of an evaluation over all ranks, in the order of the dataset."""

    prompts: list[Any] = field(default_factory=list)
    completions: list[Any] = field(default_factory=list)
    """Strings, or lists of one message for conversational prompts."""
    rewards: list[float] = field(default_factory=list)
    """Weighted sums over the reward functions; NaN where a completion has none."""
    rewards_per_func: dict[str, list[float]] = field(default_factory=dict)
    """By name of the function; NaN where it gave none."""


ComputeMetrics = Callable[[EvaluatedCompletions], dict[str, float]]


def evaluate_prompts(
    runner: RolloutRunner,
    prompts: Prompts,
    *,
    num_generations: int,
    batch_size: int | None,
    seed: int,
    ranks: Ranks,
    trainer_state: Any,
    kept_prompts: int | None = None,
    show_progress: bool = False,
) -> tuple[dict[str, float], EvaluatedCompletions, int]:
    """Sample `num_generations` completions of each prompt once, over all ranks, and reduce their metrics.

    The noise of a prompt follows from `seed` and its row: two evaluations of one run sample the same completions, whatever
    `batch_size` and the number of ranks are.

    Args:
        runner: Samples and rewards.
        prompts: What is evaluated; rank r takes the prompts r, r + world_size, ...
        num_generations: Completions per prompt.
        batch_size: Completions that the engine is asked for at a time (one group at least); None: as many as suit.
        seed: Of the run.
        ranks: Of the run.
        trainer_state: Shown to reward functions.
        kept_prompts: Return the completions of so many prompts, the first of the dataset; of all if None.
        show_progress: Show a bar over the batches.

    Returns:
        TRL's metrics, without a prefix, those of rewards NaN if no completion has a reward; the completions, over all
        ranks; and the number of prompts.

    Raises:
        StopRequested, RunStopped, RuntimeError: See `run_on_all_ranks`.
    """
    rows: list[tuple[Any, ...]] = []
    kept = math.inf if kept_prompts is None else kept_prompts
    metrics, unread = MetricLog(), MetricLog()
    size = None if batch_size is None else max(1, batch_size // num_generations) * ranks.world_size
    number = 0
    for share in _with_progress(prompts.shares(size, ranks), prompts.count, size, show_progress):
        log = metrics if share.indices else unread
        number += len(share.indices)

        def sample(share: Share = share, log: MetricLog = log) -> None:
            sampled = runner.run(share.prompts, num_generations, derive_seed(seed, "eval"), trainer_state, log)
            log.add_all(sampled.metrics())
            if log is metrics:
                rows.extend(row for row in _rows(sampled, share.indices) if row[0] < kept)

        run_on_all_ranks(sample, ranks)
    means = ["reward", *(f"rewards/{name}/mean" for name in runner.rewards.names)]
    reduced = dict.fromkeys(means, math.nan) | metrics.reduce(ranks.gather)
    if math.isnan(reduced["reward"]):
        logger.warning(
            "No completion of the evaluation on %s has a reward: all reward functions returned None or failed (see "
            "rewards/NAME/failures). Its reward is NaN, which counts as no improvement.",
            prompts.name,
        )
    return reduced, _in_order(runner.rewards.names, ranks.gather(rows)), sum(ranks.gather([number]))


def _with_progress(shares: Iterator[Share], count: int | None, size: int | None, show: bool) -> Iterable[Share]:
    """Go through the shares of `size` prompts each, with a bar where there are several."""
    total = None if count is None else math.ceil(count / (size or count))
    return tqdm(shares, desc="evaluation", leave=False, total=total, disable=not show or total == 1)


def _rows(sampled: RewardedRollout, indices: range) -> list[tuple[Any, ...]]:
    """Return (index of the prompt, prompt, completion, reward, reward of each function) of each completion."""
    owners = [index for index in indices for _ in range(sampled.num_generations)]
    rewards = sampled.rewards
    columns = (owners, sampled.prompts, sampled.texts, rewards.total_B.tolist(), rewards.values_BF.tolist())
    return list(zip(*columns, strict=True))


def _in_order(names: list[str], rows: list[tuple[Any, ...]]) -> EvaluatedCompletions:
    """Bring the rows of all ranks into the order of the dataset."""
    evaluated = EvaluatedCompletions(rewards_per_func={name: [] for name in names})
    for _, prompt, completion, reward, by_function in sorted(rows, key=lambda row: row[0]):
        evaluated.prompts.append(prompt)
        evaluated.completions.append(completion)
        evaluated.rewards.append(reward)
        for name, value in zip(names, by_function, strict=True):
            evaluated.rewards_per_func[name].append(value)
    return evaluated


def _computed(
    compute_metrics: ComputeMetrics, evaluated: EvaluatedCompletions, known: Collection[str]
) -> dict[str, float]:
    """Call `compute_metrics`; the evaluation has metrics of the names `known` itself.

    Raises:
        TypeError: It returned no dict of numbers.
        ValueError: It returned a metric that the evaluation has itself.
    """
    computed = compute_metrics(evaluated)
    if not isinstance(computed, dict):
        raise TypeError(
            f"compute_metrics returned a {type(computed).__name__}; it must return a dict of numbers by name."
        )
    for name, value in computed.items():
        if name in known:
            raise ValueError(
                f"compute_metrics returned {name!r}, which the evaluation has itself; choose another name."
            )
        try:
            computed[name] = float(value)
        except (TypeError, ValueError):
            raise TypeError(f"compute_metrics returned {value!r} for {name!r}; it must be a number.") from None
    return computed


class EvaluatingTrainer(ResumableTrainer):
    """A trainer that samples completions with a rollout engine, and evaluates by rewarding them.

    A subclass prepares `_runner`, `_eval_limit` and `_eval_prompts`.
    """

    _runner: RolloutRunner
    _eval_limit: PromptLimit
    _sync: WeightSync | None
    _ahead: SamplesAhead | None
    _eval_prompts: dict[str, Prompts]
    model: Any
    processing_class: PreTrainedTokenizerBase

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._gathered = GatheredWeights()
        self._noted = {"train": MetricLog(), "eval": MetricLog()}

    def _prompts_by_name(self, dataset: Any) -> dict[str, Prompts]:
        """Build what is evaluated on, by name; a single dataset has the name ""."""
        named = {} if dataset is None else dataset if isinstance(dataset, dict) else {"": dataset}
        titles = {name: f"eval_dataset[{name!r}]" if name else "eval_dataset" for name in named}
        return {name: self._make_prompts(one, self._eval_limit, titles[name]) for name, one in named.items()}

    def _make_prompts(self, dataset: Any, limit: PromptLimit, name: str) -> Prompts:
        prompts = make_prompts(dataset, self.processing_class, self.args, limit, name, num_embeddings(self.model))
        if isinstance(self._runner.engine, RolloutFuncEngine):  # whose columns are known when it has been called
            return prompts
        self._runner.rewards.check_columns(reward_columns(prompts.column_names), name)
        if images := [column for column in ("image", "images") if column in prompts.column_names]:
            logger.warning(
                "%s has the column %r, which only reward functions see: the policy reads text.", name, images[0]
            )
        if hidden := [column for column in prompts.column_names if column in OWN_ARGUMENTS]:
            logger.warning(
                "%s has the column %r, which reward functions do not see: the trainer passes an argument of that name.",
                name,
                hidden[0],
            )
        return prompts

    def _make_engine(self, rollout_func: Callable[..., dict[str, Any]] | None) -> RolloutEngine:
        """Build what samples: vLLM, the user's rollout_func, or the engine in this process."""
        ends = eos_token_ids(self.model, self.processing_class)
        if self.args.use_vllm:
            if rollout_func is not None:
                raise ValueError("use_vllm=True samples, and rollout_func does too; set use_vllm=False, or pass none.")
            return make_vllm_engine(self.model, self.processing_class, self.args, ends, self._signals.interruptible)
        if rollout_func is not None:
            tokens = num_embeddings(self.model)
            return RolloutFuncEngine(rollout_func, self, ends, self._signals.interruptible, tokens)
        return make_engine(
            self.model,
            self.processing_class,
            self.args,
            ends,
            context=self._sampling_context,
            check=self._signals.check,
            in_step=self.is_fsdp_enabled or (is_deepspeed_zero3_enabled() and not self.args.ds3_gather_for_generation),
            show_progress=self._shows_progress,
        )

    @contextmanager
    def _sampling_context(self) -> Iterator[None]:
        """Gather the policy's weights, and compute in the precision of training."""
        with self._gathered_policy(), self.accelerator.autocast():
            yield

    def _gathered_policy(self) -> AbstractContextManager[None]:
        return self._gathered.of(self.model_wrapped) if self.args.ds3_gather_for_generation else nullcontext()

    @property
    def _waits_in_forward(self) -> bool:
        """Whether ranks wait for each other in every forward and backward, so that they must make equally many."""
        return self.is_deepspeed_enabled or self.is_fsdp_enabled

    def _shows_progress(self) -> bool:
        """Whether to draw a bar of what is sampled; a subclass shows it in another way."""
        return not self.args.disable_tqdm and self.is_world_process_zero()

    def evaluate(
        self,
        eval_dataset: Dataset | IterableDataset | list[Any] | dict[str, Any] | str | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Sample `num_generations_eval` completions of each prompt once and reward them; training is left as it is.

        Args:
            eval_dataset: Has a column `"prompt"`; or several by name, each of which gets a prefix of its own; or the name
                of one of the constructor's. The constructor's by default.
            ignore_keys: Not used.
            metric_key_prefix: Stands before each metric's name.

        Returns:
            The metrics, `eval_reward` among them; over several datasets it is the mean of theirs.

        Raises:
            ValueError: There is no dataset, or none of this name.
        """
        prompt_sets = self._sets_to_evaluate(eval_dataset)
        metrics: dict[str, float] = {}
        for name, prompts in prompt_sets.items():
            metrics |= self._evaluate_prompts(prompts, f"{metric_key_prefix}_{name}" if name else metric_key_prefix)
        if "" not in prompt_sets:
            rewards = [metrics[f"{metric_key_prefix}_{name}_reward"] for name in prompt_sets]
            mean = {f"{metric_key_prefix}_reward": sum(rewards) / len(rewards)}
            self.log(mean)
            metrics |= mean
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _sets_to_evaluate(self, eval_dataset: Any) -> dict[str, Prompts]:
        if isinstance(eval_dataset, str):
            if eval_dataset not in self._eval_prompts or not eval_dataset:
                names = ", ".join(repr(name) for name in self._eval_prompts if name) or "none with a name"
                raise ValueError(f"eval_dataset={eval_dataset!r} is no dataset of the trainer's; it has {names}.")
            return {"": self._eval_prompts[eval_dataset]}
        sets = self._eval_prompts if eval_dataset is None else self._prompts_by_name(as_eval_datasets(eval_dataset))
        if not sets:
            raise ValueError("eval_dataset=None; pass a dataset with a column 'prompt' to evaluate.")
        return sets

    def _evaluate_prompts(self, prompts: Prompts, prefix: str) -> dict[str, float]:
        self._memory_tracker.start()
        start_time = time.time()
        in_process = self._runner.engine.in_process
        compute_metrics = cast("ComputeMetrics | None", self.compute_metrics)
        if in_process and self._waits_in_forward and self.model_wrapped is self.model:
            move_to_device(self.model, self.args.device, self.args.ds3_gather_for_generation)
        set_optimizer_mode(self.optimizer, training=False)
        self._sync_engine(prompts)
        with evaluation_mode(self.model), self._gathered_policy() if in_process else nullcontext():
            metrics, evaluated, num_prompts = evaluate_prompts(
                self._runner,
                prompts,
                num_generations=self.args.eval_generations,
                batch_size=None if in_process or self._sync else self.args.per_device_eval_batch_size,
                seed=self.args.seed,
                ranks=self._ranks,
                trainer_state=self.state,
                kept_prompts=None if compute_metrics is not None or self.args.log_completions else RECORDED_PROMPTS,
                show_progress=self._shows_progress(),
            )
        if compute_metrics is not None:
            metrics |= _computed(compute_metrics, evaluated, metrics)
        metrics |= reduce_noted(self._noted["eval"], self._ranks.gather, metrics)
        set_optimizer_mode(self.optimizer, training=self.is_in_train)
        metrics = {f"{prefix}_{name}": value for name, value in metrics.items()}
        metrics |= speed_metrics(prefix, start_time, num_samples=num_prompts)
        self.log(metrics)
        self._record_evaluation(prefix, evaluated)
        self._memory_tracker.stop_and_update_metrics(metrics)
        return metrics

    def _record_evaluation(self, name: str, evaluated: EvaluatedCompletions) -> None:
        """A subclass may keep the completions of an evaluation; `name` is the prefix of its metrics."""

    def _sync_engine(self, prompts: Prompts) -> None:
        """Give an engine with weights of its own those of now; what is sampled ahead is from those of its turn."""
        if self._sync is None:
            return
        if self._ahead is not None:
            run_on_all_ranks(self._ahead.wait_for_rewards, self._ranks)
        request = make_request(prompts.first(PROBES), 1, self.args.seed)
        self._sync.run(self.model_wrapped, request, MetricLog())
