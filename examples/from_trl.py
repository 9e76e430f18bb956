"""A training script as one writes it for TRL: only the import of `GRPOConfig`, `GRPOTrainer` and `TrlParser` is another.

    python examples/from_trl.py --output_dir tldr-grpo
    python examples/from_trl.py --output_dir local-grpo --model_name_or_path PATH --dataset_name FOLDER

By default it trains Qwen2.5-0.5B-Instruct on trl-lib/tldr, from the hub. A local model is given by its path, and a local
dataset as a folder with a train.jsonl whose rows have a "prompt". All options of the trainer are options of the script, and
`--config FILE` reads them from YAML; `--use_peft` trains an adapter.
"""

from dataclasses import dataclass
from typing import Any

from datasets import load_dataset
from trl import ModelConfig, ScriptArguments, get_peft_config, get_quantization_config
from trl.rewards import get_soft_overlong_punishment

from grpo_trl import GRPOConfig, GRPOTrainer, TrlParser


@dataclass
class Arguments(ScriptArguments):
    """What is trained on."""

    dataset_name: str = "trl-lib/tldr"


def text_of(completion: str | list[dict[str, str]]) -> str:
    """The text of a completion, which for conversational prompts is a message."""
    return completion if isinstance(completion, str) else completion[0]["content"]


def distinct_words(completions: list, **kwargs: object) -> list[float]:
    """Reward the share of words that a completion does not repeat."""
    words = [text_of(completion).lower().split() for completion in completions]
    return [len(set(one)) / max(len(one), 1) for one in words]


def main() -> None:
    classes: Any = (Arguments, GRPOConfig, ModelConfig)
    script, training, model = TrlParser(classes).parse_args_and_config()
    dataset = load_dataset(script.dataset_name, name=script.dataset_config)
    evaluates = training.eval_strategy != "no"
    budget = training.max_completion_length
    trainer = GRPOTrainer(
        model=model.model_name_or_path or "Qwen/Qwen2.5-0.5B-Instruct",
        reward_funcs=[distinct_words, get_soft_overlong_punishment(budget, budget // 4)],
        args=training,
        train_dataset=dataset[script.dataset_train_split],
        eval_dataset=dataset[script.dataset_test_split] if evaluates else None,
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
    )
    trainer.train()
    trainer.save_model(training.output_dir)
    trainer.create_model_card(dataset_name=script.dataset_name)
    if training.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)


if __name__ == "__main__":
    main()
