"""GRPO for language models, as a `transformers.Trainer`.

Names are imported when they are used, so that a worker process that calls a reward function of this package loads no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from trl import (
        DatasetMixtureConfig,
        ModelConfig,
        RichProgressCallback,
        ScriptArguments,
        get_dataset,
        get_peft_config,
        get_quantization_config,
    )

    from .config import GRPOConfig
    from .config.parser import TrlParser
    from .errors import RunStopped
    from .trainer import GRPOTrainer

__all__ = [
    "DatasetMixtureConfig",
    "GRPOConfig",
    "GRPOTrainer",
    "ModelConfig",
    "RichProgressCallback",
    "RunStopped",
    "ScriptArguments",
    "TrlParser",
    "get_dataset",
    "get_peft_config",
    "get_quantization_config",
]
__version__: str

_MODULES = {"GRPOConfig": "config", "GRPOTrainer": "trainer", "RunStopped": "errors", "TrlParser": "config.parser"}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("grpo_trl")
    if name in _MODULES:
        return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    if name in __all__:  # TRL's own, which scripts import beside its trainer
        return getattr(importlib.import_module("trl"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
