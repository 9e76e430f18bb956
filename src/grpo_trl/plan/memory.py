"""What a way of training holds and sends, in bytes of a rank, before it is run.

`memory` and `traffic` follow from the number of parameters; activations come on top, for the tokens of one micro-batch.
`benchmarks/distributed.py` counts the same in runs of two processes.

Source: Rajbhandari et al., arXiv 1910.02054, sections 5 and 7, for what each stage shards; what DeepSpeed's engine holds
besides, and which collectives it uses, was read from deepspeed 0.19 and counted.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


METHODS = ("DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3", "FSDP2")
HALF, FLOAT32 = 2, 4
"""Bytes of a number in bfloat16 and in float32."""
ADAM = 2 * FLOAT32
"""Two moments of each trained parameter."""
LIVE = 10**9
"""Parameters that ZeRO-3 keeps gathered, and that it updates at a time (stage3_max_live_parameters, sub_group_size)."""


@dataclass(frozen=True)
class Job:
    """A model, and how it is trained.

    Under ZeRO trained weights are bfloat16, and the optimizer holds float32 copies.

    Raises:
        ValueError: `method` is unknown.
    """

    method: str
    """One of `METHODS`."""
    ranks: int
    trained: int
    """Parameters that are trained."""
    frozen: int = 0
    """Parameters under an adapter."""
    frozen_bytes: float = HALF
    """Of one of them: 2 in bfloat16, 4 in float32, about 0.5 in 4 bits."""
    trained_bytes: int = FLOAT32
    """Of a trained parameter and of its gradient, under DDP and FSDP2."""
    optimizer_bytes: float = ADAM
    """Of the optimizer's state of a trained parameter: two moments by default."""
    offload_optimizer: bool = False
    offload_param: bool = False

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method={self.method!r} is unknown; use one of {', '.join(map(repr, METHODS))}.")

    @property
    def stage(self) -> int:
        """Of ZeRO; 0 for DDP and FSDP2."""
        return int(self.method[-1]) if self.method.startswith("ZeRO") else 0

    @property
    def parameters(self) -> int:
        return self.trained + self.frozen


def offloaded(config: Mapping[str, Any]) -> list[str]:
    """Return what a DeepSpeed configuration keeps off the device: of `"optimizer"` and `"param"`."""
    zero = config.get("zero_optimization", {})
    devices = {name: (zero.get(f"offload_{name}") or {}).get("device", "none") for name in ("optimizer", "param")}
    return [name for name, device in devices.items() if device != "none"]


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank, on its device but for `host`."""

    held: float
    """All the time."""
    update: float
    """On top of it at the peak of an optimizer step, without activations."""
    sampling: float
    """On top of it while completions are written, where weights are gathered for that (`ds3_gather_for_generation`)."""
    host: float
    """What is offloaded."""

    @property
    def peak(self) -> float:
        return self.held + max(self.update, self.sampling)


def memory(job: Job) -> Memory:
    """What a rank holds of weights, gradients and optimizer.

        held      DDP     4 T + b F + 4 T + 8 T              weights, frozen ones, DDP's buckets of gradients, optimizer
                  FSDP2   (4 T + b F + 8 T)/N
                  ZeRO-1  2 T + b F + 12 T/N                 weights; float32 copies and optimizer
                  ZeRO-2  the same
                  ZeRO-3  (2 T + b F)/N + 2 T/N + 12 T/N     with a place for gradients
        update    DDP     4 T                                gradients
                  FSDP2   4 T/N
                  ZeRO-1  max(2 T, 8 T/N)                    gradients; in the step, this rank's twice and in float32
                  ZeRO-2  8 T/N
                  ZeRO-3  max(2 min(T + F, 1e9), 6 min(T/N, 1e9))    gathered weights; in the step, gradients of a group
        sampling  ZeRO-3  2 T + b F

    with T trained and F frozen parameters of b bytes and N ranks. One process has no buckets. FSDP2 gathers two layers at a
    time besides, which `phases` adds.
    """
    trained, share = job.trained, job.trained / job.ranks
    frozen = job.frozen_bytes * job.frozen
    if job.method == "DDP":
        buckets = job.trained_bytes if job.ranks > 1 else 0
        held = (job.trained_bytes + buckets + job.optimizer_bytes) * trained + frozen
        return Memory(held, update=job.trained_bytes * trained, sampling=0, host=0)
    if job.method == "FSDP2":
        held = ((job.trained_bytes + job.optimizer_bytes) * trained + frozen) / job.ranks
        return Memory(held, update=job.trained_bytes * share, sampling=0, host=0)
    weights, gradients, sampling = HALF * trained + frozen, 0.0, 0.0
    update = max(HALF * trained if job.stage == 1 else 0, (2 * HALF + FLOAT32) * share)
    if job.stage == 3:
        weights, gradients, sampling = weights / job.ranks, HALF * share, weights
        update = max(HALF * min(job.parameters, LIVE), (HALF + FLOAT32) * min(share, LIVE))
    optimizer = (FLOAT32 + job.optimizer_bytes) * share
    host = optimizer * job.offload_optimizer + weights * job.offload_param
    return Memory(weights + gradients + optimizer - host, update, sampling, host)


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank sends."""

    update: float
    """In an optimizer step."""
    sampling: float
    """In a generation batch, where weights are gathered for it."""


def traffic(job: Job, micro_batches: int = 1, passes: int = 0) -> Traffic:
    """What a rank sends, where collectives are rings.

        DDP     8 T R                           all-reduce of float32 gradients, once
        ZeRO-1  6 T R                           all-reduce of the gradients, once; all-gather of the weights
        ZeRO-2  (4 k + 2) T R                   the gradients for each micro-batch
        ZeRO-3  k (4 (T + F) + 2 T) R           all-gather forward and backward, reduce-scatter, for each micro-batch
                + 2 k p (T + F) R               all-gather for each pass without gradient
        FSDP2   k ((4 + 2 p) (T + F) + 4 T) R   as ZeRO-3, with float32 gradients

    with R = (N - 1)/N; sampling under ZeRO-3 gathers 2 (T + F) R.

    Args:
        job: What is trained.
        micro_batches: k, the forwards and backwards of an optimizer step.
        passes: p, the evaluations of each micro-batch without gradient: one for an old policy, one for a reference.
    """
    ring = (job.ranks - 1) / job.ranks
    if job.method == "DDP":
        return Traffic(2 * FLOAT32 * job.trained * ring, 0)
    gradients, weights = HALF * job.trained * ring, HALF * job.parameters * ring
    if job.stage == 1:
        return Traffic(3 * gradients, 0)
    if job.stage == 2:
        return Traffic((2 * micro_batches + 1) * gradients, 0)
    if job.method == "FSDP2":
        return Traffic(micro_batches * ((2 + passes) * weights + 2 * gradients), 0)
    return Traffic(micro_batches * ((2 + passes) * weights + gradients), weights)
