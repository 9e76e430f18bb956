"""Whether the launcher gave what the trainer needs."""

import os
import sys


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
