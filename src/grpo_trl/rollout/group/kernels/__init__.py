"""Kernels of a decoding step on a GPU, in Triton: one launch for all that stands between two products.

Under `TRITON_INTERPRET=1` they run on a CPU.
"""

from .attention import attend
from .layer import ACTIVATIONS, add_and_norm, gated, rotate_and_store


__all__ = ["ACTIVATIONS", "add_and_norm", "attend", "gated", "rotate_and_store"]
