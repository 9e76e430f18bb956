"""Kernels of a decoding step on a GPU, in Triton: one launch for all that stands between two products.

Under `TRITON_INTERPRET=1` they run on a CPU.
"""

import os

import torch

from ....logging import get_logger
from ....model_utils import ran_out_of_memory
from .attention import Partial, attend, chunks_of, merged
from .layer import ACTIVATIONS, add_and_norm, gated, rotate_and_store


__all__ = [
    "ACTIVATIONS",
    "Partial",
    "add_and_norm",
    "attend",
    "chunks_of",
    "gated",
    "merged",
    "rotate_and_store",
    "work_on",
]

logger = get_logger(__name__)


def work_on(device_type: str) -> bool:
    """Whether Triton compiles for the device; if it does not for a GPU, a line in the log says so."""
    if device_type != "cuda":
        return os.environ.get("TRITON_INTERPRET") == "1"
    try:
        gated(torch.zeros(1, 2, device=device_type), 0)
    except Exception as error:  # whatever a compiler that is missing or broken raises
        if ran_out_of_memory(error):
            raise
        logger.warning("Triton cannot compile the kernels of decoding steps, and sampling takes longer: %s", error)
        return False
    return True
