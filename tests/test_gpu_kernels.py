import logging

import pytest
import torch

from grpo_trl import gpu_kernels
from grpo_trl.gpu_kernels import triton_works


@pytest.fixture(autouse=True)
def unknown():
    cached = triton_works, gpu_kernels._compiles
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


def test_kernels_are_for_gpus_and_not_for_float64(monkeypatch):
    monkeypatch.setattr(gpu_kernels, "triton", object())
    monkeypatch.setattr(gpu_kernels, "compile_probe", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert triton_works("cuda", torch.bfloat16)
    assert not triton_works("cuda", torch.float64)
    assert not triton_works("cpu", torch.float32)


def test_the_interpreter_serves_a_cpu(monkeypatch):
    monkeypatch.setattr(gpu_kernels, "triton", object())
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton_works("cpu", torch.float32)
    assert not triton_works("cpu", torch.float64)


def test_bfloat16_that_torch_imitates_is_left_to_torch(monkeypatch):
    monkeypatch.setattr(gpu_kernels, "compile_probe", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert not triton_works("cuda", torch.bfloat16)
    assert triton_works("cuda", torch.float16)


def test_triton_that_is_missing_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(gpu_kernels, "triton", None)
    with caplog.at_level(logging.WARNING):
        assert not triton_works("cuda", torch.float32)
        assert not triton_works("cuda", torch.float16)
    (line,) = caplog.messages
    assert "not installed" in line


def test_a_compiler_that_is_missing_is_said_once(monkeypatch, caplog):
    def fail():
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(gpu_kernels, "triton", object())
    monkeypatch.setattr(gpu_kernels, "compile_probe", fail)
    with caplog.at_level(logging.WARNING):
        assert not triton_works("cuda", torch.float32)
        assert not triton_works("cuda", torch.float16)
    (line,) = caplog.messages
    assert "Failed to find C compiler" in line


def test_memory_that_runs_out_is_no_missing_compiler(monkeypatch):
    def fail():
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gpu_kernels, "triton", object())
    monkeypatch.setattr(gpu_kernels, "compile_probe", fail)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        triton_works("cuda", torch.float32)
