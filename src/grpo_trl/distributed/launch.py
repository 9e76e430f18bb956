"""Whether the launcher and the machines gave what the options ask for."""

import atexit
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.utils import is_torch_bf16_gpu_available

from ..logging import get_logger
from ..types import Ranks


logger = get_logger(__name__)

MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
"""Where kinds of MPI say how many ranks they have started."""
SIZES = ("WORLD_SIZE", *MPI_SIZES)
"""Where launchers do: the first is that of torchrun, deepspeed and accelerate."""
TASKS = "SLURM_STEP_NUM_TASKS"
"""Where srun says how many processes it has started, which need not be ranks."""
SHARING_SECONDS = 60.0
"""In which network file systems show what another machine has written: NFS keeps what it knows of a folder so long."""


def check_launcher(deepspeed: Any, environment: Mapping[str, str]) -> None:
    """Say what is wrong with how the process was started, before anything is set up.

    Args:
        deepspeed: The option.
        environment: `os.environ`.

    Raises:
        ValueError: DeepSpeed was asked for, and no launcher has told this process its rank, or its configuration is not
            there.
    """
    file = deepspeed or environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    is_path = isinstance(file, str) and "{" not in file and ("." in file or "/" in file)  # it may be JSON or base64 too
    if is_path and not os.path.exists(file):
        raise ValueError(
            f"deepspeed={file!r} is no file, seen from {os.getcwd()}. Pass a dict, or the path of one as in ds_configs/ "
            "(with `accelerate launch`: deepspeed_config_file in the file that --config_file names)."
        )
    if deepspeed and not any(name in environment for name in ("LOCAL_RANK", *MPI_SIZES)):
        raise ValueError(
            "deepspeed=... needs a launcher that gives each process its rank, for one GPU too: "
            f"`deepspeed {_script()} ...` or `torchrun --nproc_per_node 1 {_script()} ...`."
        )
    started_by_deepspeed = "CROSS_RANK" in environment  # set by it alone
    if started_by_deepspeed and not deepspeed_was_asked_for(deepspeed, environment):
        logger.warning(
            "`deepspeed` started this run, which has no DeepSpeed configuration: its ranks train with DDP, and nothing is "
            "sharded. Pass one, e.g. --deepspeed ds_configs/zero2.json."
        )


ALONE = "If that is what you want, set WORLD_SIZE=1 in the environment."


def check_ranks(world_size: int, fsdp: bool = False, device_type: str = "cpu") -> None:
    """Refuse ranks that would train something other than what was requested, and warn of processes that may.

    Args:
        world_size: Ranks that the trainer sees.
        fsdp: Whether FSDP was requested.
        device_type: Where the weights are.

    Raises:
        ValueError: A launcher started several processes, and other ones than the trainer sees; or FSDP without a GPU
            (which would be DDP).
    """
    if fsdp and device_type == "cpu":
        raise ValueError(
            "FSDP was requested, and there is no GPU: the run would silently use DDP. Drop fsdp, or use ZeRO "
            "(ds_configs/zero3.json), which shards on CPUs too."
        )
    launcher = next((name for name in SIZES if name in os.environ), None)
    if launcher is not None:
        _check_launched(launcher, int(os.environ[launcher]), world_size)
    elif world_size == 1:
        _warn_of_tasks()


def _check_launched(name: str, launched: int, world_size: int) -> None:
    if launched in (1, world_size):
        return
    remedy = f"Start it with {_torchrun()}, deepspeed or accelerate. {ALONE}"
    if name == "WORLD_SIZE" and "LOCAL_RANK" in os.environ:
        remedy = (
            "On a machine without GPU pass use_cpu=True (`--use_cpu true`). If that is what you want, start them "
            "without a launcher."
        )
    elif name == "WORLD_SIZE":
        remedy = f"LOCAL_RANK is not set. {remedy}"
    raise ValueError(
        f"The launcher started {name}={launched} processes and the trainer sees world_size={world_size}: those that do "
        f"not see each other would train separately. {remedy}"
    )


def _warn_of_tasks() -> None:
    in_terminal = "SLURM_PTY_PORT" in os.environ  # of `srun --pty`, where other tasks are idle
    tasks = int(os.environ.get(TASKS, "1"))
    if tasks > 1 and not in_terminal:
        logger.warning(
            "srun started %s=%d tasks, and this one trains alone. To train as ranks of one run, have srun start %s. %s",
            TASKS,
            tasks,
            _torchrun(),
            ALONE,
        )


def _torchrun() -> str:
    return (
        f"`torchrun --nproc_per_node GPUS {_script()} ...` (on several machines once on each, with --nnodes, "
        "--rdzv_backend c10d and --rdzv_endpoint)"
    )


def check_devices(n_gpu: int) -> None:
    """Refuse several GPUs in one process, over which `nn.DataParallel` would scatter a group.

    Raises:
        ValueError: `n_gpu`, the GPUs that this process would use, is above 1.
    """
    if n_gpu > 1:
        raise ValueError(
            f"One process sees n_gpu={n_gpu} GPUs, and groups cannot be split over them. Start one process per GPU: "
            f"`torchrun --nproc_per_node {n_gpu} {_script()} ...`, or show this one a single GPU with "
            "CUDA_VISIBLE_DEVICES=0."
        )


def check_bf16(use_cpu: bool) -> None:
    """Refuse bfloat16 where the hardware lacks it, or only imitates it.

    Raises:
        ValueError: There is no GPU that has it, and the run is none on the CPU.
    """
    if use_cpu or gpu_has_bf16() or (not torch.cuda.is_available() and is_torch_bf16_gpu_available()):
        return
    if torch.cuda.is_available():
        raise ValueError(
            f"bf16=True cannot work: {torch.cuda.get_device_name()} has no bfloat16. Set bf16=False to train in float32, "
            "or fp16=True."
        )
    raise ValueError(
        "bf16=True cannot work: there is no GPU. Set use_cpu=True to train in bfloat16 on the CPU, or bf16=False to train "
        "in float32."
    )


def gpu_has_bf16() -> bool:
    """Whether there is an NVIDIA or AMD GPU that computes in bfloat16 itself."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def check_shared(folder: Path, ranks: Ranks, patience: float = SHARING_SECONDS) -> None:
    """Refuse a folder that is not the same one for all ranks, before each has to write its part of a checkpoint there.

    A collective.

    Args:
        folder: Is made if it is not there.
        ranks: Of the run.
        patience: Seconds until what one machine has written must have come to the others.

    Raises:
        ValueError: Some rank does not see what the first one has written.
    """
    if ranks.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        probe = Path(tempfile.mkdtemp(prefix=".shared-", dir=folder)).name
    probe = ranks.gather([probe if ranks.rank == 0 else None])[0]
    deadline = time.monotonic() + patience
    while not (seen := (folder / probe).exists()) and time.monotonic() < deadline:
        time.sleep(0.5)
    blind = [other for other, sees in enumerate(ranks.gather([seen])) if not sees]
    if ranks.rank == 0:
        (folder / probe).rmdir()
    if blind:
        raise ValueError(
            f"output_dir={str(folder)!r} is not the same folder on all machines: what rank 0 writes there is not seen by "
            f"rank {', '.join(map(str, blind))}, and a checkpoint has a part of each. Use a file system that all machines "
            "share, or save_strategy='no'."
        )


def delay_exit(world_size: int, device_type: str) -> None:
    """Have a rank on the CPU wait a moment before Python ends.

    Threads of gloo release tensors of collectives that are over, for which they need Python; one that comes too late aborts
    the process, and then the launcher ends the ranks that are still at work.
    """
    if world_size > 1 and device_type == "cpu":
        atexit.unregister(_rest)  # of an earlier trainer
        atexit.register(_rest)


def deepspeed_was_asked_for(option: Any, environment: Mapping[str, str]) -> bool:
    """By the option `deepspeed`, or as accelerate's launcher does; any trainer leaves ACCELERATE_USE_DEEPSPEED behind."""
    names = ("ACCELERATE_CONFIG_DS_FIELDS", "ACCELERATE_DEEPSPEED_")
    return bool(option) or any(name.startswith(names) for name in environment)


def check_one_backend(uses_deepspeed: bool, option: Any, environment: Mapping[str, str]) -> None:
    """Refuse a trainer of another backend than an earlier one of this process.

    Raises:
        ValueError: `deepspeed` contradicts what accelerate has been set up for.
    """
    if uses_deepspeed != deepspeed_was_asked_for(option, environment):
        raise ValueError(
            f"deepspeed={option!r} conflicts with an earlier trainer in this process, or with ACCELERATE_USE_DEEPSPEED in "
            "its environment. Give all trainers deepspeed=..., or none, or start another process."
        )


def fsdp_was_asked_for(option: Any) -> bool:
    """By the option `fsdp`, or by accelerate's launcher."""
    return bool(option) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1")


def _rest() -> None:
    time.sleep(0.2)


def _script() -> str:
    return os.path.basename(sys.argv[0]) or "train.py"
