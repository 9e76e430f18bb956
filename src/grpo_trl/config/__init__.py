"""Every option once, and every check that needs no model and no data."""

from .config import GRPOConfig


__all__ = ["GRPOConfig"]
