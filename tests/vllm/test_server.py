"""vLLM on a server, the real one: weights and adapters reach it, and a run survives that it is restarted."""

import threading

import pytest

from grpo_trl.rollout.vllm import VLLMEngine, VLLMServer
from grpo_trl.rollout.vllm.worker import EXTENSION

from .helpers import OPTIONS, Server, largest_difference, policy, request, step


pytestmark = pytest.mark.vllm
CLOSE = 1e-4


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Serves a tied model in full, and adapters of it."""
    arguments = ["--worker-extension-cls", EXTENSION, "--enable-lora", "--max-lora-rank", "8"]
    with Server(policy(), tmp_path_factory.mktemp("served") / "model", *arguments).running() as server:
        yield server


def make_engine(server, model, folder, **changes):
    return VLLMEngine(VLLMServer(server.url, timeout=120, folder=folder), model, OPTIONS, folder, **changes)


def follow(engine, model):
    last = None
    for _ in range(3):
        if last is not None:
            assert largest_difference(model, last) > 0.05, "the step is too small for this test"
        engine.sync_weights()
        last = engine.rollout(request()).completions
        assert len(last) == 9
        assert largest_difference(model, last) < CLOSE
        step(model)


@pytest.mark.parametrize("lora", [False, True])
def test_samples_follow_the_policy_step_after_step(server, lora, tmp_path):
    model = policy(lora=lora)
    if lora:
        make_engine(server, policy(), tmp_path / "base").sync_weights()  # what the other test has moved
    engine = make_engine(server, model, tmp_path / "sync")
    follow(engine, model)
    assert len(list((tmp_path / "sync").iterdir())) == 1, "only the last is kept"
    engine.close()
    assert not (tmp_path / "sync").exists()


@pytest.mark.parametrize("lora", [True, False])  # a server started again has the base that the adapter is for
def test_a_server_restarted_in_the_middle_gets_the_current_weights_again(server, lora, tmp_path):
    model = policy(lora=lora)
    engine = make_engine(server, model, tmp_path / "sync")
    if not lora:
        step(model)
    engine.sync_weights()
    expected = engine.rollout(request()).completions
    server.stop()
    threading.Timer(2.0, server.start).start()
    again = engine.rollout(request()).completions
    assert [c.ids for c in again] == [c.ids for c in expected]
    assert largest_difference(model, again) < CLOSE
    engine.close()
