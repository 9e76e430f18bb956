"""The training loop: which piece Trainer gets when, and what the loss of a piece is. Everything else has its own room."""

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import gather_object, set_seed
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import speed_metrics
from trl.trainer.callbacks import SyncRefModelCallback

from .config import GRPOConfig
from .data import PromptLimit, PromptSet
from .evaluation import evaluate_prompts
from .launch import check_launch, gathered_weights
from .metrics import Mean, MetricLog, loss_metrics
from .models import (
    Reference,
    add_adapter,
    context_length,
    disable_dropout,
    eos_token_ids,
    load_policy,
    load_tokenizer,
)
from .objective import group_advantages, grpo_loss
from .policy import Completion, Packer, Piece, enable_scoring, evaluation_mode, score, serve_shared_prefix
from .report import append_objective, merge_tables, print_completions, write_completions
from .rewards import Rewards
from .rollout import GroupEngine, RolloutEngine, RolloutFuncEngine, Round, RoundRunner
from .scoring import Scorer
from .seeds import derive_seed
from .state import Window


PHASES = ("time/sampling", "time/rewards", "time/scoring", "time/update")


class GRPOTrainer(Trainer):
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
        set_seed(args.seed)  # a new adapter starts from random weights
        policy = load_policy(model, args.init_kwargs if isinstance(model, str) or args.model_init_kwargs else {})
        tokenizer = load_tokenizer(processing_class, policy, args.trust_remote_code)
        policy = add_adapter(policy, peft_config)
        enable_scoring(policy)
        if isinstance(policy, PeftModel) and args.gradient_checkpointing:
            policy.enable_input_require_grads()
        rewards = Rewards(
            reward_funcs,
            args.reward_weights,
            reward_processing_classes,
            model_init_kwargs=args.init_kwargs,
            chat_template_kwargs=args.template_kwargs,
            batch_size=args.per_device_train_batch_size,
        )
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
        check_launch(args.n_gpu, args.world_size)  # a model that lies on several devices has set n_gpu to 1 by now
        if args.disable_dropout:
            disable_dropout(self.model)
        self.model.add_model_tags(["grpo_trl", "grpo"])

        self._metrics = MetricLog()
        self._window: Window | None = None
        self._timer = _StepTimer(self._metrics)
        self.add_callback(self._timer)
        self._scorer = self._make_scorer()
        self._prepare_reference(new_adapter=peft_config is not None)
        self._prepare_prompts(writes_prompts=rollout_func is not None)
        rewards.prepare_models(lambda m: self.accelerator.prepare_model(m, device_placement=True, evaluation_mode=True))
        self._runner = self._make_runner(rewards, rollout_func)
        set_seed(args.seed, device_specific=True)  # dropout differs between ranks

    # ---- Construction ----
    def _make_scorer(self) -> Scorer:
        assert self.processing_class.pad_token_id is not None
        packer = Packer(
            batch_size=self.args.per_device_train_batch_size,
            max_tokens=self.args.max_tokens_per_piece,
            pad_token_id=self.processing_class.pad_token_id,
            device=self.args.device,
            agree=lambda count: max(gather_object([count])),
        )
        return Scorer(
            self.model,
            packer,
            shared_prefix=self.args.shared_prefix,
            temperature=self.args.temperature,
            mixed_precision=self.accelerator.mixed_precision != "no",
            needs_all=self.args.beta > 0,
            gather=gather_object,
        )

    def _prepare_reference(self, new_adapter: bool) -> None:
        self._reference: Reference | None = None
        if not self.args.beta:
            return
        self._reference = Reference(self.model, new_adapter)
        if self._reference.model is not None:
            self._reference.model = self.accelerator.prepare_model(self._reference.model, evaluation_mode=True)
        if self.args.sync_ref_model:
            if self._reference.model is None:
                raise ValueError(
                    "sync_ref_model=True works on a copy of all weights, which an adapter does not have; set "
                    "sync_ref_model=False, or train without LoRA."
                )
            self.add_callback(SyncRefModelCallback(ref_model=self._reference.model, accelerator=self.accelerator))

    def _prepare_prompts(self, writes_prompts: bool) -> None:
        context = None if writes_prompts else context_length(self.model)
        self._eval_limit = self.args.prompt_limit(context)
        self._eval_prompts = {} if self.eval_dataset is None else self._eval_prompt_sets(self.eval_dataset)
        if self.train_dataset is None:
            return
        limit = self.args.prompt_limit(context, trained_on=not writes_prompts)
        self._prompts = self._prompt_set(self.train_dataset, "train_dataset", limit)
        self._schedule = self.args.schedule(len(self._prompts))
        self._schedule.check()

    def _prompt_set(self, dataset: Dataset, name: str, limit: PromptLimit) -> PromptSet:
        return PromptSet(
            dataset,
            self.processing_class,
            limit,
            chat_template_kwargs=self.args.template_kwargs,
            prompt_only=self.args.remove_unused_columns,
            name=name,
        )

    def _eval_prompt_sets(self, dataset: Dataset | dict[str, Dataset]) -> dict[str, PromptSet]:
        if not isinstance(dataset, dict):
            dataset = {"": dataset}
        return {
            name: self._prompt_set(part, f"eval_dataset[{name!r}]" if name else "eval_dataset", self._eval_limit)
            for name, part in dataset.items()
        }

    def _make_runner(self, rewards: Rewards, rollout_func: Callable[..., dict[str, Any]] | None) -> RoundRunner:
        ends = eos_token_ids(self.model, self.processing_class)
        if rollout_func is not None:
            engine: RolloutEngine = RolloutFuncEngine(rollout_func, self, ends)
        else:
            engine = GroupEngine(
                self.model,
                self.args.sampling_options(self.processing_class.pad_token_id, ends),
                max_rows_in_flight=self.args.max_rows_in_flight,
                tokenizer=self.processing_class,
                context=self._whole_policy,
                mixed_precision=self.accelerator.mixed_precision != "no",
                gather=gather_object,
                show_progress=self._shows_progress,
            )
        return RoundRunner(engine, rewards, self.processing_class)

    @contextmanager
    def _whole_policy(self) -> Iterator[None]:
        """What sampling runs in."""
        with gathered_weights(self.model_wrapped), self.accelerator.autocast():
            yield

    @property
    def _shows_progress(self) -> bool:
        return not self.args.disable_tqdm and self.is_world_process_zero()

    # ---- What Trainer iterates over ----
    def get_train_dataloader(self) -> DataLoader:
        """One item per micro-step: its number within the epoch, the same on every rank."""
        if self.train_dataset is None:
            raise ValueError("train_dataset=None; pass a dataset with a column 'prompt' to train.")
        self._window = None
        items = cast("torch.utils.data.Dataset[int]", range(self._schedule.items_per_epoch))
        return DataLoader(items, batch_size=1, collate_fn=_only)

    def num_examples(self, dataloader: DataLoader) -> int:
        """Prompts of an epoch."""
        return self._schedule.windows_per_epoch * self._schedule.prompts_per_window

    def get_batch_samples(
        self, epoch_iterator: Iterator[int], num_batches: int, device: torch.device
    ) -> tuple[list[list[Piece]], None]:
        """The pieces of the next optimizer step, by micro-step; samples the windows that they need. Called once a step."""
        self._timer.start_step()
        count = len(list(itertools.islice(epoch_iterator, num_batches)))
        batch_size = self.args.per_device_train_batch_size
        completions: list[Completion] = []
        for place in self._schedule.places(self.state.global_step, count):
            if self._window is None or self._window.index != place.window:
                self._window = self._sample_window(place.window)
            completions += self._window.completions[place.micro_step * batch_size :][:batch_size]
        pieces = self._scorer.pieces(completions, self.args.world_size)
        self._metrics.add("policy_signal", Mean(0.0, len(completions) - len(self._scorer.informative(completions))))
        self._timer.start_update()
        return [pieces[i * len(pieces) // count : (i + 1) * len(pieces) // count] for i in range(count)], None

    def _sample_window(self, index: int) -> Window:
        """Sample, reward and score this rank's share of window `index`."""
        rank = self.args.process_index
        prompts = self._prompts.prompts(self._schedule.rows(index, rank))
        seed = derive_seed(self.args.seed, "window", index)
        sampled = self._runner.run(prompts, self.args.num_generations, seed, self.state, self._metrics)
        self._metrics.add_all(sampled.metrics())
        self.state.num_input_tokens_seen += sum(gather_object([sampled.num_tokens]))
        advantages = self._advantages(sampled).flatten().tolist()
        completions = [replace(c, advantage=a) for c, a in zip(sampled.completions, advantages, strict=True)]
        with self._metrics.timed("time/scoring"):
            self._scorer.compare(self.model_wrapped, completions)
            if not self._schedule.on_policy:
                completions = self._scorer.with_logps(self.model_wrapped, completions, "old_logps")
            if self._reference is not None:
                with self._reference.evaluating(self.model_wrapped) as reference:
                    completions = self._scorer.with_logps(reference, completions, "ref_logps")
        return Window(index, completions, sampled.table() | {"advantage": advantages})

    def _advantages(self, sampled: Round) -> Tensor:
        """Advantages by group, of shape (P, G)."""
        window_rewards = None
        if self.args.scale_rewards == "batch":
            window_rewards = torch.tensor(gather_object(sampled.rewards.total_B.tolist()), dtype=torch.float64)
        return group_advantages(sampled.total_PG, self.args.scale_rewards, window_rewards)

    # ---- The loss ----
    def training_step(  # type: ignore[override]  # what Trainer passes on is a list of pieces
        self, model: nn.Module, inputs: list[Piece], num_items_in_batch: Any = None
    ) -> Tensor:
        """Forward and backward of a micro-step's pieces, of which there may be none; the sum of their losses.

        Only the last piece of an optimizer step synchronises gradients.
        """
        loss = torch.zeros((), device=self.args.device)
        synchronise = self.accelerator.sync_gradients
        for place, piece in enumerate(inputs, start=1):
            last = place == len(inputs)
            self.accelerator.gradient_state._set_sync_gradients(synchronise and last)
            with (
                nullcontext() if last or self.is_deepspeed_enabled else self.accelerator.no_sync(model),
                serve_shared_prefix(model) if piece.layout else nullcontext(),  # for what the backward pass recomputes
            ):
                loss = loss + super().training_step(model, piece, num_items_in_batch)  # type: ignore[arg-type]
        return loss

    def compute_loss(  # type: ignore[override]  # what Trainer passes on is a piece
        self, model: nn.Module, inputs: Piece, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """The piece's share of the optimizer step's loss; its gradient averages over ranks, as DDP and ZeRO do."""
        scores = score(model, inputs, self.args.temperature)
        epsilon, epsilon_high = self.args.epsilon_bounds
        output = grpo_loss(
            scores.logps_BT,
            scores.logps_BT.detach() if inputs.old_logps_BT is None else inputs.old_logps_BT,
            inputs.advantages_B,
            inputs.mask_BT,
            loss_level=self.args.loss_level,
            epsilon=epsilon,
            epsilon_high=epsilon_high,
            beta=self.args.beta,
            ref_logps_BT=inputs.ref_logps_BT,
        )
        self._metrics.add_all(loss_metrics(output, scores, inputs))
        return output.loss * self.args.world_size / inputs.num_completions

    def _prepare_inputs(self, inputs: Piece) -> Piece:  # type: ignore[override]
        return inputs  # on the device already, in the precision that it needs

    def _track_num_input_tokens(self, inputs: list[Piece]) -> None:
        """Tokens are counted when a window is sampled."""

    def floating_point_ops(self, inputs: list[Piece]) -> int:  # type: ignore[override]
        return sum(super(GRPOTrainer, self).floating_point_ops({"input_ids": p.input_ids_RS}) for p in inputs)

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
            prompt_sets = self._eval_prompts if eval_dataset is None else self._eval_prompt_sets(eval_dataset)
        if not prompt_sets:
            raise ValueError("eval_dataset=None; pass a dataset with a column 'prompt' to evaluate.")
        metrics: dict[str, float] = {}
        for name, prompts in prompt_sets.items():
            metrics |= self._evaluate_prompts(prompts, f"{metric_key_prefix}_{name}" if name else metric_key_prefix)
        return metrics

    def _evaluate_prompts(self, prompts: PromptSet, prefix: str) -> dict[str, float]:
        self._memory_tracker.start()
        start_time = time.time()
        with evaluation_mode(self.model):
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
