"""Random numbers that need not be carried, because they follow from names: seeds, and the noise of sampling."""

import contextlib
import hashlib
import random
from collections.abc import Iterator

import numpy as np
import torch


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2**63) that follows from `parts` alone, on every platform and in every process.

    >>> derive_seed(0, "prompts", 1) == derive_seed(0, "prompts", 1) != derive_seed(0, "prompts", 2)
    True
    """
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def uniforms(seed: int, completion: int, count: int) -> np.ndarray:
    """The noise of a completion: numbers in [0, 1) in float64, of shape (count,); a smaller count gives a prefix.

    >>> uniforms(7, 0, 3)[:2].tolist() == uniforms(7, 0, 2).tolist() != uniforms(7, 1, 2).tolist()
    True
    """
    digest = hashlib.shake_128(repr((seed, completion)).encode()).digest(8 * count)
    # 52 bits: the product of the largest with a sum is below the sum after rounding too
    return (np.frombuffer(digest, dtype="<u8") >> 12).astype(np.float64) * 2.0**-52


@contextlib.contextmanager
def keeping_random_state() -> Iterator[None]:
    """Restore the global random states of Python, numpy and torch at the end.

    >>> before = random.getstate()
    >>> with keeping_random_state():
    ...     number = random.random()
    >>> random.getstate() == before
    True
    """
    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, the global random states of Python, numpy and torch start from `seed`; they are as they were after.

    >>> with seeded(7):
    ...     first = random.random(), torch.rand(1).item()
    >>> with seeded(7):
    ...     assert first == (random.random(), torch.rand(1).item())
    """
    with keeping_random_state():
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        yield
