"""What a whole GRPO step costs, here and in TRL: sampling, rewards, logprobs and update.

    python benchmarks/step.py                          # both cases, both models
    python benchmarks/step.py --models 5m --cases zero-shot --rounds 1
    python benchmarks/step.py --models 0.5b            # on a GPU, in bf16

Both trainers get the same model, prompts, rewards and options, and write completions of the same lengths, those of GSM8K's
answers: each completion ends where the benchmark says. A step lasts from the end of the one before to its own end. Each
trainer runs in a process of its own, in turns; its first step is left out; figures are medians. Memory is the peak of a
last step, which is not timed, above what the process holds before it.
"""

import argparse
import importlib
import json
import statistics
import tempfile
from typing import Any

from workload import ANSWER_LENGTHS, MODELS, Case, Meter, ended_at, in_child, make_model, make_tokenizer, now


SYSTEMS = ("trl", "grpo_trl")
CASES = {"zero-shot": Case(4, 75), "eight-shot": Case(2, 1800), "tiny": Case(2, 20, 2)}
PHASES = ("sampling", "rewards", "logprobs", "update")
WARM_UP = 1


# ---- One trainer, in a process of its own ----
def measure(system: str, model_name: str, case: Case, steps: int) -> dict:
    """Seconds of each timed step, those of its phases, and the bytes of a last one."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback

    total = WARM_UP + steps + 1
    prompts = [" ".join(f"t{token}" for token in ids) for step in range(total) for ids in case.prompts(step)]
    options = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": case.num_completions,
        "num_generations": case.num_generations,
        "max_completion_length": max(ANSWER_LENGTHS),
        "max_steps": total,
        "beta": 0.0,
        "gradient_checkpointing": False,
        "bf16": torch.cuda.is_available(),
        "shuffle_dataset": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    }
    meter = Meter(timed_steps=steps)

    class MeterCallback(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            meter.stop()  # nothing at the end of the first one
            meter.start()

    def reward(completions, **kwargs):
        return [float(i % 4) for i in range(len(completions))]

    trainer_class, config = _trainer_of(system, options)
    model = make_model(model_name)
    trainer = trainer_class(
        model,
        reward,
        config,
        Dataset.from_dict({"prompt": prompts}),
        processing_class=make_tokenizer(),
        callbacks=[MeterCallback()],
    )
    sampling = _end_completions(system, model, trainer, case)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    lengths = [entry["completions/mean_length"] for entry in logged]
    assert lengths == [statistics.fmean(case.lengths(step)) for step in range(total)], lengths
    phases = [
        {"sampling": seconds} | {phase: entry[f"time/{phase}"] for phase in PHASES if f"time/{phase}" in entry}
        for seconds, entry in zip(sampling, logged, strict=True)
    ]
    return {"seconds": meter.seconds, "phases": phases[WARM_UP:-1], "bytes": meter.bytes}


def _trainer_of(system: str, options: dict):
    library: Any = importlib.import_module("trl" if system == "trl" else "grpo_trl")
    own = {"loss_type": "grpo"} if system == "trl" else {}
    return library.GRPOTrainer, library.GRPOConfig(**options, **own)


def _end_completions(system: str, model, trainer, case: Case) -> list[float]:
    """Let the completions of step i have the lengths `case.lengths(i)`; the seconds that sampling them took."""
    seconds: list[float] = []
    if system == "grpo_trl":
        from grpo_trl.rollout.base import RolloutRequest

        engine = trainer._runner.engine
        rollout = engine.rollout

        def timed_rollout(request):
            if not seconds:  # the engine compares itself with plain forwards, of completions that nothing ends
                rollout(RolloutRequest([""], request.prompt_ids[:1], 2, [0]))
            start = now()
            with ended_at(case.lengths(len(seconds))):
                output = rollout(request)
            seconds.append(now() - start)
            return output

        engine.rollout = timed_rollout
        return seconds
    from transformers import LogitsProcessor

    class Ends(LogitsProcessor):
        def __init__(self, lengths, prompt_length):
            self.lengths, self.prompt_length = lengths, prompt_length

        def __call__(self, input_ids, scores):
            written = input_ids.shape[1] - self.prompt_length
            scores[:, 1] = float("-inf")
            for row, length in enumerate(self.lengths):
                if length == written + 1:
                    scores[row] = float("-inf")
                    scores[row, 1] = 0.0
            return scores

    generate = model.generate

    def timed_generate(input_ids, **kwargs):
        start = now()
        ends = Ends(case.lengths(len(seconds)), input_ids.shape[1])
        output = generate(input_ids=input_ids, logits_processor=[ends], **kwargs)
        seconds.append(now() - start)
        return output

    model.generate = timed_generate
    return seconds


# ---- The table ----
def compare(model: str, name: str, case: Case, args) -> None:
    print(f"\n{model}, {name}: {case.num_prompts} prompts of {case.prompt_length} tokens, G = {case.num_generations}")
    seconds: dict[str, list[float]] = {system: [] for system in args.systems}
    phases: dict[str, list[dict]] = {system: [] for system in args.systems}
    peaks: dict[str, list[int]] = {system: [] for system in args.systems}
    sizes = case.num_prompts, case.prompt_length, case.num_generations
    for _ in range(args.rounds):
        for system in args.systems:
            measured = in_child(__file__, system, "--models", model, "--steps", args.steps, "--case_sizes", *sizes)
            seconds[system] += measured["seconds"]
            phases[system] += measured["phases"]
            peaks[system].append(measured["bytes"])
    time_of = {system: statistics.median(values) for system, values in seconds.items()}
    peak_of = {system: statistics.median(values) for system, values in peaks.items()}
    print(f"{'':10} {'s/step':>8} {'range':>17} {'GiB':>6} {'time':>6} {'memory':>6}  of grpo_trl; shares of a step")
    for system, values in seconds.items():
        ratios = [f"{x[system] / x['grpo_trl']:.2f}" if "grpo_trl" in x else "" for x in (time_of, peak_of)]
        shares = [
            f"{phase} {statistics.median(p[phase] for p in phases[system]) / time_of[system]:.0%}"
            for phase in PHASES
            if phase in phases[system][0]
        ]
        print(
            f"{system:10} {time_of[system]:8.2f} {f'{min(values):.2f}-{max(values):.2f}':>17} "
            f"{peak_of[system] / 2**30:6.2f}",
            *(f"{ratio:>6}" for ratio in ratios),
            f" {', '.join(shares)}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["zero-shot", "eight-shot"])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["5m", "32m"])
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a process")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each trainer, in turns")
    parser.add_argument("--child", choices=SYSTEMS, help=argparse.SUPPRESS)
    parser.add_argument("--case_sizes", nargs=3, type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.child, args.models[0], Case(*args.case_sizes), args.steps)))
        return
    for model in args.models:
        for name in args.cases:
            compare(model, name, CASES[name], args)


if __name__ == "__main__":
    main()
