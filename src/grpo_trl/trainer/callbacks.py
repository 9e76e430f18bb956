"""Callbacks that write the log of a run, and show it on a terminal."""

import atexit
import functools
import resource
import shutil
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.live import Live
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from ..config import GRPOConfig
from ..errors import RunStopped
from ..plan import RunPlan
from ..reliability.signals import EXIT_CODE
from ..report import RunLog, merge_tables, print_completions
from ..report.environment import environment
from ..report.hub import CompletionsUpload
from ..report.live import view
from ..report.log import COMPLETIONS, CONFIG, ENVIRONMENT, PLAN
from ..report.run import Run
from ..report.tolerant import str_of, tolerated
from ..report.trackers import track_completions
from .evaluation import RECORDED_PROMPTS, EvaluatedCompletions


PACES = 20
"""Steps whose mean time says how long the rest takes."""
EVENTS = [name for name in dir(TrainerCallback) if name.startswith("on_")]


class RunRecorder(TrainerCallback):
    """Writes the log of a run, whatever `report_to` says, and prints its plan; the first rank does.

    Args:
        args: The configuration.
        plan: Makes the plan.
        model_name: For the report.
    """

    def __init__(self, args: GRPOConfig, plan: Callable[[], RunPlan], model_name: str):
        self.args = args
        self.plan = plan
        self.model_name = model_name
        self.log = RunLog(Path(str(args.output_dir)), keeps_all=args.log_completions)
        self._records = False
        self._upload: CompletionsUpload | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._records = state.is_world_process_zero
        if not self._records:
            return
        facts = {
            CONFIG: self.args.to_dict(),
            ENVIRONMENT: environment(self.args.world_size) | {"model": self.model_name},
        }
        with tolerated("The plan of the run"):
            plan = self.plan()
            facts[PLAN] = plan.as_dict()
            if not self.args.disable_tqdm and state.global_step == 0:
                print(plan.text(shutil.get_terminal_size().columns if has_terminal(sys.stdout) else None))
        self.log.start(state.global_step, state.max_steps, facts)
        if self.args.log_completions_hub_repo is not None:
            folder, private, token = self.log.folder / COMPLETIONS, self.args.hub_private_repo, self.args.hub_token
            self._upload = CompletionsUpload(self.args.log_completions_hub_repo, folder, private, token)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if self._records:
            self.log.entry(state.global_step, (logs or {}) | {"memory/peak_gib": peak_memory() / 2**30})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._records:
            self.log.end(state.global_step)
        if self._upload is not None:
            self._upload.finish()
            self._upload = None

    def stopped(self, step: int, error: BaseException) -> None:
        """Note what ends the run before its last step."""
        if self._records:
            self.log.stop(step, reason_of(error))

    def completions(self, step: int, table: dict[str, list[Any]]) -> None:
        """Keep the completions of a generation batch; with `log_completions`, print them and send them to trackers.

        Args:
            step: The optimizer step.
            table: Columns, group after group: of all ranks with `log_completions`, else of the first.
        """
        with nullcontext() if self._upload is None else self._upload.writing():
            self.log.completions(step, table, self.args.num_generations)
        if self.args.log_completions:
            shown = merge_tables([table], unique_prompts=self.args.log_unique_prompts)
            print_completions(shown, step, self.args.num_completions_to_print)
            track_completions(shown, step, list(self.args.report_to or []), str(self.args.output_dir))

    def evaluation(self, step: int, name: str, evaluated: EvaluatedCompletions) -> None:
        """Keep completions of an evaluation during training: with `log_completions` of all prompts.

        Args:
            step: The optimizer step.
            name: Of what was evaluated, e.g. `"eval"`.
            evaluated: In the order of the dataset.
        """
        if self._records:
            size = self.args.eval_generations
            rows = None if self.args.log_completions else RECORDED_PROMPTS * size
            columns = {"prompt": evaluated.prompts, "completion": evaluated.completions} | evaluated.rewards_per_func
            self.log.evaluation(step, name, {key: values[:rows] for key, values in columns.items()}, size)


class LiveView(TrainerCallback):
    """One view of the run on the terminal, in place of a progress bar.

    Args:
        folder: The output directory.
        phase: Returns the phase that is under way, and when it began, by `time.monotonic`.
    """

    def __init__(self, folder: Path, phase: Callable[[], tuple[str, float] | None]):
        self.folder = folder
        self.phase = phase
        self.run = Run(folder.resolve().name)
        self.step = 0
        self._live: Live | None = None
        self._paces: deque[float] = deque(maxlen=PACES)
        self._began = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step, self._began = state.global_step, time.monotonic()
        self.run.add({"event": "start", "step": self.step, "max_steps": state.max_steps, "time": time.time()})
        self._live = Live(get_renderable=self._view, refresh_per_second=2, transient=False)
        self._live.start()
        atexit.register(self.stop)  # a run that ends in an error leaves the terminal as it was

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.monotonic()
        self._paces.append(now - self._began)
        self.step, self._began = state.global_step, now

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.run.add((logs or {}) | {"step": state.global_step, "time": time.time()})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.run.add({"event": "end"})
        self.stop()

    def stop(self) -> None:
        """Leave the last view on the terminal."""
        if self._live is not None:
            self._live.stop()
            self._live = None
            atexit.unregister(self.stop)

    def _view(self) -> Any:
        pace = statistics.mean(self._paces) if self._paces else None
        return view(self.run, self.folder, self.step, pace, "" if self._live is None else self._doing())

    def _doing(self) -> str:
        name, began = self.phase() or ("", 0.0)
        return f"{name}, {time.monotonic() - began:.0f} s" if name else ""


def reason_of(error: BaseException) -> str:
    """Say in one line why a run has stopped."""
    if isinstance(error, SystemExit) and error.code == EXIT_CODE:
        return "a signal; it is saved, start it again to resume"
    kind = "" if isinstance(error, RunStopped) else type(error).__name__
    first = next(iter(str_of(error).splitlines()), "")
    return ": ".join(filter(None, [kind, first]))


def has_terminal(stream: TextIO | None) -> bool:
    """Whether somebody watches what is written to a stream."""
    try:
        return stream is not None and stream.isatty()
    except Exception:  # closed, or a logger in the place of a stream
        return False


def shows_live_view(args: GRPOConfig) -> bool:
    """Whether this process has a terminal, and the user wants to see progress."""
    return has_terminal(sys.stdout) and not args.disable_tqdm and args.process_index == 0


def tolerate_reporting(callbacks: Iterable[TrainerCallback]) -> None:
    """Let callbacks that only report (trackers, progress bars, the live view) fail without ending the run."""
    for callback in callbacks:
        reports = isinstance(callback, (PrinterCallback, ProgressCallback, LiveView))
        if reports or type(callback).__module__.startswith(
            ("transformers.integrations", "transformers.utils.notebook")
        ):
            for event in EVENTS:
                setattr(callback, event, _tolerant(getattr(callback, event), type(callback).__name__))


def _tolerant(method: Callable[..., Any], name: str) -> Callable[..., Any]:
    @functools.wraps(method)
    def called(*args: Any, **kwargs: Any) -> Any:
        with tolerated(name):
            return method(*args, **kwargs)

    return called


def peak_memory() -> int:
    """Count the bytes at the peak so far: of the GPU's allocator, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
