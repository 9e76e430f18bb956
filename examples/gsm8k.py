"""Train a language model on GSM8K's word problems with GRPO.

With a connection to the Hugging Face hub:

    python examples/gsm8k.py --output_dir outputs/gsm8k --use_peft

With local files, for a model that was trained on plain text instead of chats:

    python examples/gsm8k.py --dataset PATH/gsm8k --model_name_or_path PATH/model --prompt_style plain \\
        --rewards arithmetic --learning_rate 3e-4 --max_steps 30 --max_completion_length 200 \\
        --per_device_train_batch_size 8 --gradient_accumulation_steps 8 --output_dir outputs/gsm8k

All options of `GRPOConfig` and of TRL's `ModelConfig` may be given, on the command line or as YAML (`--config FILE`).
"""

import ast
import operator
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from datasets import DatasetDict, load_dataset
from math_verify import parse, verify
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from grpo_trl import GRPOConfig, GRPOTrainer
from grpo_trl.report import plot_run


INSTRUCTIONS = (
    "Solve the problem step by step. Write every calculation in the form <<48/2=24>>, and end with a line of the form "
    "#### 24 that holds the final number alone."
)
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


@dataclass
class ScriptArguments:
    dataset: str = field(
        default="openai/gsm8k",
        metadata={"help": "Hub name, or a folder with train.jsonl and test.jsonl (columns question and answer)."},
    )
    prompt_style: str = field(
        default="chat",
        metadata={
            "help": "'chat' for instruction models, 'plain' for 'Question: ... Answer:'.",
            "choices": ["chat", "plain"],
        },
    )
    rewards: list[str] = field(
        default_factory=lambda: ["exact", "answer_format", "arithmetic"],
        metadata={"help": "Which of exact, answer_format and arithmetic to reward; --reward_weights weighs them."},
    )
    eval_problems: int = field(default=100, metadata={"help": "Test problems of an evaluation (see --eval_strategy)."})


def text_of(completion: str | list[dict[str, str]]) -> str:
    return completion if isinstance(completion, str) else completion[0]["content"]


def exact(completions: list, answer: list[str]) -> list[float]:
    """1 if the final number is the right one, wherever math-verify finds it."""
    rewards = []
    for completion, solution in zip(completions, answer, strict=True):
        given = text_of(completion).split("####")[-1]
        rewards.append(float(verify(parse(solution.split("####")[-1]), parse(given))))
    return rewards


def answer_format(completions: list) -> list[float]:
    """1 if the answer ends in a line `#### NUMBER`."""
    ending = re.compile(r"\n#### -?[\d,]+(\.\d+)?\s*$")
    return [float(bool(ending.search(text_of(completion)))) for completion in completions]


def arithmetic(completions: list) -> list[float]:
    """The share of the calculations `<<48/2=24>>` that are right; 0 if there is none."""
    rewards = []
    for completion in completions:
        calculations = re.findall(r"<<([^<>=]*)=([^<>=]*)>>", text_of(completion))
        rewards.append(sum(is_right(*c) for c in calculations) / max(len(calculations), 1))
    return rewards


def is_right(expression: str, result: str) -> bool:
    try:
        return abs(evaluate(ast.parse(expression.strip(), mode="eval").body) - float(result)) < 1e-6
    except (ArithmeticError, SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def evaluate(node: ast.expr) -> float:
    """The value of an expression of numbers, + - * / and brackets. Nothing else is computed."""
    match node:
        case ast.Constant(value=value) if type(value) in (int, float):  # a bool is an int too
            return float(cast(float, value))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -evaluate(operand)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return OPERATORS[type(op)](evaluate(left), evaluate(right))
    raise ValueError("not an expression of arithmetic")


def load(script: ScriptArguments) -> DatasetDict:
    """GSM8K with the column `prompt`."""
    if (Path(script.dataset) / "train.jsonl").exists():
        files = {split: str(Path(script.dataset) / f"{split}.jsonl") for split in ("train", "test")}
        problems = load_dataset("json", data_files=files)
    else:
        try:
            problems = load_dataset(script.dataset, "main")
        except (ConnectionError, FileNotFoundError) as error:
            raise SystemExit(
                f"--dataset {script.dataset} could not be loaded from the hub ({error}).\nPass a folder that holds "
                "train.jsonl and test.jsonl, with `question` and `answer` in each line: --dataset PATH"
            ) from error

    def add_prompt(row: dict[str, str]) -> dict:
        if script.prompt_style == "plain":
            return {"prompt": f"Question: {row['question']}\nAnswer:"}
        return {"prompt": [{"role": "system", "content": INSTRUCTIONS}, {"role": "user", "content": row["question"]}]}

    return problems.map(add_prompt)


def main() -> None:
    script, args, model_args = TrlParser(cast(Any, (ScriptArguments, GRPOConfig, ModelConfig))).parse_args_and_config()
    problems = load(script)
    args.model_init_kwargs = {
        "dtype": model_args.dtype,
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "quantization_config": get_quantization_config(model_args),
    } | (args.model_init_kwargs or {})
    test = problems["test"]
    try:
        trainer = GRPOTrainer(
            model=model_args.model_name_or_path or "Qwen/Qwen2.5-0.5B-Instruct",
            reward_funcs=[
                {"exact": exact, "answer_format": answer_format, "arithmetic": arithmetic}[name]
                for name in script.rewards
            ],
            args=args,
            train_dataset=problems["train"],
            eval_dataset=test.select(range(min(script.eval_problems, len(test)))) if args.do_eval else None,
            peft_config=get_peft_config(model_args),
        )
    except OSError as error:
        raise SystemExit(
            f"{error}\nPass a folder that holds a model and its tokenizer: --model_name_or_path PATH"
        ) from error
    resume = args.resume_from_checkpoint  # a path, or "true" for the last one in output_dir, if there is one
    trainer.train(resume_from_checkpoint=True if str(resume).lower() == "true" else resume)
    trainer.save_model()
    if trainer.is_world_process_zero():
        if any(
            "reward" in entry for entry in trainer.state.log_history
        ):  # a run of fewer than logging_steps has no curve
            plot_run(trainer.state.log_history, Path(args.output_dir) / "run.png", title="GSM8K")
        print(f"The model is in {args.output_dir}")


if __name__ == "__main__":
    main()
