"""Cards by name, with what their makers state: memory, bandwidth, rate of dense bfloat16 products."""

import difflib
from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """An accelerator."""

    name: str
    memory_gib: float
    bytes_per_second: float
    flops_per_second: float
    """Of bfloat16 (float16 where there is none), dense."""


CARDS = {
    card.name: card
    for card in (
        Card("B200", 180, 8.0e12, 2250e12),
        Card("H200", 141, 4.8e12, 989e12),
        Card("H100", 80, 3.35e12, 989e12),
        Card("H100-PCIe", 80, 2.0e12, 756e12),
        Card("A100-80GB", 80, 2.04e12, 312e12),
        Card("A100-40GB", 40, 1.56e12, 312e12),
        Card("L40S", 48, 0.864e12, 362e12),
        Card("A6000", 48, 0.768e12, 155e12),
        Card("RTX-4090", 24, 1.008e12, 165e12),
        Card("RTX-3090", 24, 0.936e12, 71e12),
        Card("A10", 24, 0.6e12, 125e12),
        Card("L4", 24, 0.3e12, 121e12),
        Card("T4", 16, 0.32e12, 65e12),
    )
}


def card_named(name: str) -> Card:
    """Find a card, e.g. `"H100"`; case does not count.

    Raises:
        ValueError: It is unknown; the message names the nearest.
    """
    by_lower = {known.lower(): card for known, card in CARDS.items()}
    if name.lower() in by_lower:
        return by_lower[name.lower()]
    near = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.3)
    hint = f"; did you mean {by_lower[near[0]].name}?" if near else "."
    raise ValueError(f"gpu={name!r} is unknown{hint} Known are {', '.join(CARDS)}.")
