"""A Trainer that a signal can stop and that resumes exactly: which checkpoint, when, and complete."""

import contextlib
import os
import uuid
from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers import Trainer
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import SaveStrategy, TrainOutput
from transformers.training_args import OptimizerNames

from ..config import GRPOConfig
from ..distributed.collectives import run_on_all_ranks
from ..distributed.launch import check_shared
from ..distributed.sharding import BACKEND_MARK, backend_of
from ..errors import RunStopped, StopRequested
from ..logging import get_logger
from ..logprobs.evaluator import DoesNotFit
from ..model_utils import set_optimizer_mode
from ..models import has_injected_adapter, load_injected_adapter
from ..reliability.checkpoints import (
    UNFINISHED,
    Manifest,
    checkpoint_argument,
    fault_of,
    finish_checkpoint,
    last_checkpoint,
    locked,
    prepare_output_dir,
    remove,
    rotate_checkpoints,
    warn_of_another_run,
    write_manifest,
)
from ..reliability.run_state import RunState, Stateful, changed_options, data_only, resumed_state, training_options
from ..reliability.signals import EXIT_CODE, StopSignals
from ..reliability.training_checks import (
    WeightsMove,
    check_adapters,
    check_optimizer,
    check_same_options,
    check_unchanged,
    describe_trained,
    same_optimizer,
)
from ..reliability.watchdog import Watchdog
from ..types import GenerationBatch
from .build import make_ranks


logger = get_logger(__name__)


class ResumableTrainer(Trainer):
    """`transformers.Trainer` with checkpoints that are whole or absent and hold what a subclass is in the middle of.

    A subclass names the parts of the run that have state (`_parts`), what must be unchanged to resume (`_fingerprint`), and
    the generation batch in use. It calls `_between_steps` between two optimizer steps, which is where a run can stop.
    """

    args: GRPOConfig

    def __init__(self, model: nn.Module, args: GRPOConfig, **kwargs: Any):
        args.output_dir = prepare_output_dir(str(args.output_dir))
        super().__init__(model=model, args=args, **kwargs)
        self._trained = describe_trained(model)
        self._ranks = make_ranks(self.args)
        check_same_options(training_options(self.args.to_dict()), self._ranks)
        self._fixed_options = self.args.fixed_at_construction
        self._weights_move = WeightsMove()
        self._signals = StopSignals()
        self._watchdog = Watchdog(self.args.phase_warning_seconds, self.args.process_index)
        self._resumed: RunState | None = None
        self._unfinished: Path | None = None
        """Where a checkpoint is being written."""
        self._saved: Path | None = None
        """The last checkpoint that was written or resumed from."""
        self._run = ""
        """Identifies the run in its checkpoints."""

    def _parts(self) -> dict[str, Stateful]:
        """Return the parts of the run whose state a checkpoint saves, by name."""
        raise NotImplementedError

    def _fingerprint(self) -> dict[str, Any]:
        """Return what must be unchanged for a run to resume."""
        raise NotImplementedError

    def _generation_batch_in_use(self) -> GenerationBatch | None:
        """Return the generation batch that the next optimizer step trains on, if it is sampled already."""
        raise NotImplementedError

    def _load_run_state(self, state: RunState) -> None:
        """Load the state of each part; called before the first step of a resumed run."""
        for name, part in self._parts().items():
            if name in state.parts:  # else an option that needs it was set since
                part.load_state_dict(state.parts[name])

    def _check_boundary(self) -> None:
        """Called between two optimizer steps and after the last one, on all ranks.

        Raises:
            RunStopped: The run must not go on.
        """
        skipped = self.accelerator.optimizer_step_was_skipped
        self._weights_move.after_step(cast(nn.Module, self.model), self._ranks, skipped)

    def train(
        self, resume_from_checkpoint: str | os.PathLike[str] | bool | None = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        """Train, as `transformers.Trainer.train`; a resumed run equals the uninterrupted one bit for bit.

        SIGTERM and SIGUSR1 end it between two optimizer steps, with a checkpoint.

        Args:
            resume_from_checkpoint: The path of a checkpoint, or True: the last one in `output_dir`; where there is none,
                the run starts at its beginning.
            args: As in `transformers.Trainer.train`.
            kwargs: As in `transformers.Trainer.train`.

        Raises:
            SystemExit: A signal has stopped the run; the code is `signals.EXIT_CODE`.
            RunStopped: A guard has stopped the run, which is saved.
            ValueError: The checkpoint holds another run, or some rank cannot reach `output_dir`.
            TypeError: `resume_from_checkpoint` is neither a path nor a bool.
            RuntimeError: It is the second call, under DeepSpeed.
        """
        if hasattr(self.model, BACKEND_MARK):
            raise RuntimeError(
                "train() was called before, and DeepSpeed starts once for a model. Save it with save_model(path), and make "
                "a new trainer with the path; to go on with this run, use resume_from_checkpoint there."
            )
        given = checkpoint_argument(resume_from_checkpoint)
        if given is None and checkpoint_argument(self.args.resume_from_checkpoint):
            logger.warning(
                "resume_from_checkpoint=%r of the options has no effect; pass it to train().",
                self.args.resume_from_checkpoint,
            )
        if self.args.world_size > 1 and self.args.save_strategy != SaveStrategy.NO:
            check_shared(Path(str(self.args.output_dir)), self._ranks)
        with contextlib.ExitStack() as stack:
            run_on_all_ranks(lambda: stack.enter_context(self._output_dir_locked()), self._ranks)
            return self._train(given, *args, **kwargs)

    def _train(self, given: Path | bool | None, *args: Any, **kwargs: Any) -> TrainOutput:
        folder = self._start_or_resume(given)
        if self.is_deepspeed_enabled:
            setattr(self.model, BACKEND_MARK, True)
        with self._signals.listening():
            try:
                output = super().train(None if folder is None else str(folder), *args, **kwargs)
                self._check_boundary()
                set_optimizer_mode(self.optimizer, training=False)
                return output
            except StopRequested as stop:
                logger.warning("%s: the run stops. %s", stop, self._save_boundary())
                raise SystemExit(EXIT_CODE) from None
            except DoesNotFit as error:
                if self.args.world_size > 1:  # other ranks are in the middle of the step
                    raise
                raise RunStopped(f"{error} {self._save_boundary()}") from error
            except RunStopped as stop:
                raise RunStopped(f"{stop} {self._save_boundary()}") from stop

    def _between_steps(self) -> None:
        """Check that the run may go on, and prepare the optimizer step that follows.

        Raises, on all ranks:
            StopRequested: A signal has come, to some rank.
            RunStopped: The run must not go on.
        """
        run_on_all_ranks(self._check_this_rank, self._ranks)
        self._check_boundary()
        set_optimizer_mode(self.optimizer, training=True)
        self._weights_move.before_step(cast(nn.Module, self.model), self._get_learning_rate())

    def _check_this_rank(self) -> None:
        self._signals.check()
        check_unchanged(self._fixed_options, self.args.fixed_at_construction)

    def _output_dir_locked(self) -> contextlib.AbstractContextManager[None]:
        """Keep other runs out of `output_dir` while this one saves there."""
        if self._ranks.rank != 0 or self.args.save_strategy == SaveStrategy.NO:
            return contextlib.nullcontext()
        return locked(Path(str(self.args.output_dir)))

    def _start_or_resume(self, given: Path | bool | None) -> Path | None:
        """Find the checkpoint to resume from and read this rank's state of it; None where the run starts fresh."""
        on_first = self._ranks.rank == 0
        found = run_on_all_ranks(lambda: self._choose_checkpoint(given) if on_first else None, self._ranks)
        folder, self._run = self._ranks.gather([found])[0]
        self._resumed = None if folder is None else resumed_state(folder, self._ranks, self._fingerprint())
        self._saved = folder
        if self._resumed is not None:
            changes = changed_options(self._resumed.options, training_options(self.args.to_dict()))
            if changes:
                logger.warning("The run resumes with other options; %s.", changes)
        return folder

    def _choose_checkpoint(self, given: Path | bool | None) -> tuple[Path | None, str]:
        """Return the folder to resume from, None for a new run, and what identifies the run.

        Raises:
            ValueError: The checkpoint that was given cannot be resumed from.
        """
        output_dir = Path(str(self.args.output_dir))
        if isinstance(given, Path) and (fault := fault_of(given)):
            raise ValueError(
                f"resume_from_checkpoint={str(given)!r} {fault}. To start a new run from the weights of a checkpoint, pass "
                "its path as model."
            )
        folder = last_checkpoint(output_dir) if given is True else given if isinstance(given, Path) else None
        manifest = None if folder is None else Manifest.read(folder)
        if manifest is not None:
            return folder, manifest.run
        if given is True:
            logger.warning("%s holds no checkpoint to resume from; the run starts fresh.", output_dir)
        if self.args.save_strategy != SaveStrategy.NO:
            warn_of_another_run(output_dir)
        return None, uuid.uuid4().hex[:12]

    # ---- Loading ----
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """As `transformers.Trainer`, and for an adapter that `model.add_adapter` made."""
        with data_only(resume_from_checkpoint):
            if has_injected_adapter(self.model):
                load_injected_adapter(self.model, Path(resume_from_checkpoint))
            else:
                super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        """As `transformers.Trainer`, and for an adapter that `model.add_adapter` made."""
        if has_injected_adapter(self.model):
            load_injected_adapter(self.model, Path(str(self.state.best_model_checkpoint)))
        else:
            super()._load_best_model()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As `transformers.Trainer`; the state of another optimizer is refused."""
        if checkpoint is None:
            return
        same = same_optimizer(checkpoint, self.optimizer, OptimizerNames(self.args.optim).value)
        with data_only(checkpoint), contextlib.nullcontext() if self.is_deepspeed_enabled else same:
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        """As `transformers.Trainer`; a run that no longer is in fp16 has no use for it."""
        if checkpoint is not None and self.accelerator.scaler is not None:
            with data_only(checkpoint):
                super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            with data_only(checkpoint):
                super()._load_rng_state(checkpoint)

    def _prepare_for_training(self, max_steps: int, *args: Any, **kwargs: Any) -> Any:
        """As `transformers.Trainer`; called when the state of a resumed run is known, before its first step."""
        if self.state.global_step >= max_steps:
            logger.warning(
                "The run is at step %d and ends at step %d: nothing is left to do. Raise max_steps or num_train_epochs to "
                "train further.",
                self.state.global_step,
                max_steps,
            )
        check_adapters(cast(nn.Module, self.model))
        prepared = super()._prepare_for_training(max_steps, *args, **kwargs)
        if backend_of(self.accelerator) == "none":  # others hold the weights in tensors of their own
            check_optimizer(cast(nn.Module, self.model), self.optimizer)
        return prepared

    def _save_boundary(self) -> str:
        """Save what the last optimizer step left, all that a resumed run needs, unless that has been done; a word on it."""
        if not self.state.global_step:
            return "(No step is made yet, so nothing is saved.)"
        if self._saved != self._checkpoint():
            only_model, self.args.save_only_model = self.args.save_only_model, False
            try:
                self._save_checkpoint(cast(nn.Module, self.model), trial=None)
            finally:
                self.args.save_only_model = only_model
        return f"(Saved in {self._saved}.)"

    def _checkpoint(self, trial: Any = None) -> Path:
        """That of the last optimizer step."""
        return Path(super()._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `transformers.Trainer.save_model`.

        Where weights are sharded, all ranks call it, and none returns before the model is written: a launcher ends the
        rank that writes if another one fails meanwhile.
        """
        super().save_model(output_dir, _internal_call)
        if is_deepspeed_zero3_enabled() or self.is_fsdp_enabled:
            self.accelerator.wait_for_everyone()

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save into a folder aside, which gets its name when it is complete on all ranks."""
        final = self._checkpoint(trial)
        self._unfinished = final.parent / UNFINISHED
        if self.args.should_save:
            remove(self._unfinished)
        self.accelerator.wait_for_everyone()
        unfinished = self._unfinished / final.name
        with self._watchdog.phase("saving"):
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._unfinished = None
            if self.state.best_model_checkpoint == str(unfinished):
                self.state.best_model_checkpoint = str(final)
                if self.args.should_save:
                    self.state.save_to_json(str(unfinished / "trainer_state.json"))
            if not self.args.save_only_model:
                parts = {name: part.state_dict() for name, part in self._parts().items()}
                batch = self._generation_batch_in_use()
                options = training_options(self.args.to_dict())
                state = RunState(self._fingerprint(), options, self.args.world_size, batch, parts)
                state.save(unfinished, self._ranks.rank)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                write_manifest(unfinished, self._run, self.state.global_step, not self.args.save_only_model)
                finish_checkpoint(unfinished, final)
                best = self.state.best_model_checkpoint
                rotate_checkpoints(final.parent, self._run, self.args.save_total_limit, best)
                remove(unfinished.parent)
            self.accelerator.wait_for_everyone()
        if not self.args.save_only_model:
            self._saved = final
        if self.args.push_to_hub:
            super()._push_from_checkpoint(str(final))

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._unfinished or super()._get_output_dir(trial))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """A checkpoint is sent when it has its name."""
