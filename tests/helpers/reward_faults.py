"""Reward functions that go wrong on some completions. Workers import this module, which therefore imports little."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def score(text: str) -> float:
    return float(len(text))


def lengths(completions):
    return [score(text) for text in completions]


def throw(text):
    raise KeyError(f"no {text}")


def hang(text):
    while True:
        time.sleep(60)


def leave(text):
    sys.exit(3)


def vanish(text):
    os._exit(3)


def segfault(text):
    os.kill(os.getpid(), signal.SIGSEGV)


def devour(text):
    hoard = []
    while True:
        hoard.append(bytearray(16 * 1024**2))


def allocated(size):
    return len(bytearray(size))


def fork_and_vanish(text):
    """A child holds the connection open while the worker is gone."""
    if os.fork() == 0:
        time.sleep(60)
    os._exit(3)


def shut_the_connection(text):
    os.closerange(3, 256)
    time.sleep(60)


def unpicklable(text):
    return lambda: text


FAULTS = {
    function.__name__: function
    for function in (
        throw,
        hang,
        leave,
        vanish,
        segfault,
        devour,
        fork_and_vanish,
        shut_the_connection,
        unpicklable,
    )
}
BAD_VALUES = {"nan": float("nan"), "inf": float("inf"), "string": "1.0", "list": [1.0], "huge": 10**400, "complex": 1j}


def faulty(completions, fault):
    """Lengths, but for the completions that hold an "x", on which `fault` happens."""
    return [FAULTS[fault](text) if "x" in text else score(text) for text in completions]


def bad_value(completions, kind):
    return [BAD_VALUES[kind] if "x" in text else score(text) for text in completions]


def wrong_count(completions, change):
    """Lengths, `change` values more or fewer where a completion holds an "x"."""
    values = lengths(completions)
    if any("x" in text for text in completions):
        return values[:change] if change < 0 else values + [0.0] * change
    return values


def wrong_type(completions):
    return 1.0 if any("x" in text for text in completions) else lengths(completions)


def only_alone(completions):
    if len(completions) > 1:
        raise ValueError("one at a time")
    return lengths(completions)


def counted(completions, folder):
    """Writes a file for each call, named by what it was called on."""
    Path(folder, f"{time.time_ns()}-{os.getpid()}").write_text("\n".join(completions))
    return faulty(completions, "throw")


def fails_first(completions, folder):
    """Fails the first `x` in each folder, then works."""
    mark = Path(folder, "called")
    if not mark.exists():
        mark.touch()
        raise OSError("not yet")
    return lengths(completions)


def process(completions):
    return [float(os.getpid())] * len(completions)


def process_or_hang(completions):
    return faulty(completions, "hang") and process(completions)


def process_or_devour(completions):
    return faulty(completions, "devour") and process(completions)


def noted(completions, log_extra, log_metric):
    log_extra("seen", [text.upper() for text in completions])
    log_metric("calls", len(completions))
    return faulty(completions, "throw")


def noted_too_few(completions, log_extra):
    log_extra("seen", completions[1:])
    return lengths(completions)


def with_state(completions, trainer_state):
    return [float(len(trainer_state.log_history) + trainer_state.global_step)] * len(completions)


def with_kwargs(completions, **kwargs):
    state = kwargs["trainer_state"]
    assert not hasattr(state, "log_history")
    return [float(state.global_step + len(kwargs["answer"]))] * len(completions)


def matches(completions, answer):
    return [float(text == right) for text, right in zip(completions, answer, strict=True)]


class Scaled:
    """An instance with state."""

    def __init__(self, scale):
        self.scale = scale
        self.calls = 0

    def __call__(self, completions):
        self.calls += 1
        return [self.scale * score(text) for text in completions]

    def method(self, completions):
        return self(completions)


class NotLoadable:
    """Pickles, but raises where it is unpickled in another process."""

    def __init__(self):
        self.home = os.getpid()

    def __reduce__(self):
        return load_only_in, (self.home,)

    def __call__(self, completions):
        return lengths(completions)


def load_only_in(home):
    if os.getpid() != home:
        raise ImportError("no such module here")
    return NotLoadable()


def start_sleeper():
    return subprocess.Popen(["sleep", "60"]).pid


def loaded_modules():
    return set(sys.modules)


def meets(completions, folder, own):
    """Returns when both `a` and `b` are being called."""
    Path(folder, own).touch()
    while not (Path(folder, "a").exists() and Path(folder, "b").exists()):
        time.sleep(0.01)
    return lengths(completions)


def noted_slowly(completions, log_metric):
    """The call on the shortest completion takes longest."""
    log_metric("first", len(completions[0]))
    time.sleep(0.5 if len(completions[0]) == 1 else 0)
    return lengths(completions)
