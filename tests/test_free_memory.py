"""What limits the memory of this process is seen."""

import ctypes
import platform
import resource

import psutil
import pytest
import torch

from grpo_trl.free_memory import free_memory, left_in_cgroups, return_freed_blocks


CPU = torch.device("cpu")


@pytest.mark.parametrize("launcher", ["LOCAL_WORLD_SIZE", "LOCAL_SIZE"])
def test_ranks_of_one_machine_share_its_memory(launcher, monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    whole = free_memory(CPU)
    monkeypatch.setenv(launcher, "4")
    assert free_memory(CPU) == pytest.approx(whole / 4, rel=0.1)


def test_a_limit_of_the_address_space_bounds_it(monkeypatch):
    used = psutil.Process().memory_info().vms
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (used + 2**20, used + 2**30))
    assert free_memory(CPU) == pytest.approx(2**20, abs=2**19)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (used // 2, used // 2))
    assert free_memory(CPU) == 0


@pytest.mark.parametrize("fraction, expected", [(1.0, 45), (0.9, 45), (0.6, 30), (0.2, 0)])
def test_on_a_gpu_torchs_own_limit_bounds_it(fraction, expected, monkeypatch):
    """100 bytes in all: 20 free, 55 reserved by torch, 30 of these in use; the other 25 are another process's."""
    sizes = {"mem_get_info": (20, 100), "memory_reserved": 55, "memory_allocated": 30}
    for name, size in (sizes | {"get_per_process_memory_fraction": fraction}).items():
        monkeypatch.setattr(torch.cuda, name, lambda device, size=size: size)
    assert free_memory(torch.device("cuda")) == expected


def test_another_malloc_than_glibcs_is_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("musl", "1.2"))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: pytest.fail("it has no such option"))
    return_freed_blocks()


def group(folder, limit, used, cached, version):
    """A control group of memory that holds `used` bytes, `cached` of them of files."""
    names = {1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"), 2: ("memory.max", "memory.current", "")}
    folder.mkdir(parents=True, exist_ok=True)
    limit_file, usage_file, prefix = names[version]
    (folder / limit_file).write_text(f"{limit}\n")
    (folder / usage_file).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"{prefix}active_file 7\n{prefix}inactive_file {cached}\n")


@pytest.mark.parametrize("version, lines, top", [(1, "4:cpu:/\n7:memory:/a/b", "memory"), (2, "0::/a/b", ".")])
def test_every_control_group_around_the_process_counts(tmp_path, version, lines, top):
    root, membership = tmp_path / "groups", tmp_path / "cgroup"
    membership.write_text(lines + "\n")
    group(root / top / "a" / "b", 1000, 700, 100, version)
    group(root / top / "a", 2000, 1900, 150, version)
    assert sorted(left_in_cgroups(root, membership)) == [250, 400]


def test_no_control_group_and_no_limit_bound_nothing(tmp_path):
    assert list(left_in_cgroups(tmp_path, tmp_path / "missing")) == []
    (tmp_path / "cgroup").write_text("0::/somewhere/else\n")
    group(tmp_path, "max", 5, 0, 2)
    assert list(left_in_cgroups(tmp_path, tmp_path / "cgroup")) == []
