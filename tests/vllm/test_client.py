"""The client of a vLLM server against a stub: each way in which a server fails ends in one clear message, or in none."""

import math
import threading
import time

import pytest
import torch

from grpo_trl.rollout.vllm import VLLMEngine, VLLMServer
from grpo_trl.rollout.vllm.weights import check_adapter

from .helpers import OPTIONS, free_port, policy, request
from .stub import StubServer


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr("grpo_trl.rollout.vllm.server.RETRY_SECONDS", 0.02)


def make_engine(stub, folder, model=None, writes=True, **options):
    client = VLLMServer(stub.url, timeout=10.0, folder=folder, writes=writes)
    return VLLMEngine(client, model or policy(), OPTIONS, folder, writes=writes, **options)


def ids_of(rollout):
    return [completion.ids for completion in rollout.completions]


def test_an_absent_server_is_named_with_the_command_that_starts_one(tmp_path):
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(ConnectionError, match=rf"{url}.*vllm_server_timeout=0.1 s.*vllm serve.*PolicyLoader"):
        VLLMServer(url, timeout=0.1, folder=tmp_path)


def test_a_server_that_comes_up_late_is_waited_for(tmp_path):
    stub = StubServer()
    threading.Timer(0.5, stub.start).start()
    assert VLLMServer(stub.url, timeout=10.0, folder=tmp_path).max_model_length == 64
    stub.stop()


def test_logprobs_of_another_distribution_are_refused(tmp_path):
    with StubServer(processed=False).running() as stub, pytest.raises(ValueError, match="--logprobs-mode processed"):
        make_engine(stub, tmp_path)


@pytest.mark.parametrize("missing", ["/collective_rpc", "/reset_prefix_cache"])
def test_a_missing_endpoint_is_named_with_the_command_that_adds_it(tmp_path, missing):
    with StubServer(missing=(missing,)).running() as stub:
        engine = make_engine(stub, tmp_path)
        with pytest.raises(RuntimeError, match=rf"{missing} with HTTP 404(.|\n)*VLLM_SERVER_DEV_MODE=1"):
            engine.sync_weights()


def test_the_prefix_cache_is_dropped_after_every_sync(tmp_path):
    with StubServer().running() as stub:
        engine = make_engine(stub, tmp_path)
        for _ in range(2):
            engine.sync_weights()
        assert [path for path, _ in stub.calls] == ["/collective_rpc", "/reset_prefix_cache"] * 2


def test_with_lora_only_the_adapter_travels_each_time_from_a_path_of_its_own(tmp_path):
    with StubServer().running() as stub:
        engine = make_engine(stub, tmp_path, policy(lora=True))
        for _ in range(2):
            engine.sync_weights()
        loads = [body["lora_path"] for path, body in stub.calls if path == "/v1/load_lora_adapter"]
        assert len(set(loads)) == 2
        assert not any(path == "/collective_rpc" for path, _ in stub.calls)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("dies_in", [None, 0, 1])
def test_a_restarted_server_gets_the_weights_again_and_samples_the_same(tmp_path, lora, dies_in):
    """It dies before the rollout, or after so many of its requests."""
    stub = StubServer()
    stub.start()
    engine = make_engine(stub, tmp_path, policy(lora=lora))
    engine.sync_weights()
    expected = ids_of(engine.rollout(request()))
    loads = [call for call in stub.calls if call[0] != "/reset_prefix_cache"]

    def restart():
        stub.stop()
        stub.dies_in = None
        time.sleep(0.3)
        stub.start()

    stub.dies_in = dies_in
    if dies_in is None:
        restart()
    else:
        threading.Timer(0.3, restart).start()
    assert ids_of(engine.rollout(request())) == expected
    assert [call for call in stub.calls if call[0] != "/reset_prefix_cache"] == loads * 2 or dies_in is not None
    assert stub.loaded is not None
    stub.stop()


def test_a_server_whose_engine_has_died_is_waited_for_as_one_that_is_away(tmp_path):
    stub = StubServer()
    stub.start()
    engine = make_engine(stub, tmp_path)
    engine.sync_weights()
    expected = ids_of(engine.rollout(request()))
    stub.engine_dead = True

    def restart():
        stub.stop()
        stub.engine_dead = False
        stub.start()

    threading.Timer(0.3, restart).start()
    assert ids_of(engine.rollout(request())) == expected
    assert stub.loaded is not None
    stub.stop()


def test_an_error_of_a_server_that_is_alive_is_told(tmp_path):
    with StubServer().running() as stub:
        engine = make_engine(stub, tmp_path)
        stub.engine_fails = True
        with pytest.raises(RuntimeError, match="/v1/completions with HTTP 500: EngineCore encountered an issue"):
            engine.rollout(request())


def test_a_server_that_does_not_come_back_ends_the_wait(tmp_path):
    stub = StubServer()
    stub.start()
    client = VLLMServer(stub.url, timeout=0.5, folder=tmp_path)
    stub.stop()
    with pytest.raises(ConnectionError, match="vllm_server_timeout"):
        VLLMEngine(client, policy(), OPTIONS, tmp_path).rollout(request())


def test_unknown_logprobs_are_nan(tmp_path):
    with StubServer(logprob=None).running() as stub:
        completions = make_engine(stub, tmp_path).rollout(request()).completions
        assert all(math.isnan(logp) for c in completions for logp in c.drawn_logps)


def test_probes_come_after_the_first_sync_and_then_every_so_many(tmp_path):
    with StubServer().running() as stub:
        engine = make_engine(stub, tmp_path, check_steps=3)
        seen = []
        for _ in range(6):
            engine.sync_weights()
            seen.append(len(engine.probe(request())))
        assert seen == [3, 0, 3, 0, 0, 3]


def test_a_rank_that_does_not_write_takes_part_in_gathering_all_the_same(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "grpo_trl.rollout.vllm.engine.policy_weights",
        lambda model: (seen.append(n) or (n, torch.ones(1)) for n in "abc"),
    )
    with StubServer().running() as stub:
        make_engine(stub, tmp_path / "silent", writes=False).sync_weights()
        assert (seen, stub.calls) == (["a", "b", "c"], [])
        engine = make_engine(stub, tmp_path / "fails")
        monkeypatch.setattr(engine._client, "load_weights", lambda weights: next(weights) and 1 / 0)
        seen.clear()
        with pytest.raises(ZeroDivisionError):
            engine.sync_weights()
        assert seen == ["a", "b", "c"]


def test_an_adapter_that_is_no_plain_lora_is_refused():
    model = policy(lora=True)
    model.peft_config["default"].use_dora = True
    with pytest.raises(ValueError, match=r"use_dora=True.*plain LoRA"):
        check_adapter(model)
