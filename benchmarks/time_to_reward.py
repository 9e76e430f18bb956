"""How soon a run learns, here and in TRL: seconds and steps until GSM8K's arithmetic reward is reached.

    python benchmarks/time_to_reward.py --model PATH/model --dataset PATH/gsm8k

trains a small language model on the arithmetic reward of examples/gsm8k.py (the share of its calculations that are right)
with both trainers, the same options and the same seeds, until the mean reward of the last steps reaches the goal. Each run
is a process of its own, trainers in turns. The clock runs from the call of train(); what a trainer compiles at its first
step counts, and stands in a column of its own.
"""

import argparse
import importlib
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from workload import in_child, now


SYSTEMS = ("trl", "grpo_trl")
AVERAGED = 4
"""Steps over which the reward is averaged."""


def measure(system: str, args) -> dict:
    """The second and the reward at the end of each step."""
    from transformers import AutoTokenizer, TrainerCallback

    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    from gsm8k import ScriptArguments, arithmetic, load

    rewards: list[float] = []
    seconds: list[float] = []

    def arithmetic_reward(completions, **kwargs):
        values = arithmetic(completions)
        rewards.append(statistics.fmean(values))
        return values

    class StopAtGoal(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            self.start = now()

        def on_step_end(self, _, state, control, **kwargs):
            seconds.append(now() - self.start)
            control.should_training_stop |= reached(rewards, args.goal)

    options = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": args.batch_size,
        "num_generations": 8,
        "max_completion_length": 200,
        "learning_rate": args.learning_rate,
        "lr_scheduler_type": "constant",
        "max_steps": args.max_steps,
        "seed": args.seed,
        "beta": 0.0,
        "gradient_checkpointing": False,
        "bf16": False,
        "model_init_kwargs": {"dtype": "float32"},
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    }
    library: Any = importlib.import_module("trl" if system == "trl" else "grpo_trl")
    if system == "trl":
        options["loss_type"] = "grpo"
    trainer = library.GRPOTrainer(
        args.model,
        arithmetic_reward,
        library.GRPOConfig(**options),
        load(ScriptArguments(dataset=args.dataset, prompt_style="plain"))["train"],
        processing_class=AutoTokenizer.from_pretrained(args.model),
        callbacks=[StopAtGoal()],
    )
    trainer.train()
    return {"seconds": seconds, "rewards": rewards, "reached": reached(rewards, args.goal)}


def reached(rewards: list[float], goal: float) -> bool:
    return len(rewards) >= AVERAGED and statistics.fmean(rewards[-AVERAGED:]) >= goal


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", required=True, help="folder of a model trained on plain 'Question: ... Answer:' text"
    )
    parser.add_argument("--dataset", required=True, help="folder with GSM8K's train.jsonl and test.jsonl")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--goal", type=float, default=0.8)
    parser.add_argument("--batch_size", type=int, default=64, help="completions of a step")
    parser.add_argument("--learning_rate", type=float, default=3e-4)
    parser.add_argument("--max_steps", type=int, default=150)
    parser.add_argument("--child", choices=SYSTEMS, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.child, args)))
        return
    names = ("model", "dataset", "goal", "batch_size", "learning_rate", "max_steps")
    options = [part for name in names for part in (f"--{name}", getattr(args, name))]
    print(f"{'seed':>4} {'':10} {'seconds':>8} {'first step':>10} {'steps':>6} {'reward':>12}")
    totals: dict[str, list[float]] = {system: [] for system in args.systems}
    for seed in args.seeds:
        for system in args.systems:
            run = in_child(__file__, system, *options, "--seed", seed)
            seconds, rewards = run["seconds"], run["rewards"]
            totals[system].append(seconds[-1])
            outcome = f"{rewards[0]:.2f} to {statistics.fmean(rewards[-AVERAGED:]):.2f}"
            note = "" if run["reached"] else "  not reached"
            print(
                f"{seed:>4} {system:10} {seconds[-1]:8.0f} {seconds[0]:10.1f} {len(seconds):6} {outcome:>12}{note}",
                flush=True,
            )
    if set(totals) == set(SYSTEMS):
        ratios = [theirs / ours for theirs, ours in zip(totals["trl"], totals["grpo_trl"], strict=True)]
        print(
            f"TRL takes {statistics.median(ratios):.1f} times as long (each seed: {', '.join(f'{r:.1f}' for r in ratios)})"
        )


if __name__ == "__main__":
    main()
