"""Sampling ahead, on a stub that samples from the weights it was sent, as fast or slow as it is told to."""

import shutil
import subprocess
import sys
import threading

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from grpo_trl import GRPOConfig, GRPOTrainer
from grpo_trl.rewards import RewardLogs, RewardTable
from grpo_trl.rollout.base import Rollout
from grpo_trl.trainer.ahead import SampledRollout, SamplesAhead
from grpo_trl.types import Completion
from tests.helpers.models import make_model, make_tokenizer
from tests.helpers.worker_rewards import Gated, letters, letters_async

from .stub import StubServer


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr("grpo_trl.trainer.ahead.CHECK_SECONDS", 0.01)


def make_trainer(folder, stub, callbacks=None, reward_funcs=letters, **options):
    defaults = {
        "use_vllm": True,
        "vllm_mode": "server",
        "vllm_server_base_url": stub.url,
        "generations_ahead": 1,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "max_steps": 6,
        "num_generations": 4,
        "per_device_train_batch_size": 8,
        "max_completion_length": 6,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "output_dir": str(folder),
    }
    return GRPOTrainer(
        make_model(),
        reward_funcs,
        GRPOConfig(**(defaults | options)),
        Dataset.from_dict({"prompt": ["ab=", "f", "a", "cde12=", "x", "yz", "0=", "1=2"]}),
        processing_class=make_tokenizer(),
        callbacks=callbacks,
    )


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def logs(trainer):
    return [log for log in trainer.state.log_history if "loss" in log]


@pytest.mark.parametrize("ahead", [1, *(pytest.param(ahead, marks=pytest.mark.slow) for ahead in (0, 2))])
def test_weights_do_not_follow_from_the_speed_of_the_server(ahead, tmp_path):
    ends = []
    for place, delay in enumerate((0.0, 0.15)):
        with StubServer(model=make_model(), delay=delay).running() as stub:
            trainer = make_trainer(tmp_path / str(place), stub, generations_ahead=ahead, save_strategy="no")
            trainer.train()
        ends.append(weights(trainer))
        if ahead:
            assert [log["sampling/staleness"] for log in logs(trainer)] == [min(n, ahead) for n in range(6)]
    assert ends[0].equal(ends[1])


def test_the_phases_of_a_step_are_parts_of_it(tmp_path):
    """What the server does meanwhile is none; weights are sent in every second step, and take time of that one alone."""
    with StubServer(model=make_model()).running() as stub:
        trainer = make_trainer(tmp_path, stub, num_iterations=2, save_strategy="no")
        trainer.train()
    for log in logs(trainer):
        assert sum(value for name, value in log.items() if name.startswith("time/")) <= log["step_time"] * 1.001
    assert [log["time/sync"] > 0 for log in logs(trainer)] == [True, False] * 3
    assert any(log.get("sampling/idle_time", 0) > 0 for log in logs(trainer))


def test_generation_batch_n_is_sampled_from_the_weights_with_which_the_training_on_the_one_before_began(tmp_path):
    """The stub's logprobs are those of the weights it has: generation batch n's are of the checkpoint after n - 1 steps."""
    with StubServer(model=make_model()).running() as stub:
        trainer = make_trainer(tmp_path, stub)
        seen = []

        class Watch(TrainerCallback):
            def on_step_begin(self, args, state, control, model=None, **kwargs):
                seen.append([p.detach().clone() for p in model.parameters()])

        trainer.add_callback(Watch())
        batches = []
        build = trainer._builder.build
        trainer._builder.build = lambda *arguments: batches.append(build(*arguments)) or batches[-1]
        trainer.train()
    model = make_model()
    for number, batch in enumerate(batches):
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), seen[max(0, number - 1)], strict=True):
                parameter.copy_(value)
            for completion in batch.mini_batches[0]:
                ids = torch.tensor([completion.prompt_ids + completion.ids])
                expected = model(ids).logits[0].log_softmax(-1)[len(completion.prompt_ids) - 1 : -1]
                expected = expected[torch.arange(len(completion.ids)), completion.ids]
                torch.testing.assert_close(completion.old_logps, expected, rtol=0, atol=1e-4)
    assert not torch.equal(seen[2][0], seen[3][0])


@pytest.mark.parametrize(
    "iterations, ahead, steps, workers",
    [
        (1, 1, 3, 0),
        (2, 2, 2, 0),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((1, 1, 1, 1), (1, 2, 2, 0), (2, 1, 1, 0), (2, 1, 3, 1), (2, 2, 2, 1))
        ),
    ],
)
def test_a_resumed_run_ends_as_the_one_that_was_not_interrupted(ahead, steps, iterations, workers, tmp_path):
    options = {"generations_ahead": ahead, "num_iterations": iterations, "reward_workers": workers}
    with StubServer(model=make_model()).running() as stub:
        whole = make_trainer(tmp_path / "whole", stub, **options)
        whole.train()
        (tmp_path / "resumed").mkdir()
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{steps}", tmp_path / "resumed" / f"checkpoint-{steps}")
        stub.delay = 0.1
        resumed = make_trainer(tmp_path / "resumed", stub, **options)
        resumed.train(resume_from_checkpoint=True)
    assert weights(resumed).equal(weights(whole))
    rewards = [[log.get("reward") for log in logs(trainer)[steps:]] for trainer in (resumed, whole)]
    assert rewards[0] == rewards[1]


def test_the_next_generation_batch_is_sampled_while_this_one_is_trained_on(tmp_path, monkeypatch):
    """The stub answers for generation batch 1 once the first update has begun; waiting for each other, neither would."""
    step = GRPOTrainer.training_step
    begun = threading.Event()

    def announced(self, *arguments, **kwargs):
        begun.set()
        return step(self, *arguments, **kwargs)

    monkeypatch.setattr(GRPOTrainer, "training_step", announced)
    with StubServer(model=make_model()).running() as stub:
        complete, waited = stub.complete, []

        def gated(body):
            if stub.completions > 5:  # one at the start, two probes, and two groups of generation batch 0
                waited.append(begun.wait(30))
            return complete(body)

        stub.complete = gated
        trainer = make_trainer(tmp_path, stub, max_steps=1, save_strategy="no")
        trainer.train()
        trainer._ahead.wait()
    assert waited == [True, True]


def test_the_next_generation_batch_is_rewarded_by_workers_while_this_one_is_trained_on(tmp_path, monkeypatch):
    """Rewards of generation batch 1 are done before the update ends; waiting for each other, neither would be."""
    step = GRPOTrainer.training_step

    def waits(self, *arguments, **kwargs):
        (tmp_path / "updating").touch()
        assert self._ahead.take(1).rewards is not None
        return step(self, *arguments, **kwargs)

    monkeypatch.setattr(GRPOTrainer, "training_step", waits)
    with StubServer(model=make_model()).running() as stub:
        options = {"max_steps": 1, "save_strategy": "no", "reward_workers": 1, "on_reward_error": "raise"}
        trainer = make_trainer(tmp_path, stub, reward_funcs=Gated(tmp_path), **options)
        trainer.train()
        trainer._runner.rewards.close()


@pytest.mark.slow
@pytest.mark.parametrize("reward_funcs", [letters, [letters, letters_async]])
def test_rewards_are_the_same_whoever_computes_them(reward_funcs, tmp_path):
    ends = []
    with StubServer(model=make_model()).running() as stub:
        for workers in (0, 1):
            trainer = make_trainer(
                *(tmp_path / str(workers), stub),
                **{"reward_funcs": reward_funcs, "reward_workers": workers, "save_strategy": "no", "max_steps": 3},
            )
            trainer.train()
            trainer._runner.rewards.close()
            ends.append((weights(trainer), [log["reward"] for log in logs(trainer)]))
    assert ends[0][0].equal(ends[1][0])
    assert ends[0][1] == ends[1][1]


def test_a_checkpoint_holds_rewards_that_were_computed_ahead(tmp_path):
    notes = RewardLogs()
    notes.log_extra("parsed", ["x", {1: (2.0, None)}])
    notes.log_metric("length", 3.0)
    values, failed = torch.tensor([[1.0], [float("nan")]]).double(), torch.tensor([[False], [True]])
    table = RewardTable(["f"], values, values[:, 0], notes, failed, frozenset({"f"}))
    completion = Completion([1, 2], [3], [True], sampler_logps=[-1.0], drawn_logps=[-1.0])
    for rewards in (table, None):
        torch.save(SampledRollout(Rollout([completion]), 1.5, rewards).state_dict(), tmp_path / "state")
        loaded = SampledRollout.of_state_dict(torch.load(tmp_path / "state", weights_only=True))
        assert (loaded.rollout.completions, loaded.seconds) == ([completion], 1.5)
    assert loaded.rewards is None
    torch.save(SampledRollout(Rollout([]), 0.0, table).state_dict(), tmp_path / "state")
    rewards = SampledRollout.of_state_dict(torch.load(tmp_path / "state", weights_only=True)).rewards
    torch.testing.assert_close(rewards.values_BF, values, equal_nan=True)
    torch.testing.assert_close(rewards.total_B, values[:, 0], equal_nan=True)
    assert (rewards.names, rewards.watching, rewards.failed_BF.tolist()) == (["f"], {"f"}, failed.tolist())
    assert rewards.logs.columns == {"parsed": ["x", {"1": [2.0, None]}]}
    assert rewards.logs.metrics == {"length": [3.0]}


def test_what_could_not_be_sampled_is_in_no_checkpoint_and_its_error_is_heard_in_its_turn():
    class Broken:
        def rollout(self, request):
            if request == "breaks":
                raise ConnectionError("gone")
            return Rollout([])

    ahead = SamplesAhead(Broken(), 1)
    for index, request in enumerate(["works", "breaks"]):
        ahead.submit(index, request, lambda rollout: None)
    assert list(ahead.state_dict()) == ["0"]
    assert ahead.take(0).rewards is None
    for wait in (ahead.wait, lambda: ahead.take(1)):
        with pytest.raises(ConnectionError, match="gone"):
            wait()


def test_sampling_ahead_of_the_trainer_s_own_logprobs_is_refused(tmp_path):
    with pytest.raises(ValueError, match="generations_ahead=1 cannot work with old_logprobs='trainer'"):
        GRPOConfig(
            output_dir=str(tmp_path), use_vllm=True, vllm_mode="server", generations_ahead=1, old_logprobs="trainer"
        )
    with pytest.raises(ValueError, match="generations_ahead=1 needs a sampler beside the trainer"):
        GRPOConfig(output_dir=str(tmp_path), use_vllm=True, generations_ahead=1)
    with pytest.raises(ValueError, match=r"with top_p=0\.9 vLLM reports those of another distribution"):
        GRPOConfig(output_dir=str(tmp_path), use_vllm=True, vllm_mode="server", generations_ahead=1, top_p=0.9)


@pytest.mark.slow
def test_what_is_sampled_ahead_does_not_keep_the_process_from_ending():
    script = """
import threading
from grpo_trl.trainer.ahead import SamplesAhead

class Stuck:
    def rollout(self, request):
        threading.Event().wait()

SamplesAhead(Stuck(), 1).submit(0, None, None)
"""
    subprocess.run([sys.executable, "-c", script], timeout=60, check=True)
