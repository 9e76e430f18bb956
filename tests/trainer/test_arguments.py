"""Arguments of the trainer are of the right kind, or an error at construction says what is."""

import pytest
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import ConstantLR
from transformers import PrinterCallback, TrainerCallback

from grpo_trl.trainer.arguments import check_callbacks, check_functions, check_optimizers


WEIGHT = [torch.nn.Parameter(torch.zeros(2))]


@pytest.mark.parametrize("wrong", [None, SGD(WEIGHT), (SGD(WEIGHT),), (SGD(WEIGHT), None, None), "adamw", {}])
def test_optimizers_are_a_pair(wrong):
    with pytest.raises(TypeError, match=r"is no pair; pass a pair \(optimizer, scheduler\)"):
        check_optimizers(wrong)


@pytest.mark.parametrize(
    "pair, kind",
    [
        ((SGD, None), "an optimizer"),
        (("adamw", None), "an optimizer"),
        ((ConstantLR(SGD(WEIGHT)), None), "an optimizer"),
        ((None, ConstantLR), "a scheduler"),
        ((None, "cosine"), "a scheduler"),
    ],
)
def test_optimizer_and_scheduler_are_instances_in_this_order(pair, kind):
    with pytest.raises(TypeError, match=f"in place of {kind}; pass a pair"):
        check_optimizers(pair)


def test_a_scheduler_is_of_the_optimizer_that_is_passed_with_it():
    optimizer, other = SGD(WEIGHT), SGD(WEIGHT)
    for pair in ((None, None), (optimizer, None), [optimizer, ConstantLR(optimizer)]):
        check_optimizers(pair)
    for optimizer in (None, other):
        with pytest.raises(ValueError, match="scheduler of another optimizer"):
            check_optimizers((optimizer, ConstantLR(SGD(WEIGHT))))


@pytest.mark.parametrize(
    "wrong", [TrainerCallback(), {TrainerCallback}, [None], [print], [TrainerCallback(), "printer"], [int]]
)
def test_callbacks_are_a_list_of_callbacks(wrong):
    with pytest.raises(TypeError, match=r"callbacks (is a|has) .*; pass a list of transformers\.TrainerCallback"):
        check_callbacks(wrong)
    for right in (None, [], (TrainerCallback(),), [PrinterCallback, TrainerCallback()]):
        check_callbacks(right)


async def awaited(prompts, trainer):
    return {}


@pytest.mark.parametrize(
    "wrong, message",
    [
        (3, r"rollout_func is 3 \(int\)"),
        (dict, "rollout_func is <class 'dict'>"),
        (awaited, "rollout_func is a coroutine function"),
        (lambda: {}, "rollout_func cannot be called: too many positional arguments"),
        (lambda prompts: {}, "rollout_func cannot be called: too many positional arguments"),
        (lambda prompts, trainer, tokens: {}, "rollout_func cannot be called: missing a required argument: 'tokens'"),
    ],
)
def test_functions_can_be_called_with_what_they_get(wrong, message):
    with pytest.raises(TypeError, match=rf"{message}.*; pass a function rollout_func\(prompts, trainer\)"):
        check_functions(wrong, None, None)
    check_functions(lambda *everything: {}, None, None)
