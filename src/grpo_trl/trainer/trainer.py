"""The training loop: what a run is made of, and which mini-batch Trainer gets when.

The route of a completion, from a row of the dataset to the gradient:

    dataset row -> Prompt                      data/prompts.py; in which order, prompt_set.py, prompt_stream.py
    Prompt -> Completion, G of each            rollout/group/engine.py
    Completion -> reward -> advantage          rewards/rewards.py, objective/advantages.py, called by runner.py
    -> GenerationBatch, one MiniBatch a step   generation.py; which rank, distributed/load_balance.py
    MiniBatch -> MicroBatch                    logprobs/packing.py
    MicroBatch -> logprobs                     logprobs/compute.py, through the wrapped model
    logprobs -> loss -> gradient               objective/loss.py, called by update.py
"""

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, cast

import torch
from accelerate.utils import set_seed
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl.trainer.callbacks import SyncRefModelCallback

from ..config import GRPOConfig
from ..config.vllm import sampler_is_old_policy
from ..data.datasets import as_eval_datasets, as_train_dataset
from ..data.schedule import Schedule
from ..distributed.collectives import exchange
from ..distributed.launch import check_devices, check_one_backend, check_ranks, delay_exit, fsdp_was_asked_for
from ..distributed.load_balance import Balancer
from ..distributed.sharding import backend_of
from ..logprobs.comparison import tolerance
from ..metrics import MetricLog
from ..models import context_length, eos_token_ids, has_dropout
from ..objective import Counts, grpo_loss
from ..reliability.guards import DeadRun, RankSummary, check_failures, warn_of_drift
from ..reliability.hints import Hints
from ..reliability.run_state import Stateful, fingerprint
from ..report import merge_tables
from ..rollout.vllm import VLLMEngine
from ..types import Completion, GenerationBatch, MiniBatch
from .advantages import AdvantageFunc
from .arguments import (
    check_callbacks,
    check_functions,
    check_kinds,
    check_names,
    check_not_here,
    check_optimizers,
    choose_metric,
    config_of,
    warn_of_unknown_metric,
)
from .build import (
    make_advantages,
    make_evaluator,
    make_order,
    make_policy,
    make_prompt_limit,
    make_reference,
    make_rewards,
    make_schedule,
)
from .build_vllm import make_ahead, make_weight_sync
from .entropy import EntropyControl
from .evaluation import ComputeMetrics
from .generation import GenerationBatchBuilder
from .memory_budget import MemoryBudget
from .noted import reduce_noted
from .overrides import check_overrides
from .router import RouterBalance, router_coefficient
from .runner import RolloutRunner
from .sampler_check import SamplerCheck
from .timing import StepTimer
from .update import UpdatingTrainer


class GRPOTrainer(UpdatingTrainer):
    """Trains a language model with Group Relative Policy Optimization.

    For each prompt it samples a group of completions, rewards them, and moves the model towards those that were better
    than their group. `args.loss_level` names the published objective; see `grpo_trl.objective.grpo_loss`.

    Args:
        model: The policy: a path or hub name, a `PreTrainedModel`, or a `PeftModel` whose adapter is trained on.
        reward_funcs: One or several reward functions. Each is a callable (sync or async) that takes what it names of
            `prompts`, `completions`, `completion_ids`, `trainer_state`, `log_extra`, `log_metric` and the dataset's
            columns (all of it with `**kwargs`), and returns one number per completion, or None where it does not apply;
            or a sequence-classification model, or the path of one.
        args: The options; those of `GRPOConfig` by default, in the folder `"<model>-GRPO"`.
        train_dataset: Has a column `"prompt"` of strings, or of lists of messages. It may be streamed, with
            `max_steps`. A list of dicts is a dataset too.
        eval_dataset: The same for `evaluate()`; or several by name.
        processing_class: The tokenizer, with an eos token; the one beside the model by default.
        reward_processing_classes: The tokenizers of reward models, in the order of `reward_funcs`.
        callbacks: As in `transformers.Trainer`.
        optimizers: As in `transformers.Trainer`.
        quantization_config: Passed to `from_pretrained` of a model given as a path.
        peft_config: Train a new adapter instead of the weights.
        tools: Not available; call tools from a rollout_func.
        rollout_func: Writes the completions instead of the trainer: `rollout_func(prompts, trainer)` gets every prompt
            `num_generations` times in a row and returns a dict of `"prompt_ids"`, `"completion_ids"`, `"logprobs"` and
            further columns for the rewards, with one entry per row.
        environment_factory: Not available, as tools.
        compute_metrics: Computes further metrics of an evaluation from its `EvaluatedCompletions`, as a dict.
        advantage_func: Computes advantages instead of the trainer: `advantage_func(rewards_per_func, group)` gets the
            rewards of a group's completions, of shape (completions, functions), NaN where a function gave none, and
            their `RewardedGroup`; it returns one number, or a list with one number per token, for each completion.

    Raises:
        ValueError: An option, a dataset, a model or the launch cannot work; the message names what would.
        TypeError: An argument has the wrong type.
    """

    args: GRPOConfig
    model: Any
    processing_class: PreTrainedTokenizerBase

    def __init__(
        self,
        model: str | os.PathLike[str] | PreTrainedModel | PeftModel,
        reward_funcs: Any = None,
        args: GRPOConfig | None = None,
        train_dataset: Dataset | IterableDataset | list[dict[str, Any]] | None = None,
        eval_dataset: Dataset | IterableDataset | list[dict[str, Any]] | dict[str, Any] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase | None] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: Any = None,
        peft_config: PeftConfig | None = None,
        tools: list[Callable[..., Any]] | None = None,
        rollout_func: Callable[[list[Any], Any], dict[str, Any]] | None = None,
        environment_factory: Any = None,
        compute_metrics: ComputeMetrics | None = None,
        advantage_func: AdvantageFunc | None = None,
        **unknown: Any,
    ):
        check_overrides(type(self), GRPOTrainer)
        check_names(unknown, GRPOTrainer)
        check_not_here(tools=tools, environment_factory=environment_factory)
        check_functions(rollout_func, compute_metrics, advantage_func)
        check_kinds(model=model, args=args, processing_class=processing_class, peft_config=peft_config)
        check_callbacks(callbacks)
        check_optimizers(optimizers)
        model = os.fspath(model) if isinstance(model, os.PathLike) else model
        args = config_of(args, model)
        choose_metric(args, callbacks, eval_dataset, compute_metrics is not None)
        check_ranks(args.world_size, fsdp_was_asked_for(args.fsdp), args.device.type)
        delay_exit(args.world_size, args.device.type)
        set_seed(args.seed)  # a new adapter starts from random weights
        policy, tokenizer = make_policy(model, processing_class, peft_config, args, quantization_config)
        rewards = make_rewards(reward_funcs, reward_processing_classes, args)
        super().__init__(
            model=policy,
            args=args,
            data_collator=_only,
            compute_loss_func=grpo_loss,  # not called; Trainer then leaves the division of the loss to us
            train_dataset=as_train_dataset(train_dataset, args.max_steps),
            eval_dataset=as_eval_datasets(eval_dataset),
            processing_class=tokenizer,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        check_one_backend(self.is_deepspeed_enabled, args.deepspeed, os.environ)
        check_devices(args.n_gpu)  # a model that lies on several devices has set it to 1 by now

        self._start_updates()
        self._generation_batch: GenerationBatch | None = None
        self._dead_run = DeadRun(args.dead_run_patience, args.on_dead_run, args.max_completion_length)
        self._evaluator = make_evaluator(self.model, tokenizer, args, self._waits_in_forward)
        self._reference = make_reference(self.model, model, peft_config is not None, args, self.accelerator)
        if args.sync_ref_model and self._reference is not None:
            copy = cast(nn.Module, self._reference.model)
            self.add_callback(SyncRefModelCallback(ref_model=copy, accelerator=self.accelerator))
        rewards.prepare_models(lambda m: self.accelerator.prepare_model(m, device_placement=True, evaluation_mode=True))
        engine = self._make_engine(rollout_func)
        self._sync = make_weight_sync(engine, self.model, args, self._evaluator)
        self._timer = StepTimer(self._train_metrics, syncs=self._sync is not None)
        self.add_callback(self._timer)
        self._ahead = make_ahead(engine, args, self._signals.check)
        self._runner = RolloutRunner(engine, rewards, tokenizer, self._watchdog.phase, self._signals.interruptible)
        functions = dict(zip(self.reward_func_names, self.reward_funcs, strict=True))
        self._hints = Hints(tokenizer, eos_token_ids(self.model, tokenizer), functions)
        self._memory = MemoryBudget(args, self.model, self._evaluator, self._ranks, self._setup)
        self._entropy = EntropyControl(args, self._evaluator, self._ranks)
        router = router_coefficient(args.router_aux_loss_coef, self.model)
        self._router = RouterBalance(router, self._evaluator, self._ranks)
        self._prepare_prompts(own_prompts=rollout_func is None, advantage_func=advantage_func)
        self._record()
        set_seed(args.seed, device_specific=True)  # dropout differs between ranks

    # ---- Construction ----
    def _prepare_prompts(self, own_prompts: bool, advantage_func: AdvantageFunc | None) -> None:
        """Render and check all prompts. With a rollout_func, which may change them, the model's context is no limit."""
        context = context_length(self.model) if own_prompts else None
        if isinstance(engine := self._runner.engine, VLLMEngine):
            context = engine.max_model_length if context is None else min(context, engine.max_model_length)
        self._eval_limit = make_prompt_limit(self.args, context)
        self._eval_prompts = self._prompts_by_name(self.eval_dataset)
        others_may_come = self.compute_metrics is not None or self._runner.rewards.may_log_metrics
        warn_of_unknown_metric(self.args, self._eval_prompts, self._runner.metric_names, others_may_come)
        self._schedule: Schedule | None = None
        if self.train_dataset is None:
            return
        limit = make_prompt_limit(self.args, context, trained_on=own_prompts)
        prompts = self._make_prompts(self.train_dataset, limit, "train_dataset")
        self._schedule = make_schedule(self.args, prompts.count)
        self._order = make_order(self.args, prompts, self._schedule.prompts_per_generation_batch)
        self._builder = GenerationBatchBuilder(
            order=self._order,
            schedule=self._schedule,
            runner=self._runner,
            evaluator=self._evaluator,
            sampler_check=SamplerCheck(self._evaluator, self.args.half_precision, self._ranks),
            balancer=Balancer(self._ranks, partial(exchange, device=self.args.device)),
            reference=self._reference,
            sync=self._sync,
            ahead=self._ahead,
            old_logprobs="sampler" if sampler_is_old_policy(self.args) else "trainer",
            advantages=make_advantages(self.args, self._runner.rewards.weights_F, advantage_func),
            max_completion_length=self.args.max_completion_length,
            mask_truncated=self.args.mask_truncated_completions,
            seed=self.args.seed,
            ranks=self._ranks,
            check=self._check_generation_batch,
            phase=self._watchdog.phase,
        )

    # ---- What Trainer iterates over ----
    def get_train_dataloader(self) -> DataLoader:
        """Return one item per micro-step: its number within the epoch, the same on every rank."""
        if self._schedule is None:
            raise ValueError("train_dataset=None; pass a dataset with a column 'prompt' to train.")
        self._generation_batch = None
        for log in (self._train_metrics, self._noted["train"]):
            log.reduce(list)  # what an earlier train() did not log
        self._nonfinite.count = 0
        if self._resumed is not None:
            self._load_run_state(self._resumed)
            self._generation_batch = self._resumed.generation_batch
        items = cast("torch.utils.data.Dataset[int]", range(self._schedule.items(self.args.max_steps)))
        return DataLoader(items, batch_size=1, collate_fn=_only)

    def num_examples(self, dataloader: DataLoader) -> int:
        """Return the prompts of an epoch; those of all steps of a stream."""
        assert self._schedule is not None
        uses = self._schedule.steps_per_generation * self._schedule.num_iterations
        return len(dataloader) // uses * self._schedule.prompts_per_generation_batch

    def get_batch_samples(
        self, epoch_iterator: Iterator[int], num_batches: int, device: torch.device
    ) -> tuple[list[MiniBatch | None], None]:
        """Return the next optimizer step, all of it in its last micro-step; samples the generation batches it needs.

        Called once per optimizer step. A step that a signal interrupts leaves no trace.
        """
        self._timer.start_step()
        if self.state.global_step >= self.state.max_steps:  # a run that was resumed after its last step
            self.control.should_training_stop = True
            return [], None
        self._between_steps()
        self.model.train()  # reward functions and a rollout_func find it so, before the first step as before any other
        self._memory.choose()
        count = len(list(itertools.islice(epoch_iterator, num_batches)))
        mini_batch = self._next_mini_batch(count)
        self._timer.start_update()
        return [*[None] * (count - 1), mini_batch], None

    def _next_mini_batch(self, micro_steps: int) -> MiniBatch:
        assert self._schedule is not None
        completions: list[Completion] = []
        counts = Counts(0, 0, 0)
        batch, log, tokens, dead_run = self._generation_batch, MetricLog(), 0, self._dead_run.state_dict()
        refs = self._schedule.mini_batches(self.state.global_step, micro_steps)
        for ref in refs:
            if batch is None or batch.index != ref.generation:
                try:
                    batch = self._builder.build(ref.generation, self.model_wrapped, self.state, log)
                except BaseException:
                    self._dead_run.load_state_dict(dead_run)
                    raise
                tokens += batch.tokens
                self._hints.look([c for mini_batch in batch.mini_batches for c in mini_batch], batch.table)
            completions += batch.mini_batches[ref.mini_batch]
            counts += batch.counts[ref.mini_batch]
        self._generation_batch = batch
        self._order.forget(before=refs[0].generation)
        self._train_metrics.drain(log)
        self.state.num_input_tokens_seen += tokens
        return MiniBatch(completions, counts)

    def _check_generation_batch(self, summaries: Sequence[RankSummary]) -> None:
        check_failures(summaries, self.args.max_reward_failure_rate)
        self._dead_run.update(summaries)

    # ---- What survives ----
    def _parts(self) -> dict[str, Stateful]:
        parts: dict[str, Stateful | None] = {
            "prompts": self._order,
            "metrics": self._train_metrics,
            "noted": self._noted["train"],
            "logprobs": self._evaluator,
            "memory": self._memory,
            "entropy": self._entropy,
            "dead_run": self._dead_run,
            "nonfinite": self._nonfinite,
            "reference": self._reference,
            "ahead": self._ahead,
        }
        return {name: part for name, part in parts.items() if part is not None}

    def _fingerprint(self) -> dict[str, Any]:
        assert self._schedule is not None
        run = fingerprint(self._schedule, self._order.fingerprint, self.args.seed, backend_of(self.accelerator))
        # what is sampled ahead belongs to a rank
        ahead = {"generations_ahead": self._ahead.distance, "ranks": self._ranks.world_size} if self._ahead else {}
        return run | ahead | {"trained parameters": self._trained}

    def _generation_batch_in_use(self) -> GenerationBatch | None:
        assert self._schedule is not None
        batch, next_step = self._generation_batch, self._schedule.mini_batches(self.state.global_step, 1)
        return batch if batch is not None and batch.index == next_step[0].generation else None

    def _check_boundary(self) -> None:
        super()._check_boundary()
        self._nonfinite.check()

    # ---- What one sees ----
    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log `logs`; to those of training and of its end, add the metrics since the last time, over all ranks."""
        training, ended = "loss" in logs, "train_loss" in logs
        if training or ended:
            metrics = self._train_metrics.reduce(self._ranks.gather)
            if ended:  # the loss of a few steps, beside that of the run
                metrics.pop("loss", None)
            logs = logs | metrics | {"num_tokens": self.state.num_input_tokens_seen}
            logs |= reduce_noted(self._noted["train"], self._ranks.gather, logs)
            if not (self._schedule is not None and self._schedule.on_policy and has_dropout(self.model)):
                warn_of_drift(logs, tolerance(self.model, self.args.half_precision))
        super().log(logs, start_time)
        if training and self._generation_batch is not None:
            table = self._generation_batch.table
            if self.args.log_completions:
                table = merge_tables(self._ranks.gather([table]))
            if self.is_world_process_zero():
                self._recorder.completions(self.state.global_step, table)


def _only(batch: list[Any]) -> Any:
    """The one item of a batch of one."""
    (item,) = batch
    return item
