"""Compiling and caching C++ kernels."""

import ctypes
import logging
import shutil

import pytest
import torch

from grpo_trl import cpu_kernels
from grpo_trl.cpu_kernels import FLOAT, POINTER, SIZE, library


SOURCE = """
#include "vectors.h"

extern "C" void add(const float *x, float *to, float y, long count) {
    for (long i = 0; i < count; i++) to[i] = x[i] + y;
}
"""
SIGNATURES = {"add": [POINTER, POINTER, FLOAT, SIZE]}


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "adding.cpp"
    path.write_text(SOURCE)
    yield path
    cpu_kernels._load.cache_clear()


@pytest.fixture
def commands(monkeypatch):
    """The commands that compile."""
    commands, run = [], cpu_kernels.subprocess.run

    def note(command, **options):
        if "-c" in command:
            commands.append(command)
        return run(command, **options)

    monkeypatch.setattr(cpu_kernels.subprocess, "run", note)
    return commands


def load_again(source):
    cpu_kernels._load.cache_clear()
    return library(source, SIGNATURES)


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@needs_compiler
def test_a_kernel_computes_with_the_memory_that_it_is_given(source):
    numbers, sums = (ctypes.c_float * 3)(1, 2, 3), (ctypes.c_float * 3)()
    library(source, SIGNATURES).add(numbers, sums, 0.5, 2)
    assert list(sums) == [1.5, 2.5, 0.0]


@needs_compiler
def test_kernels_run_on_the_threads_of_torch(source, monkeypatch):
    source.write_text(
        """
extern "C" void threads(long *count) {
#pragma omp parallel
#pragma omp atomic
    *count += 1;
}
"""
    )
    before, count = torch.get_num_threads(), ctypes.c_long(0)
    try:
        torch.set_num_threads(3)
        library(source, {"threads": [POINTER]}).threads(ctypes.addressof(count))
    finally:
        torch.set_num_threads(before)
    assert count.value == 3


@needs_compiler
def test_kernels_are_compiled_once_for_all_processes(source, commands):
    assert load_again(source) is not None
    assert load_again(source) is not None
    assert len(commands) == 1


@needs_compiler
def test_another_source_other_flags_or_another_processor_give_another_file(source, monkeypatch, tmp_path):
    load_again(source)
    monkeypatch.setattr(cpu_kernels, "FLAGS", ("-O1", *cpu_kernels.FLAGS[1:]))
    load_again(source)
    monkeypatch.setattr(cpu_kernels.torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    load_again(source)
    source.write_text(SOURCE + "// changed")
    assert load_again(source) is not None
    assert len(list((tmp_path / "cache" / "grpo_trl").iterdir())) == 4


@needs_compiler
def test_a_cache_that_cannot_be_loaded_from_is_left_alone(source, tmp_path, monkeypatch):
    loaded, load = [], ctypes.CDLL

    def mounted_noexec(path):
        loaded.append(path)
        if path.startswith(str(tmp_path / "cache")):
            raise OSError("failed to map segment from shared object")
        return load(path)

    monkeypatch.setattr(ctypes, "CDLL", mounted_noexec)
    assert load_again(source) is not None
    assert len(loaded) == 2


@needs_compiler
def test_without_a_home_kernels_are_compiled_in_every_process(source, commands, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(cpu_kernels.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert load_again(source) is not None
    assert load_again(source) is not None
    assert len(commands) == 2


@needs_compiler
def test_a_cache_that_is_no_folder_is_left_alone(source, commands, tmp_path):
    (tmp_path / "cache").write_text("")
    assert load_again(source) is not None
    assert load_again(source) is not None
    assert len(commands) == 2


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_a_compiler_that_is_missing_or_fails_is_warned_of_once(source, monkeypatch, caplog, compiler):
    monkeypatch.setattr(cpu_kernels, "COMPILER", compiler)
    with caplog.at_level(logging.WARNING):
        assert load_again(source) is None
        assert library(source, SIGNATURES) is None
    (line,) = caplog.messages
    assert line.startswith("adding.cpp falls back to PyTorch's operations, which are slower: it does not compile (")
