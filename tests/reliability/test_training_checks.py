"""Training that does nothing, and options that speak of another policy than the one that samples, are errors."""

import copy
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import TrainerCallback

from grpo_trl.errors import RunStopped
from grpo_trl.reliability.training_checks import (
    WeightsMove,
    check_adapters,
    check_optimizer,
    check_same_options,
    check_unchanged,
)
from grpo_trl.types import Ranks
from tests.helpers.models import make_model
from tests.helpers.training import sampling_trainer, train, weights


LORA = LoraConfig(r=2, target_modules=["q_proj"])
OPTIONS = st.dictionaries(st.sampled_from(["beta", "temperature", "seed"]), st.integers(0, 1), min_size=3)


@given(of_ranks=st.lists(OPTIONS, min_size=1, max_size=3))
def test_ranks_train_with_the_same_options_or_not_at_all(of_ranks):
    ranks = Ranks(0, len(of_ranks), lambda own: of_ranks)
    if all(options == of_ranks[0] for options in of_ranks):
        check_same_options(of_ranks[0], ranks)
        return
    with pytest.raises(ValueError, match="Ranks have different options") as raised:
        check_same_options(of_ranks[0], ranks)
    for name in of_ranks[0]:
        assert (name in str(raised.value)) == (len({options[name] for options in of_ranks}) > 1)


@given(before=OPTIONS, now=OPTIONS)
def test_an_option_that_changes_after_construction_is_named(before, now):
    changed = [name for name in before if before[name] != now[name]]
    if not changed:
        check_unchanged(before, now)
        return
    with pytest.raises(RunStopped) as raised:
        check_unchanged(before, now)
    assert all(
        (f"{name} from {before[name]} to {now[name]}" in str(raised.value)) == (name in changed) for name in before
    )


class Set(TrainerCallback):
    """Changes an option after a step."""

    def __init__(self, name, value):
        self.name, self.value = name, value

    def on_step_end(self, args, state, control, **kwargs):
        setattr(args, self.name, self.value)


@pytest.mark.parametrize("name, value", [("temperature", 0.5), ("seed", 3), ("gradient_accumulation_steps", 7)])
def test_a_callback_that_changes_what_is_sampled_or_trained_stops_the_run(name, value, tmp_path):
    with pytest.raises(RunStopped, match=rf"{name} from \S+ to {value}"):
        train(make_model(), ["ab="], callbacks=[Set(name, value)], max_steps=2, output_dir=str(tmp_path))


def test_a_callback_may_change_how_often_a_run_logs():
    train(make_model(), ["ab="], callbacks=[Set("log_completions", False), Set("logging_steps", 2)], max_steps=2)


# ---- Optimizers ----
def test_an_optimizer_made_before_the_adapter_or_for_another_model_is_refused(caplog):
    model = make_model()
    before = torch.optim.SGD(model.parameters())
    policy = get_peft_model(model, LORA)
    for optimizer in (before, torch.optim.SGD(make_model().parameters())):
        with pytest.raises(ValueError, match=r"none of the \d+ that are trained .*lora_A"):
            check_optimizer(policy, optimizer)
    assert not caplog.text
    check_optimizer(policy, torch.optim.SGD(policy.parameters()))
    assert not caplog.text
    check_optimizer(policy, torch.optim.SGD([p for n, p in policy.named_parameters() if "lora_B" in n]))
    assert re.search(r"leaves out 2 of the 4 parameters that are trained \(\S*lora_A", caplog.text)


def test_a_learning_rate_of_0_is_said_to_change_nothing_and_a_warmup_is_not(caplog):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)
    assert optimizer.param_groups[0]["lr"] == 0
    check_optimizer(model, optimizer)
    assert not caplog.text
    check_optimizer(model, torch.optim.SGD(model.parameters(), lr=0.0))
    assert "learning rate of the optimizer is 0" in caplog.text


# ---- Adapters ----
@settings(max_examples=20, deadline=None)
@given(active=st.sampled_from(["a", "b"]), trained=st.sampled_from(["a", "b"]), enabled=st.booleans())
def test_an_adapter_that_is_trained_is_active_and_switched_on(active, trained, enabled):
    policy = get_peft_model(make_model(), LORA, adapter_name="a")
    policy.add_adapter("b", LORA)
    policy.set_adapter(active)
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_(f".{trained}." in name)
    if not enabled:
        policy.base_model.disable_adapter_layers()
        for name, parameter in policy.named_parameters():
            parameter.requires_grad_(f".{trained}." in name)
    if active == trained and enabled:
        check_adapters(policy)
        return
    with pytest.raises(ValueError, match="switched off" if not enabled else rf"set_adapter\('{trained}'\)"):
        check_adapters(policy)


def test_an_adapter_that_is_merged_is_refused():
    policy = get_peft_model(make_model(), LORA)
    policy.merge_adapter()
    with pytest.raises(ValueError, match=r"'default' is merged into the base.*unmerge_adapter"):
        check_adapters(policy)
    policy.unmerge_adapter()
    check_adapters(policy)


def test_a_model_without_adapters_has_none_to_check():
    check_adapters(make_model())


# ---- Weights ----
@settings(max_examples=30, deadline=None)
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    place=st.integers(0, 11),
    moves=st.booleans(),
    learning_rate=st.sampled_from([0.0, 0.1]),
    norm=st.sampled_from([0.0, 1.0, float("nan"), float("inf")]),
    skipped=st.booleans(),
)
def test_a_step_with_a_gradient_and_a_learning_rate_moves_a_weight(dtype, place, moves, learning_rate, norm, skipped):
    """One element of one parameter is enough; without gradient or learning rate nothing has to move, nor where fp16
    overflowed and the scaler has skipped the step."""
    model = nn.Linear(3, 4, dtype=dtype)
    check = WeightsMove()
    check.before_step(model, learning_rate)
    check.note_gradient(norm, has_signal=False)
    if moves:
        with torch.no_grad():
            model.weight.view(-1)[place] += 0.5
    if not moves and learning_rate and norm == 1.0 and not skipped:
        with pytest.raises(RunStopped, match=r"norm 1\).*changed none of the 2 trained parameters \(weight"):
            check.after_step(model, Ranks(), skipped)
    else:
        check.after_step(model, Ranks(), skipped)


@pytest.mark.parametrize("own, other", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("norm", [0.0, 1e-30])
def test_signal_on_some_rank_gives_a_gradient(own, other, norm):
    model, check = nn.Linear(3, 4), WeightsMove()
    check.before_step(model, 0.1)
    check.note_gradient(norm, has_signal=own)
    ranks = Ranks(0, 2, lambda objects: [*objects, norm > 0 or other])
    if not norm and (own or other):
        with pytest.raises(RunStopped, match="exactly 0: none of the 2 parameters that are trained"):
            check.after_step(model, ranks)
    else:
        check.after_step(model, ranks)


def test_a_step_that_the_scaler_skipped_says_nothing_of_the_next():
    model, check = nn.Linear(3, 4), WeightsMove()
    for skipped in (True, False):
        check.before_step(model, 0.1)
        check.note_gradient(1.0, has_signal=True)
        if skipped:
            check.after_step(model, Ranks(), skipped)
    with pytest.raises(RunStopped, match="changed none"):
        check.after_step(model, Ranks())


def test_weights_that_move_on_another_rank_are_weights_that_move():
    model, check = nn.Linear(3, 4), WeightsMove()
    check.before_step(model, 0.1)
    check.note_gradient(1.0, has_signal=True)
    check.after_step(model, Ranks(0, 2, lambda own: [*own, True]))


class StandsStill(torch.optim.SGD):
    def step(self, closure=None):
        pass


def test_training_whose_weights_stand_still_stops(tmp_path):
    trainer = sampling_trainer(tmp_path, 16, learning_rate=1.0)
    trainer.optimizer = StandsStill(trainer.model.parameters(), lr=1.0)
    with pytest.raises(RunStopped, match="changed none of the"):
        trainer.train()
    assert trainer.state.global_step == 1


def letters(completions):
    return [float(sum(map(ord, text)) % 7) for text in completions]


@pytest.mark.parametrize("how", ["unused", "detached", "multiplied by 0"])
def test_training_of_what_takes_no_part_in_the_logprobs_stops(how, tmp_path):
    model = make_model()
    if how == "unused":
        model.requires_grad_(False)
        model.extra = nn.Linear(2, 2)
    elif how == "detached":
        model.requires_grad_(False)
        model.model.norm.requires_grad_(True)
        model.model.norm.register_forward_hook(lambda module, inputs, output: output.detach().requires_grad_())
    else:
        for parameter in model.parameters():
            parameter.register_hook(lambda gradient: gradient * 0)
    trainer = sampling_trainer(tmp_path, 16, model=model, reward_funcs=letters)
    with pytest.raises(RunStopped, match="exactly 0"):
        trainer.train()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_training_without_gradients_stops_and_says_why(mode, tmp_path):
    trainer = sampling_trainer(tmp_path, 16, beta=0.0)
    with pytest.raises(RunStopped, match=r"inside torch\.no_grad\(\) or torch\.inference_mode"), mode():
        trainer.train()


# ---- Schedule-free optimizers ----
class ScheduleFree(torch.optim.SGD):
    """In evaluation mode the weights are others than those that are trained."""

    training = True

    def train(self):
        self._shift(not self.training, 1.0)
        self.training = True

    def eval(self):
        self._shift(self.training, -1.0)
        self.training = False

    @torch.no_grad()
    def _shift(self, needed, sign):
        if needed:
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.add_(sign * 0.01)

    def __deepcopy__(self, memo):
        return copy.copy(self)


def test_a_schedule_free_optimizer_trains_on_what_samples_and_evaluates_the_other_weights(tmp_path):
    """After an evaluation sampling is by the trained weights again, so that sampler and trainer agree."""
    trainer = sampling_trainer(tmp_path, 16, save_strategy="no", logging_steps=1, num_iterations=1, max_steps=3)
    trainer.optimizer = ScheduleFree(trainer.model.parameters(), lr=0.01)
    modes = []

    class Evaluate(TrainerCallback):
        def on_log(self, args, state, control, logs, **kwargs):
            if "loss" not in logs:
                return
            before = weights(trainer.model)
            trainer.evaluate(trainer.train_dataset.select([0]))
            modes.append(all(torch.equal(value, weights(trainer.model)[n]) for n, value in before.items()))

    trainer.add_callback(Evaluate())
    trainer.train()
    assert len(modes) == 3
    assert not trainer.optimizer.optimizer.training
    differences = [e["sampling/sampling_logp_difference/mean"] for e in trainer.state.log_history if "loss" in e]
    assert max(differences) < 1e-4
