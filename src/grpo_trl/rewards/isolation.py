"""Settings of the process that a reward function may change, restored when its call ends.

A worker imports this module, which therefore imports neither torch nor numpy: a library that is not loaded has no settings.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any


Setting = tuple[Callable[[], Any], Callable[[Any], Any]]
"""Reads a setting; sets it to what was read."""
TIMER_TOLERANCE = 0.01
"""Seconds by which two readings of one timer may differ."""


@contextlib.contextmanager
def isolated() -> Iterator[None]:
    """Restore the working directory, the signal handlers and timer, and the global settings of torch and numpy.

    `os.environ` is left as it is: libraries set variables once, when they are first used. Signals are restored in the main
    thread only, which alone may set them. Random states: see `grpo_trl.seeds`.
    """
    settings = _settings()
    before = [read() for read, _ in settings]
    try:
        yield
    finally:
        for (read, restore), value in zip(settings, before, strict=True):
            if read() != value:
                restore(value)


def _settings() -> list[Setting]:
    settings: list[Setting] = [(_working_directory, _change_directory)]
    if threading.current_thread() is threading.main_thread():
        settings += [(_timer, _set_timer), (_handlers, _set_handlers), (_blocked_signals, _block_signals)]
    if numpy := sys.modules.get("numpy"):
        settings.append((numpy.geterr, lambda modes: numpy.seterr(**modes)))
    if torch := sys.modules.get("torch"):
        settings += _torch_settings(torch)
    return settings


# ---- Process ----
def _working_directory() -> str | None:
    try:
        return os.getcwd()
    except FileNotFoundError:  # it was removed
        return None


def _change_directory(path: str | None) -> None:
    if path is not None:
        with contextlib.suppress(OSError):
            os.chdir(path)


def _handlers() -> dict[int, Any]:
    return {number: signal.getsignal(number) for number in signal.valid_signals()}


def _set_handlers(handlers: dict[int, Any]) -> None:
    for number, handler in handlers.items():
        if handler is not None and signal.getsignal(number) is not handler:  # None: set by a library in C
            signal.signal(number, handler)


def _blocked_signals() -> set[int]:
    return set(signal.pthread_sigmask(signal.SIG_BLOCK, []))


def _block_signals(numbers: set[int]) -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, numbers)


def _timer() -> tuple[float, float] | None:
    """When SIGALRM comes next, and the interval after that; None where no timer runs."""
    left, interval = signal.getitimer(signal.ITIMER_REAL)
    return (time.monotonic() + left, interval) if left else None


def _set_timer(timer: tuple[float, float] | None) -> None:
    if timer is None:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        return
    now = _timer()
    end, interval = timer
    fired = interval > 0 and now is not None and now[1] == interval  # and has set its next end itself
    if not fired and (now is None or abs(now[0] - end) > TIMER_TOLERANCE):
        signal.setitimer(signal.ITIMER_REAL, max(1e-3, end - time.monotonic()), interval)


# ---- Libraries ----
def _torch_settings(torch: Any) -> list[Setting]:
    """Of the thread: grad mode, autocast. Of the process: all others."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    settings: list[Setting] = [
        (torch.is_grad_enabled, torch.set_grad_enabled),
        (torch.is_anomaly_enabled, torch.set_anomaly_enabled),
        (torch.get_default_dtype, torch.set_default_dtype),
        (torch.get_default_device, lambda device: torch.set_default_device(None if device.type == "cpu" else device)),
        (torch.get_num_threads, torch.set_num_threads),
        (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
        (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    ]
    settings += [
        (partial(torch.is_autocast_enabled, kind), partial(torch.set_autocast_enabled, kind))
        for kind in ("cpu", "cuda")
    ]
    settings += [
        (partial(getattr, place, name), partial(setattr, place, name))
        for place, name in (
            (matmul, "allow_tf32"),
            (cudnn, "allow_tf32"),
            (cudnn, "benchmark"),
            (cudnn, "deterministic"),
            (cudnn, "enabled"),
        )
    ]
    cuda = torch.backends.cuda
    settings += [
        (getattr(cuda, f"{kernel}_sdp_enabled"), getattr(cuda, f"enable_{kernel}_sdp"))
        for kernel in ("flash", "mem_efficient", "math", "cudnn")
    ]
    if torch.cuda.is_initialized():
        settings.append((torch.cuda.current_device, torch.cuda.set_device))
    return settings
