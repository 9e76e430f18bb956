"""Training with the real vLLM: a run follows the policy, and one whose sync is broken on purpose stops."""

import contextlib
import random

import numpy as np
import pytest
import torch
from datasets import Dataset

from grpo_trl import GRPOConfig, GRPOTrainer, RunStopped
from grpo_trl.trainer import build_vllm
from tests.helpers.models import make_tokenizer

from .helpers import policy


pytestmark = pytest.mark.vllm
LONG = "ab" * 70  # fills a block of the prefix cache


def letters(completion_ids, **columns):
    return [float(sum(14 < token < 30 for token in ids)) for ids in completion_ids]


def make_trainer(folder, model, server=None, **options):
    where = {} if server is None else {"vllm_mode": "server", "vllm_server_base_url": server.url}
    defaults = {
        "use_vllm": True,
        "vllm_max_model_length": 256,
        "vllm_check_steps": 1,
        "optim": "sgd",
        "learning_rate": 0.3,
        "lr_scheduler_type": "constant",
        "max_steps": 3,
        "num_generations": 4,
        "per_device_train_batch_size": 8,
        "max_completion_length": 12,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "output_dir": str(folder),
    }
    return GRPOTrainer(
        model,
        letters,
        GRPOConfig(**(defaults | where | options)),
        Dataset.from_dict({"prompt": [LONG, "f="]}),
        Dataset.from_dict({"prompt": ["0=", "x"]}),
        processing_class=make_tokenizer(),
    )


@pytest.mark.parametrize("where", ["colocate", "server"])
@pytest.mark.parametrize("lora", [True, False])
def test_a_run_samples_from_the_policy_that_it_trains(where, lora, tmp_path, request):
    server = request.getfixturevalue("server") if where == "server" else None
    trainer = make_trainer(tmp_path, policy(lora=lora), server)
    before = [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]
    trainer.train()
    moved = max(
        float((p - old).abs().max())
        for p, old in zip((p for p in trainer.model.parameters() if p.requires_grad), before, strict=True)
    )
    assert moved > 1e-3, "the steps are too small for this test"
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 3
    for log in logs:
        assert log["sampling/sync_difference/max"] < 1e-4
        assert log["sampling/sampling_logp_difference/max"] < 1e-4
        assert log["sampling/importance_sampling_ratio/mean"] == pytest.approx(1.0, abs=1e-3)
        assert log["time/sync"] > 0
    assert "eval_reward" in trainer.evaluate()
    trainer._runner.engine.close()


def skip_the_sync(client, monkeypatch):
    load, calls = client._load_files, []
    monkeypatch.setattr(client, "_load_files", lambda folder: calls.append(folder) or len(calls) > 1 or load(folder))


def skip_the_cache(client, monkeypatch):
    monkeypatch.setattr(client, "_drop_cache", lambda command: None)


def sync_another_model(client, monkeypatch):
    load = client.load_weights
    monkeypatch.setattr(client, "load_weights", lambda weights: load(iter(policy(seed=1).named_parameters())))


@pytest.mark.parametrize("breaks", [skip_the_sync, skip_the_cache, sync_another_model])
def test_a_run_whose_sync_is_broken_stops_before_it_trains_on_the_samples(server, breaks, tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, policy(), server)
    breaks(trainer._runner.engine._client, monkeypatch)
    with pytest.raises(RunStopped, match=r"does not sample from the policy.*differ from the trainer's by"):
        trainer.train()
    assert trainer.state.global_step == (0 if breaks is sync_another_model else 1)
    trainer._runner.engine.close()


class Damaging:
    """vLLM, which besides its work does what it can to the process it runs in, more than it does by itself."""

    def __init__(self, llm):
        self.llm = llm

    def __getattr__(self, name):
        value = getattr(self.llm, name)
        return damaging(value) if name in ("generate", "collective_rpc", "reset_prefix_cache") else value


def damaging(call):
    def damaged(*arguments, **kwargs):
        result = call(*arguments, **kwargs)
        torch.manual_seed(3), np.random.seed(3), random.seed(3)
        torch.set_num_threads(3)
        torch.set_num_threads = lambda count: None
        return result

    return damaged


class Replay:
    """In place of vLLM: the samples that it has returned, in the same order."""

    max_model_length = 256

    def __init__(self, samples):
        self.samples = iter(samples)

    def generate(self, prompt_ids, params):
        return next(self.samples)

    def load_weights(self, weights):
        pass

    def close(self):
        pass


def test_training_is_the_same_whatever_vllm_does_to_the_process(tmp_path, monkeypatch):
    """Bit for bit that of a run which takes the same samples from no vLLM; dropout uses the random state."""
    ends, recorded, threads, set_num_threads = [], [], torch.get_num_threads(), torch.set_num_threads

    def end_of(trainer):
        trainer.train()
        trainer._runner.engine.close()
        ends.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
        assert (torch.get_num_threads(), torch.set_num_threads) == (threads, set_num_threads)

    def damaged(*arguments):
        client = build(*arguments)
        client._llm = Damaging(client._llm)
        generate = client.generate
        client.generate = lambda *request: recorded.append(generate(*request)) or recorded[-1]
        return client

    build = build_vllm._build
    monkeypatch.setattr(build_vllm, "_build", damaged)
    options = {"vllm_check_steps": 100, "num_iterations": 2, "max_steps": 4}
    end_of(make_trainer(tmp_path, policy(attention_dropout=0.2), **options))
    monkeypatch.setattr(build_vllm, "_build", lambda *arguments: Replay(recorded))
    end_of(make_trainer(tmp_path, policy(attention_dropout=0.2), **options))
    assert ends[0].equal(ends[1])
    monkeypatch.setattr(Replay, "load_weights", damaging(Replay.load_weights))
    with contextlib.suppress(AssertionError):  # of the threads
        end_of(make_trainer(tmp_path, policy(attention_dropout=0.2), **options))
    torch.set_num_threads = set_num_threads
    torch.set_num_threads(threads)
    assert not ends[0].equal(ends[2]), "damage makes no difference here"
