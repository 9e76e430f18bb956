import base64
import json
import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from grpo_trl.distributed import launch
from grpo_trl.distributed.launch import (
    check_bf16,
    check_devices,
    check_launcher,
    check_ranks,
    check_shared,
    deepspeed_was_asked_for,
    delay_exit,
    fsdp_was_asked_for,
)
from grpo_trl.types import Ranks
from tests.distributed.test_balancer import Threads


@pytest.fixture(autouse=True)
def launched(monkeypatch):
    for name in (*launch.SIZES, launch.TASKS, "LOCAL_RANK", "SLURM_PTY_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "argv", ["/home/me/train.py", "--beta", "0.1"])


CONFIG = {"zero_optimization": {"stage": 2}}


# ---- How it was started ----
@pytest.mark.parametrize("started_by", ["LOCAL_RANK", *launch.MPI_SIZES])
def test_deepspeed_may_be_started_by_whatever_gives_ranks(started_by):
    check_launcher(CONFIG, environment={started_by: "2"})


@pytest.mark.parametrize("environment", [{}, {launch.TASKS: "2"}, {"WORLD_SIZE": "2", "RANK": "0"}])
def test_deepspeed_without_a_launcher_is_refused_with_the_command(environment):
    with pytest.raises(ValueError, match="needs a launcher") as raised:
        check_launcher(CONFIG, environment=environment)
    assert re.findall("`(.*?)`", str(raised.value)) == [
        "deepspeed train.py ...",
        "torchrun --nproc_per_node 1 train.py ...",
    ]
    check_launcher(None, environment=environment)


@pytest.mark.parametrize(
    "deepspeed, environment, told",
    [
        (None, {"CROSS_RANK": "0", "RANK": "0", "WORLD_SIZE": "2"}, True),
        (CONFIG, {"CROSS_RANK": "0", "RANK": "0", "LOCAL_RANK": "0"}, False),
        (None, {"RANK": "0", "WORLD_SIZE": "2"}, False),
        # `accelerate launch` on several machines
        (None, {"CROSS_RANK": "0", "RANK": "0", "WORLD_SIZE": "2", "ACCELERATE_CONFIG_DS_FIELDS": ""}, False),
    ],
)
def test_a_run_that_deepspeed_started_is_told_that_nothing_is_sharded(caplog, deepspeed, environment, told):
    check_launcher(deepspeed, environment)
    assert ("train with DDP, and nothing is sharded" in caplog.text) == told


@pytest.mark.parametrize(
    "deepspeed, environment",
    [("ds_configs/zero9.json", {}), (None, {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds_configs/zero9.json"})],
)
def test_a_configuration_that_is_not_there_is_refused_with_the_folder(monkeypatch, tmp_path, deepspeed, environment):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rf"'ds_configs/zero9\.json' is no file, seen from {tmp_path}\."):
        check_launcher(deepspeed, environment | {"LOCAL_RANK": "0"})
    Path("ds_configs").mkdir()
    Path("ds_configs/zero9.json").write_text("{}")
    check_launcher(deepspeed, environment | {"LOCAL_RANK": "0"})


@pytest.mark.parametrize(
    "deepspeed", [CONFIG, json.dumps(CONFIG), base64.urlsafe_b64encode(json.dumps(CONFIG).encode() * 9).decode()]
)
def test_a_configuration_need_not_be_a_file(deepspeed):
    check_launcher(deepspeed, {"LOCAL_RANK": "0", "ACCELERATE_DEEPSPEED_CONFIG_FILE": "None"})


@pytest.mark.parametrize(
    "option, environment, asked",
    [
        (None, {}, False),
        (None, {"ACCELERATE_USE_DEEPSPEED": "true"}, False),
        (None, {"ACCELERATE_CONFIG_DS_FIELDS": ""}, True),
        (None, {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, True),
        ("ds_configs/zero2.json", {}, True),
    ],
)
def test_deepspeed_is_asked_for_by_option_or_launcher(option, environment, asked):
    assert deepspeed_was_asked_for(option, environment) == asked


# ---- Ranks and devices ----
@pytest.mark.parametrize("n_gpu", [0, 1])
def test_one_process_with_one_device_is_accepted(n_gpu):
    check_ranks(world_size=1)
    check_devices(n_gpu)


@pytest.mark.parametrize("n_gpu", [2, 8])
def test_several_gpus_in_one_process_are_refused_with_the_command_to_launch(n_gpu):
    with pytest.raises(ValueError, match=f"n_gpu={n_gpu} GPUs") as raised:
        check_devices(n_gpu)
    command = re.search(r"`(.*?)`", str(raised.value))[1]
    assert command == f"torchrun --nproc_per_node {n_gpu} train.py ..."
    assert "CUDA_VISIBLE_DEVICES=0" in str(raised.value)


def test_the_command_names_a_script_where_there_is_none(monkeypatch):
    monkeypatch.setattr(sys, "argv", [""])
    with pytest.raises(ValueError, match=r"`torchrun --nproc_per_node 2 train\.py "):
        check_devices(2)


@pytest.mark.parametrize("name", launch.SIZES)
@pytest.mark.parametrize("launched", ["1", "4"])
def test_as_many_processes_as_ranks_are_accepted(monkeypatch, caplog, name, launched):
    """So are ranks that no launcher knows of, where a script has made the process group."""
    monkeypatch.setenv(name, launched)
    check_ranks(world_size=4)
    assert not caplog.text


WITH_TORCHRUN = "Start it with `torchrun --nproc_per_node GPUS train.py ...` (on several machines once on each"


@pytest.mark.parametrize(
    "environment, remedy",
    [
        (
            {"WORLD_SIZE": "4", "LOCAL_RANK": "1"},
            "On a machine without GPU pass use_cpu=True (`--use_cpu true`). If that is what you want, start them without",
        ),
        ({"WORLD_SIZE": "4", "RANK": "1"}, f"LOCAL_RANK is not set. {WITH_TORCHRUN}"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, WITH_TORCHRUN),
        ({"PMI_SIZE": "4", launch.TASKS: "4"}, WITH_TORCHRUN),
    ],
)
@pytest.mark.parametrize("seen", [1, 2])
def test_processes_that_do_not_see_each_other_are_refused_with_the_remedy(monkeypatch, environment, remedy, seen):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        ValueError, match=rf"SIZE=4 processes .* world_size={seen}: .* separately\. {re.escape(remedy)}"
    ):
        check_ranks(world_size=seen)


@pytest.mark.parametrize(
    "environment, world_size, told",
    [
        ({}, 1, True),
        ({}, 4, False),
        ({launch.TASKS: "1"}, 1, False),
        ({"SLURM_PTY_PORT": "40000"}, 1, False),  # a terminal
        ({"WORLD_SIZE": "1"}, 1, False),
        ({"WORLD_SIZE": "32", "LOCAL_RANK": "0"}, 32, False),  # torchrun in each task
    ],
)
def test_tasks_of_srun_that_train_alone_are_told_how_to_train_together(
    monkeypatch, caplog, environment, world_size, told
):
    for name, value in ({launch.TASKS: "4"} | environment).items():
        monkeypatch.setenv(name, value)
    check_ranks(world_size)
    assert ("SLURM_STEP_NUM_TASKS=4 tasks, and this one trains alone" in caplog.text) == told
    assert ("`torchrun --nproc_per_node GPUS train.py" in caplog.text) == told


@pytest.mark.parametrize("name", launch.MPI_SIZES)
def test_processes_are_left_alone_that_were_meant_to_train_alone(monkeypatch, caplog, name):
    monkeypatch.setenv(name, "4")
    monkeypatch.setenv("WORLD_SIZE", "1")
    check_ranks(world_size=1)
    assert not caplog.text


def check_shared_by(folders, patience=5.0):
    """Each rank is a thread that sees another folder; what each raises."""
    threads = Threads(len(folders))

    def gather(rank):
        return lambda values: [value for values in threads.collect(rank, values) for value in values]

    def check(rank):
        try:
            check_shared(folders[rank], Ranks(rank, len(folders), gather(rank)), patience)
        except ValueError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(len(folders)) as pool:
        return list(pool.map(check, range(len(folders))))


def test_a_folder_that_all_ranks_share_is_accepted_and_left_empty(tmp_path):
    assert check_shared_by([tmp_path / "new"] * 3) == [None] * 3
    assert not list((tmp_path / "new").iterdir())


def test_a_folder_of_each_machine_is_refused_on_all_ranks(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    second.mkdir()
    refusals = check_shared_by([first, first, second, tmp_path / "none"], patience=0.0)
    assert all(re.search(r"not seen by rank 2, 3,.*file system that all machines share", text) for text in refusals)
    assert not list(first.iterdir())


def test_a_file_system_may_take_its_time(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    link = threading.Timer(0.3, lambda: second.symlink_to(first))
    link.start()
    assert check_shared_by([first, second]) == [None] * 2


def test_fsdp_without_a_gpu_is_refused():
    with pytest.raises(ValueError, match=r"FSDP was requested, and there is no GPU.*zero3\.json"):
        check_ranks(world_size=1, fsdp=True, device_type="cpu")
    check_ranks(world_size=1, fsdp=True, device_type="cuda")


@pytest.mark.parametrize(
    "option, launcher, expected",
    [("", None, False), ([], None, False), ("full_shard", None, True), ("", "true", True), ("", "false", False)],
)
def test_fsdp_is_asked_for_by_option_or_launcher(monkeypatch, option, launcher, expected):
    if launcher is not None:
        monkeypatch.setenv("ACCELERATE_USE_FSDP", launcher)
    assert fsdp_was_asked_for(option) == expected


# ---- Precision ----
@pytest.mark.parametrize(
    "gpu, native, other, use_cpu, refused",
    [
        (True, True, False, False, None),
        (True, False, False, False, "Tesla T4 has no bfloat16.*bf16=False.*fp16=True"),
        (True, False, False, True, None),
        (False, False, False, False, "there is no GPU.*use_cpu=True.*bf16=False"),
        (False, False, False, True, None),
        (False, False, True, False, None),  # an accelerator of another maker
    ],
)
def test_bf16_is_refused_where_the_hardware_lacks_or_imitates_it(monkeypatch, gpu, native, other, use_cpu, refused):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native or including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(launch, "is_torch_bf16_gpu_available", lambda: other)
    if refused is None:
        check_bf16(use_cpu)
        return
    with pytest.raises(ValueError, match=f"bf16=True cannot work: .*{refused}"):
        check_bf16(use_cpu)


# ---- How it ends ----
@pytest.mark.parametrize("ranks, device, rests", [(2, "cpu", True), (1, "cpu", False), (2, "cuda", False)])
def test_ranks_rest_once_before_python_ends_where_gloo_has_threads(monkeypatch, ranks, device, rests):
    ends, naps = [], []
    monkeypatch.setattr(launch.atexit, "register", ends.append)
    monkeypatch.setattr(launch.atexit, "unregister", lambda end: ends.remove(end) if end in ends else None)
    monkeypatch.setattr(launch.time, "sleep", naps.append)
    for _ in ("a trainer", "another one"):
        delay_exit(ranks, device)
    for end in ends:
        end()
    assert len(naps) == rests
    assert all(nap > 0 for nap in naps)
