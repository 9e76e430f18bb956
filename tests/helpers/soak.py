"""Ends a small run at random moments, resumes it each time, and compares its end with that of the uninterrupted run.

    python -m tests.helpers.soak --kills 200

A run is a process of its own, forked from this one, so that a start costs no imports. It is ended by SIGKILL, by SIGTERM,
or by a limit on the size of files that is met while a checkpoint is being written; then it is started again with
`resume_from_checkpoint=True` until it reaches its last step.
"""

import argparse
import contextlib
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from datasets import Dataset
from transformers import TrainerCallback

from grpo_trl import GRPOConfig, GRPOTrainer
from grpo_trl.reliability.checkpoints import last_checkpoint
from grpo_trl.reliability.signals import EXIT_CODE
from tests.helpers.models import make_model, make_tokenizer
from tests.helpers.training import weights


KINDS = ("SIGKILL", "SIGTERM", "file size")
ENDS = {
    "SIGKILL": (0, -signal.SIGKILL),
    "SIGTERM": (0, EXIT_CODE, -signal.SIGTERM),  # the last outside train()
    "file size": (0, 1),
}
"""How a process may end; 0: it was done before."""
STEPS = 36
PROMPTS = ["ab=", "f", "a", "cde12=", "x", "yz", "0=", "1=2"]


def letters(completions):
    return [sum(letter < "n" for letter in text) / max(len(text), 1) for text in completions]


class LimitFiles(TrainerCallback):
    """From a step on, no file may be larger than some bytes."""

    def __init__(self, step: int, size: int):
        self.step, self.size = step, size

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= self.step:
            _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, most))


def train(folder: Path, callbacks: list[TrainerCallback]) -> None:
    """Train to the last step, from the last checkpoint if there is one, and write what came of it."""
    trainer = GRPOTrainer(
        make_model(),
        letters,
        GRPOConfig(
            output_dir=str(folder),
            learning_rate=0.01,
            beta=0.1,
            num_generations=4,
            per_device_train_batch_size=8,
            steps_per_generation=2,
            num_iterations=2,
            max_steps=STEPS,
            max_completion_length=8,
            reward_workers=1,
            save_steps=1,
            save_total_limit=2,
            logging_steps=3,
            gradient_checkpointing=False,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
        Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=make_tokenizer(),
        callbacks=callbacks,
    )
    trainer.train(resume_from_checkpoint=True)
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    torch.save({"weights": weights(trainer.model), "rewards": rewards}, folder / "ending.pt")
    (folder / "ending.pt").rename(folder / "end.pt")


def in_process(work: Callable[[], None], log: Path) -> int:
    """Start `work` in a process of its own that writes to `log`; its number."""
    process = os.fork()
    if process:
        return process
    os.setsid()
    code = 1
    try:
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        work()
        code = 0
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)  # nothing of the parent's may be cleaned up here, and the log may be at its limit


@dataclass
class Soak:
    """What has been done to runs so far."""

    folder: Path
    rng: random.Random
    duration: float = 0.0
    """Seconds of the uninterrupted run."""
    ended: Counter = field(default_factory=Counter)
    """How often a run was ended, by kind."""
    starts: Counter = field(default_factory=Counter)
    """From which step runs were started."""
    finished: int = 0

    def uninterrupted(self) -> None:
        start = time.monotonic()
        process = in_process(lambda: train(self.folder / "whole", []), self.folder / "log")
        assert os.waitpid(process, 0)[1] == 0, (self.folder / "log").read_text()
        self.duration = time.monotonic() - start

    def step_of(self, run: Path) -> int:
        folder = last_checkpoint(run)
        return 0 if folder is None else int(folder.name.split("-")[1])

    def interrupted(self, run: Path, kind: str) -> None:
        """Start or resume `run`, and end it once."""
        log, step = self.folder / "log", self.step_of(run)
        callbacks = []
        if kind == "file size":
            # From nothing to more than the largest file, the optimizer's, has
            callbacks = [LimitFiles(self.rng.randint(step + 1, STEPS), self.rng.choice([0, 3000, 30_000, 130_000]))]
        process = in_process(lambda: train(run, callbacks), log)
        if kind != "file size":
            time.sleep(self.rng.uniform(0, self.duration / 2))
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, getattr(signal, kind))
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        assert code in ENDS[kind], (kind, code, log.read_text()[-3000:])
        self.starts[
            "the beginning" if step == 0 else "inside a generation batch" if step % 4 else "between generation batches"
        ] += 1
        self.ended["not in time" if code == 0 else kind] += 1
        self._check_leftovers()

    def _check_leftovers(self) -> None:
        """Reward workers end with their trainer."""
        deadline = time.monotonic() + 10
        while any("worker.py" in " ".join(p.cmdline()) for p in psutil.process_iter() if _is_orphan(p)):
            assert time.monotonic() < deadline, "a worker outlives its trainer"
            time.sleep(0.05)

    def compare(self, run: Path) -> None:
        """A run that has reached its last step ends as the uninterrupted one."""
        whole, end = (torch.load(folder / "end.pt") for folder in (self.folder / "whole", run))
        assert all(torch.equal(end["weights"][name], value) for name, value in whole["weights"].items())
        assert end["rewards"] == whole["rewards"]
        self.finished += 1

    def go(self, kills: int) -> None:
        self.uninterrupted()
        run = self.folder / "run0"
        while sum(self.ended[kind] for kind in KINDS) < kills:
            self.interrupted(run, self.rng.choice(KINDS))
            if (run / "end.pt").exists():
                self.compare(run)
                run = self.folder / f"run{self.finished}"
        last = in_process(lambda: train(run, []), self.folder / "log")
        assert os.waitpid(last, 0)[1] == 0, (self.folder / "log").read_text()[-3000:]
        self.compare(run)

    def table(self) -> str:
        rows = [("ended by", "times"), ("---", "---:"), *((kind, self.ended[kind]) for kind in KINDS)]
        rows += [(f"(started from {place})", count) for place, count in sorted(self.starts.items())]
        rows += [("runs that reached their end, equal to the uninterrupted one", self.finished)]
        return "\n".join(f"| {name} | {count} |" for name, count in rows)


def _is_orphan(process: psutil.Process) -> bool:
    try:
        return process.ppid() == 1 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def soak(kills: int, seed: int) -> Soak:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(Path(folder), random.Random(seed))
        soak.go(kills)
    return soak


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(soak(options.kills, options.seed).table())
