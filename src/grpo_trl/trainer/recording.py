"""A trainer that plans its run, has it logged, and shows it on a terminal."""

import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import TrainOutput

from ..data.schedule import Schedule
from ..distributed.sharding import backend_config, backend_of
from ..free_memory import free_memory
from ..plan import MEASURED_PROMPTS, RunPlan, Setup, card_named, fitted, offloaded, room_for_activations, setup_of
from .build import make_schedule
from .callbacks import LiveView, RunRecorder, has_terminal, shows_live_view, tolerate_reporting
from .evaluation import EvaluatedCompletions
from .generation import GenerationBatchBuilder
from .interface import TrlInterface


class RecordedTrainer(TrlInterface):
    """A trainer that leaves a log, and is shown where there is a terminal.

    A subclass has `_schedule`, the schedule of training or None, and calls `_record` when it is complete.
    """

    _schedule: Schedule | None
    _builder: GenerationBatchBuilder

    def _record(self) -> None:
        """Have the run logged, and shown where there is a terminal."""
        self._recorder = RunRecorder(self.args, self.plan, str(self.model.config._name_or_path))
        self.add_callback(self._recorder)
        self._live_view: LiveView | None = None
        if shows_live_view(self.args):
            self.remove_callback(ProgressCallback)
            self._live_view = LiveView(Path(str(self.args.output_dir)), lambda: self._watchdog.now)
            self.add_callback(self._live_view)
        self._quiet = not has_terminal(sys.stderr) and self.pop_callback(ProgressCallback) is not None
        if self._quiet:  # a line for each log, without bars; a notebook has a callback of its own
            self.add_callback(PrinterCallback)
        tolerate_reporting(self.callback_handler.callbacks)

    def _train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        try:
            return super()._train(*args, **kwargs)
        except BaseException as error:
            if self._live_view is not None:
                self._live_view.stop()
            self._recorder.stopped(self.state.global_step, error)
            raise

    def _shows_progress(self) -> bool:
        """Bars are for a terminal that has no live view at the time, and for a notebook."""
        hidden = self._quiet or (self.is_in_train and shows_live_view(self.args))
        return super()._shows_progress() and not hidden

    def _record_evaluation(self, name: str, evaluated: EvaluatedCompletions) -> None:
        self._recorder.evaluation(self.state.global_step, name, evaluated)

    def plan(self, gpu: str | None = None, gpu_memory: float | None = None) -> RunPlan:
        """Plan this run: its batches, and the memory of a rank by phase.

        Args:
            gpu: Estimate the time of a step on this card, e.g. `"H100"`.
            gpu_memory: GiB of a card, for the largest micro-batch that fits; those of `gpu` by default.

        Raises:
            ValueError: `gpu` is unknown, or the plan cannot read the sizes of the model.
        """
        setup, card = self._setup(), None if gpu is None else card_named(gpu)
        gib = card.memory_gib if gpu_memory is None and card is not None else gpu_memory
        size = setup.gpu_bytes if gib is None else gib * 2**30
        if size is None:
            setup = fitted(setup, room_for_activations(setup, free_memory(self.args.device)))
        return RunPlan(setup, card, size)

    def _setup(self) -> Setup:
        """Describe this run to the plan, on the device that it has.

        Raises:
            ValueError: The plan cannot read the sizes of the model.
        """
        prompts = None if self._schedule is None else self._builder.order.source
        lengths = [] if prompts is None else [len(prompt.ids) for prompt in prompts.first(MEASURED_PROMPTS)]
        backend = backend_of(self.accelerator)
        setup = setup_of(
            self.args,
            self.model,
            self._schedule or make_schedule(self.args, None),
            prompt_tokens=int(statistics.median(lengths)) if lengths else 0,
            method={"none": "DDP", "ZeRO-0": "DDP", "FSDP": "FSDP2"}.get(backend, backend),
            offload=offloaded(backend_config(self.accelerator)),
            new_adapter=self._reference is None or self._reference.model is None,
        )
        device = self.args.device
        on_gpu = device.type == "cuda"
        return replace(setup, gpu_bytes=torch.cuda.get_device_properties(device).total_memory if on_gpu else None)
