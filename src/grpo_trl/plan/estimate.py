"""What a run takes: bytes of a rank in each phase, and the time of a step at the limits of a card."""

import bisect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from ..data.schedule import Schedule
from .activations import (
    GPU_TOKENS,
    PREFILL_TOKENS,
    Precision,
    Shape,
    activation_bytes_per_token,
    forward_bytes_per_token,
    kept_bytes_per_token,
    key_value_bytes_per_token,
    largest_micro_batch,
    layer_weights,
    logits_bytes,
)
from .cards import Card
from .memory import Job, memory


GIB = 2**30
FREE_SHARE = 0.8
"""Share of the free memory that an update may take; the rest is for what the plan does not count, such as fragments."""
LAID_OUT_SHARE = 0.15
"""Share of the free memory that weights laid out for decoding may take; where they would take more, there are none."""
Sampler = Literal["engine", "vllm", "server"]
"""What samples: the engine in the trainer's process, vLLM on its card, or vLLM on cards of its own."""
Phases = dict[str, dict[str, float]]
"""For "sampling", "logprobs" and "update": what holds how many bytes of a rank."""


@dataclass(frozen=True)
class Setup:
    """A model, how it is trained, and on how much text."""

    job: Job
    shape: Shape
    precision: Precision
    schedule: Schedule
    prompt_tokens: int
    """Of a typical prompt."""
    completion_tokens: int
    """`max_completion_length`: what memory must hold."""
    rows_in_flight: int
    """Completions that are decoded at a time."""
    checkpointing: bool | None = True
    """Whether the backward pass recomputes activations; None: where a micro-batch does not fit otherwise."""
    max_tokens: int | None = None
    """Tokens of a micro-batch; None: those of `micro_batch_tokens` if they fit, and as many as fit otherwise."""
    reference_copies: bool = False
    """Whether a frozen copy of the trained weights is kept: `beta > 0` without a new adapter."""
    reference: bool = False
    """Whether a reference is evaluated."""
    sampler: Sampler = "engine"
    sampler_share: float = 0.0
    """Share of the card that vLLM takes beside the trainer (`vllm_gpu_memory_utilization`)."""
    sampler_sleeps: bool = False
    """Whether vLLM is off the card while it does not sample."""
    gpu_bytes: float | None = None
    """Of a rank's card, which decides how many tokens have logits at a time; None on a CPU."""

    @property
    def micro_batch_tokens(self) -> int:
        """Tokens of the largest micro-batch: the limit, or what is worth it.

        That is on a CPU `batch_size` completions of full length with their prompts; on a GPU an optimizer step, or the part
        of it that has `GPU_TOKENS`.
        """
        if self.max_tokens is not None:
            return self.max_tokens
        if self.gpu_bytes is None:
            return self._tokens_of(self.schedule.batch_size)
        return max(self._tokens_of(1), min(GPU_TOKENS, self.step_tokens))

    @property
    def micro_batches(self) -> int:
        """Forwards and backwards of an optimizer step, if all completions have full length."""
        return -(-self.step_tokens // max(self.micro_batch_tokens, 1))

    @property
    def step_tokens(self) -> int:
        """Tokens of a rank in an optimizer step, if all completions have full length."""
        return self._tokens_of(self.schedule.batch_size * self.schedule.accumulation)

    @property
    def recomputes(self) -> bool:
        """Whether activations are recomputed, as far as is known."""
        return self.checkpointing is not False

    def _tokens_of(self, completions: int) -> int:
        return (
            completions * self.completion_tokens + -(-completions // self.schedule.num_generations) * self.prompt_tokens
        )


def phases(setup: Setup) -> Phases:
    """Count the bytes that a rank holds in each phase, by component; what is offloaded is not on it."""
    shape, held = setup.shape, _held(setup)
    vllm = {"vLLM": setup.sampler_share * (setup.gpu_bytes or 0.0)} if setup.sampler == "vllm" else {}
    awake = {} if setup.sampler_sleeps else vllm
    gathered = 2 * 2.0 * setup.job.parameters / shape.layers if setup.job.method == "FSDP2" else 0.0
    logprobs = {
        "activations": float(setup.micro_batch_tokens * forward_bytes_per_token(shape, setup.precision)),
        "logits": logits_bytes(shape, setup.precision, setup.gpu_bytes) / 2,
    }
    return {
        "sampling": _nonzero(held | vllm | _sampling(setup)),
        "logprobs": _nonzero(held | awake | {"gathered weights": gathered} | logprobs),
        "update": _nonzero(held | awake | {"gathered weights": gathered} | _update(setup)),
    }


def _sampling(setup: Setup) -> dict[str, float]:
    """What the engine of this process takes on top; vLLM keeps to its share."""
    if setup.sampler != "engine":
        return {}
    job, shape, schedule = setup.job, setup.shape, setup.schedule
    groups = max(schedule.prompts_per_generation_batch // job.ranks, 1)
    rows = min(setup.rows_in_flight, groups * schedule.num_generations)
    prompts = min(groups, 2 * -(-rows // schedule.num_generations))
    cached = rows * setup.completion_tokens + prompts * setup.prompt_tokens
    at_a_time = PREFILL_TOKENS["cpu" if setup.gpu_bytes is None else "cuda"]
    prefilled = max(setup.prompt_tokens, min(at_a_time, prompts * setup.prompt_tokens))
    return {
        "gathered weights": memory(job).sampling,
        "weights in bfloat16": 2.0 * job.trained if setup.precision == "autocast" else 0.0,
        "weights for decoding": _laid_out(setup),
        "keys and values": float(cached * key_value_bytes_per_token(shape, setup.precision)),
        "activations": float(prefilled * forward_bytes_per_token(shape, setup.precision)),
        "logits": 3.0 * 4 * rows * shape.vocabulary,
    }


def _laid_out(setup: Setup) -> float:
    """Copies of the layers' weights in the order that decoding reads them, made where memory is plenty."""
    job = setup.job
    size = job.trained_bytes * job.trained + job.frozen_bytes * job.frozen
    if setup.gpu_bytes is not None and size > LAID_OUT_SHARE * (setup.gpu_bytes - sum(_held(setup).values())):
        return 0.0
    return float((4 if setup.precision == "float32" else 2) * min(layer_weights(setup.shape), job.parameters))


def _update(setup: Setup) -> dict[str, float]:
    """What a forward and backward takes on top, at its peak.

    That is one of three moments: at the head, with the logits; in the backward pass of the last layer, while all others
    keep their activations; or in that of the first, when all other gradients are there. Gradients of one process, and
    under DDP, come as activations go, unless an earlier micro-batch of the step has left them.
    """
    job, shape, tokens = setup.job, setup.shape, setup.micro_batch_tokens
    gradients = memory(job).update
    first, own_head = setup.micro_batches == 1 and job.method == "DDP", job.frozen == 0
    early = min(job.trained_bytes * shape.vocabulary * shape.hidden * own_head, gradients) if first else gradients
    kept = kept_bytes_per_token(shape, setup.precision, setup.recomputes)
    last = activation_bytes_per_token(shape, setup.precision, setup.recomputes)
    only = activation_bytes_per_token(replace(shape, layers=1), setup.precision, setup.recomputes)
    logits = float(logits_bytes(shape, setup.precision, setup.gpu_bytes))
    moments = (
        {"activations": float(tokens * kept), "gradients": early, "logits": logits},
        {"activations": float(tokens * last), "gradients": early},
        {"activations": float(tokens * only), "gradients": gradients},
    )
    return max(moments, key=lambda components: sum(components.values()))


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

    def taken(tokens: int) -> float:
        return sum(phases(replace(setup, gpu_bytes=gpu_bytes, max_tokens=tokens))["update"].values())

    return max(0, bisect.bisect_right(range(2**40), gpu_bytes, key=taken) - 1)


def room_for_activations(setup: Setup, free: float) -> float:
    """Count the bytes for activations and logits where `free` are free before the first update.

        room = 0.8 (free - gradients - gathered weights - optimizer)

    Under ZeRO the optimizer is there before the first update.
    """
    job = setup.job
    share = job.ranks if job.method == "FSDP2" else 1
    optimizer = 0.0 if job.stage else job.optimizer_bytes * job.trained / share
    gathered = phases(setup)["update"].get("gathered weights", 0.0)
    return FREE_SHARE * (free - memory(job).update - gathered - optimizer)


def choose(setup: Setup, room: float) -> tuple[bool, int]:
    """Choose whether activations are recomputed, and count the tokens of a micro-batch that fit into `room` then.

    Where the setup leaves it open, activations are kept if a micro-batch of `micro_batch_tokens` fits with them. The count
    is rounded down to four binary digits, so that a little more or less memory makes no other micro-batches.
    """
    fits = {
        recomputed: largest_micro_batch(setup.shape, room, setup.precision, recomputed, setup.gpu_bytes)
        for recomputed in (False, True)
    }
    recomputed = fits[False] < setup.micro_batch_tokens if setup.checkpointing is None else setup.checkpointing
    digits = max(0, fits[recomputed].bit_length() - 4)
    return recomputed, fits[recomputed] >> digits << digits


def fitted(setup: Setup, room: float) -> Setup:
    """Choose what a setup leaves open as the run does that has `room` bytes for activations and logits."""
    recomputed, fits = choose(setup, room)
    tokens = setup.max_tokens
    if tokens is None and fits:
        tokens = min(fits, setup.micro_batch_tokens)
    return replace(setup, checkpointing=recomputed, max_tokens=tokens)


def fitted_to_card(setup: Setup, gpu_bytes: float) -> Setup:
    """Choose what a setup leaves open as the run does on a card of so many bytes."""
    setup = replace(setup, gpu_bytes=gpu_bytes)
    update = phases(setup)["update"]
    held = sum(size for name, size in update.items() if name not in ("activations", "logits", "gradients"))
    return fitted(setup, FREE_SHARE * (gpu_bytes - held - memory(setup.job).update))


def step_seconds(setup: Setup, card: Card) -> dict[str, float]:
    """Estimate the least time of an optimizer step by phase: a card at its full rate and bandwidth (roofline).

        sampling   waves x tokens x max(bytes read / bandwidth, FLOPs / rate)
        logprobs   2 P FLOPs a token, for an old policy and for a reference
        update     6 P FLOPs a token, 8 P with recomputation

    with P parameters. Attention's FLOPs, launches and communication are not counted: docs/performance.md compares with
    real steps.
    """
    job, schedule = setup.job, setup.schedule
    completions = schedule.batch_size * schedule.accumulation
    tokens = completions * setup.completion_tokens + completions / schedule.num_generations * setup.prompt_tokens
    forward = 2.0 * job.parameters * tokens / card.flops_per_second
    passes = (not schedule.on_policy) + setup.reference
    sampled = completions / schedule.num_iterations
    return {
        "sampling": _sampling_seconds(setup, card, sampled),
        "logprobs": passes * forward,
        "update": (4 if setup.recomputes else 3) * forward,
    }


def _sampling_seconds(setup: Setup, card: Card, completions: float) -> float:
    rows = min(setup.rows_in_flight, completions)
    if not rows:
        return 0.0
    key_value = key_value_bytes_per_token(setup.shape, setup.precision)
    own = rows * setup.completion_tokens / 2
    shared = rows / setup.schedule.num_generations * setup.prompt_tokens
    weights = (4 if setup.precision == "float32" else 2) * setup.job.trained
    read = weights + setup.job.frozen_bytes * setup.job.frozen + key_value * (own + shared)
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
