"""A process that calls functions for the trainer and can be killed at any time.

Run as a script, this file is the process. It imports neither the package nor torch, so that it is small and starts at once;
what a function needs is imported when the function is loaded.
"""

import atexit
import contextlib
import ctypes
import functools
import math
import os
import pickle
import resource
import signal
import socket
import subprocess
import sys
import time
import traceback
import weakref
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


GIB = 1024**3
LOADING_SECONDS = 300.0
"""Limit for starting the process and importing what a function needs, which does not count as its own time."""
POLL_SECONDS = 0.5
"""Between checks that a process is alive: its forks may hold its connection open."""
PENDING = object()


class WorkerError(RuntimeError):
    """A call in a worker failed; `traceback` is what the worker printed of it, empty where the worker itself ended."""

    worker_is_usable = False
    """Whether the worker can take another call; otherwise it must be killed."""

    def __init__(self, message: str, traceback: str = ""):
        super().__init__(message)
        self.traceback = traceback


class CallRaised(WorkerError):
    """The function raised, or returned what cannot be pickled."""

    worker_is_usable = True


class OutOfMemory(CallRaised):
    """The function exceeded the memory limit; the process may still hold that memory."""

    worker_is_usable = False


class CallNotLoaded(WorkerError):
    """The function or its arguments could not be unpickled in the process: nothing was called."""

    worker_is_usable = True


class CallTimedOut(WorkerError):
    """There was no reply in time."""


class WorkerDied(WorkerError):
    """The process ended during a call."""


RAISED_BY_KIND = {"raised": CallRaised, "not loaded": CallNotLoaded, "out of memory": OutOfMemory}


class Worker:
    """One process, started at the first call, in its own session, so that what a function starts ends with it.

    On Linux the process also ends with the thread that started it.

    Args:
        memory_limit: Bytes of data that the process may hold; None for no limit. A function that asks for more sees
            `MemoryError`. Enforced on Linux.
    """

    def __init__(self, memory_limit: int | None = None):
        self.memory_limit = memory_limit
        self.connection: Connection | None = None
        self.deadline = math.inf
        """Time limit of the running call, in `time.monotonic`."""
        self._timeout: float | None = None
        self._allowed = math.inf
        self._is_busy = False
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = os.getpid()
        _STARTED.add(self)

    def call(self, call: bytes, timeout: float | None) -> Any:
        """Send a call (see `packed_call`) and wait for its reply, at most `timeout` seconds from when it is loaded.

        Raises:
            WorkerError: The call failed, see its kinds. A worker that is not usable is killed.
        """
        try:
            self.send(call, timeout)
            while (value := self.receive()) is PENDING:
                pass
            return value
        except BaseException as error:  # also what a signal handler raises: otherwise the call keeps running
            if not (isinstance(error, WorkerError) and error.worker_is_usable):
                self.kill()
            raise

    def send(self, call: bytes, timeout: float | None) -> None:
        """Start a call without waiting for it; see `has_news`."""
        if self._is_busy or not self._is_alive():
            self._start()  # also if a call was abandoned in it, whose reply would be taken for this one's
        assert self.connection is not None
        self._is_busy = True
        self._timeout = timeout
        self._allow(LOADING_SECONDS)
        self._tell(call)

    def has_news(self) -> bool:
        """Return whether `receive` would return, or raise, at once."""
        assert self.connection is not None
        return self.connection.poll() or time.monotonic() >= self.deadline or not self._is_alive()

    def receive(self) -> Any:
        """Return the result of the call, or `PENDING` if it has only been loaded; its time starts then.

        Raises:
            WorkerError: The call failed, see its kinds. The worker is left as it is: see `worker_is_usable`.
        """
        assert self.connection is not None
        try:
            while not self.connection.poll(min(POLL_SECONDS, max(0.0, self.deadline - time.monotonic()))):
                if not self._is_alive() and not self.connection.poll():
                    raise EOFError
                if time.monotonic() >= self.deadline:
                    raise CallTimedOut(f"no reply after {self._allowed:.4g} seconds")
            message = self.connection.recv_bytes()
        except (EOFError, OSError) as error:
            raise WorkerDied(f"the worker process {self._ending()}") from error
        try:
            kind, value = pickle.loads(message)
        except Exception as error:
            raise CallRaised(f"what it returned cannot be read: {error}") from error
        if kind == "loaded":
            self._allow(math.inf if self._timeout is None else self._timeout)
            return PENDING
        self._is_busy = False
        if kind == "returned":
            return value
        raise RAISED_BY_KIND[kind](*value)

    def kill(self) -> None:
        """End the process and all that it has started; the next call starts another."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):  # one that hangs in the kernel is left
                self._process.wait(timeout=5)
            self._process = None
        if self.connection is not None:
            self.connection.close()
            self.connection = None

    def _start(self) -> None:
        self.kill()
        own, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno()), str(os.getpid()), str(self.memory_limit or 0)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env={"OMP_NUM_THREADS": "1"} | os.environ,
            )
        self.connection = Connection(own.detach())
        self._tell(pickle.dumps([os.getcwd(), *sys.path]))

    def _tell(self, message: bytes) -> None:
        assert self.connection is not None
        with contextlib.suppress(OSError):  # a process that has ended is found when its reply is read
            self.connection.send_bytes(message)

    def _allow(self, seconds: float) -> None:
        self._allowed = seconds
        self.deadline = time.monotonic() + seconds

    def _is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def _ending(self) -> str:
        assert self._process is not None
        try:
            code = self._process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            return "closed its connection"
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"


_STARTED: "weakref.WeakSet[Worker]" = weakref.WeakSet()


@atexit.register
def _kill_all() -> None:
    for worker in list(_STARTED):
        if worker._owner == os.getpid():  # not what a fork of the trainer has inherited
            worker.kill()


def packed_function(function: Callable[..., Any]) -> bytes:
    """Pickle a function; one of the running script by value, so that no worker runs the script.

    Raises:
        Exception: What pickle raises for a closure, a lambda, and whatever else cannot be sent.
    """
    by_name = pickle.dumps(function)
    if b"__main__" not in by_name:
        return by_name
    import dill

    return bytes(dill.dumps(function, recurse=True))


def packed_call(function: Callable[..., Any] | bytes, *args: Any, **kwargs: Any) -> bytes:
    """Pickle a call; `function` may be packed already.

    Raises:
        Exception: What pickle raises for a function or an argument that cannot be sent.
    """
    packed = function if isinstance(function, bytes) else packed_function(function)
    return pickle.dumps((packed, pickle.dumps((args, kwargs))))


# ---- The process ----
_loaded = functools.lru_cache(maxsize=32)(pickle.loads)


def _serve(connection: Connection) -> None:
    sys.path[:] = pickle.loads(connection.recv_bytes())
    os.chdir(sys.path.pop(0))
    while True:
        try:
            call = connection.recv_bytes()
        except EOFError:
            return
        connection.send_bytes(_reply(call, connection))


def _reply(call: bytes, connection: Connection) -> bytes:
    """Make a call and return its end as `Worker.receive` reads it; report when its function is loaded."""
    kind = "not loaded"
    try:
        packed, arguments = pickle.loads(call)
        function = _loaded(packed)
        args, kwargs = pickle.loads(arguments)
        kind = "raised"
        connection.send_bytes(pickle.dumps(("loaded", None)))
        return pickle.dumps(("returned", function(*args, **kwargs)))
    except BaseException as error:  # SystemExit among them
        kind = "out of memory" if isinstance(error, MemoryError) else kind
        message = f"{type(error).__name__}: {error}".rstrip(": ")
        return pickle.dumps((kind, (message, traceback.format_exc())))


def _end_with(parent: int) -> None:
    """Have this process killed when the trainer ends, however it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


if __name__ == "__main__":
    fd, trainer, limit = map(int, sys.argv[1:])
    _end_with(trainer)
    if limit:
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.set_inheritable(fd, False)
    _serve(Connection(fd))
