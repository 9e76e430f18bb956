"""Whether kernels in Triton, which comes with torch's builds for GPUs, work here."""

import functools
import os

import torch

from .logging import get_logger
from .model_utils import ran_out_of_memory


try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

logger = get_logger(__name__)


@functools.cache
def triton_works(device_type: str, dtype: torch.dtype) -> bool:
    """Whether Triton's kernels compute for tensors of a kind; under `TRITON_INTERPRET=1` they do so on a CPU.

    Triton has no bfloat16 on GPUs that have none, where torch imitates it. If no kernel can be compiled for a GPU, a line
    in the log says so.
    """
    if dtype == torch.float64:
        return False
    if device_type != "cuda":
        return triton is not None and os.environ.get("TRITON_INTERPRET") == "1"
    if dtype == torch.bfloat16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        return False
    return _compiles()


@functools.cache
def _compiles() -> bool:
    try:
        compile_probe()
    except Exception as error:  # whatever a compiler that is missing or broken raises
        if ran_out_of_memory(error):
            raise
        logger.warning("Triton cannot compile kernels here, and sampling and training take longer: %s", error)
        return False
    return True


def compile_probe() -> None:
    """Run a small kernel on the GPU.

    Raises:
        Exception: Whatever Triton and the compilers that it calls raise.
    """
    if triton is None:
        raise ImportError("it is not installed")
    _store_one[(1,)](torch.zeros(1, device="cuda"))


if triton is not None:

    @triton.jit
    def _store_one(target):  # type: ignore[no-untyped-def]
        tl.store(target, 1.0)
