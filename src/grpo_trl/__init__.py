"""GRPO for language models, as a `transformers.Trainer`."""

from importlib.metadata import version

from .config import GRPOConfig
from .trainer import GRPOTrainer


__all__ = ["GRPOConfig", "GRPOTrainer"]
__version__ = version("grpo_trl")
