"""What writing completions costs: this package's engine, `model.generate`, transformers' continuous batching, and vLLM.

    python benchmarks/sampling.py                      # both cases, both models, all systems
    python benchmarks/sampling.py --models 5m --cases zero-shot --rounds 1
    python benchmarks/sampling.py --models 0.5b        # on a GPU, in bf16

All systems get the same prompts and write completions of the same lengths, those of GSM8K's answers: end tokens end
nothing, and each completion ends at its own length, as its system ends completions. Each system runs in a process of its
own, in turns; a first, small call is left out; figures are medians. Memory is the peak of a call above what the process
holds before it. Continuous batching allocates its pages at each call, by its own defaults for this workload, and
shares the pages of equal prompts; the time that it takes to set up is counted, as it is in our engine. vLLM is there if it
is installed; it allocates its pages when it starts, so that its memory is not counted.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from workload import MODELS, Case, PeakMemory, ended_at, in_child, make_model, make_tokenizer, now


GROUP: dict[str, dict[str, float]] = {"group": {}, "top_p": {"top_p": 0.95}, "penalty": {"repetition_penalty": 1.1}}
"""This package's engine, and what it is asked for besides."""
SYSTEMS = ("generate", "continuous", *GROUP, *(["vllm"] if find_spec("vllm") else []))
CASES = {"zero-shot": Case(32, 75), "eight-shot": Case(8, 1800), "tiny": Case(2, 20, 2)}


# ---- One system, in a process of its own ----
def measure(system: str, model_name: str, case: Case, calls: int, rows_in_flight: int) -> dict:
    """Seconds and bytes of each call."""
    import torch

    on_gpu = torch.cuda.is_available()
    model = make_model(model_name).to("cuda" if on_gpu else "cpu", torch.bfloat16 if on_gpu else torch.float32).eval()
    others: dict[str, Any] = {"generate": Generate, "continuous": Continuous, "vllm": VLLM}
    write = others[system](model, rows_in_flight) if system in others else Group(model, rows_in_flight, **GROUP[system])
    small = Case(2, 75, 2)
    write(small.prompts(-1), small.num_generations, small.lengths(-1))
    seconds, peaks, memory = [], [], PeakMemory()
    for step in range(calls):
        prompts, lengths = case.prompts(step), case.lengths(step)
        memory.start()
        start = now()
        written = write(prompts, case.num_generations, lengths)
        seconds.append(now() - start)
        peaks.append(memory.stop())
        assert written == lengths, f"{system} wrote other lengths"
    return {"seconds": seconds, "bytes": peaks}


class Generate:
    def __init__(self, model, rows_in_flight):
        self.model = model

    def __call__(self, prompts, group, lengths):
        import torch
        from transformers import GenerationConfig, StoppingCriteria

        class Ends(StoppingCriteria):
            def __init__(self, device):
                self.lengths = torch.tensor(lengths, device=device)
                self.step = 0

            def __call__(self, input_ids, scores, **kwargs):
                self.step += 1
                return self.lengths <= self.step

        input_ids = torch.tensor([ids for ids in prompts for _ in range(group)], device=self.model.device)
        config = GenerationConfig(
            do_sample=True, top_k=0, max_new_tokens=max(lengths), pad_token_id=0, eos_token_id=None
        )
        self.model.generation_config.eos_token_id = None
        with torch.no_grad():
            output = self.model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                generation_config=config,
                stopping_criteria=[Ends(input_ids.device)],
            )
        written = output[:, input_ids.shape[1] :]
        return [length for length, ids in zip(lengths, written, strict=True) if len(ids) >= length]


class Continuous:
    def __init__(self, model, rows_in_flight):
        self.model = model

    def __call__(self, prompts, group, lengths):
        from transformers import GenerationConfig
        from transformers.generation.continuous_batching.utils import WorkloadHints

        config = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=max(lengths), pad_token_id=0, eos_token_id=-1)
        rows = [ids for ids in prompts for _ in range(group)]
        hints = WorkloadHints(
            max_prompt_length=max(map(len, prompts)), max_generated_length=max(lengths), num_requests=len(rows)
        )
        written = {}
        with self.model.continuous_batching_context_manager(config, workload_hints=hints, timeout=5) as manager:
            names = [
                manager.add_request(ids, max_new_tokens=length, eos_token_id=-1)
                for ids, length in zip(rows, lengths, strict=True)
            ]
            while len(written) < len(rows):
                result = manager.get_result(timeout=1)
                if result is not None and result.is_finished():
                    written[result.request_id] = len(result.generated_tokens)
                elif result is None and not manager.is_running():
                    raise RuntimeError("continuous batching ended before its requests")
        return [written[name] for name in names]


class Group:
    def __init__(self, model, rows_in_flight, **sampling):
        from grpo_trl.rollout.base import SamplingOptions
        from grpo_trl.rollout.group.engine import GroupEngine

        options = SamplingOptions(max_completion_length=300, pad_token_id=0, eos_token_ids=(), **sampling)
        self.engine = GroupEngine(model, options, max_rows_in_flight=rows_in_flight)
        self.compared = False

    def __call__(self, prompts, group, lengths):
        from dataclasses import replace

        from grpo_trl.rollout.base import RolloutRequest

        if not self.compared:  # with plain forwards, of completions that nothing ends
            self.engine.options = replace(self.engine.options, max_completion_length=64)
            self.engine.rollout(RolloutRequest([""], prompts[:1], 2, [0]))
            self.compared = True
        self.engine.options = replace(self.engine.options, max_completion_length=max(lengths))
        with ended_at(lengths):
            request = RolloutRequest([""] * len(prompts), prompts, group, list(range(len(prompts))))
            return [len(completion.ids) for completion in self.engine.rollout(request).completions]


class VLLM:
    """In this process; each row is a request of its own, and rows share the pages of their prompt."""

    def __init__(self, model, rows_in_flight):
        from grpo_trl.rollout.base import SamplingOptions
        from grpo_trl.rollout.vllm import ColocatedVLLM, VLLMEngine

        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
        self.client = ColocatedVLLM(model.config, make_tokenizer(), dtype=model.dtype, gpu_memory_utilization=0.5)
        options = SamplingOptions(max_completion_length=300, pad_token_id=0, eos_token_ids=())
        self.engine = VLLMEngine(self.client, model, options, Path(tempfile.mkdtemp()))
        self.engine.sync_weights()

    def __call__(self, prompts, group, lengths):
        rows = [ids for ids in prompts for _ in range(group)]
        params = [
            {"n": 1, "seed": row, "temperature": 1.0, "max_tokens": length, "ignore_eos": True, "logprobs": 0}
            for row, length in enumerate(lengths)
        ]
        return [len(sample.ids) for (sample,) in self.client.generate(rows, params)]


# ---- The table ----
def compare(model: str, name: str, case: Case, args) -> None:
    tokens = sum(case.lengths(0))
    print(
        f"\n{model}, {name}: {case.num_prompts} prompts of {case.prompt_length} tokens, G = {case.num_generations}, "
        f"{tokens} tokens written"
    )
    seconds: dict[str, list[float]] = {system: [] for system in args.systems}
    peaks: dict[str, list[int]] = {system: [] for system in args.systems}
    for _ in range(args.rounds):
        for system in args.systems:
            sizes = case.num_prompts, case.prompt_length, case.num_generations
            measured = in_child(
                __file__, system, "--models", model, "--calls", args.calls, "--case_sizes", *sizes,
                "--rows_in_flight", args.rows_in_flight,
            )  # fmt: skip
            print(f"  {system}: {measured['seconds']}", file=sys.stderr, flush=True)
            seconds[system] += measured["seconds"]
            peaks[system] += measured["bytes"]
    print(f"{'':10} {'tokens/s':>8} {'s/call':>7} {'range':>15} {'GiB':>6} {'time':>6} {'memory':>6}  of group")
    time_of = {system: statistics.median(values) for system, values in seconds.items()}
    peak_of = {system: statistics.median(values) for system, values in peaks.items()}
    for system, values in seconds.items():
        ratios = [f"{x[system] / x['group']:.2f}" if "group" in x else "" for x in (time_of, peak_of)]
        print(
            f"{system:10} {tokens / time_of[system]:8.0f} {time_of[system]:7.2f} "
            f"{f'{min(values):.2f}-{max(values):.2f}':>15} {peak_of[system] / 2**30:6.2f}",
            *(f"{ratio:>6}" for ratio in ratios),
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["zero-shot", "eight-shot"])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["5m", "32m"])
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--rows_in_flight", type=int, default=128, help="of this package's engine")
    parser.add_argument("--calls", type=int, default=2, help="timed calls of a process")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each system, in turns")
    parser.add_argument("--child", choices=SYSTEMS, help=argparse.SUPPRESS)
    parser.add_argument("--case_sizes", nargs=3, type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        case = Case(*args.case_sizes)
        print(json.dumps(measure(args.child, args.models[0], case, args.calls, args.rows_in_flight)))
        return
    for model in args.models:
        for name in args.cases:
            compare(model, name, CASES[name], args)


if __name__ == "__main__":
    main()
