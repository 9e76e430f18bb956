"""The parser of scripts that read their options from a YAML file and from the command line."""

import sys
from collections.abc import Iterable
from typing import Any

import trl
import yaml

from .names import is_absent, todays_name, translated


class TrlParser(trl.TrlParser):
    """TRL's parser, which also reads the retired names that `GRPOConfig` reads.

    TRL's own answers a name that no class has before `GRPOConfig` is made.
    """

    def parse_args_and_config(  # type: ignore[override]  # the further arguments are those of TRL
        self, args: Iterable[str] | None = None, **kwargs: Any
    ) -> Any:
        """Parse the command line and the file after `--config`; as in TRL."""
        words = list(sys.argv[1:] if args is None else args)
        return super().parse_args_and_config(self._translated_words(words), **kwargs)

    def set_defaults_with_config(self, **kwargs: Any) -> list[str]:
        """Set defaults from the options of a file; as in TRL."""
        return super().set_defaults_with_config(**translated(kwargs, self.known_names))

    def parse_dict(self, args: dict[str, Any], allow_extra_keys: bool = False) -> Any:
        """Make the classes from options by name; as in transformers."""
        return super().parse_dict(translated(args, self.known_names), allow_extra_keys)

    @property
    def known_names(self) -> set[str]:
        """The options of all classes, with those that switch one off, as `no_shuffle_dataset`."""
        spelled = {word.lstrip("-").replace("-", "_") for action in self._actions for word in action.option_strings}
        return spelled | {action.dest for action in self._actions}

    def _translated_words(self, words: list[str]) -> list[str]:
        options: list[list[str]] = [[]]
        for word in words:
            if word.startswith("--"):
                options.append([])
            options[-1].append(word)
        return [word for option in options for word in self._translated_option(option)]

    def _translated_option(self, words: list[str]) -> list[str]:
        """Translate `--name=value`, or `--name` and its values; nothing remains of one that changes nothing."""
        if not words or not words[0].startswith("--"):
            return words
        name, _, value = words[0].removeprefix("--").partition("=")
        known, values = self.known_names, [value, *words[1:]] if value else words[1:]
        name = name.replace("-", "_")
        today = todays_name(name, known)
        if today == name and (name in known or not is_absent(name)):
            return words
        options = translated({name: yaml.safe_load(" ".join(values)) if values else True}, known)
        return [f"--{today}", *values] if options else []
