"""A sampler and a loss that describe different policies are found before the first step."""

import pytest
import torch
from peft import LoraConfig

from grpo_trl.errors import RunStopped
from grpo_trl.logprobs.comparison import Comparison
from grpo_trl.logprobs.compute import compute_completion_logprobs
from grpo_trl.logprobs.packing import Packer
from grpo_trl.models import has_dropout
from grpo_trl.trainer.sampler_check import FEW, MORE, SamplerCheck
from grpo_trl.types import Completion, Ranks
from tests.helpers.models import make_model
from tests.helpers.training import sampling_trainer, train


ONE_STEP = {"max_steps": 1, "num_iterations": 1, "beta": 0.0, "save_strategy": "no", "logging_steps": 1}


class Evaluator:
    """Gives each completion's tokens these differences from the sampler's logprobs."""

    def __init__(self, difference, alone=0.0):
        self.difference, self.alone, self.asked = difference, alone, []

    def logps(self, model, completions, alone=False):
        self.asked.append(len(completions))
        shift = self.difference + (self.alone if alone else 0.0)
        return [torch.tensor(c.sampler_logps) + shift for c in completions]


COMPLETIONS = [Completion([5], [7, 8], [True] * 2, sampler_logps=[-1.0, -2.0])] * 20
UNKNOWN = Completion([5], [7], [True])


def run(evaluator, completions=COMPLETIONS, ranks=None, mixed_precision=False):
    check = SamplerCheck(evaluator, mixed_precision, ranks or Ranks())
    for _ in range(2):
        check.run(make_model(), completions)
    return evaluator.asked


def test_what_agrees_is_compared_once_on_a_few_completions():
    assert run(Evaluator(0.0009)) == [FEW]
    assert run(Evaluator(0.04), mixed_precision=True) == [FEW]
    assert run(Evaluator(9.0), [UNKNOWN] * 5) == [0]


def test_a_difference_is_judged_again_on_more_completions_and_against_the_noise():
    assert run(Evaluator(0.01, alone=0.003)) == [FEW, MORE, MORE]
    with pytest.raises(RunStopped, match=r"differ .* by 0.01 nats .* over 32 tokens, where 0.008 .*Likely causes"):
        run(Evaluator(0.01, alone=0.002))


@pytest.mark.parametrize("difference", [0.01, float("nan")])
def test_a_difference_on_another_rank_stops_this_one_too(difference):
    def gather(values):
        return [*values, Comparison(difference, 0.0, 1e-3, tokens=7)]

    with pytest.raises(RunStopped, match="over 7 tokens"):
        run(Evaluator(0.0), ranks=Ranks(0, 2, gather))


def test_a_run_whose_loss_has_another_temperature_stops_before_its_first_step(tmp_path):
    trainer = sampling_trainer(tmp_path, 8, **ONE_STEP)
    trainer._evaluator.temperature = 1.5
    with pytest.raises(RunStopped, match="The policy that samples is not the one that the loss trains"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_dropout_of_training_is_no_difference_and_is_not_warned_of(tmp_path, caplog):
    config = LoraConfig(r=4, lora_dropout=0.9, target_modules="all-linear", init_lora_weights=False)
    trainer = sampling_trainer(tmp_path, 8, peft_config=config, **ONE_STEP)
    trainer.train()
    (entry,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert entry["sampling/sampling_logp_difference/mean"] > 0.01
    assert "completions come from another distribution" not in caplog.text


@pytest.mark.parametrize("changes", [{}, {"attention_dropout": 0.5}])
def test_dropout_is_found_where_layers_keep_its_rate(changes):
    assert has_dropout(make_model(**changes)) == bool(changes)


def test_logprobs_of_a_rollout_func_may_be_of_any_sampler():
    def rollout(prompts, trainer):
        rows = {"prompt_ids": [[5, 6]] * len(prompts), "completion_ids": [[7, 8]] * len(prompts)}
        return rows | {"logprobs": [[-90.0, -90.0]] * len(prompts), "score": [float(i) for i in range(len(prompts))]}

    assert train(make_model(), ["ab="], rollout_func=rollout).state.global_step == 1


def test_completions_one_by_one_have_the_logprobs_of_plain_forwards(tmp_path):
    trainer = sampling_trainer(tmp_path, 8, **ONE_STEP)
    completions = [Completion([5, 6], [7, 8, 9][:n], [True] * n) for n in (1, 3, 2)]
    packer = Packer(1, None, pad_token_id=0, shared_prefix=False)
    expected = compute_completion_logprobs(trainer.model, completions, packer, 1.0)
    for alone in (True, False):
        for mine, other in zip(trainer._evaluator.logps(trainer.model, completions, alone), expected, strict=True):
            torch.testing.assert_close(mine, other)
