"""The load-balancing loss of a mixture of experts is that of the whole mini-batch, however it is cut."""

import copy

import pytest
import torch
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from grpo_trl.trainer.router import router_coefficient
from tests.helpers.families import FAMILIES, make_family
from tests.helpers.models import make_model
from tests.helpers.training import completion_of, relative_error, train, weights


PROMPTS = ["ab=", "equal", "a", "cde12="]
CUTS = {
    "packed": {},
    "small micro-batches": {"max_tokens_per_micro_batch": 14},
    "padded": {"shared_prefix": False},
    "checkpointing": {
        "gradient_checkpointing": True,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
    },
}


def make_mixture():
    return make_family("qwen3_moe")


def expected_step(model, coefficient, learning_rate):
    """A step of SGD on transformers' own loss over all completions, each read alone, in float64; and that loss."""
    model = copy.deepcopy(model).double()
    logits = []
    for prompt in PROMPTS:
        for place in range(4):
            ids, completion, _ = completion_of(prompt, place)
            if completion:
                logits.append(model(torch.tensor([ids + completion]), output_router_logits=True).router_logits)
    layers = tuple(torch.cat(layer) for layer in zip(*logits, strict=True))
    loss = load_balancing_loss_func(layers, model.config.num_experts, model.config.num_experts_per_tok)
    (coefficient * loss).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= learning_rate * parameter.grad
    return weights(model), loss.item()


@pytest.mark.parametrize("cut", CUTS)
def test_the_gradient_is_that_of_the_loss_over_the_whole_mini_batch(cut):
    model = make_mixture()
    before, (expected, loss) = weights(model), expected_step(model, 2.0, 0.1)
    options = {"per_device_train_batch_size": 16, "router_aux_loss_coef": 2.0} | CUTS[cut]
    trainer = train(model, PROMPTS, advantage_func=lambda rewards, group: [0.0] * len(group.rewards), **options)
    assert relative_error(before, weights(trainer.model), expected) < 1e-4
    assert trainer.state.log_history[0]["aux_loss"] == pytest.approx(loss, rel=1e-4)


def test_the_coefficient_is_the_options_or_that_of_the_configuration():
    assert router_coefficient(None, make_mixture()) == make_mixture().config.router_aux_loss_coef
    assert router_coefficient(0.5, make_mixture()) == 0.5
    assert router_coefficient(None, make_model()) == 0.0
    with pytest.raises(ValueError, match=r"router_aux_loss_coef=0\.5 needs a mixture of experts.*Qwen2ForCausalLM"):
        router_coefficient(0.5, make_model())


def test_without_the_loss_a_mixture_is_read_once_a_step():
    assert "qwen3_moe" in FAMILIES
    model, forwards = make_mixture(), []
    model.register_forward_pre_hook(lambda *_: forwards.append(1) and None)
    log = train(model, PROMPTS, per_device_train_batch_size=16, shared_prefix=False).state.log_history[0]
    assert "aux_loss" not in log
    assert len(forwards) == 1
