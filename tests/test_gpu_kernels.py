import logging

import pytest
import torch

from grpo_trl import gpu_kernels
from grpo_trl.gpu_kernels import triton_works


@pytest.fixture(autouse=True)
def unknown():
    triton_works.cache_clear()
    yield
    triton_works.cache_clear()


def test_kernels_are_for_gpus_and_not_for_float64(monkeypatch):
    monkeypatch.setattr(gpu_kernels, "triton", object())
    monkeypatch.setattr(gpu_kernels, "compile_probe", lambda: None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert triton_works("cuda", torch.bfloat16)
    assert not triton_works("cuda", torch.float64)
    assert not triton_works("cpu", torch.float32)


def test_a_compiler_that_is_missing_is_said_once(monkeypatch, caplog):
    def fail():
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(gpu_kernels, "triton", object())
    monkeypatch.setattr(gpu_kernels, "compile_probe", fail)
    with caplog.at_level(logging.WARNING):
        assert not triton_works("cuda", torch.float32)
        assert not triton_works("cuda", torch.float32)
    assert [message for message in caplog.messages if "Failed to find C compiler" in message] == caplog.messages
    assert len(caplog.messages) == 1


def test_memory_that_runs_out_is_no_missing_compiler(monkeypatch):
    def fail():
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gpu_kernels, "triton", object())
    monkeypatch.setattr(gpu_kernels, "compile_probe", fail)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        triton_works("cuda", torch.float32)
