"""Random numbers that need not be carried, because they follow from names: seeds, and the noise of sampling."""

import hashlib

import numpy as np


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
