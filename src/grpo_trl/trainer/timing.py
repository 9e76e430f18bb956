"""Seconds per optimizer step and phase."""

import time

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..metrics import Mean, MetricLog


PHASES = ("time/sampling", "time/rewards", "time/logprobs", "time/update")


class StepTimer(TrainerCallback):
    """Measures an optimizer step and its update, and counts a step for every phase.

    Args:
        metrics: Of training.
        syncs: Whether sending weights to an engine is one of the phases.
    """

    def __init__(self, metrics: MetricLog, syncs: bool):
        self.metrics = metrics
        self.phases = (*PHASES, "time/sync") if syncs else PHASES
        self.step_start = self.update_start = 0.0

    def start_step(self) -> None:
        self.step_start = time.perf_counter()

    def start_update(self) -> None:
        self.update_start = time.perf_counter()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if args.device.type != "cpu":
            torch.accelerator.synchronize()  # the update may still be running, and would count as the next sampling
        now = time.perf_counter()
        self.metrics.add("step_time", Mean(now - self.step_start))
        self.metrics.add("time/update", Mean(now - self.update_start, 0.0))
        for phase in self.phases:
            self.metrics.add(phase, Mean(0.0, 1.0))
