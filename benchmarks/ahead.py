"""What `generations_ahead` saves of an optimizer step: sampling, and rewards of workers, run beside the update.

    python benchmarks/ahead.py                  # a server that only sleeps, as long as an update takes
    python benchmarks/ahead.py --server vllm    # vLLM on a core of its own, where it is installed

The trainer has one core. A step is the median of those after the second; each run is in a process of its own. The reward
function sleeps for `--reward_seconds`.
"""

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from workload import ANSWER_LENGTHS, VOCABULARY, in_child, make_model, make_tokenizer


sys.path.insert(0, str(Path(__file__).parents[1]))  # the servers are those of the tests


class Sleepy:
    """A reward function, in a worker."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def __call__(self, completion_ids: list[list[int]]) -> list[float]:
        time.sleep(self.seconds)
        return [float(sum(ids) % 7) for ids in completion_ids]


@contextlib.contextmanager
def server_of(kind: str, model: Any, folder: str, delay: float) -> Any:
    """The URL of a server of the model."""
    from tests.vllm.helpers import Server
    from tests.vllm.stub import StubServer

    if kind == "stub":
        with StubServer(delay=delay, max_model_length=4096).running() as stub:
            yield stub.url
        return
    from grpo_trl.rollout.vllm.worker import EXTENSION

    arguments = ["--worker-extension-cls", EXTENSION]
    served = Server(model, Path(folder, "served"), *arguments, tokenizer=make_tokenizer(), max_model_length=1024)
    os.sched_setaffinity(0, {1})
    with served.running() as server:
        os.sched_setaffinity(0, {0})
        yield server.url


def measure(args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each step, and of its parts."""
    import torch
    from datasets import Dataset

    from grpo_trl import GRPOConfig, GRPOTrainer

    os.sched_setaffinity(0, {0})
    torch.set_num_threads(1)
    model = make_model(args.model)
    prompts = [" ".join(f"t{3 + (7 * i + j) % (VOCABULARY - 3)}" for j in range(75)) for i in range(64)]
    with (
        tempfile.TemporaryDirectory() as folder,
        server_of(args.server, model, folder, args.delay) as url,
    ):
        options = GRPOConfig(
            output_dir=folder,
            use_vllm=True,
            vllm_mode="server",
            vllm_server_base_url=url,
            vllm_check_steps=10**6,
            old_logprobs="sampler",
            generations_ahead=args.ahead,
            per_device_train_batch_size=args.completions,
            num_generations=8,
            num_iterations=args.iterations,
            max_completion_length=max(ANSWER_LENGTHS) // 2,
            max_steps=args.steps * args.iterations,
            reward_workers=1,
            logging_steps=args.iterations,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        data = Dataset.from_dict({"prompt": prompts})
        trainer: Any = GRPOTrainer(model, Sleepy(args.reward_seconds), options, data, processing_class=make_tokenizer())
        if args.server == "stub":
            trainer._sync._compare = lambda *probes: None  # its samples are of no model
        trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log][2:]
    names = ("step_time", "time/sampling", "time/rewards", "time/update", "time/sync")
    return {name: [log[name] for log in logs if name in log] for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", choices=("stub", "vllm"), default="stub")
    parser.add_argument("--model", default="5m")
    parser.add_argument("--completions", type=int, default=32)
    parser.add_argument("--iterations", type=int, default=1, help="optimizer steps on each generation batch")
    parser.add_argument("--steps", type=int, default=8, help="generation batches")
    parser.add_argument("--reward_seconds", type=float, default=0.0)
    parser.add_argument("--delay", type=float, help="seconds that the stub samples; as long as an update by default")
    parser.add_argument("--ahead", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args)))
        return

    def medians(ahead: int, delay: float) -> dict[str, float]:
        given = vars(args) | {"ahead": ahead, "delay": delay}
        options = [word for name, value in given.items() if name != "child" for word in (f"--{name}", value)]
        return {name: statistics.median(values) for name, values in in_child(__file__, *options).items() if values}

    delay = args.delay
    if delay is None:
        delay = medians(0, 0.0)["time/update"] if args.server == "stub" else 0.0
    parts = ("step_time", "time/sampling", "time/rewards", "time/update", "time/sync")
    print(f"{'generations_ahead':18}", *(f"{name:>14}" for name in parts))
    steps = {}
    for ahead in (0, 1):
        found = medians(ahead, delay)
        steps[ahead] = found["step_time"] * args.iterations
        print(f"{ahead:<18}", *(f"{found.get(name, 0.0):14.2f}" for name in parts), flush=True)
    print(f"of the time: {steps[1] / steps[0]:.0%}")


if __name__ == "__main__":
    main()
