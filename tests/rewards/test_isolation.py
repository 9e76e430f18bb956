"""Whatever a reward function does to its arguments or to the process, nobody else sees it."""

import copy
import decimal
import io
import logging
import os
import random
import signal
import sys
import threading
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grpo_trl.rewards import RewardBatch, Rewards
from grpo_trl.rewards.isolation import isolated


COLUMNS = {"meta": dict, "tests": list, "image": np.ndarray, "answer": str}


def make_batch(groups: int, group: int) -> RewardBatch:
    """The completions of a group share the objects of their row, as those of a dataset's row do."""
    prompts, columns = [], {name: [] for name in COLUMNS}
    for row in range(groups):
        prompt = [{"role": "user", "content": f"{row}="}]
        values = {
            "meta": {"answer": row, "deep": {"units": ["m"]}},
            "tests": [f"f({row})", {"n": [1]}],
            "image": np.full(3, row),
            "answer": str(row),
        }
        prompts += [prompt] * group
        for name, value in values.items():
            columns[name] += [value] * group
    count = groups * group
    completions = [[{"role": "assistant", "content": f"c{i}"}] for i in range(count)]
    state = SimpleNamespace(global_step=3, log_history=[{"loss": 0.5}], stateful_callbacks={"a": {"b": [1]}})
    return RewardBatch(prompts, completions, [[i, 9, 1] for i in range(count)], columns, state, group)


def wreck(value) -> None:
    """Change everything that can be changed in place, from the inside out."""
    if isinstance(value, dict):
        for inner in value.values():
            wreck(inner)
        value.clear()
    elif isinstance(value, list):
        for inner in value:
            wreck(inner)
        value.append("wrecked")
        value.reverse()
    elif isinstance(value, np.ndarray):
        value[:] = -1
    elif isinstance(value, SimpleNamespace):
        wreck(vars(value))


def snapshot(arguments):
    return repr({name: value for name, value in sorted(arguments.items()) if not name.startswith("log_")})


@given(
    groups=st.integers(1, 3),
    group=st.integers(1, 3),
    wrecked=st.sets(st.sampled_from([*COLUMNS, "prompts", "completions", "completion_ids", "trainer_state"])),
    fails=st.booleans(),
)
def test_each_call_has_its_own_copy_and_each_completion_too(groups, group, wrecked, fails):
    batch = make_batch(groups, group)
    expected = snapshot(batch.arguments(None, SimpleNamespace(log_extra=None, log_metric=None)))
    seen, single = [], []

    def wrecks(completions, **kwargs):
        arguments = {"completions": completions} | kwargs
        single.append((len(completions), copy.deepcopy(kwargs["meta"]), copy.deepcopy(kwargs["prompts"])))
        for name in wrecked:
            wreck(arguments[name])
        if fails:
            raise RuntimeError
        return [1.0] * groups * group

    def watches(**kwargs):
        seen.append(snapshot(kwargs))
        return [1.0] * groups * group

    before = repr(batch)
    table = Rewards([wrecks, watches])(batch)
    assert repr(batch) == before
    assert seen == [expected]
    assert table.values_BF[:, 1].tolist() == [1.0] * groups * group
    for count, metas, prompts in single:  # also where a call that fails is repeated on parts
        assert all("answer" in meta and meta["deep"] == {"units": ["m"]} for meta in metas)
        assert all(len(prompt) == 1 for prompt in prompts)
        assert len({id(meta) for meta in metas}) == count


def test_what_is_logged_is_not_changed_afterwards():
    def logs(completions, tests, log_extra):
        log_extra("tests", tests)
        wreck(tests)
        return [1.0] * len(completions)

    batch = make_batch(1, 2)
    assert Rewards(logs)(batch).logs.columns["tests"] == batch.columns["tests"]


def recursive(value):
    value.append(value)
    return value


@pytest.mark.parametrize("make", [lambda: recursive([]), lambda: [{"a": recursive([1])}], lambda: deep(100)])
def test_what_no_table_can_hold_is_logged_as_text(make):
    def logs(completions, log_extra):
        log_extra("x", [make(), [{"a": [1]}]])
        return [1.0] * len(completions)

    assert Rewards(logs)(make_batch(1, 2)).logs.columns["x"] == ["<nested too deeply>", [{"a": [1]}]]


def deep(levels):
    return [deep(levels - 1)] if levels else 0


def test_what_cannot_be_copied_is_handed_out_as_it_is():
    lock = threading.Lock()

    def uses(completions, client):
        return [float(c is lock) for c in client]

    batch = RewardBatch(["p"] * 2, ["a", "b"], [[1], [2]], {"client": [lock] * 2})
    assert Rewards(uses)(batch).total_B.tolist() == [1.0, 1.0]


# ---- The process ----
def ignore_signal(number):
    signal.signal(number, signal.SIG_IGN)


CHANGES = {
    "grad mode": lambda folder: torch.set_grad_enabled(not torch.is_grad_enabled()),
    "default dtype": lambda folder: torch.set_default_dtype(torch.float64),
    "default device": lambda folder: torch.set_default_device("meta"),
    "threads": lambda folder: torch.set_num_threads(torch.get_num_threads() + 1),
    "deterministic": lambda folder: torch.use_deterministic_algorithms(True, warn_only=True),
    "attention": lambda folder: torch.backends.cuda.enable_flash_sdp(not torch.backends.cuda.flash_sdp_enabled()),
    "cudnn": lambda folder: setattr(torch.backends.cudnn, "benchmark", not torch.backends.cudnn.benchmark),
    "precision": lambda folder: torch.set_float32_matmul_precision("medium"),
    "anomaly": lambda folder: torch.autograd.set_detect_anomaly(True),
    "autocast": lambda folder: torch.set_autocast_enabled("cpu", True),
    "autocast dtype": lambda folder: torch.set_autocast_dtype("cpu", torch.float16),
    "torch seed": lambda folder: torch.manual_seed(123),
    "numpy seed": lambda folder: np.random.seed(123),
    "python seed": lambda folder: random.seed(123),
    "draws": lambda folder: (torch.rand(3), np.random.rand(3), random.random()),
    "numpy errors": lambda folder: np.seterr(all="raise"),
    "directory": lambda folder: os.chdir(folder),
    "variable": lambda folder: os.environ.update(PATH="nowhere"),
    "variable removed": lambda folder: os.environ.pop("PATH", None),
    "stdout": lambda folder: setattr(sys, "stdout", io.StringIO()),
    "stderr": lambda folder: setattr(sys, "stderr", None),
    "hook": lambda folder: setattr(sys, "excepthook", print),
    "warnings": lambda folder: warnings.simplefilter("error"),
    "level": lambda folder: logging.root.setLevel(logging.root.level + 1),
    "logging off": lambda folder: logging.disable(),
    "decimals": lambda folder: setattr(decimal.getcontext(), "prec", 3),
    "handler": lambda folder: ignore_signal(signal.SIGTERM),
    "interrupt": lambda folder: ignore_signal(signal.SIGINT),
    "alarm": lambda folder: signal.alarm(60),
    "blocked": lambda folder: signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1]),
}


def process_state():
    return {
        "grad mode": torch.is_grad_enabled(),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.get_deterministic_debug_mode(),
        "attention": torch.backends.cuda.flash_sdp_enabled(),
        "cudnn": torch.backends.cudnn.benchmark,
        "precision": (torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32),
        "anomaly": torch.is_anomaly_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "autocast dtype": torch.get_autocast_dtype("cpu"),
        "torch seed": torch.get_rng_state().tolist(),
        "numpy seed": np.random.get_state()[1].tolist(),
        "python seed": random.getstate(),
        "numpy errors": np.geterr(),
        "directory": os.getcwd(),
        "variable": os.environ["PATH"],
        "stdout": sys.stdout,
        "stderr": sys.stderr,
        "hook": sys.excepthook,
        "warnings": list(warnings.filters),
        "level": logging.root.level,
        "logging off": logging.root.manager.disable,
        "decimals": decimal.getcontext().prec,
        "handler": signal.getsignal(signal.SIGTERM),
        "interrupt": signal.getsignal(signal.SIGINT),
        "alarm": signal.getitimer(signal.ITIMER_REAL),
        "blocked": signal.pthread_sigmask(signal.SIG_BLOCK, []),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("elsewhere")


@given(changes=st.lists(st.sampled_from(sorted(CHANGES)), min_size=1, unique=True), fails=st.booleans())
def test_no_change_of_the_process_outlives_a_call(folder, changes, fails):
    inside = []

    def changes_it(completions):
        for name in changes:
            CHANGES[name](folder)
        if fails:
            raise RuntimeError
        return [1.0] * len(completions)

    def watches(completions):
        inside.append(process_state())
        return [1.0] * len(completions)

    before = process_state()
    Rewards([changes_it, watches])(RewardBatch(["p"] * 2, ["a", "b"], [[1], [2]], {}))
    assert process_state() == before
    assert inside == [before]


def test_new_variables_of_the_environment_stay_for_the_libraries_that_set_them_once(monkeypatch):
    monkeypatch.setenv("SET_BY_A_LIBRARY", "")
    del os.environ["SET_BY_A_LIBRARY"]

    def sets(completions):
        os.environ["SET_BY_A_LIBRARY"] = "1"
        return [1.0] * len(completions)

    Rewards(sets)(RewardBatch(["p"], ["a"], [[1]], {}))
    assert os.environ["SET_BY_A_LIBRARY"] == "1"


IN_ANY_THREAD = sorted(set(CHANGES) - {"handler", "interrupt", "alarm", "blocked"})


@given(changes=st.lists(st.sampled_from(IN_ANY_THREAD), min_size=1, unique=True))
def test_no_change_of_the_process_outlives_async_calls(folder, changes):
    inside = []

    async def changes_it(completions):
        for name in changes:
            CHANGES[name](folder)
        return [1.0]

    async def watches(completions):
        inside.append(process_state())
        return [1.0]

    batch = RewardBatch(["p"], ["a"], [[1]], {})
    before = process_state()
    Rewards(changes_it)(batch)
    assert process_state() == before
    Rewards(watches)(batch)
    assert inside == [before]  # in the thread of the event loop, which has a grad mode of its own


def test_a_timer_that_ran_before_goes_on():
    signal.setitimer(signal.ITIMER_REAL, 60.0)
    try:
        with isolated():
            signal.alarm(0)
        assert 59 < signal.getitimer(signal.ITIMER_REAL)[0] <= 60
        with isolated():
            signal.alarm(5)
        assert 59 < signal.getitimer(signal.ITIMER_REAL)[0] <= 60
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)


def test_a_directory_that_is_gone_is_no_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gone").mkdir()
    with isolated():
        os.chdir(tmp_path / "gone")
        (tmp_path / "gone").rmdir()
    assert os.getcwd() == str(tmp_path)


def test_random_functions_draw_the_same_whatever_others_draw():
    def draws(completions):
        return [random.random() for _ in completions]

    def draws_more(completions):
        return [torch.rand(7).sum() + random.random() for _ in completions]

    batch = RewardBatch(["p"] * 2, ["a", "b"], [[1], [2]], {})
    random.seed(5)
    alone = Rewards(draws)(batch).values_BF[:, 0].tolist()
    random.seed(5)
    assert Rewards([draws_more, draws])(batch).values_BF[:, 1].tolist() == alone


def test_a_repeated_call_draws_other_numbers():
    drawn = []

    def unlucky(completions):
        drawn.append(random.random())
        if len(drawn) < 3:
            raise OSError
        return [1.0]

    Rewards(unlucky, retries=2)(RewardBatch(["p"], ["a"], [[1]], {}))
    assert len(set(drawn)) == 3


def test_the_environment_is_left_to_the_function(monkeypatch):
    monkeypatch.delenv("GRPO_TRL_TEST", raising=False)

    def sets(completions):
        os.environ["GRPO_TRL_TEST"] = "set"
        return [1.0]

    Rewards(sets)(RewardBatch(["p"], ["a"], [[1]], {}))
    assert os.environ.pop("GRPO_TRL_TEST") == "set"
