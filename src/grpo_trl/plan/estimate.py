"""What a run takes: bytes of a rank in each phase, and the time of a step at the limits of a card."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from .activations import (
    Precision,
    Shape,
    activation_bytes_per_token,
    key_value_bytes_per_token,
    largest_micro_batch,
    logits_bytes,
)
from .batch import BatchPlan
from .cards import Card
from .memory import Job, memory


GIB = 2**30
Phases = dict[str, dict[str, float]]
"""For "sampling", "logprobs" and "update": what holds how many bytes of a rank."""


@dataclass(frozen=True)
class Setup:
    """A model, how it is trained, and on how much text."""

    job: Job
    shape: Shape
    precision: Precision
    batch: BatchPlan
    prompt_tokens: int
    """Of a typical prompt."""
    completion_tokens: int
    """`max_completion_length`: what memory must hold."""
    rows_in_flight: int
    """Completions that are decoded at a time."""
    checkpointing: bool = True
    max_tokens: int | None = None
    """Tokens of a micro-batch; by default those of `batch_size` completions with their prompts."""
    reference_copies: bool = False
    """Whether a frozen copy of the trained weights is kept: `beta > 0` without a new adapter."""
    reference: bool = False
    """Whether a reference is evaluated."""
    sampler_share: float = 0.0
    """Share of the card that vLLM takes beside the trainer (`vllm_gpu_memory_utilization`)."""
    gpu_bytes: float | None = None
    """Of a rank's card, which decides how many tokens have logits at a time; None on a CPU."""

    @property
    def micro_batch_tokens(self) -> int:
        """Tokens of the largest micro-batch: the limit, or `batch_size` completions of full length with their prompts."""
        if self.max_tokens is not None:
            return self.max_tokens
        groups = -(-self.batch.batch_size // self.batch.num_generations)
        return self.batch.batch_size * self.completion_tokens + groups * self.prompt_tokens


def phases(setup: Setup) -> Phases:
    """Count the bytes that a rank holds in each phase, by component; what is offloaded is not on it."""
    job, shape = setup.job, setup.shape
    held = _held(setup)
    taken = memory(job)
    rows = min(setup.rows_in_flight, max(setup.batch.completions // job.ranks, setup.batch.num_generations))
    prompts = -(-2 * rows // setup.batch.num_generations)
    cached = rows * setup.completion_tokens + prompts * setup.prompt_tokens
    sampling = {
        "gathered weights": taken.sampling,
        "weights in bfloat16": 2.0 * job.trained if setup.precision == "autocast" else 0.0,
        "keys and values": float(cached * key_value_bytes_per_token(shape, setup.precision)),
        "logits": 3.0 * 4 * rows * shape.vocabulary,
    }
    logits, tokens = float(logits_bytes(shape, setup.gpu_bytes)), setup.micro_batch_tokens
    per_token = activation_bytes_per_token(shape, setup.precision, setup.checkpointing)
    one_layer = activation_bytes_per_token(replace(shape, layers=1), setup.precision, checkpointing=False)
    gathered = 2 * 2.0 * job.parameters / shape.layers if job.method == "FSDP2" else 0.0
    return {
        "sampling": _nonzero(held | sampling),
        "logprobs": _nonzero(
            held | {"gathered weights": gathered, "activations": float(tokens * one_layer), "logits": logits / 2}
        ),
        "update": _nonzero(
            held
            | {"gradients": taken.update, "gathered weights": gathered}
            | {"activations": float(tokens * per_token), "logits": logits}
        ),
    }


def _held(setup: Setup) -> dict[str, float]:
    """What a rank holds all the time."""
    job = setup.job
    sharded = job.ranks if job.method in ("ZeRO-3", "FSDP2") else 1
    trained_bytes = 2 if job.stage else job.trained_bytes
    weights = trained_bytes * job.trained / sharded if not job.offload_param else 0.0
    frozen = job.frozen_bytes * job.frozen / sharded if not job.offload_param else 0.0
    return {
        "weights": weights,
        "frozen weights": frozen,
        "optimizer and gradient buffers": memory(job).held - weights - frozen,
        "reference": trained_bytes * job.trained / sharded if setup.reference_copies else 0.0,
    }


def _nonzero(components: dict[str, float]) -> dict[str, float]:
    return {name: size for name, size in components.items() if size}


def peak(setup: Setup) -> float:
    """Count the bytes of a rank at the peak of the phase that needs most."""
    return max(sum(components.values()) for components in phases(setup).values())


def largest_tokens(setup: Setup, gpu_bytes: float) -> int:
    """Count the tokens of the largest micro-batch whose update fits on a card; 0 if the rest does not."""
    update = phases(replace(setup, gpu_bytes=gpu_bytes))["update"]
    taken = sum(size for name, size in update.items() if name not in ("activations", "logits"))
    free = gpu_bytes * (1 - setup.sampler_share) - taken
    return largest_micro_batch(setup.shape, free, setup.precision, setup.checkpointing, gpu_bytes)


def step_seconds(setup: Setup, card: Card) -> dict[str, float]:
    """Estimate the least time of an optimizer step by phase: a card at its full rate and bandwidth (roofline).

        sampling   waves x tokens x max(bytes read / bandwidth, FLOPs / rate)
        logprobs   2 P FLOPs a token, for an old policy and for a reference
        update     6 P FLOPs a token, 8 P with recomputation

    with P parameters. Attention's FLOPs, launches and communication are not counted: real steps take 1.5 to 4 times as
    long.
    """
    job, batch = setup.job, setup.batch
    completions = batch.mini_batch / job.ranks
    tokens = completions * setup.completion_tokens + completions / batch.num_generations * setup.prompt_tokens
    forward = 2.0 * job.parameters * tokens / card.flops_per_second
    passes = (batch.off_policy > 0) + setup.reference
    sampled = completions / max(batch.num_iterations, 1)
    return {
        "sampling": _sampling_seconds(setup, card, sampled),
        "logprobs": passes * forward,
        "update": (4 if setup.checkpointing else 3) * forward,
    }


def _sampling_seconds(setup: Setup, card: Card, completions: float) -> float:
    rows = min(setup.rows_in_flight, completions)
    if not rows:
        return 0.0
    key_value = key_value_bytes_per_token(setup.shape, setup.precision)
    own = rows * setup.completion_tokens / 2
    shared = rows / setup.batch.num_generations * setup.prompt_tokens
    read = 2.0 * setup.job.parameters + key_value * (own + shared)
    compute = 2.0 * setup.job.parameters * rows / card.flops_per_second
    return completions / rows * setup.completion_tokens * max(read / card.bytes_per_second, compute)


def launches(setup: Setup) -> Iterator[tuple[str, Setup]]:
    """List the ways to launch the same run, from the fastest to the one that needs least memory."""
    job = setup.job
    ways = ["DDP"] if job.ranks == 1 else ["DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3", "FSDP2"]
    for method in ways:
        precision: Precision = "bf16" if method.startswith("ZeRO") else setup.precision
        yield (
            method,
            replace(
                setup,
                precision=precision,
                job=replace(job, method=method, offload_optimizer=False, offload_param=False),
            ),
        )
    for method, param in (("ZeRO-2", False), ("ZeRO-3", True)):
        offloaded = replace(job, method=method, offload_optimizer=True, offload_param=param)
        yield f"{method} with offload", replace(setup, precision="bf16", job=offloaded)
