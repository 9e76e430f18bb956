"""The trainer: the loop, and what it is built from."""

from .trainer import GRPOTrainer


__all__ = ["GRPOTrainer"]
