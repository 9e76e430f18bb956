"""What sampling and the update cost on a GPU, in bfloat16: one JSON, a few minutes.

    python benchmarks/gpu.py --output gpu.json
    python benchmarks/gpu.py --models 0.5b --parts sampling profile
    python benchmarks/gpu.py --models tiny --rows 8 --completion 16 24          # does it run, on a CPU too

Models are of Qwen2's shape with random weights. Every part runs in a process of its own under a time limit; what fails or
takes too long is written down as that, and the others go on.

sampling    prompts of `--prompt` tokens, eight completions each, lengths spread over `--completion`: this package's
            engine, `model.generate`, transformers' continuous batching. Tokens/s of the second call.
profile     a decoding step of the engine: kernels, time on the GPU, and the time in which the GPU waits for the host.
sampler     the next tokens of all rows, from logits.
update      forward and backward of `--tokens` packed tokens: peak memory against `plan.activations`, largest kernels.
trainers    an optimizer step of this package and of TRL on the same completions.
"""

import argparse
import contextlib
import fcntl
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from workload import MODELS, Case, PeakMemory, make_model, now


GROUP = 8
PARTS = ("sampling", "profile", "sampler", "update", "trainers")


def device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def on_device(name: str, dtype: str = "bfloat16"):
    import torch

    with torch.device(device()):
        return make_model(name).to(getattr(torch, dtype))


turn: Any = None
"""The lock of the child that uses the device."""


def take_turn(path: str) -> None:
    """Wait until no other child uses the device; the turn ends with the process."""
    global turn
    turn = open(path, "w")  # noqa: SIM115  (the lock lives as long as the file is open)
    fcntl.flock(turn, fcntl.LOCK_EX)


def lengths_of(args) -> list[int]:
    """Spread evenly over `--completion`, shuffled."""
    import random

    low, high = args.completion
    lengths = [low + (high - low) * i // max(1, args.rows - 1) for i in range(args.rows)]
    random.Random(0).shuffle(lengths)
    return lengths


def prompts_of(args) -> list[list[int]]:
    return Case(args.rows // GROUP, args.prompt, GROUP).prompts(0)


# ---- Sampling ----
def sampling(args) -> dict:
    """Of one system: seconds of each call, tokens/s of the last, bytes above what the process held before it."""
    import sampling as systems

    model = on_device(args.model).eval()
    classes = {"group": systems.Group, "generate": systems.Generate, "continuous": systems.Continuous}
    write: Any = classes[args.system](model, args.rows)
    prompts, lengths, memory = prompts_of(args), lengths_of(args), PeakMemory()
    seconds = []
    with counted_recordings() as recordings:
        for _ in range(args.calls):
            recordings.clear()
            memory.start()
            start = now()
            assert write(prompts, GROUP, lengths) == lengths
            seconds.append(now() - start)
    result = {"seconds": seconds, "tokens_per_s": sum(lengths) / seconds[-1], "bytes": memory.stop()}
    return result | {"recordings": len(recordings), "recording_seconds": sum(recordings)}


@contextlib.contextmanager
def counted_recordings():
    """Inside, the list holds the seconds of each recording of a CUDA graph."""
    from unittest.mock import patch

    from grpo_trl.rollout.group.cuda_graphs import CudaRecorder

    seconds: list[float] = []
    record = CudaRecorder.__call__

    def timed(self, call):
        start = now()
        try:
            return record(self, call)
        finally:
            seconds.append(now() - start)

    with patch.object(CudaRecorder, "__call__", timed):
        yield seconds


# ---- One decoding step ----
def profile(args) -> dict:
    """Of steps of the engine in mid-flight: recorded as a CUDA graph, or launched one by one."""
    from unittest.mock import patch

    import sampling as systems

    from grpo_trl.rollout.group.scheduler import Scheduler

    model = on_device(args.model).eval()
    write: Any = systems.Group(model, args.rows)
    write.engine._records = args.system != "eager"
    prompts, lengths = prompts_of(args), [args.completion[1]] * args.rows
    middle, profiled = args.completion[1] // 2, 4
    timed = min(16, middle - 1)
    numbers, step, found, marks = iter(range(10**9)), Scheduler._step, {}, []

    def metered(self):
        number = next(numbers)
        if number in (middle - timed, middle):
            marks.append(now())
        if number == middle:
            found.update(kernels_of(lambda: [step(self) for _ in range(profiled)], profiled))
        step(self)

    write(prompts[:2], 2, lengths[:4])  # the comparison with plain forwards
    with counted_recordings() as recordings, patch.object(Scheduler, "_step", metered):
        write(prompts, GROUP, lengths)
    wall = (marks[1] - marks[0]) / timed
    return found | {
        "step_ms": wall * 1e3,
        "host_gap_ms": wall * 1e3 - found["gpu_ms"],
        "kernels_per_layer": found["kernels"] / model.config.num_hidden_layers,
        "recordings": [round(x, 3) for x in recordings],
    }


def kernels_of(work, times: int) -> dict:
    """Kernels of one of the `times` that `work` does the same, their milliseconds, and the largest of them."""
    import torch
    from torch.profiler import ProfilerActivity

    on_gpu = device() == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with torch.profiler.profile(activities=activities) as profiler:
        work()
        now()
    kind = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    totals: dict[str, list[float]] = {}
    for event in profiler.events():
        if event.device_type == kind:
            entry = totals.setdefault(event.name[:70], [0, 0.0])
            entry[0] += 1
            entry[1] += (event.device_time_total if on_gpu else event.self_cpu_time_total) / 1e3
    largest = sorted(totals.items(), key=lambda item: -item[1][1])[:14]
    return {
        "kernels": sum(count for count, _ in totals.values()) / times,
        "gpu_ms": sum(ms for _, ms in totals.values()) / times,
        "largest": [[name, round(count / times, 1), round(ms / times, 4)] for name, (count, ms) in largest],
    }


def sampler(args) -> dict:
    """Milliseconds in which the next tokens of all rows are sampled."""
    import torch

    from grpo_trl.rollout.base import SamplingOptions
    from grpo_trl.rollout.sampling import Sampler

    model = on_device("tiny")
    size = MODELS[args.model].get("vocab_size", 4096)
    logits = torch.randn(args.rows, size, device=device(), dtype=torch.bfloat16)
    noise = torch.rand(args.rows, dtype=torch.float64, device=device())
    result = {}
    cases: dict[str, dict[str, Any]] = {"plain": {}, "temperature": {"temperature": 0.7}, "top_p": {"top_p": 0.95}}
    for name, options in cases.items():
        sample = Sampler(model, SamplingOptions(8, 0, (), **options)).sample
        result[name] = milliseconds(lambda sample=sample: sample(logits, noise))
    return result


def milliseconds(work, times: int = 10) -> float:
    for _ in range(3):
        work()
    start = now()
    for _ in range(times):
        work()
    return (now() - start) / times * 1e3


# ---- The update ----
def update(args) -> dict:
    """Tokens/s of forward and backward, for each precision of the weights, slice of the head and checkpointing."""
    from accelerate import Accelerator

    from grpo_trl.logprobs.head import enable_logprobs

    result: dict[str, Any] = {}
    for weights in ("float32", "bfloat16"):
        model = on_device(args.model, weights).train()
        enable_logprobs(model)
        if weights == "float32":
            model = Accelerator(mixed_precision="bf16", cpu=device() == "cpu").prepare_model(model)
        for checkpointing in (True, False):
            for size in (256, 2048) if weights == "float32" else (2048,):
                name = f"{weights} weights, checkpointing {'on' if checkpointing else 'off'}, slices of {size}"
                try:
                    result[name] = update_of(model, args, checkpointing, size)
                except Exception as error:
                    result[name] = f"{type(error).__name__}: {error}"[:300]
    return result


def update_of(model, args, checkpointing: bool, slice_size: int) -> dict:
    import torch

    from grpo_trl import plan
    from grpo_trl.attention.shared_prefix import serve_shared_prefix
    from grpo_trl.logprobs import head
    from grpo_trl.logprobs.compute import compute_logprobs
    from grpo_trl.logprobs.packing import Packer

    head.slice_tokens = lambda *_: slice_size
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()
    micro_batch = Packer(10**6, None, 0, device()).micro_batch(completions_of(args), 1)

    def step():
        with serve_shared_prefix(model):  # where activations are recomputed
            compute_logprobs(model, micro_batch, 1.0).logps_BT.sum().backward()

    step()
    memory = PeakMemory()
    memory.start()
    step()
    peak = memory.stop()
    ms, tokens = milliseconds(step, times=4), micro_batch.input_ids_RS.shape[1]
    precision: Any = "bf16" if next(model.parameters()).dtype == torch.bfloat16 else "autocast"
    card = torch.cuda.get_device_properties(0).total_memory if device() == "cuda" and slice_size > 256 else None
    planned = plan.activations(plan.Shape.of(model.config), tokens, precision, checkpointing, card)
    largest = kernels_of(step, 1)["largest"]
    model.zero_grad(set_to_none=False)
    return {
        "tokens": tokens,
        "trained_tokens": int(micro_batch.mask_BT.sum()),
        "ms": ms,
        "tokens_per_s": tokens / ms * 1e3,
        "bytes": peak,
        "planned_bytes": planned,
        "largest": largest,
    }


def completions_of(args) -> list:
    """Groups of eight that fill `--tokens` packed tokens."""
    import random

    from grpo_trl.types import Completion

    source = random.Random(0)

    def tokens(length):
        return [source.randrange(3, 4000) for _ in range(length)]

    result, used = [], 0
    while used < args.tokens:
        prompt = tokens(args.prompt)
        group = [tokens(source.randrange(*args.completion)) for _ in range(GROUP)]
        used += len(prompt) + sum(map(len, group)) - GROUP
        result += [Completion(prompt, ids, [True] * len(ids), advantage=1.0) for ids in group]
    return result


def trainers(args) -> dict:
    """Seconds of an optimizer step on the same completions, of `update.py`."""
    import update

    case = Case(args.trainer_prompts, args.prompt, GROUP)
    measured = update.measure(args.system, args.model, case, 3, checkpointing=False)
    seconds = statistics.median(measured["seconds"])
    return {"seconds": seconds, "bytes": measured["bytes"], "completion_tokens_per_s": sum(case.lengths(0)) / seconds}


# ---- The table ----
CHILDREN = (
    ("profile", "recorded"),
    ("sampling", "group"),
    ("sampling", "generate"),
    ("trainers", "packed"),
    ("trainers", "trl"),
    ("update", "all"),
    ("sampler", "all"),
    ("profile", "eager"),
    ("sampling", "continuous"),
)
"""What is measured, and of which system."""


def run(model: str, part: str, system: str, args) -> dict | str:
    """What a child says, or why it says nothing."""
    command = [sys.executable, __file__, "--child", model, part, system]
    for name in ("rows", "prompt", "tokens", "calls", "trainer_prompts", "limit", "lock"):
        command += [f"--{name}", str(getattr(args, name))]
    command += ["--completion", *map(str, args.completion)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == -signal.SIGALRM:
        return f"took more than {args.limit} s"
    if done.returncode:
        return f"exit code {done.returncode}: {done.stderr[-600:]}"
    return json.loads(done.stdout.splitlines()[-1])


def child(args) -> None:
    """Measure one part of one model when it is this process's turn."""
    args.model, part, args.system = args.child
    import torch  # noqa: F401

    import grpo_trl  # noqa: F401

    if part == "trainers":
        import trl  # noqa: F401
    take_turn(args.lock)
    signal.alarm(args.limit)  # ends the process
    start = time.perf_counter()
    result = {name: globals()[name] for name in PARTS}[part](args)
    print(json.dumps(result | {"took": time.perf_counter() - start}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["0.5b", "1.5b"])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rows", type=int, default=256, help="completions that are sampled, all in flight at once")
    parser.add_argument("--prompt", type=int, default=300, help="tokens of a prompt")
    parser.add_argument(
        "--completion", type=int, nargs=2, default=[256, 400], help="tokens of the shortest and longest"
    )
    parser.add_argument("--tokens", type=int, default=8192, help="of a micro-batch")
    parser.add_argument("--trainer_prompts", type=int, default=4, help="of an optimizer step")
    parser.add_argument("--calls", type=int, default=2, help="of sampling; the last one counts")
    parser.add_argument("--limit", type=int, default=90, help="seconds of one measurement")
    parser.add_argument("--output", type=Path, default=Path("gpu.json"))
    parser.add_argument("--child", nargs=3, metavar=("MODEL", "PART", "SYSTEM"), help=argparse.SUPPRESS)
    parser.add_argument(
        "--lock", default=str(Path(tempfile.gettempdir()) / "grpo_trl-gpu.lock"), help=argparse.SUPPRESS
    )
    args = parser.parse_args()
    if args.child:
        child(args)
        return
    table: dict = {"machine": machine(), "options": {k: str(v) for k, v in vars(args).items()}}
    wanted: list[Any] = [(model, *one) for model in args.models for one in CHILDREN if one[0] in args.parts]
    with ThreadPoolExecutor(2) as pool:  # the next one imports while one measures
        for name, result in zip(wanted, pool.map(lambda one: run(one[0], one[1], one[2], args), wanted), strict=True):
            table[" ".join(name)] = result
            print(f"{' '.join(name)}: {shown(result)}", flush=True)
            args.output.write_text(json.dumps(table, indent=1))


def machine() -> dict:
    import torch
    import transformers

    card = torch.cuda.get_device_name() if device() == "cuda" else "CPU"
    return {"card": card, "torch": torch.__version__, "transformers": transformers.__version__}


def shown(result) -> str:
    """Numbers with four digits; a line for each of several results."""
    if isinstance(result, dict):
        nested = any(isinstance(value, dict) for value in result.values())
        return ("\n    " if nested else ", ").join(f"{name} {shown(value)}" for name, value in result.items())
    if isinstance(result, list):
        return "; ".join(map(shown, result))
    return f"{result:.4g}" if isinstance(result, float) else str(result)


if __name__ == "__main__":
    main()
