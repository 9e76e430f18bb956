"""What vLLM's workers gain, so that weights reach them without CUDA: `--worker-extension-cls` names the class."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor


EXTENSION = f"{__name__}.PolicyLoader"
"""How vLLM imports it."""


class PolicyLoader:
    """Adds methods to vLLM's worker, which call each other by RPC; vLLM mixes the class in."""

    model_runner: Any

    def load_policy(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Replace all weights; `weights` has every one of them, under the names of a checkpoint."""
        self.model_runner.reload_weights(weights_iterator=weights)
        from vllm.platforms import current_platform

        head = getattr(self.model_runner.model, "lm_head", None)
        if current_platform.is_cpu() and hasattr(head, "weight"):
            # On a CPU the head is multiplied in a packed copy, which reloading leaves as it was where weights are tied.
            from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

            dispatch_cpu_unquantized_gemm(head, remove_weight=False)

    def load_policy_files(self, folder: str) -> None:
        """Replace all weights by those of the safetensors files in `folder`."""
        self.load_policy(_read(sorted(Path(folder).glob("*.safetensors"))))


def _read(files: list[Path]) -> Iterator[tuple[str, Tensor]]:
    for file in files:
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 - it is no dict
                yield name, weights.get_tensor(name)
