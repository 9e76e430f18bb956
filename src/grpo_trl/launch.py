"""Whether the launcher gave what the trainer needs, and where it put the weights."""

import contextlib
import os
import sys
from collections.abc import Iterator

from torch import nn


def check_launch(n_gpu: int, world_size: int) -> None:
    """Refuse launches that would train something else than what was asked for.

    Args:
        n_gpu: GPUs that this process would use.
        world_size: Ranks that the trainer believes in.

    Raises:
        ValueError: Several GPUs in one process (`nn.DataParallel` would scatter a group over them), or a launcher that
            started another number of ranks than the trainer sees.
    """
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
