import re
import sys

import pytest
from torch import nn

from grpo_trl.launch import check_launch, check_sharding, fsdp_was_asked_for


@pytest.fixture(autouse=True)
def launched(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(sys, "argv", ["/home/me/train.py", "--beta", "0.1"])


@pytest.mark.parametrize("n_gpu", [0, 1])
def test_one_process_with_one_device_is_accepted(n_gpu):
    check_launch(n_gpu=n_gpu, world_size=1)


@pytest.mark.parametrize("n_gpu", [2, 8])
def test_several_gpus_in_one_process_are_refused_with_the_command_to_launch(n_gpu):
    with pytest.raises(ValueError, match=f"n_gpu={n_gpu} GPUs") as raised:
        check_launch(n_gpu=n_gpu, world_size=1)
    command = re.search(r"`(.*?)`", str(raised.value))[1]
    assert command == f"torchrun --nproc_per_node {n_gpu} train.py ..."
    assert "CUDA_VISIBLE_DEVICES=0" in str(raised.value)


def test_the_command_names_a_script_where_there_is_none(monkeypatch):
    monkeypatch.setattr(sys, "argv", [""])
    with pytest.raises(ValueError, match=r"`torchrun --nproc_per_node 2 train\.py "):
        check_launch(n_gpu=2, world_size=1)


def test_as_many_processes_as_ranks_are_accepted(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    check_launch(n_gpu=1, world_size=4)


def test_processes_that_do_not_see_each_other_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(
        ValueError, match=r"WORLD_SIZE=4 processes .* world_size=1: .*use_cpu=True \(`--use_cpu true`\)"
    ):
        check_launch(n_gpu=1, world_size=1)


def test_fsdp_without_a_gpu_is_refused():
    with pytest.raises(ValueError, match=r"FSDP was asked for, and there is no GPU.*zero3\.json"):
        check_launch(n_gpu=0, world_size=1, fsdp=True, device_type="cpu")
    check_launch(n_gpu=1, world_size=1, fsdp=True, device_type="cuda")


@pytest.mark.parametrize(
    "option, launcher, expected",
    [("", None, False), ([], None, False), ("full_shard", None, True), ("", "true", True), ("", "false", False)],
)
def test_fsdp_is_asked_for_by_option_or_launcher(monkeypatch, option, launcher, expected):
    if launcher is not None:
        monkeypatch.setenv("ACCELERATE_USE_FSDP", launcher)
    assert fsdp_was_asked_for(option) == expected


def test_a_model_that_zero_3_could_not_shard_is_told_with_its_size(monkeypatch, caplog):
    model = nn.Linear(2**14, 2**14, bias=False, device="meta")
    check_sharding(model, 8)
    assert not caplog.text
    monkeypatch.setattr("grpo_trl.launch.is_deepspeed_zero3_enabled", lambda: True)
    check_sharding(model, 8)
    assert "each of the 8 ranks holds all 1.00 GiB" in caplog.text
    caplog.clear()
    model.weight.ds_id = 0
    check_sharding(model, 8)
    assert not caplog.text
