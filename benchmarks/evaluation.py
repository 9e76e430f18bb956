"""What `evaluate()` costs, asked for all prompts at once or for one prompt per call of the engine.

    python benchmarks/evaluation.py

Options are the defaults: 8 completions of each prompt. Their lengths are quantiles of those of GSM8K's answers, the same
for each prompt. One prompt per call is measured on the first prompts, as many as `--one_by_one` says, and scaled to all.
"""

import argparse
import tempfile

from workload import MODELS, Case, ended_at, make_model, make_tokenizer, now


GROUP = 8


def trainer_of(model_name, num_prompts):
    """A trainer that evaluates `num_prompts` prompts of 75 tokens."""
    import torch

    from grpo_trl import GRPOConfig, GRPOTrainer

    rows = [{"prompt": " ".join(f"t{token}" for token in ids)} for ids in Case(num_prompts, 75).prompts(0)]
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        disable_tqdm=True,
    )
    return GRPOTrainer(
        make_model(model_name),
        lambda completions: [0.0] * len(completions),
        config,
        eval_dataset=rows,
        processing_class=make_tokenizer(),
    )


def seconds_of(trainer, num_prompts, one_by_one):
    """Seconds of an evaluation of the first prompts."""
    engine = trainer._runner.engine
    engine.in_process = not one_by_one  # others are asked for per_device_eval_batch_size completions at a time
    dataset = trainer.eval_dataset.select(range(num_prompts))
    start = now()
    with ended_at(Case(1, 75).lengths(0) * num_prompts):
        trainer.evaluate(dataset)
    return now() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="5m")
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--one_by_one", type=int, default=50)
    args = parser.parse_args()
    trainer = trainer_of(args.model, args.prompts)
    trainer.evaluate(trainer.eval_dataset.select([0]))  # the engine compares itself with plain forwards
    single = seconds_of(trainer, args.one_by_one, one_by_one=True) * args.prompts / args.one_by_one
    whole = seconds_of(trainer, args.prompts, one_by_one=False)
    print(f"{args.model}, {args.prompts} prompts: one prompt per call {single:.1f} s, evaluate() {whole:.1f} s")
    print(f"speedup {single / whole:.2f}")


if __name__ == "__main__":
    main()
