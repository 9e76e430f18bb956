"""Kernels for CPUs in C++, compiled when they are first needed, once for each user and kind of processor.

GCC is needed; where it is missing, or what it builds cannot be loaded, torch's own operations serve.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..logging import get_logger


logger = get_logger(__name__)

HEADERS = Path(__file__).parent
FLAGS = (
    "-O3",
    "-std=c++17",
    "-fopenmp",
    "-shared",
    "-fPIC",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-signed-zeros",
)
PROCESSORS = {"AVX2": ["-march=x86-64-v3"], "AVX512": ["-march=x86-64-v4"]}
"""By what torch says of the processor; others get what all of their kind can do."""
POINTER, SIZE, FLOAT, DOUBLE = ctypes.c_void_p, ctypes.c_long, ctypes.c_float, ctypes.c_double
"""Arguments of kernels; sizes are `long` in C++."""


def library(source: Path, signatures: Mapping[str, Sequence[Any]]) -> Any:
    """The functions of a C++ file, by the types of their arguments; None, and a line in the log, if it does not compile."""
    loaded = _load(source)
    if loaded is not None:
        for name, types in signatures.items():
            function = getattr(loaded, name)
            function.argtypes, function.restype = list(types), None
    return loaded


@functools.cache
def _load(source: Path) -> Any:
    try:
        with _folder() as folder:
            return ctypes.CDLL(str(_built(source, folder)))
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or error
        logger.info("Kernels for sampling on a CPU cannot be compiled here, and it takes longer: %s", reason)
        return None


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """The user's cache; a temporary folder where that cannot be written to."""
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "grpo_trl"
        cache.mkdir(parents=True, exist_ok=True)
        writable = os.access(cache, os.W_OK)
    except (OSError, RuntimeError):  # the latter: there is no home
        writable = False
    if writable:
        yield cache
        return
    with tempfile.TemporaryDirectory() as temporary:
        yield Path(temporary)


def _built(source: Path, folder: Path) -> Path:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise FileNotFoundError("there is no g++")
    flags = [*FLAGS, *PROCESSORS.get(torch.backends.cpu.get_cpu_capability(), [])]
    told = repr([flags, platform.machine(), *(x.read_text() for x in sorted(HEADERS.glob("*.h"))), source.read_text()])
    target = folder / f"{source.stem}-{hashlib.sha256(told.encode()).hexdigest()[:16]}.so"
    if not target.exists():
        # under another name, as other processes may load it
        with tempfile.TemporaryDirectory(dir=folder) as own:
            built = Path(own) / target.name
            command = [compiler, *flags, f"-I{HEADERS}", str(source), "-o", str(built)]
            subprocess.run(command, check=True, capture_output=True, text=True)
            built.replace(target)
    return target
