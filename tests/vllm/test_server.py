"""vLLM on a server, the real one: weights and adapters reach it, and a run survives that it is restarted."""

import threading

import pytest

from grpo_trl.rollout.vllm.worker import EXTENSION

from .helpers import Server, largest_difference, make_server_engine, policy, request, step


pytestmark = pytest.mark.vllm
CLOSE = 1e-4


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
    engine = make_server_engine(server, model, tmp_path / "sync")
    follow(engine, model)
    assert len(list((tmp_path / "sync").iterdir())) == 1, "only the last is kept"
    engine.close()
    assert not (tmp_path / "sync").exists()


@pytest.mark.parametrize("lora", [False, True])
def test_a_server_restarted_in_the_middle_gets_the_current_weights_again(server, lora, tmp_path):
    model = policy(lora=lora)
    engine = make_server_engine(server, model, tmp_path / "sync")
    if not lora:  # an adapter is for the weights that a server starts with
        step(model)
    engine.sync_weights()
    expected = engine.rollout(request()).completions
    server.stop()
    threading.Timer(2.0, server.start).start()
    again = engine.rollout(request()).completions
    assert [c.ids for c in again] == [c.ids for c in expected]
    assert largest_difference(model, again) < CLOSE
    engine.close()


def test_a_server_of_a_model_with_a_head_of_its_own_follows_it_too(tmp_path):
    with Server(policy(tied=False), tmp_path / "model", "--worker-extension-cls", EXTENSION).running() as server:
        model = policy(tied=False, seed=1)
        follow(make_server_engine(server, model, tmp_path / "sync"), model)
