"""Training with the real vLLM: a run follows the policy, and one whose sync is broken on purpose stops."""

import pytest
import torch
from datasets import Dataset

from grpo_trl import GRPOConfig, GRPOTrainer, RunStopped
from grpo_trl.rollout.vllm.worker import EXTENSION
from tests.conftest import make_tokenizer

from .helpers import Server, policy


pytestmark = pytest.mark.vllm
LONG = "ab" * 70  # fills a block of the prefix cache


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    arguments = ["--worker-extension-cls", EXTENSION, "--enable-lora", "--max-lora-rank", "8"]
    with Server(policy(), tmp_path_factory.mktemp("served") / "model", *arguments).running() as server:
        yield server


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
@pytest.mark.parametrize("lora", [True, False])  # the adapter is for the weights that the server starts with
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


def test_training_is_the_same_whatever_vllm_does_to_the_process(server, tmp_path):
    """Equal completions, dropout, and a vLLM in this process or not: equal weights."""
    ends = []
    for place in (None, server):
        model = policy()
        model.config.attention_dropout = 0.1
        trainer = make_trainer(tmp_path, model, place)
        trainer.train()
        ends.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
        trainer._runner.engine.close()
    assert (ends[0] - ends[1]).abs().max() < 1e-4
