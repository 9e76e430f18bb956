import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from grpo_trl.rewards import worker as module
from grpo_trl.rewards.worker import (
    PENDING,
    CallNotLoaded,
    CallRaised,
    CallTimedOut,
    OutOfMemory,
    Worker,
    WorkerDied,
    WorkerError,
    packed_call,
    packed_function,
)

from ..helpers import reward_faults as faults


MEMORY = 256 * 1024**2


@pytest.fixture
def worker():
    worker = Worker(MEMORY)
    yield worker
    worker.kill()


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until(condition, seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not condition():
        time.sleep(0.01)
    return condition()


def pid_of(worker: Worker) -> int:
    return worker.call(packed_call(os.getpid), 20)


def test_a_call_is_made_in_another_process_which_stays(worker):
    assert worker.call(packed_call(divmod, 17, 5), 20) == (3, 2)
    assert worker.call(packed_call(sorted, [1, 2, 3], reverse=True), None) == [3, 2, 1]
    assert pid_of(worker) == pid_of(worker) != os.getpid()


def test_no_process_is_started_before_the_first_call(worker):
    assert worker.connection is None


def test_what_a_function_raises_comes_back_with_its_traceback(worker):
    with pytest.raises(CallRaised, match=r"KeyError: 'no 5'") as raised:
        worker.call(packed_call(faults.throw, 5), 20)
    assert 'raise KeyError(f"no {text}")' in raised.value.traceback
    assert raised.value.worker_is_usable


def test_an_exception_leaves_the_process_running(worker):
    before = pid_of(worker)
    for fault in ("throw", "leave"):
        with pytest.raises(CallRaised):
            worker.call(packed_call(faults.FAULTS[fault], 5), 20)
    with pytest.raises(CallRaised, match="pickle"):
        worker.call(packed_call(faults.unpicklable, 5), 20)
    assert pid_of(worker) == before


@pytest.mark.parametrize(
    "fault, error, message",
    [
        ("hang", CallTimedOut, "no reply after 0.3 seconds"),
        ("vanish", WorkerDied, "exited with code 3"),
        ("segfault", WorkerDied, "ended by SIGSEGV"),
        ("shut_the_connection", WorkerDied, "closed its connection"),
        ("fork_and_vanish", WorkerDied, "exited with code 3"),
    ],
)
def test_a_call_that_takes_its_process_along_is_told_and_the_next_gets_another(worker, fault, error, message):
    before = pid_of(worker)
    # Time runs out for a function that hangs only; the others must be found to have ended without it.
    timeout = 0.3 if error is CallTimedOut else None
    with pytest.raises(error, match=message) as raised:
        worker.call(packed_call(faults.FAULTS[fault], "x"), timeout)
    assert not raised.value.worker_is_usable
    assert wait_until(lambda: not is_running(before))
    assert pid_of(worker) != before


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is enforced on Linux")
def test_memory_without_end_is_refused_and_the_process_replaced(worker):
    before = pid_of(worker)
    with pytest.raises(OutOfMemory, match="MemoryError"):
        worker.call(packed_call(faults.devour, "x"), 60)
    assert pid_of(worker) != before


def test_without_a_limit_memory_is_there():
    worker = Worker()
    assert worker.call(packed_call(faults.allocated, MEMORY), 60) == MEMORY
    worker.kill()


def test_a_process_that_cannot_even_start_is_told(worker, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(WorkerDied, match="exited with code 1"):
        worker.call(packed_call(bytes, 10_000_000), 20)


def test_importing_what_a_function_needs_does_not_count_as_its_time(worker, tmp_path, monkeypatch):
    (tmp_path / "slow_to_import.py").write_text("import time\ntime.sleep(1)\ndef call():\n    return 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    import slow_to_import

    assert worker.call(packed_call(slow_to_import.call), 0.5) == 3


def test_a_function_that_never_loads_times_out(worker, tmp_path, monkeypatch):
    (tmp_path / "never_imported.py").write_text(
        "import os, time\nif os.environ.get('HANG'):\n    time.sleep(60)\ndef call():\n    return 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import never_imported

    monkeypatch.setenv("HANG", "1")
    monkeypatch.setattr(module, "LOADING_SECONDS", 0.5)
    with pytest.raises(CallTimedOut, match=r"no reply after 0\.5 seconds"):
        worker.call(packed_call(never_imported.call), 60)


def test_what_cannot_be_loaded_is_told_apart_from_what_raises(worker):
    with pytest.raises(CallNotLoaded, match="no such module here"):
        worker.call(packed_call(faults.NotLoadable(), []), 20)
    with pytest.raises(CallNotLoaded, match="no such module here"):
        worker.call(packed_call(len, [faults.NotLoadable()]), 20)
    assert worker.call(packed_call(len, [1]), 20) == 1


def test_news_come_in_two_parts(worker):
    worker.send(packed_call(time.sleep, 0.5), 20)
    assert wait_until(worker.has_news)
    assert worker.receive() is PENDING
    assert not worker.has_news()
    assert wait_until(worker.has_news)
    assert worker.receive() is None


def test_a_late_call_is_news(worker):
    pid_of(worker)
    worker.send(packed_call(time.sleep, 60), 0.1)
    assert wait_until(worker.has_news)
    assert worker.receive() is PENDING
    assert wait_until(worker.has_news, 5)
    with pytest.raises(CallTimedOut):
        worker.receive()


def test_what_a_signal_handler_raises_in_the_middle_leaves_no_stale_answer(worker):
    class Stop(BaseException):
        pass

    def stop(*_):
        raise Stop

    previous = signal.signal(signal.SIGALRM, stop)
    try:
        pid_of(worker)
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(Stop):
            worker.call(packed_call(time.sleep, 60), None)
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert worker.call(packed_call(divmod, 7, 2), 20) == (3, 1)


def test_a_call_that_was_abandoned_does_not_answer_the_next(worker):
    worker.send(packed_call(divmod, 17, 5), None)
    assert worker.call(packed_call(divmod, 7, 2), 20) == (3, 1)


def test_a_process_that_was_killed_between_calls_is_replaced(worker):
    os.kill(pid_of(worker), signal.SIGKILL)
    time.sleep(0.2)
    assert worker.call(packed_call(divmod, 7, 2), 20) == (3, 1)


def test_killing_ends_what_a_function_has_started(worker):
    pid = worker.call(packed_call(faults.start_sleeper), 20)
    assert is_running(pid)
    worker.kill()
    assert wait_until(lambda: not is_running_or_zombie(pid))


def is_running_or_zombie(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_workers_end_with_the_process_that_started_them(tmp_path):
    script = tmp_path / "trainer.py"
    script.write_text(
        textwrap.dedent("""
        import os, time
        from grpo_trl.rewards.worker import Worker, packed_call
        idle, busy = Worker(), Worker()
        print(idle.call(packed_call(os.getpid), 20), busy.call(packed_call(os.getpid), 20), flush=True)
        busy.send(packed_call(time.sleep, 60), None)
        time.sleep(60)
        """)
    )
    trainer = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    pids = [int(pid) for pid in trainer.stdout.readline().split()]
    assert all(map(is_running_or_zombie, pids))
    trainer.kill()
    trainer.wait()
    assert wait_until(lambda: not any(map(is_running_or_zombie, pids)))


def test_a_closure_or_a_lambda_cannot_be_sent():
    def closure():
        return MEMORY

    for function in (lambda: 1, closure):
        with pytest.raises((AttributeError, pickle.PicklingError), match=r"[Pp]ickle"):
            packed_function(function)


def test_every_error_says_whether_its_worker_is_usable():
    usable = {kind.__name__ for kind in (CallRaised, CallNotLoaded)}
    kinds = [WorkerError, CallRaised, CallNotLoaded, OutOfMemory, CallTimedOut, WorkerDied]
    assert {kind.__name__ for kind in kinds if kind.worker_is_usable} == usable


SCRIPT = """
import dataclasses, functools, re, math
from grpo_trl.rewards import RewardBatch, Rewards

assert __name__ == "__main__"
print("script runs")
NUMBER = re.compile(r"\\d+")
BONUS = {"a": 1.0}


@dataclasses.dataclass(frozen=True)
class Weighted:
    weight: float

    def __call__(self, completions):
        return [self.weight * helper(text) for text in completions]


def helper(text):
    return math.floor(float(NUMBER.search(text).group())) + BONUS["a"]


def plain(completions):
    import os
    assert os.getpid() != HOME
    return [helper(text) for text in completions]


def scaled(completions, scale):
    return [scale * helper(text) for text in completions]


import os
HOME = os.getpid()
rewards = Rewards([plain, Weighted(3.0), functools.partial(scaled, scale=0.5)], workers=2, timeout=30)
batch = RewardBatch([""] * 4, ["a1", "b2", "c3", "d4"], [[]] * 4, {}, None, 2)
BONUS["a"] = 2.0
print(rewards(batch).values_BF.tolist(), rewards._pool._kept_out)
"""


@pytest.mark.parametrize(
    "runner",
    [
        pytest.param([], id="python"),
        pytest.param(
            ["-m", "torch.distributed.run", "--nproc-per-node=1", "--standalone"], id="torchrun", marks=pytest.mark.slow
        ),
    ],
)
def test_functions_of_the_running_script_are_sent_whole(tmp_path, runner):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run([sys.executable, *runner, str(script)], capture_output=True, text=True, timeout=120)
    expected = [[n, 3.0 * n, 0.5 * n] for n in (3.0, 4.0, 5.0, 6.0)]
    assert done.stdout.splitlines() == ["script runs", f"{expected} set()"], done.stderr


def test_a_function_of_the_package_loads_neither_torch_nor_transformers(worker):
    from grpo_trl.rewards import RewardBatch
    from grpo_trl.rewards.call import FunctionReward

    batch = RewardBatch(["p"], ["ab"], [[1]], {})
    assert worker.call(packed_call(FunctionReward(faults.lengths), batch), 60).values == [2.0]
    loaded = worker.call(packed_call(faults.loaded_modules), 20)
    assert "grpo_trl.rewards.call" in loaded
    assert not {"torch", "transformers", "datasets"} & loaded
