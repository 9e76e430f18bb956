"""The plan of a configuration and a model, whose weights need not be loaded."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..data.schedule import Schedule
from .activations import ROWS_IN_FLIGHT, Precision, Shape
from .batch import batch_lines
from .cards import Card
from .estimate import GIB, Sampler, Setup, fitted_to_card, largest_tokens, launches, peak, phases, step_seconds
from .memory import Job


OPTIMIZER_STATES = {"sgd": 0.0, "adafactor": 0.1, "8bit": 0.5, "lion": 1.0, "adam": 2.0}
"""Float32 numbers per trained parameter that an optimizer keeps, by a part of its name; the first that matches counts."""
MEASURED_PROMPTS = 64
"""The first ones of the dataset, whose lengths are those of a plan."""


def setup_of(
    args: Any,
    model: Any,
    schedule: Schedule,
    *,
    prompt_tokens: int,
    method: str = "DDP",
    offload: Sequence[str] = (),
    new_adapter: bool = False,
) -> Setup:
    """Read what a plan needs from a `GRPOConfig` and a model, which may be on the meta device.

    Args:
        args: The configuration.
        model: With its adapter, if there is one.
        schedule: What becomes of the prompts, on how many ranks.
        prompt_tokens: Of a typical prompt.
        method: One of `METHODS`.
        offload: Of `"optimizer"` and `"param"`, what is on the host.
        new_adapter: Whether the base weights are the reference.
    """
    trained = sum(_size(p) for p in model.parameters() if p.requires_grad)
    frozen = [p for p in model.parameters() if not p.requires_grad]
    trained_bytes = max((p.element_size() for p in model.parameters() if p.requires_grad), default=4)
    precision: Precision = "autocast" if args.half_precision and trained_bytes == 4 else "bf16"
    if not args.half_precision and trained_bytes == 4:
        precision = "float32"
    job = Job(
        method,
        schedule.world_size,
        trained,
        sum(_size(p) for p in frozen),
        frozen_bytes=sum(map(_bytes, frozen)) / max(1, sum(_size(p) for p in frozen)),
        trained_bytes=trained_bytes,
        optimizer_bytes=trained_bytes * _states(str(args.optim)),
        offload_optimizer="optimizer" in offload,
        offload_param="param" in offload,
    )
    rows = args.max_rows_in_flight or ROWS_IN_FLIGHT["cpu" if args.device.type == "cpu" else "cuda"]
    return Setup(
        job=job,
        shape=Shape.of(model.config),
        precision="bf16" if job.stage else precision,
        schedule=schedule,
        prompt_tokens=prompt_tokens,
        completion_tokens=args.max_completion_length,
        rows_in_flight=rows,
        checkpointing=args.gradient_checkpointing,
        max_tokens=args.max_tokens_per_micro_batch,
        reference=args.beta > 0,
        reference_copies=args.beta > 0 and not new_adapter,
        sampler=_sampler(args),
        sampler_share=args.vllm_gpu_memory_utilization,
        sampler_sleeps=args.vllm_enable_sleep_mode,
    )


def _sampler(args: Any) -> Sampler:
    if not args.use_vllm:
        return "engine"
    return "server" if args.vllm_mode == "server" else "vllm"


def _size(parameter: Any) -> int:
    """Numbers of a parameter, also of one that is sharded or packed in 4 bits."""
    sharded = getattr(parameter, "ds_numel", None)
    packed = type(parameter).__name__ == "Params4bit" and parameter.element_size() == 1
    return int(sharded or parameter.numel() * (2 if packed else 1))


def _bytes(parameter: Any) -> int:
    return int(getattr(parameter, "ds_numel", None) or parameter.numel()) * int(parameter.element_size())


def _states(optimizer: str) -> float:
    return next((count for name, count in OPTIMIZER_STATES.items() if name in optimizer.lower()), 2.0)


@dataclass(frozen=True)
class RunPlan:
    """What a configuration does and costs."""

    setup: Setup
    card: Card | None = None
    """What the time of a step is estimated for."""
    gpu_bytes: float | None = None
    """What a rank's card holds."""
    given: Setup = field(init=False, repr=False)
    """The setup before what it leaves open was chosen for the card."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "given", self.setup)
        if self.gpu_bytes is not None:
            object.__setattr__(self, "setup", fitted_to_card(self.setup, self.gpu_bytes))

    def lines(self) -> list[str]:
        """Describe the run in about ten lines."""
        lines = [
            f"model: {self._parameters()}, {self._launch()}, {self.setup.precision}",
            *batch_lines(self.setup.schedule),
            f"micro-batch: at most {self.setup.micro_batch_tokens:,} tokens; activations are "
            + ("recomputed" if self.setup.recomputes else "kept"),
        ]
        for phase, components in phases(self.setup).items():
            parts = sorted(components.items(), key=lambda item: -item[1])
            shown = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts if size / GIB >= 0.005)
            lines.append(f"memory, {phase}: {sum(components.values()) / GIB:.2f} GiB a rank ({shown})")
        if self.gpu_bytes is not None:
            tokens = largest_tokens(self.setup, self.gpu_bytes)
            verdict = "fits" if peak(self.setup) <= self.gpu_bytes else "does not fit"
            lines.append(
                f"{self.gpu_bytes / GIB:.0f} GiB: {verdict}; the largest micro-batch has {tokens:,} tokens "
                f"(this configuration: {self.setup.micro_batch_tokens:,})"
            )
        if self.card is not None:
            seconds = step_seconds(self.setup, self.card)
            shown = ", ".join(f"{name} {value:.2g}" for name, value in seconds.items() if value)
            lines.append(f"{self.card.name}, estimated: at least {sum(seconds.values()):.2g} s a step ({shown})")
        return lines

    def text(self, width: int | None = None) -> str:
        """Return the lines as one text, those longer than `width` folded."""
        lines = self.lines()
        if width is None:
            return "\n".join(lines)
        return "\n".join(textwrap.fill(line, width, subsequent_indent="    ") for line in lines)

    def fitting(self) -> list[tuple[str, float, bool]]:
        """List the ways to launch this run: the name, bytes of a rank at the peak, and whether they fit."""
        assert self.gpu_bytes is not None
        peaks = [(name, peak(fitted_to_card(setup, self.gpu_bytes))) for name, setup in launches(self.given)]
        return [(name, size, size <= self.gpu_bytes) for name, size in peaks]

    def as_dict(self) -> dict[str, Any]:
        """The plan for plan.json: `summary` is what the report compares with what is measured."""
        seconds = {} if self.card is None else step_seconds(self.setup, self.card)
        summary: dict[str, Any] = {"peak memory (GiB)": peak(self.setup) / GIB}
        if seconds:
            summary["seconds per optimizer step"] = sum(seconds.values())
        return {
            "summary": summary,
            "lines": self.lines(),
            "memory_bytes": phases(self.setup),
            "seconds": seconds,
            "tokens_per_micro_batch": self.setup.micro_batch_tokens,
        }

    def _launch(self) -> str:
        alone = self.setup.job.ranks == 1 and self.setup.job.method == "DDP"
        return "one process" if alone else self.setup.job.method

    def _parameters(self) -> str:
        job = self.setup.job
        frozen = f" and {job.frozen / 1e6:,.1f} M frozen" if job.frozen else ""
        return f"{job.trained / 1e6:,.1f} M trained{frozen} parameters"
