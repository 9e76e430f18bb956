"""A ready reward function that runs the completion's program against tests (the processes are in `sandbox.py`)."""

import contextlib
import functools
import marshal
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from .format import last_block, text_of


_STARTING = 10.0
"""Seconds that the processes can take beyond the program's own time."""
_PYTHON = ("python", "python3", "py", "")


@dataclass(frozen=True)
class _PythonTests:
    timeout: float
    memory_limit: int
    num_workers: int
    __name__ = "python_tests"

    def __call__(self, completions: list[Any], tests: list[Any], **kwargs: Any) -> list[float | None]:
        _check_that_programs_run(self.memory_limit)
        pairs = list(zip(completions, tests, strict=True))
        with ThreadPoolExecutor(self.num_workers) as threads:
            return list(threads.map(self._reward, pairs))

    def _reward(self, pair: tuple[Any, Any]) -> float | None:
        completion, tests = pair
        tests = [tests] if isinstance(tests, str) else list(tests or [])
        if not tests:
            return None
        if not all(isinstance(test, str) for test in tests):
            raise ValueError(
                f"The column tests has {tests!r}; it must have Python code, e.g. ['assert double(2) == 4']."
            )
        passed, _ = _run(_program(text_of(completion)), tests, self.timeout, self.memory_limit)
        return sum(passed) / len(tests)


def python_tests(timeout: float = 5.0, memory_limit: int = 512 * 1024**2, num_workers: int = 4) -> Any:
    """Make a reward function: the share of the tests in the column `tests` that the completion's program passes.

    The program is the completion's last ```python block, or the whole text if there is none; the column contains code, such
    as assert statements, or a list of it. Each test runs in a fresh interpreter, after the program, with the program's
    names, and passes if it runs to its end: a program that ends the interpreter passes nothing. A program has the standard
    library, an empty folder, at most 8 processes and threads, and no input, output or environment. On Linux, if namespaces
    are permitted (root, or user namespaces), it also has no other files, no network and no other processes; if they are
    not, a warning says so.

    This is not a virtual machine. A program can shadow what a test calls (`def abs(x): return 0`), return objects that are
    equal to everything, or search its interpreter's memory for the protocol, and the kernel is the machine's own. Against
    determined adversaries, train in a container. Without namespaces it can also read what its user can read (as root: what
    everybody can), use the network, and signal the processes of its user.

    Args:
        timeout: Seconds for the program with all its tests. Each test may take an even share of the time left.
        memory_limit: Bytes that each of the program's processes can map.
        num_workers: How many programs run at the same time.

    Raises:
        ValueError: An option is not positive. At a call: a test is not a string.
        RuntimeError: The system has no limits for processes (Windows). At a call: it runs no programs at all.

    >>> program = "```python\\ndef double(x):\\n    return x + 2\\n```"
    >>> python_tests()(completions=[program], tests=[["assert double(2) == 4", "assert double(3) == 6"]])
    [0.5]
    """
    for name, value, example in (
        ("timeout", timeout, "5.0 (seconds)"),
        ("memory_limit", memory_limit, "512 * 1024**2 (bytes)"),
        ("num_workers", num_workers, "4"),
    ):
        if not value > 0:
            raise ValueError(f"{name}={value} must be positive, e.g. {example}.")
    if os.name != "posix":
        raise RuntimeError("python_tests needs the process limits of Linux or macOS; run it in WSL or in a container.")
    return _PythonTests(timeout, memory_limit, num_workers)


def _program(text: str) -> str:
    block = last_block(text, _PYTHON)
    return text if block is None else block


@functools.lru_cache
def _check_that_programs_run(memory_limit: int) -> None:
    """Check once per process that programs run: a broken installation must not look like wrong programs."""
    passed, isolated = _run("x = 1", ["assert x == 1"], 30.0, memory_limit)
    if passed != [True]:
        raise RuntimeError(
            f"python_tests cannot run {os.path.realpath(sys.executable)} with memory_limit={memory_limit}: raise the limit "
            "(512 * 1024**2 is enough), and let every user execute this Python."
        )
    if sys.platform == "linux" and not isolated:
        warnings.warn(
            "python_tests may not use namespaces here: programs see this machine's files, network and processes. Run as "
            "root with CAP_SYS_ADMIN, permit user namespaces, or train in a container.",
            stacklevel=2,
        )


def _run(program: str, tests: Sequence[str], timeout: float, memory_limit: int) -> tuple[list[bool], bool]:
    """Return which tests pass, and whether the program was isolated."""
    with tempfile.TemporaryDirectory(prefix="grpo_trl-", ignore_cleanup_errors=True) as folder:
        request = {"program": program, "tests": list(tests), "timeout": timeout, "memory_limit": memory_limit}
        launcher = subprocess.Popen(
            [os.path.realpath(sys.executable), "-I", "-S", str(Path(__file__).with_name("sandbox.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env={},
            start_new_session=True,
        )
        reply = b""
        try:
            assert launcher.stdin is not None
            launcher.stdin.write(marshal.dumps(request | {"folder": folder}))
            launcher.stdin.flush()
            reply = _reply(launcher, 2 * timeout + _STARTING)
        except BrokenPipeError:  # it could not even start
            pass
        finally:
            _kill(launcher, isolated=reply[:1] == b"\x01")
    passed = [value == 1 for value in reply[1:]]
    return (passed if len(passed) == len(tests) else [False] * len(tests)), reply[:1] == b"\x01"


def _reply(launcher: "subprocess.Popen[bytes]", seconds: float) -> bytes:
    """Read what the supervisor writes until it ends; empty if it takes too long."""
    assert launcher.stdout is not None
    reply, end = b"", time.monotonic() + seconds
    connection = Connection(os.dup(launcher.stdout.fileno()), writable=False)
    with connection:
        while connection.poll(max(0.0, end - time.monotonic())):
            if not (data := os.read(connection.fileno(), 65536)):
                return reply
            reply += data
    return b""


def _kill(launcher: "subprocess.Popen[bytes]", isolated: bool) -> None:
    """End the launcher and all that descends from it. In a namespace, it has ended with the supervisor."""
    import psutil

    assert launcher.stdin is not None

    end = time.monotonic() + _STARTING
    with contextlib.suppress(psutil.NoSuchProcess):
        while not isolated and time.monotonic() < end:
            descendants = psutil.Process(launcher.pid).children(recursive=True)
            alive = [process for process in descendants if process.status() != psutil.STATUS_ZOMBIE]
            for process in alive:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            if not alive:
                break
    with launcher:
        with contextlib.suppress(BrokenPipeError):
            launcher.stdin.close()
        try:
            launcher.wait(_STARTING)
        except subprocess.TimeoutExpired:
            os.killpg(launcher.pid, signal.SIGKILL)
