"""Training on samples of a truncated distribution, of which the trainer's own engine reports the logprobs."""

import logging

import pytest
import torch

from tests.helpers.models import make_model
from tests.helpers.training import sampling_trainer


RATE = 0.1


def train_one_step(folder, **options):
    defaults = {
        "num_iterations": 1,
        "beta": 0.0,
        "max_steps": 1,
        "optim": "sgd",
        "learning_rate": RATE,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
    }
    trainer = sampling_trainer(folder, 8, **(defaults | options))
    trainer.train()
    return trainer


def moved(trainer):
    after = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    return after - torch.cat([p.detach().flatten() for p in make_model().parameters()])


def expected_move(completions, temperature, corrects):
    """A step on 1/B sum_i A_i / |o_i| sum_t v_it logp_it, v_it = policy / what the token was sampled from."""
    model = make_model()
    loss = torch.zeros(())
    for c in completions:
        logits = model(torch.tensor([c.prompt_ids + c.ids])).logits[0, len(c.prompt_ids) - 1 : -1] / temperature
        logps = logits.log_softmax(-1)[torch.arange(len(c.ids)), c.ids]
        weights = (logps.detach() - torch.tensor(c.drawn_logps)).exp() if corrects else torch.ones(len(c.ids))
        loss = loss - c.advantage / len(c.ids) * (weights * logps).sum() / len(completions)
    loss.backward()
    return torch.cat([-RATE * p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("engine", [{}, {"generation_kwargs": {"cache_implementation": "dynamic"}}])
@pytest.mark.parametrize("corrects", [True, None])
def test_the_policy_gradient_is_weighed_by_policy_over_sampling_distribution(engine, corrects, tmp_path):
    options = {"top_p": 0.6, "temperature": 0.8, "vllm_importance_sampling_mode": None} | engine
    trainer = train_one_step(tmp_path, vllm_importance_sampling_correction=corrects, **options)
    completions = trainer._generation_batch.mini_batches[0]
    assert all(c.drawn_logps is not None for c in completions)
    actual, expected = moved(trainer), expected_move(completions, 0.8, corrects)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5)
    other = expected_move(completions, 0.8, not corrects)
    assert (expected - other).abs().max() > 20 * (expected - actual).abs().max()
    log = trainer.state.log_history[0]
    assert ("sampling/importance_sampling_ratio/mean" in log) == bool(corrects)
    assert not corrects or 0.4 < log["sampling/importance_sampling_ratio/mean"] < 0.95


def test_samples_of_the_policy_itself_are_not_weighed(tmp_path):
    trainer = train_one_step(tmp_path, vllm_importance_sampling_correction=True)
    assert all(c.drawn_logps is None for c in trainer._generation_batch.mini_batches[0])
    assert "sampling/importance_sampling_ratio/mean" not in trainer.state.log_history[0]


@pytest.mark.parametrize("mode, warns", [("sequence_mask", True), ("token_truncate", False), (None, False)])
def test_weights_that_vanish_with_the_length_are_warned_of(mode, warns, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        sampling_trainer(
            tmp_path, 8, top_p=0.9, vllm_importance_sampling_correction=True, vllm_importance_sampling_mode=mode
        )
    assert ("With top_p=0.9, vllm_importance_sampling_mode" in caplog.text) == warns
