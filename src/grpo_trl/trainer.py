"""The training loop: which piece Trainer gets when, and what the loss of a piece is. Everything else has its own room."""

import itertools
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import gather_object, set_seed
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import speed_metrics
from trl.trainer.callbacks import SyncRefModelCallback

from .assembly import make_engine, make_prompts, make_rewards, make_scorer
from .balance import Balancer, exchange
from .config import GRPOConfig
from .data import PromptLimit, PromptSet
from .evaluation import evaluate_prompts
from .guards import DeadRun, NonFinite, Share, check_failures
from .launch import check_devices, check_ranks, deepspeed_was_asked_for, fsdp_was_asked_for, rest_at_exit
from .metrics import Mean, MetricLog, Sum, loss_metrics
from .models import (
    Reference,
    add_adapter,
    context_length,
    disable_dropout,
    eos_token_ids,
    load_policy,
    load_tokenizer,
)
from .objective import Counts, grpo_loss, make_objective
from .policy import Completion, Piece, enable_scoring, evaluation_mode, score, serve_shared_prefix
from .report import append_objective, merge_tables, print_completions, write_completions
from .resumable import ResumableTrainer
from .rollout import RolloutEngine, RolloutFuncEngine, RoundRunner, reward_columns
from .sharding import GatheredWeights, check_sharding, engine_of, place_unprepared, prepare_frozen
from .state import RunState, StepShare, Window, fingerprint, resumed_state
from .windows import WindowMaker


PHASES = ("time/sampling", "time/rewards", "time/scoring", "time/update")


class GRPOTrainer(ResumableTrainer):
    """Trains a language model with Group Relative Policy Optimization.

    For each prompt it samples a group of completions, rewards them, and moves the model towards those that were better
    than their group. `args.loss_level` names the published objective; see `grpo_trl.objective.grpo_loss`.

    Args:
        model: The policy: a path or hub name, a `PreTrainedModel`, or a `PeftModel` whose adapter is trained on.
        reward_funcs: One or several reward functions. Each is a callable (sync or async) that takes what it names of
            `prompts`, `completions`, `completion_ids`, `trainer_state`, `log_extra`, `log_metric` and the dataset's
            columns (all of it with `**kwargs`), and returns one number per completion, or None where it does not apply;
            or a sequence-classification model, or the path of one.
        args: The options; those of `GRPOConfig` by default.
        train_dataset: Has a column `"prompt"` of strings, or of lists of messages.
        eval_dataset: The same for `evaluate()`; or several by name.
        processing_class: The tokenizer, with a pad and an eos token; the one beside the model by default.
        reward_processing_classes: The tokenizers of reward models, in the order of `reward_funcs`.
        callbacks: As in `transformers.Trainer`.
        optimizers: As in `transformers.Trainer`.
        peft_config: Train a new adapter instead of the weights.
        rollout_func: Writes the completions instead of the trainer: `rollout_func(prompts, trainer)` gets every prompt
            `num_generations` times in a row and returns a dict of `"prompt_ids"`, `"completion_ids"`, `"logprobs"` and
            further columns for the rewards, with one entry per row.

    Raises:
        ValueError: An option, a dataset, a model or the launch cannot work; the message names what would.
        TypeError: An argument has the wrong type.
    """

    args: GRPOConfig
    model: Any
    processing_class: PreTrainedTokenizerBase

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        reward_funcs: Any,
        args: GRPOConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase | None] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        peft_config: PeftConfig | None = None,
        rollout_func: Callable[[list[Any], Any], dict[str, Any]] | None = None,
    ):
        args = GRPOConfig() if args is None else args
        check_ranks(args.world_size, fsdp_was_asked_for(args.fsdp), args.device.type)
        rest_at_exit(args.world_size, args.device.type)
        set_seed(args.seed)  # a new adapter starts from random weights
        policy = load_policy(model, args.init_kwargs if isinstance(model, str) or args.model_init_kwargs else {})
        tokenizer = load_tokenizer(processing_class, policy, args.trust_remote_code)
        check_sharding(policy, args.world_size)
        policy = add_adapter(policy, peft_config)
        enable_scoring(policy)
        if isinstance(policy, PeftModel) and args.gradient_checkpointing:
            policy.enable_input_require_grads()
        rewards = make_rewards(reward_funcs, reward_processing_classes, args)
        super().__init__(
            model=policy,
            args=args,
            data_collator=_only,
            compute_loss_func=grpo_loss,  # not called; Trainer then leaves the division of the loss to us
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if self.is_deepspeed_enabled != deepspeed_was_asked_for(args.deepspeed, os.environ):
            raise ValueError(
                f"deepspeed={args.deepspeed!r} says otherwise than an earlier trainer of this process, or "
                "ACCELERATE_USE_DEEPSPEED in its environment. Give all trainers deepspeed=..., or none, or start another "
                "process."
            )
        check_devices(args.n_gpu)  # a model that lies on several devices has set it to 1 by now
        if args.disable_dropout:
            disable_dropout(self.model)
        self.model.add_model_tags(["grpo_trl", "grpo"])

        self._objective = make_objective(
            args.loss_level, epsilon=args.epsilon, epsilon_high=args.epsilon_high, beta=args.beta
        )
        self._metrics, self._step_metrics = MetricLog(), MetricLog()
        self._window: Window | None = None
        self._gathered = GatheredWeights()
        self._timer = _StepTimer(self._metrics)
        self.add_callback(self._timer)
        self._dead_run = DeadRun(args.dead_run_patience, args.on_dead_run, args.max_completion_length)
        self._nonfinite = NonFinite(args.max_nonfinite_steps)
        self._scorer = make_scorer(self.model, tokenizer, args, self._waits_in_forward)
        reload = partial(load_policy, model, args.init_kwargs) if isinstance(model, str) else None
        self._prepare_reference(new_adapter=peft_config is not None, reload=reload)
        rewards.prepare_models(lambda m: self.accelerator.prepare_model(m, device_placement=True, evaluation_mode=True))
        self._runner = RoundRunner(
            self._make_engine(rollout_func),
            rewards,
            tokenizer,
            watch=self._watchdog.phase,
            breaking_in=self._signals.breaking_in,
        )
        self._prepare_prompts(writes_prompts=rollout_func is not None)
        set_seed(args.seed, device_specific=True)  # dropout differs between ranks

    # ---- Construction ----
    @property
    def _waits_in_forward(self) -> bool:
        """Whether ranks wait for each other in every forward and backward, so that they must make equally many."""
        return self.is_deepspeed_enabled or self.is_fsdp_enabled

    def _prepare_reference(self, new_adapter: bool, reload: Callable[[], nn.Module] | None) -> None:
        self._reference: Reference | None = None
        if not self.args.beta:
            return
        self._reference = Reference(self.model, new_adapter, reload)
        if self._reference.model is not None:
            self._reference.model = prepare_frozen(self._reference.model, self.accelerator)
        if self.args.sync_ref_model:
            if self._reference.model is None:
                raise ValueError(
                    "sync_ref_model=True works on a copy of all weights, which an adapter does not have; set "
                    "sync_ref_model=False, or train without LoRA."
                )
            if is_deepspeed_zero3_enabled() or self.is_fsdp_enabled:
                raise ValueError(
                    "sync_ref_model=True needs weights that are whole on each rank, which ZeRO-3 and FSDP shard; use "
                    "ZeRO-2, or set sync_ref_model=False."
                )
            self.add_callback(SyncRefModelCallback(ref_model=self._reference.model, accelerator=self.accelerator))

    def _prepare_prompts(self, writes_prompts: bool) -> None:
        context = None if writes_prompts else context_length(self.model)
        self._eval_limit = self.args.prompt_limit(context)
        self._eval_prompts = self._prompt_sets(self.eval_dataset)
        if self.train_dataset is None:
            return
        limit = self.args.prompt_limit(context, trained_on=not writes_prompts)
        prompts = self._make_prompts(self.train_dataset, limit, "train_dataset")
        self._schedule = self.args.schedule(len(prompts))
        self._schedule.check()
        self._windows = WindowMaker(
            prompts=prompts,
            schedule=self._schedule,
            runner=self._runner,
            scorer=self._scorer,
            balancer=Balancer(self.args.process_index, gather_object, partial(exchange, device=self.args.device)),
            reference=self._reference,
            scale_rewards=self.args.scale_rewards,
            seed=self.args.seed,
            rank=self.args.process_index,
            gather=gather_object,
            check=self._check_window,
            watch=self._watchdog.phase,
        )

    def _prompt_sets(self, dataset: Dataset | dict[str, Dataset] | None) -> dict[str, PromptSet]:
        """What is evaluated on, by name; a single dataset has the name ""."""
        parts = {} if dataset is None else dataset if isinstance(dataset, dict) else {"": dataset}
        titles = {name: f"eval_dataset[{name!r}]" if name else "eval_dataset" for name in parts}
        return {name: self._make_prompts(part, self._eval_limit, titles[name]) for name, part in parts.items()}

    def _make_prompts(self, dataset: Dataset, limit: PromptLimit, name: str) -> PromptSet:
        prompts = make_prompts(dataset, self.processing_class, self.args, limit, name)
        if not isinstance(self._runner.engine, RolloutFuncEngine):  # whose columns are known when it has been called
            self._runner.rewards.check_columns(reward_columns(prompts.dataset.column_names), name)
        return prompts

    def _make_engine(self, rollout_func: Callable[..., dict[str, Any]] | None) -> RolloutEngine:
        ends = eos_token_ids(self.model, self.processing_class)
        if rollout_func is not None:
            return RolloutFuncEngine(rollout_func, self, ends, self._signals.breaking_in)
        return make_engine(
            self.model,
            self.processing_class,
            self.args,
            ends,
            context=self._whole_policy,
            check=self._signals.check,
            in_step=self.is_fsdp_enabled or (is_deepspeed_zero3_enabled() and not self.args.ds3_gather_for_generation),
            show_progress=self._shows_progress,
        )

    @contextmanager
    def _whole_policy(self) -> Iterator[None]:
        """What the trainer's own engine runs in."""
        with self._gathered_policy(), self.accelerator.autocast():
            yield

    def _gathered_policy(self) -> AbstractContextManager[None]:
        return self._gathered.of(self.model_wrapped) if self.args.ds3_gather_for_generation else nullcontext()

    @property
    def _shows_progress(self) -> bool:
        return not self.args.disable_tqdm and self.is_world_process_zero()

    # ---- What Trainer iterates over ----
    def get_train_dataloader(self) -> DataLoader:
        """One item per micro-step: its number within the epoch, the same on every rank."""
        if self.train_dataset is None:
            raise ValueError("train_dataset=None; pass a dataset with a column 'prompt' to train.")
        self._window = None
        self._metrics.reduce(list)  # what an earlier train() did not log
        self._nonfinite.count = 0
        if self._resumed is not None:
            self._load_run_state(self._resumed)
        items = cast("torch.utils.data.Dataset[int]", range(self._schedule.items_per_epoch))
        return DataLoader(items, batch_size=1, collate_fn=_only)

    def num_examples(self, dataloader: DataLoader) -> int:
        """Prompts of an epoch."""
        return self._schedule.windows_per_epoch * self._schedule.prompts_per_window

    def get_batch_samples(
        self, epoch_iterator: Iterator[int], num_batches: int, device: torch.device
    ) -> tuple[list[StepShare | None], None]:
        """The next optimizer step: all of it comes in its last micro-step. Samples the windows that it needs.

        Called once a step. One that is not finished, because a signal comes, leaves no trace.
        """
        self._timer.start_step()
        if self.state.global_step >= self.state.max_steps:  # a run that was resumed after its last step
            self.control.should_training_stop = True
            return [], None
        self._between_steps()
        count = len(list(itertools.islice(epoch_iterator, num_batches)))
        completions: list[Completion] = []
        window, log, tokens, dead = self._window, MetricLog(), 0, self._dead_run.counts
        for place in self._schedule.places(self.state.global_step, count):
            if window is None or window.index != place.window:
                try:
                    window = self._windows.make(place.window, self.model_wrapped, self.state, log)
                except BaseException:
                    self._dead_run.counts = dead
                    raise
                tokens += window.tokens
            completions += window.parts[place.part]
        self._window = window
        self._metrics.take(log)
        self.state.num_input_tokens_seen += tokens
        self._timer.start_update()
        step = StepShare(completions, count * self.args.per_device_train_batch_size * self.args.world_size)
        return [*[None] * (count - 1), step], None

    def _check_window(self, shares: Sequence[Share]) -> None:
        check_failures(shares, self.args.max_reward_failure_rate)
        self._dead_run.see(shares)

    # ---- The loss ----
    def training_step(  # type: ignore[override]  # what Trainer passes on is an optimizer step, or None before it
        self, model: nn.Module, inputs: StepShare | None, num_items_in_batch: Any = None
    ) -> Tensor:
        """Forward and backward of an optimizer step's completions, piece by piece; the sum of the losses."""
        if inputs is None:
            return torch.zeros((), device=self.args.device)
        completions = inputs.completions
        with self._watchdog.phase("the update"):
            loss = self._scorer.in_pieces(
                completions, inputs.num_completions, lambda pieces: self._backward(model, pieces), undo=model.zero_grad
            )
        self._metrics.take(self._step_metrics)
        self._metrics.add("loss", Mean.of(loss))
        self._metrics.add("policy_signal", Mean(0.0, len(completions) - len(self._scorer.informative(completions))))
        self._step = completions, loss
        return loss

    def _backward(self, model: nn.Module, pieces: list[Piece]) -> Tensor:
        """Under DDP only the last piece synchronises gradients. It is empty, so that until then no rank waits for another.

        Engines that shard weights or gradients do so for each piece, and never hold whole gradients longer.
        """
        self._step_metrics = MetricLog()
        self._step_flos = 0.0
        loss = torch.zeros((), device=self.args.device)
        if self.args.world_size > 1 and not self._waits_in_forward:
            pieces = [*pieces, self._scorer.packer.piece([], pieces[0].num_completions)]
        for place, piece in enumerate(pieces, start=1):
            last = place == len(pieces)
            self.accelerator.gradient_state._set_sync_gradients(last)
            with (
                nullcontext() if last or self._waits_in_forward else self.accelerator.no_sync(model),
                serve_shared_prefix(model) if piece.layout else nullcontext(),  # for what the backward pass recomputes
            ):
                loss = loss + super().training_step(model, piece)  # type: ignore[arg-type]
            self._step_flos += super().floating_point_ops({"input_ids": piece.input_ids_RS})
        return loss

    def compute_loss(  # type: ignore[override]  # what Trainer passes on is a piece
        self, model: nn.Module, inputs: Piece, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """The piece's share of the optimizer step's loss; its gradient averages over ranks, as DDP and ZeRO do."""
        scores = score(model, inputs, self.args.temperature)
        output = grpo_loss(
            scores.logps_BT,
            scores.logps_BT.detach() if inputs.old_logps_BT is None else inputs.old_logps_BT,
            inputs.advantages_B,
            inputs.mask_BT,
            objective=self._objective,
            ref_logps_BT=inputs.ref_logps_BT,
        )
        self._step_metrics.add_all(loss_metrics(output, scores, inputs))
        divisor = self._objective.aggregation.divisor(Counts(inputs.num_completions))
        return output.loss * self.args.world_size / divisor

    def _prepare_inputs(self, inputs: Piece) -> Piece:  # type: ignore[override]
        return inputs  # on the device already, in the precision that it needs

    def _track_num_input_tokens(self, inputs: StepShare | None) -> None:
        """Tokens are counted when a window is sampled."""

    def floating_point_ops(self, inputs: StepShare | None) -> float:  # type: ignore[override]
        return self._step_flos if inputs else 0.0

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Called between clipping and the update, which is skipped here if it is not finite."""
        grad_norm = super()._get_grad_norm(model, grad_norm)
        if isinstance(grad_norm, DTensor):  # under FSDP2
            grad_norm = grad_norm.full_tensor()
        completions, loss = self._step
        if self.args.fp16:
            grad_norm_seen = None  # overflows at times; the loss scale is lowered then, and the step skipped
        elif self.is_deepspeed_enabled and self.accelerator.optimizer_step_was_skipped:
            grad_norm_seen = math.inf  # the engine has stepped by now, or has found out and not stepped
        else:
            grad_norm_seen = grad_norm
        if self._nonfinite.see(loss, grad_norm_seen, self.accelerator.reduce):
            self._metrics.add("nonfinite_steps", Sum(float(self.is_world_process_zero())))
            if self._nonfinite.exhausted and not self._waits_in_forward:
                self._nonfinite.culprits = gather_object(self._culprits(model, completions))
            model.zero_grad()
        return grad_norm

    def _culprits(self, model: nn.Module, completions: Sequence[Completion]) -> list[str]:
        """Which of this rank's completions have a loss or a gradient that is not finite, each by itself."""
        found = []
        for completion in self._scorer.informative(completions):
            model.zero_grad()
            piece = self._scorer.packer.piece([completion], len(completions))
            with (
                self.accelerator.no_sync(model),
                serve_shared_prefix(model) if piece.layout else nullcontext(),
            ):
                loss = super().training_step(model, piece)  # type: ignore[arg-type]
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            if not all(bool(values.isfinite().all()) for values in (loss, *gradients)):
                found.append(repr(self.processing_class.decode(completion.prompt_ids + completion.ids)))
        return found

    # ---- What survives ----
    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `ResumableTrainer.save_model`; of a continued adapter, without the copy that is its reference."""
        with nullcontext() if self._reference is None else self._reference.left_out():
            super().save_model(output_dir, _internal_call)

    def _run_state(self) -> RunState:
        next_window = self._schedule.places(self.state.global_step, 1)[0].window
        in_use = self._window is not None and self._window.index == next_window
        reference = self._moving_reference()
        return RunState(
            schedule=self._fingerprint(),
            world_size=self.args.world_size,
            window=self._window if in_use else None,
            metrics=self._metrics.state(),
            scoring=self._scorer.state(),
            guards={
                "dead_run": self._dead_run.counts,
                "nonfinite": 0 if self._nonfinite.exhausted else self._nonfinite.count,  # else none could be resumed
            },
            reference=reference.state_dict() if reference is not None and self.is_world_process_zero() else None,
        )

    def _load_run_state(self, state: RunState) -> None:
        self._window = state.window
        self._metrics.load_state(state.metrics)
        self._scorer.load_state(state.scoring)
        self._dead_run.counts = state.guards["dead_run"]
        self._nonfinite.count = state.guards["nonfinite"]
        reference = self._moving_reference()
        if reference is not None and state.reference is not None:
            reference.load_state_dict(state.reference)

    def _read_run_state(self, folder: Path) -> RunState:
        return resumed_state(folder, self.args.process_index, self.args.world_size, self._fingerprint())

    def _fingerprint(self) -> dict[str, Any]:
        return fingerprint(self._schedule, self._windows.prompts.digest, self.args.seed, engine_of(self.accelerator))

    def _moving_reference(self) -> nn.Module | None:
        """A reference whose weights change, so that they belong into a checkpoint."""
        if not self.args.sync_ref_model or self._reference is None:
            return None
        return self.accelerator.unwrap_model(self._reference.model)

    def _check_boundary(self) -> None:
        self._nonfinite.check()

    # ---- What one sees ----
    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log `logs`; to those of training, add the metrics since the last time, over all ranks."""
        training = "loss" in logs
        if training:
            logs = logs | self._metrics.reduce(gather_object) | {"num_tokens": self.state.num_input_tokens_seen}
        super().log(logs, start_time)
        if training and self.args.log_completions and self._window is not None:
            self._log_completions(self._window)

    def _log_completions(self, window: Window) -> None:
        table = merge_tables(gather_object([window.table]), unique_prompts=self.args.log_unique_prompts)
        if not self.is_world_process_zero():
            return
        print_completions(table, self.state.global_step, self.args.num_completions_to_print)
        path = Path(str(self.args.output_dir)) / "completions" / f"completions_{self.state.global_step:05d}.parquet"
        write_completions({"step": [self.state.global_step] * len(table["prompt"])} | table, path)

    def evaluate(
        self,
        eval_dataset: Dataset | dict[str, Dataset] | str | None = None,
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
            The metrics, `eval_reward` among them.
        """
        if isinstance(eval_dataset, str):
            prompt_sets = {"": self._eval_prompts[eval_dataset]}
        else:
            prompt_sets = self._eval_prompts if eval_dataset is None else self._prompt_sets(eval_dataset)
        if not prompt_sets:
            raise ValueError("eval_dataset=None; pass a dataset with a column 'prompt' to evaluate.")
        metrics: dict[str, float] = {}
        for name, prompts in prompt_sets.items():
            metrics |= self._evaluate_prompts(prompts, f"{metric_key_prefix}_{name}" if name else metric_key_prefix)
        return metrics

    def _evaluate_prompts(self, prompts: PromptSet, prefix: str) -> dict[str, float]:
        self._memory_tracker.start()
        start_time = time.time()
        own_engine = not isinstance(self._runner.engine, RolloutFuncEngine)
        if own_engine and self._waits_in_forward and self.model_wrapped is self.model:
            place_unprepared(self.model, self.args.device, self.args.ds3_gather_for_generation)
        # once for the whole evaluation, where the trainer would else gather for each batch
        with evaluation_mode(self.model), self._gathered_policy() if own_engine else nullcontext():
            metrics = evaluate_prompts(
                self._runner,
                prompts,
                num_generations=self.args.eval_generations,
                batch_size=self.args.per_device_eval_batch_size,
                seed=self.args.seed,
                rank=self.args.process_index,
                world_size=self.args.world_size,
                trainer_state=self.state,
                gather=gather_object,
                show_progress=self._shows_progress,
            )
        metrics = {f"{prefix}_{name}": value for name, value in metrics.items()}
        metrics |= speed_metrics(prefix, start_time, num_samples=len(prompts))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._memory_tracker.stop_and_update_metrics(metrics)
        return metrics

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Trainer's model card, with the objective and its papers."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            append_objective(Path(str(self.args.output_dir)) / "README.md", self.args.loss_level)


class _StepTimer(TrainerCallback):
    """Measures an optimizer step and the part of it that is the update; counts a step for every phase."""

    def __init__(self, metrics: MetricLog):
        self.metrics = metrics
        self.step_start = self.update_start = 0.0

    def start_step(self) -> None:
        self.step_start = time.perf_counter()

    def start_update(self) -> None:
        self.update_start = time.perf_counter()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.device.type != "cpu":
            torch.accelerator.synchronize()  # the update may still be running, and would count as the next sampling
        now = time.perf_counter()
        self.metrics.add("step_time", Mean(now - self.step_start))
        self.metrics.add("time/update", Mean(now - self.update_start, 0.0))
        for phase in PHASES:
            self.metrics.add(phase, Mean(0.0, 1.0))


def _only(batch: list[Any]) -> Any:
    """The one item of a batch of one."""
    (item,) = batch
    return item
