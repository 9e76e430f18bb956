"""Settings of the process that a reward function may change, restored when its call ends.

A worker imports this module, which therefore imports neither torch nor numpy: a library that is not loaded has no settings.
"""

import contextlib
import decimal
import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any


Setting = tuple[Callable[[], Any], Callable[[Any], Any]]
"""Reads a setting; sets it to what was read."""
TIMER_TOLERANCE = 0.01
"""Seconds by which two readings of one timer may differ."""


@contextlib.contextmanager
def isolated() -> Iterator[None]:
    """Restore the settings of the process, of Python, and of torch and numpy that change what others compute or show.

    Variables of `os.environ` get their values back; new ones stay, since libraries set them once, when they are first used.
    Signals are restored in the main thread only, which alone may set them. Random states: see `grpo_trl.seeds`.
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
    settings: list[Setting] = [
        (_working_directory, _change_directory),
        (os.environ.copy, _reset_variables),
        *_python_settings(),
    ]
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


def _reset_variables(variables: dict[str, str]) -> None:
    for name, value in variables.items():
        if os.environ.get(name) != value:
            os.environ[name] = value


# ---- Python ----
def _python_settings() -> list[Setting]:
    root = logging.root
    return [
        (partial(getattr, sys, name), partial(setattr, sys, name)) for name in ("stdout", "stderr", "excepthook")
    ] + [
        (lambda: list(warnings.filters), _set_filters),
        (lambda: root.manager.disable, logging.disable),
        (lambda: root.level, root.setLevel),
        (_decimal_context, _set_decimal_context),
    ]


def _decimal_context() -> tuple[dict[str, Any], dict[Any, bool]]:
    context = decimal.getcontext()
    names = ("prec", "rounding", "Emin", "Emax", "capitals", "clamp")
    return {name: getattr(context, name) for name in names}, dict(context.traps)


def _set_decimal_context(values: tuple[dict[str, Any], dict[Any, bool]]) -> None:
    """In place: coroutines share the object with who called them."""
    options, traps = values
    context = decimal.getcontext()
    for name, value in options.items():
        setattr(context, name, value)
    context.traps.update(traps)


def _set_filters(filters: list[Any]) -> None:
    warnings.resetwarnings()  # and forget what was shown under others
    warnings.filters[:] = filters  # type: ignore[index]  # a list


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
    for kind in ("cpu", "cuda"):
        settings += [
            (partial(torch.is_autocast_enabled, kind), partial(torch.set_autocast_enabled, kind)),
            (partial(torch.get_autocast_dtype, kind), partial(torch.set_autocast_dtype, kind)),
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
