"""A YAML file, and options on the command line, become a trainer. The format is that of `trl grpo`."""

import importlib
import itertools
import os
import re
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import yaml
from datasets import Dataset, load_dataset
from trl import DatasetMixtureConfig, ModelConfig, get_dataset, get_peft_config, get_quantization_config
from trl.scripts.grpo import GRPOScriptArguments

from .. import rewards
from ..config import GRPOConfig
from ..config.names import is_absent, refusals, todays_name
from ..config.parser import TrlParser
from ..logging import get_logger


logger = get_logger(__name__)

REWARDS: dict[str, Callable[[int], Any]] = {
    "gsm8k_answer": lambda length: rewards.gsm8k_answer,
    "math_answer": lambda length: rewards.math_answer,
    "format_tags": lambda length: rewards.format_tags(),
    "python_tests": lambda length: rewards.python_tests(),
    "repetition_penalty": lambda length: rewards.repetition_penalty(),
    "length_penalty": lambda length: rewards.length_penalty(max_completion_length=length, buffer=max(1, length // 5)),
    "accuracy_reward": lambda length: _of_trl("accuracy_reward"),
    "reasoning_accuracy_reward": lambda length: _of_trl("reasoning_accuracy_reward"),
    "think_format_reward": lambda length: _of_trl("think_format_reward"),
    "get_soft_overlong_punishment": lambda length: _of_trl("get_soft_overlong_punishment")(1280, 256),
}
"""Ready-made reward functions, made for completions of at most so many tokens; the last four are those of `trl grpo`."""
FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass
class ScriptArguments(GRPOScriptArguments):
    """Data and rewards: the options of `trl grpo`, and how a prompt is made of other columns."""

    prompt_template: str | None = field(
        default=None,
        metadata={"help": "The prompt, from columns of the dataset: '{question}'. Default: the column 'prompt'."},
    )
    prompt_style: str = field(
        default="chat",
        metadata={
            "help": "What prompt_template yields: messages for the chat template ('chat'), or plain text ('plain').",
            "choices": ["chat", "plain"],
        },
    )
    system_prompt: str | None = field(
        default=None, metadata={"help": "A system message before the prompt of prompt_template."}
    )


@dataclass
class Configuration:
    """All options of a run, parsed and checked."""

    script: ScriptArguments
    training: GRPOConfig
    model: ModelConfig
    mixture: DatasetMixtureConfig

    @classmethod
    def parse(
        cls,
        options: Mapping[str, Any],
        overrides: Sequence[str] = (),
        config_class: type[GRPOConfig] = GRPOConfig,
    ) -> "Configuration":
        """Check options; those on the command line win.

        Raises:
            ValueError: An option is unknown or cannot work.
        """
        parser = _parser(config_class)
        known = parser.known_names | {"env"}
        words = _values_of(overrides)
        options = {name: value for name, value in options.items() if name not in words}
        unknown = {n: v for n, v in words.items() if todays_name(n, known) not in known and not is_absent(n)}
        if refused := refusals(options | unknown, known):
            raise ValueError("\n".join(refused))
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "options.yaml"
            file.write_text(yaml.safe_dump(options), encoding="utf-8")
            configuration = cls(*parser.parse_args_and_config(["--config", str(file), *overrides]))
        if not {"dtype", "torch_dtype"} & {*options, *words}:
            configuration.model.dtype = None  # the trainer's default, which depends on the adapter
        script = configuration.script
        if script.system_prompt and (script.prompt_template is None or script.prompt_style == "plain"):
            raise ValueError(
                f"system_prompt={script.system_prompt!r} needs messages; set prompt_style: chat, and prompt_template: "
                "'{prompt}' if the dataset's column prompt is plain text."
            )
        if configuration.model.model_name_or_path is None:
            raise ValueError("The options name no model; set model_name_or_path, e.g. to Qwen/Qwen2.5-0.5B-Instruct.")
        return configuration

    def model_init_kwargs(self) -> dict[str, Any]:
        """Arguments of `from_pretrained`, from the options of the model."""
        model = self.model
        given = {
            "revision": model.model_revision,
            "attn_implementation": model.attn_implementation,
            "dtype": model.dtype,
            "quantization_config": get_quantization_config(model),
        }
        found = {name: value for name, value in given.items() if value is not None}
        return found | cast("dict[str, Any]", self.training.model_init_kwargs or {})

    def reward_funcs(self) -> list[Any]:
        """The reward functions, and the reward model, that the options name.

        Raises:
            ValueError: A name is unknown, or there is none.
        """
        found: list[Any] = [
            _reward(name, self.training.max_completion_length) for name in self.script.reward_funcs or []
        ]
        if self.script.reward_model_name_or_path:
            found.insert(0, self.script.reward_model_name_or_path)
        if not found:
            raise ValueError("reward_funcs is empty; name a reward function, e.g. reward_funcs: [math_answer].")
        return found

    def datasets(self) -> tuple[Dataset, Dataset | None]:
        """The datasets for training and, where `eval_strategy` asks for it, evaluation.

        Raises:
            ValueError: The options name no dataset, or a split or column that it lacks.
        """
        splits = self._splits()
        train = self._prompts(_split(splits, self.script.dataset_train_split, "dataset_train_split"))
        if self.training.eval_strategy == "no":
            return train, None
        return train, self._prompts(_split(splits, self.script.dataset_test_split, "dataset_test_split"))

    def _splits(self) -> Any:
        name = self.script.dataset_name
        if self.mixture.datasets:
            return self._mixture()
        if name is None:
            raise ValueError("dataset_name is missing; name a dataset of the hub, a folder, or a file.")
        streaming = self.script.dataset_streaming
        if Path(name).is_file() and Path(name).suffix in FORMATS:
            return load_dataset(FORMATS[Path(name).suffix], data_files={"train": name}, streaming=streaming)
        return load_dataset(name, name=self.script.dataset_config, streaming=streaming)

    def _mixture(self) -> Any:
        if self.script.dataset_name is not None:
            logger.warning("datasets is set, so dataset_name=%r is not read.", self.script.dataset_name)
        if self.mixture.streaming and self.mixture.test_split_size is not None:
            raise ValueError(
                f"test_split_size={self.mixture.test_split_size} cannot split streamed datasets; set streaming: false, or "
                "evaluate from a script."
            )
        return get_dataset(self.mixture)

    def _prompts(self, dataset: Dataset) -> Dataset:
        template = self.script.prompt_template
        if template is None:
            return dataset
        system = [{"role": "system", "content": self.script.system_prompt}] if self.script.system_prompt else []

        def add_prompt(row: dict[str, Any]) -> dict[str, Any]:
            try:
                text = template.format_map(row)
            except KeyError as error:
                raise ValueError(
                    f"prompt_template={template!r} names the column {error}; the dataset has {', '.join(row)}."
                ) from error
            return {
                "prompt": text if self.script.prompt_style == "plain" else [*system, {"role": "user", "content": text}]
            }

        return dataset.map(add_prompt)

    def trainer(self) -> Any:
        """Make the trainer."""
        from ..trainer import GRPOTrainer

        self.training.model_init_kwargs = self.model_init_kwargs()
        train, evaluation = self.datasets()
        return GRPOTrainer(
            model=str(self.model.model_name_or_path),
            reward_funcs=self.reward_funcs(),
            args=self.training,
            train_dataset=train,
            eval_dataset=evaluation,
            peft_config=get_peft_config(self.model),
        )


def options_of(file: Path) -> dict[str, Any]:
    """Read the options that a YAML file sets.

    Raises:
        ValueError: It is no mapping.
    """
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is no YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no options; a line such as 'model_name_or_path: Qwen/Qwen2.5-0.5B' sets one.")
    return {str(name): value for name, value in content.items()}


def known_options() -> set[str]:
    """List the names of all options of a run."""
    return _parser().known_names


def _parser(config_class: type[GRPOConfig] = GRPOConfig) -> TrlParser:
    return TrlParser(cast(Any, (ScriptArguments, config_class, ModelConfig, DatasetMixtureConfig)))


def _values_of(words: Sequence[str]) -> dict[str, str]:
    """Read `--name value` and `--name=value` of a command line as text; a switch has an empty one."""
    found = {}
    for word, following in itertools.pairwise([*words, "--"]):
        if word.startswith("--"):
            name, _, value = word[2:].partition("=")
            found[name.replace("-", "_")] = value or ("" if following.startswith("--") else following)
    return found


def _of_trl(name: str) -> Any:
    return getattr(importlib.import_module("trl.rewards"), name)


def _reward(name: str, length: int) -> Any:
    """The reward function of a name: a ready-made one, or a dotted path to one's own."""
    if name in REWARDS:
        return REWARDS[name](length)
    module, _, function = name.rpartition(".")
    if not module:
        raise ValueError(
            f"reward_funcs: {name} is unknown; use a dotted path (module.function), or one of {', '.join(REWARDS)}."
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"reward_funcs: {name} cannot be imported ({error}).") from error


def _split(splits: Any, name: str, option: str) -> Dataset:
    """A split by its name; `"test[:100]"` are its first 100 rows."""
    split, first = re.fullmatch(r"(.*?)(?:\[:(\d+)\])?", name, re.DOTALL).groups()  # type: ignore[union-attr]
    if split not in splits:
        raise ValueError(f"{option}={name!r} is not in the dataset; it has {', '.join(map(repr, splits))}.")
    return splits[split] if first is None else splits[split].take(int(first))
