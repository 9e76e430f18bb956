"""Versions and hardware of a run."""

import os
import platform
from importlib import metadata
from typing import Any

import psutil
import torch


PACKAGES = (
    "grpo_trl",
    "torch",
    "transformers",
    "trl",
    "accelerate",
    "peft",
    "datasets",
    "deepspeed",
    "vllm",
    "bitsandbytes",
)


def environment(world_size: int) -> dict[str, Any]:
    """Describe where a run takes place: versions of packages, and the hardware of the first rank's machine."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "versions": versions,
        "hardware": {
            "ranks": world_size,
            "system": platform.platform(),
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
            "accelerators": accelerators(),
        },
    }


def accelerators() -> list[dict[str, Any]]:
    """List the CUDA devices that this process sees."""
    if not torch.cuda.is_available():
        return []
    devices = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [{"name": device.name, "memory_gib": round(device.total_memory / 2**30, 1)} for device in devices]
