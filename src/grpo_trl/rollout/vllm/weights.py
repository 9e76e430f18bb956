"""A policy's weights as vLLM wants them: under the names of a checkpoint, unsharded, a few at a time."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.core_model_loading import revert_weight_conversion


FILE_BYTES = 2**30
"""Weights that are held in memory before they are written, unless a single weight has more."""


def policy_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All weights of `model`, or of the model under its adapter, one at a time. A collective where they are sharded.

    Tied weights come once. The adapter itself is left out.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    for name, tensor in _tensors(base):
        if isinstance(model, PeftModel) and model.prefix in name:
            continue
        with _unsharded(tensor) as whole:
            yield from revert_weight_conversion(base, {name.replace(".base_layer", ""): whole}).items()


def write_weights(weights: Iterator[tuple[str, Tensor]], folder: Path) -> None:
    """Write weights into safetensors files as they come, about 1 GiB each."""
    folder.mkdir(parents=True)
    part: dict[str, Tensor] = {}
    size = files = 0
    for name, tensor in weights:
        if part and size + tensor.nbytes > FILE_BYTES:
            save_file(part, folder / f"{files:05d}.safetensors")
            part, size, files = {}, 0, files + 1
        part[name] = tensor.detach().to("cpu", copy=True).contiguous()
        size += tensor.nbytes
    save_file(part, folder / f"{files:05d}.safetensors")


def adapter_weights(model: PeftModel) -> dict[str, Tensor]:
    """The active adapter, under PEFT's names. A collective where it is sharded."""
    name = model.active_adapter
    state: dict[str, Tensor] = {}
    for key, tensor in _tensors(model):
        if model.prefix in key:
            with _unsharded(tensor) as whole:
                state[key] = whole.detach().to("cpu", copy=True).contiguous()
    return get_peft_model_state_dict(model, state_dict=state, adapter_name=name)


def write_adapter(model: PeftModel, weights: dict[str, Tensor], folder: Path) -> None:
    """Write an adapter as `PeftModel.save_pretrained` does."""
    folder.mkdir(parents=True)
    save_file(weights, folder / "adapter_model.safetensors")
    config = {**model.peft_config[model.active_adapter].to_dict(), "inference_mode": True}
    (folder / "adapter_config.json").write_text(json.dumps(config, default=_plain))


def check_adapter(model: PeftModel) -> None:
    """Refuse adapters that vLLM does not serve.

    Raises:
        ValueError: The adapter is no plain LoRA.
    """
    config: Any = model.peft_config[model.active_adapter]
    unserved = {
        "peft_type": config.peft_type != "LORA" and str(config.peft_type),
        "use_dora": getattr(config, "use_dora", False),
        "modules_to_save": getattr(config, "modules_to_save", None),
        "bias": getattr(config, "bias", "none") != "none" and config.bias,
        "trainable_token_indices": getattr(config, "trainable_token_indices", None),
    }
    found = [f"{name}={value!r}" for name, value in unserved.items() if value]
    if found:
        raise ValueError(
            f"use_vllm=True cannot serve this adapter: peft_config has {', '.join(found)}, and vLLM loads plain LoRA only. "
            "Use a LoraConfig without it, or set use_vllm=False."
        )


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, and the buffers that a checkpoint holds."""
    yield from model.named_parameters()
    saved = model.state_dict().keys()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in saved)


@contextlib.contextmanager
def _unsharded(tensor: Tensor) -> Iterator[Tensor]:
    """The whole of a tensor that ZeRO-3 or FSDP2 shards."""
    if hasattr(tensor, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            yield tensor.data
    else:
        yield tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)
