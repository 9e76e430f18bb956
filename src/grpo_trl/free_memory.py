"""The memory that this process may still take."""

import ctypes
import platform
import resource
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch
from accelerate.utils import get_int_from_env


CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
"""Which control groups this process is in."""
M_MMAP_THRESHOLD = -3
"""Of glibc's malloc.h: the size of the smallest block that is mapped by itself."""
MAPPED = 2**20


def free_memory(device: torch.device) -> int:
    """Count the bytes that this process may still take on `device`.

    On a GPU these are the free ones and those that torch has reserved and does not use, within
    `torch.cuda.set_per_process_memory_fraction`. On the host they are this rank's share of what the system and its control
    groups leave, and at most what the limit of its address space leaves.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        allowed = int(torch.cuda.get_per_process_memory_fraction(device) * total)
        reachable = min(free + torch.cuda.memory_reserved(device), allowed)
        return max(0, reachable - torch.cuda.memory_allocated(device))
    shared = min([psutil.virtual_memory().available, *left_in_cgroups()])
    own = shared // get_int_from_env(["LOCAL_WORLD_SIZE", "LOCAL_SIZE"], 1)  # the latter is of the deepspeed launcher
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)  # ulimit -v
    if limit != resource.RLIM_INFINITY:
        own = min(own, limit - psutil.Process().memory_info().vms)
    return max(0, own)


def return_freed_blocks() -> None:
    """Let this process give back the memory of each block of a MiB or more when it is freed.

    By default glibc keeps those up to 32 MiB, in pieces that may fit nothing later; other libraries are left alone. Each
    new block then costs page faults.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MAPPED)


def left_in_cgroups(root: Path = CGROUPS, membership: Path = MEMBERSHIP) -> Iterator[int]:
    """Yield the bytes that each control group around this process leaves, files that are only cached not counted."""
    if not membership.exists():
        return
    for line in membership.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            top, limit, usage, cached = root, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            top, limit, usage, cached = (
                root / "memory",
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_inactive_file",
            )
        else:
            continue
        group = top / path.strip("/")
        for folder in (group, *group.parents):
            if (folder / limit).exists() and (most := (folder / limit).read_text().strip()) != "max":
                yield int(most) - int((folder / usage).read_text()) + _statistic(folder / "memory.stat", cached)
            if folder == top:
                break


def _statistic(file: Path, name: str) -> int:
    values = dict(line.split() for line in file.read_text().splitlines()) if file.exists() else {}
    return int(values.get(name, 0))
