import re
import sys

import pytest

from grpo_trl.launch import check_launch


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
