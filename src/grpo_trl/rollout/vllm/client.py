"""What the two places where vLLM runs have in common."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """One completion as vLLM returns it."""

    ids: list[int]
    logps: list[float]
    """Logprobs (nats) of the distribution that each token was sampled from; NaN where vLLM has none."""
    ended: bool
    """Ended by an end token or a stop string, not by the length."""


class Client(Protocol):
    """A vLLM, in this process or on a server. Sampling parameters have the names of `vllm.SamplingParams`."""

    max_model_length: int
    """Tokens of prompt and completion together, at most."""

    def generate(self, prompt_ids: list[list[int]], params: list[dict[str, Any]]) -> list[list[Sample]]:
        """`params[i]["n"]` completions of prompt i."""
        ...

    def load_weights(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Replace all weights, and drop what was cached from the old ones."""
        ...

    def load_adapter(self, folder: Path) -> None:
        """Sample with the adapter in `folder` from now on, and drop what was cached from the old one."""
        ...

    def close(self) -> None: ...
