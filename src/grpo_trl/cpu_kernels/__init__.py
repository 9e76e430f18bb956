"""Kernels for CPUs in C++, compiled when they are first needed, once for each user and kind of processor.

They need GCC; where it is missing, or what it builds cannot be loaded, callers fall back to torch's own operations.
"""

import ctypes
import functools
import hashlib
import os
import platform
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..logging import get_logger


logger = get_logger(__name__)

HEADERS = Path(__file__).parent
COMPILER = "g++"
"""Others have no `__builtin_shuffle`."""
FLAGS = (
    "-O3",
    "-std=c++17",
    "-fopenmp",
    "-fPIC",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-signed-zeros",
)
PROCESSORS = {
    "AVX2": ["-mavx2", "-mfma"],
    "AVX512": ["-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"],
}
"""Flags by `torch.backends.cpu.get_cpu_capability()`; other processors get the compiler's baseline."""
POINTER, SIZE, FLOAT, DOUBLE = ctypes.c_void_p, ctypes.c_long, ctypes.c_float, ctypes.c_double
"""Arguments of kernels; sizes are `long` in C++, of 8 bytes."""


def library(source: Path, signatures: Mapping[str, Sequence[Any]]) -> Any:
    """The functions of a C++ file, by the types of their arguments; None, and a warning, if it does not compile."""
    loaded = _load(source)
    if loaded is not None:
        for name, types in signatures.items():
            function = getattr(loaded, name)
            function.argtypes, function.restype = list(types), None
    return loaded


@functools.cache
def _load(source: Path) -> Any:
    try:
        try:
            return ctypes.CDLL(str(_built(source, _cache())))
        except (OSError, RuntimeError):  # a home that is missing, full, read-only or mounted noexec
            with tempfile.TemporaryDirectory() as folder:
                return ctypes.CDLL(str(_built(source, Path(folder))))
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or repr(error)).strip().splitlines()
        reason = next((line for line in said if "error" in line.lower()), said[0])
        logger.warning(
            "%s falls back to PyTorch's operations, which are slower: it does not compile (%s).", source.name, reason
        )
        return None


def _cache() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "grpo_trl"
    cache.mkdir(parents=True, exist_ok=True)
    return cache


def _built(source: Path, folder: Path) -> Path:
    if ctypes.sizeof(SIZE) != 8:
        raise OSError("a long has 4 bytes on this platform")
    flags = [*FLAGS, *PROCESSORS.get(torch.backends.cpu.get_cpu_capability(), [])]
    headers = [header.read_text(encoding="utf-8") for header in sorted(HEADERS.glob("*.h"))]
    fingerprint = repr([flags, platform.machine(), *headers, source.read_text(encoding="utf-8")])
    target = folder / f"{source.stem}-{hashlib.sha256(fingerprint.encode()).hexdigest()[:16]}.so"
    if not target.exists():
        # under another name, as other processes may load it
        with tempfile.TemporaryDirectory(dir=folder) as own:
            built = Path(own) / target.name
            compiled = str(built.with_suffix(".o"))
            # linked to no OpenMP, so that it finds torch's, whose threads must not wait beside others
            for command in (
                ["-c", *flags, f"-I{HEADERS}", str(source), "-o", compiled],
                ["-shared", compiled, "-o", str(built)],
            ):
                subprocess.run([COMPILER, *command], check=True, capture_output=True, text=True, errors="replace")
            built.replace(target)
    return target
