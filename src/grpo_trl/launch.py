"""Whether the launcher gave what the trainer needs, and where it put the weights."""

import contextlib
import logging
import os
import pickle
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import distributed, nn
from transformers.integrations import is_deepspeed_zero3_enabled


logger = logging.getLogger(__name__)


def check_launch(n_gpu: int, world_size: int, fsdp: bool = False, device_type: str = "cpu") -> None:
    """Refuse launches that would train something else than what was asked for.

    Args:
        n_gpu: GPUs that this process would use.
        world_size: Ranks that the trainer believes in.
        fsdp: Whether FSDP was asked for.
        device_type: What the weights lie on.

    Raises:
        ValueError: Several GPUs in one process (`nn.DataParallel` would scatter a group over them), a launcher that
            started another number of ranks than the trainer sees, or FSDP without a GPU (which would be DDP).
    """
    if fsdp and device_type == "cpu":
        raise ValueError(
            "FSDP was asked for, and there is no GPU: the run would silently be a DDP one. Leave fsdp away, or use ZeRO "
            "(ds_configs/zero3.json), which shards on CPUs too."
        )
    script = os.path.basename(sys.argv[0]) or "train.py"
    if n_gpu > 1:
        raise ValueError(
            f"One process sees n_gpu={n_gpu} GPUs, and groups cannot be split over them. Start one process per GPU: "
            f"`torchrun --nproc_per_node {n_gpu} {script} ...`, or show this one a single GPU with CUDA_VISIBLE_DEVICES=0."
        )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != world_size:
        raise ValueError(
            f"The launcher started WORLD_SIZE={launched} processes and the trainer sees world_size={world_size}: each "
            "would train alone. On a machine without GPU pass use_cpu=True (`--use_cpu true`)."
        )


def start_engine(device_type: str) -> None:
    """Have DeepSpeed know the ranks before a model is loaded, which ZeRO-3 shards while it is loaded."""
    if is_deepspeed_zero3_enabled():
        import deepspeed

        if not deepspeed.comm.is_initialized():
            deepspeed.init_distributed(dist_backend="gloo" if device_type == "cpu" else None)


def check_sharding(model: nn.Module, world_size: int) -> None:
    """Say what it costs that a model was loaded before ZeRO-3 could shard it."""
    parameters = list(model.parameters())
    if is_deepspeed_zero3_enabled() and not any(hasattr(parameter, "ds_id") for parameter in parameters):
        size = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
        logger.warning(
            "The model was loaded before ZeRO-3 was configured, so that each of the %d ranks holds all %.2f GiB of it "
            "until training starts. Pass its path as model, or load it after GRPOConfig(deepspeed=...) is made.",
            world_size,
            size / 2**30,
        )


def fsdp_was_asked_for(option: Any) -> bool:
    """By the option `fsdp`, or by accelerate's launcher."""
    return bool(option) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1")


def prepare_frozen(model: nn.Module, accelerator: Any) -> nn.Module:
    """A model that is only evaluated, where its weights belong: sharded under ZeRO-3, whole on each rank elsewhere."""
    if not is_deepspeed_zero3_enabled():
        return accelerator.prepare_model(model, evaluation_mode=True)
    from trl.models.utils import prepare_deepspeed

    return prepare_deepspeed(model, accelerator)


@contextlib.contextmanager
def gathered_weights(model: nn.Module) -> Iterator[None]:
    """Inside, the weights that ZeRO-3 shards are whole on every rank, and forwards are no collectives.

    Args:
        model: The wrapped model. One without sharded weights is left alone.
    """
    sharded = [parameter for parameter in model.parameters() if hasattr(parameter, "ds_id")]
    if not sharded:
        yield
        return
    import deepspeed
    from trl.models.utils import add_hooks, remove_hooks

    with deepspeed.zero.GatheredParameters(sharded):
        remove_hooks(model)
        try:
            yield
        finally:
            add_hooks(model)


def exchange(parcels: list[Any], device: torch.device) -> list[Any]:
    """What every rank has for this one, in the order of ranks; `parcels` has one object for each rank. A collective.

    Args:
        parcels: What pickle takes.
        device: One that the process group serves.
    """
    sent = [torch.frombuffer(bytearray(pickle.dumps(parcel)), dtype=torch.uint8) for parcel in parcels]
    sizes = torch.tensor([len(data) for data in sent], device=device)
    sizes_received = torch.empty_like(sizes)
    distributed.all_to_all_single(sizes_received, sizes)
    counts = sizes_received.tolist()
    received = torch.empty(sum(counts), dtype=torch.uint8, device=device)
    distributed.all_to_all_single(received, torch.cat(sent).to(device), counts, sizes.tolist())
    return [pickle.loads(data.cpu().numpy().tobytes()) for data in received.split(counts)]
