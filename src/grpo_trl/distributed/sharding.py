"""What a backend (DeepSpeed, FSDP) does to models: where their weights are, in which precision, when they are gathered."""

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.integrations import deepspeed as deepspeed_integration
from transformers.integrations import is_deepspeed_zero3_enabled

from ..logging import get_logger


logger = get_logger(__name__)

BACKEND_MARK = "_grpo_trl_has_engine"
"""An attribute of models that DeepSpeed has wrapped, which changes them for good."""
MIXED_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""By accelerate's names."""
GATHERED_AT_ONCE = 2**28
"""Bytes of weights that one collective gathers, unless a single weight has more."""


def check_backend_config(config: Any) -> None:
    """Warn where a DeepSpeed configuration overrides options.

    Args:
        config: `transformers.integrations.HfDeepSpeedConfig`.

    Raises:
        ValueError: It contradicts an option of the same meaning.
    """
    if mismatches := getattr(config, "mismatches", None):
        found = "; ".join(mismatch.removeprefix("- ") for mismatch in mismatches)
        raise ValueError(f'The DeepSpeed configuration contradicts GRPOConfig ({found}). Write "auto" there.')
    for block, option in (("optimizer", "optim"), ("scheduler", "lr_scheduler_type")):
        if block in config.config:
            logger.warning("The DeepSpeed configuration has %r, so that %s has no effect.", block, option)


def start_backend(device_type: str) -> None:
    """Tell DeepSpeed about the ranks before a model is loaded, since ZeRO-3 shards models as they are loaded."""
    if is_deepspeed_zero3_enabled():
        import deepspeed

        if not deepspeed.comm.is_initialized():
            deepspeed.init_distributed(dist_backend="gloo" if device_type == "cpu" else None)


@contextlib.contextmanager
def loading_whole() -> Iterator[None]:
    """Let `from_pretrained` load unsharded models inside, even where ZeRO-3 is configured."""
    configured = deepspeed_integration._hf_deepspeed_config_weak_ref  # there is no other way to ask for it
    deepspeed_integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed_integration._hf_deepspeed_config_weak_ref = configured


def check_sharding(model: nn.Module, world_size: int) -> None:
    """Warn of the cost of a model that was loaded before ZeRO-3 could shard it.

    Raises:
        ValueError: It was sharded as it was loaded, and the run has no ZeRO-3; or DeepSpeed has wrapped it already.
    """
    if hasattr(model, BACKEND_MARK):
        raise ValueError(
            "The model belongs to the DeepSpeed engine of an earlier trainer. Save it with trainer.save_model(path), and "
            "pass the path."
        )
    parameters = list(model.parameters())
    sharded = any(hasattr(parameter, "ds_id") for parameter in parameters)
    if sharded and not is_deepspeed_zero3_enabled():
        raise ValueError(
            "The model was loaded while ZeRO-3 was configured, so its weights are sharded, and this run has no "
            "ZeRO-3. Pass deepspeed=... with stage 3 to GRPOConfig, or load the model before ZeRO-3 is configured."
        )
    quantized = getattr(model, "is_quantized", False)  # which from_pretrained never shards
    if is_deepspeed_zero3_enabled() and not sharded and not quantized:
        size = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
        logger.warning(
            "The model was loaded before ZeRO-3 was configured, so that each of the %d ranks holds all %.2f GiB of it "
            "until training starts. Pass its path as model, or load it after GRPOConfig(deepspeed=...) is made.",
            world_size,
            size / 2**30,
        )


def check_whole(model: nn.Module, name: str) -> None:
    """Refuse a sharded model that each rank calls by itself: its forward would wait for other ranks.

    Raises:
        ValueError: It was sharded while it was loaded; `name` says what it is.
    """
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ValueError(
            f"{name} was loaded while ZeRO-3 was configured, so its weights are sharded; each rank needs all of it. "
            "Pass its path, or load it before GRPOConfig(deepspeed=...) is made."
        )


def backend_of(accelerator: Any) -> str:
    """Return what shards a run, and so the form of its checkpoints: "ZeRO-3", "FSDP", or "none"."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return f"ZeRO-{accelerator.state.deepspeed_plugin.zero_stage}"
    return "FSDP" if accelerator.distributed_type == DistributedType.FSDP else "none"


def backend_config(accelerator: Any) -> dict[str, Any]:
    """Return the run's DeepSpeed configuration; empty without DeepSpeed."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return {}
    return cast("dict[str, Any]", accelerator.state.deepspeed_plugin.hf_ds_config.config)


def unsharded(parameters: list[nn.Parameter]) -> contextlib.AbstractContextManager[Any]:
    """Inside, parameters that ZeRO-3 shards are whole; what is written to them on every rank stays. A collective there."""
    sharded = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not sharded:
        return contextlib.nullcontext()
    import deepspeed

    return cast("contextlib.AbstractContextManager[Any]", deepspeed.zero.GatheredParameters(sharded, modifier_rank=0))


def check_exchangeable(exchanged: bool, accelerator: Any) -> None:
    """Refuse to exchange parameters that FSDP's first version has flattened, where `exchanged`.

    Raises:
        ValueError: They are to be exchanged, and cannot be.
    """
    if exchanged and backend_of(accelerator) == "FSDP" and accelerator.state.fsdp_plugin.fsdp_version == 1:
        raise ValueError(
            "beta > 0 with an adapter that does not start as the base model needs fsdp_version=2 in fsdp_config, or ZeRO: "
            "the first version of FSDP flattens the adapter's weights."
        )


def prepare_frozen(model: nn.Module, accelerator: Any, moves: bool = False) -> nn.Module:
    """Prepare a model that is only evaluated as the backend does the policy, but shard it under ZeRO-3 only.

    In mixed precision it takes half of the memory, unless it `moves` in steps that half precision would round away.
    """
    if not is_deepspeed_zero3_enabled():
        half = MIXED_DTYPES.get(accelerator.mixed_precision)
        if half and accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP):
            for parameter in model.parameters():  # as they cast the policy, whose buffers they leave
                if parameter.is_floating_point():
                    parameter.data = parameter.data.to(half)
        elif half and not moves:
            _cast_linears(model, half)
        return accelerator.prepare_model(model, device_placement=True, evaluation_mode=True)
    from trl.models.utils import prepare_deepspeed

    return prepare_deepspeed(model, accelerator)


def _cast_linears(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast what autocast would cast at each call, which changes no result: weights of linear layers alone."""
    linears = [module for module in model.modules() if type(module) is nn.Linear]
    others = {
        p for module in model.modules() if type(module) is not nn.Linear for p in module.parameters(recurse=False)
    }
    for parameter in {p for module in linears for p in module.parameters(recurse=False)} - others:
        if parameter.dtype == torch.float32:
            parameter.data = parameter.data.to(dtype)


def move_to_device(model: nn.Module, device: torch.device, gathers: bool) -> None:
    """Move a model to its device for sampling before training, when no backend has placed it yet.

    Args:
        model: Not wrapped.
        device: Of this rank.
        gathers: Whether sampling gathers sharded weights.

    Raises:
        ValueError: Weights are sharded, and nothing gathers them.
    """
    if not gathers and any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ValueError(
            "evaluate() before train() cannot work with ds3_gather_for_generation=False: DeepSpeed gathers layers, "
            "and training starts it. Set it to True, or set eval_on_start=True instead of calling evaluate()."
        )
    parameter = next(model.parameters())
    if not isinstance(parameter, DTensor) and parameter.device != device:
        model.to(device)


class GatheredWeights:
    """Gathers weights that ZeRO-3 shards on every rank for a while. Inside, forwards are no collectives.

    They are gathered a few at a time, so that the peak is all weights and what the collective of one group needs besides.
    """

    def __init__(self) -> None:
        self._inside = False

    @contextlib.contextmanager
    def of(self, model: nn.Module) -> Iterator[None]:
        """Enter it on all ranks. Inside another one, and with a model that is not sharded, nothing happens.

        Args:
            model: The wrapped model.
        """
        sharded = [parameter for parameter in model.parameters() if hasattr(parameter, "ds_id")]
        if self._inside or not sharded:
            yield
            return
        import deepspeed
        from trl.models.utils import add_hooks, remove_hooks

        with contextlib.ExitStack() as stack:
            for group in groups_of_bytes(sharded, GATHERED_AT_ONCE):
                stack.enter_context(deepspeed.zero.GatheredParameters(group))
            remove_hooks(model)
            stack.callback(add_hooks, model)
            self._inside = True
            try:
                yield
            finally:
                self._inside = False


def groups_of_bytes(parameters: list[Any], most: int) -> list[list[Any]]:
    """Neighbours together, up to `most` bytes, or a single larger one; sizes are those of the whole parameters."""
    groups: list[list[Any]] = []
    size = 0
    for parameter in parameters:
        own = parameter.ds_numel * parameter.element_size()
        if not groups or size + own > most:
            groups.append([])
            size = 0
        groups[-1].append(parameter)
        size += own
    return groups
