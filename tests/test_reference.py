import copy
import logging
import threading
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import (
    LoftQConfig,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
)
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from safetensors.torch import load_file
from torch import nn

from grpo_trl.models import add_adapter, load_policy
from grpo_trl.reference import Reference
from tests.helpers.models import logits, lora, make_adapted, make_model, move


def reference_logits(reference: Reference, wrapped: nn.Module) -> torch.Tensor:
    with reference.evaluating(wrapped) as model:
        return logits(model)


def test_the_reference_of_full_fine_tuning_is_a_frozen_copy(model):
    model.train()
    before = logits(model)
    reference = Reference(model, new_adapter=False)
    assert not any(p.requires_grad for p in reference.model.parameters())
    assert not any(m.training for m in reference.model.modules())
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    move(model)
    assert torch.equal(reference_logits(reference, model), before)
    assert not torch.allclose(logits(model), before)
    with reference.evaluating(model) as evaluated:
        assert evaluated is reference.model


class Wrapper(nn.Module):
    """Stands for DDP: the reference of an adapter runs through the wrapped policy."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, **inputs):
        return self.module(**inputs)


@pytest.mark.parametrize("changes", [{}, {"modules_to_save": ["lm_head"]}])
def test_the_reference_of_a_new_adapter_is_the_model_under_it(model, changes):
    before = logits(model)
    policy = add_adapter(model, lora(**changes))
    reference = Reference(policy, new_adapter=True)
    assert reference.model is None
    assert list(policy.peft_config) == ["default"]
    move(policy)
    moved, wrapped = logits(policy), Wrapper(policy)
    assert not torch.allclose(moved, before)
    with reference.evaluating(wrapped) as evaluated:
        assert evaluated is wrapped
        assert torch.equal(logits(evaluated), before)
    assert torch.equal(logits(policy), moved)


ADAPTERS = [
    {},
    {"name": "model"},  # as a module of the policy is named
    {"modules_to_save": ["lm_head"]},
    {"name": "mine", "modules_to_save": ["lm_head", "norm"], "use_dora": True},
]


@pytest.mark.parametrize("adapter", ADAPTERS, ids=str)
def test_the_reference_of_a_continued_adapter_is_that_adapter_as_it_was(adapter):
    policy = make_adapted(**adapter)
    name = adapter.get("name", "default")
    before, base = logits(policy), logits(make_model())
    assert not torch.allclose(before, base)
    reference = Reference(policy, new_adapter=False)
    assert torch.equal(logits(policy), before)
    assert torch.equal(reference_logits(reference, policy), before)
    move(policy)
    moved = logits(policy)
    assert not torch.allclose(moved, before)
    wrapped = Wrapper(policy)
    with reference.evaluating(wrapped) as evaluated:
        assert evaluated is wrapped
        assert torch.equal(logits(evaluated), before)
    assert policy.active_adapter == name
    assert torch.equal(logits(policy), moved)


def test_the_path_of_an_adapter_is_refused_with_what_continues_it(tmp_path):
    make_adapted().save_pretrained(tmp_path)
    with pytest.raises(
        OSError, match=rf"is an adapter\..*PeftModel\.from_pretrained\(base, '{tmp_path}', is_trainable=True\)"
    ):
        load_policy(str(tmp_path), {})


def saved_names(folder):
    """Names of the weights in the one adapter that was saved."""
    (file,) = folder.rglob("adapter_model.safetensors")
    return sorted(load_file(file))


@pytest.mark.parametrize("adapter", ADAPTERS, ids=str)
def test_whoever_saves_the_policy_saves_no_copy_of_the_reference(adapter, tmp_path):
    plain, policy = make_adapted(**adapter), make_adapted(**adapter)
    reference = Reference(policy, new_adapter=False)
    before = reference_logits(reference, policy)
    plain.save_pretrained(tmp_path / "plain")
    policy.save_pretrained(tmp_path / "policy")
    assert policy.state_dict().keys() == plain.state_dict().keys()
    assert saved_names(tmp_path / "policy") == saved_names(tmp_path / "plain")
    assert torch.equal(reference_logits(reference, policy), before)


INITIALIZATIONS = [True, False, "gaussian", "orthogonal", "olora", "pissa", "pissa_niter_4", "loftq", "corda"]


def loftq_on_cpu(weight, num_bits, reduced_rank, num_iter=1):
    """As peft's, which needs a GPU: a coarse weight, and factors of what it lacks."""
    coarse = (weight * 8).round() / 8
    left, sizes, right = torch.linalg.svd(weight - coarse, full_matrices=False)
    return coarse, right[:reduced_rank], left[:, :reduced_rank] * sizes[:reduced_rank]


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(["default", "ref", "model"]),
    init=st.sampled_from(INITIALIZATIONS),
    bias=st.sampled_from(["none", "all", "lora_only"]),
    new_adapter=st.booleans(),
    more=st.sampled_from([{}, {"modules_to_save": ["lm_head"]}, {"use_dora": True}, {"lora_dropout": 0.5}]),
    second=st.booleans(),
)
def test_the_reference_is_the_policy_at_the_start(name, init, bias, new_adapter, more, second):
    more = more | ({"loftq_config": LoftQConfig(loftq_bits=4)} if init == "loftq" else {})
    with mock.patch("importlib.util.find_spec"):  # peft asks for scipy where LoftQ is asked for, and does not use it
        config = lora(init_lora_weights=init, bias=bias, **more)
    if bias != "none" and second:  # peft allows one adapter that trains biases
        second = False
    model = make_model()
    if init == "corda":
        config.corda_config = CordaConfig()
        preprocess_corda(model, config, run_model=lambda: logits(model))
    with mock.patch("peft.tuners.lora.layer.loftq_init", loftq_on_cpu):
        policy = get_peft_model(model, config, adapter_name=name)
    if second:
        policy.add_adapter("other", lora(r=2, init_lora_weights=False))
        policy.set_adapter(name)
    policy.eval()
    before, expected = logits(policy), trained(policy)
    reference = Reference(policy, new_adapter)
    move(policy)
    moved = logits(policy)
    assert not torch.allclose(moved, before)
    torch.testing.assert_close(reference_logits(reference, policy), before, rtol=0, atol=1e-4)
    assert torch.equal(logits(policy), moved)
    assert trained(policy) == expected


def trained(policy: PeftModel) -> set[str]:
    return {name for name, p in policy.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("new_adapter", [True, False])
def test_an_exception_while_evaluating_leaves_the_policy_as_it_was(new_adapter):
    policy = make_adapted(name="mine", modules_to_save=["lm_head"])
    reference = Reference(policy, new_adapter)
    before, expected = logits(policy), trained(policy)
    with pytest.raises(RuntimeError, match="out of memory"), reference.evaluating(policy):
        raise RuntimeError("out of memory")
    assert policy.active_adapter == "mine"
    assert torch.equal(logits(policy), before)
    assert trained(policy) == expected


def test_an_exception_leaves_the_policy_of_full_fine_tuning_as_it_was(model):
    reference = Reference(model, new_adapter=False)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="out of memory"), reference.evaluating(model):
        raise RuntimeError("out of memory")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_continued_adapter_is_one_that_was_saved_and_loaded(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    saved = make_adapted()
    saved.save_pretrained(tmp_path)
    policy = PeftModel.from_pretrained(make_model(), tmp_path, is_trainable=True)
    reference = Reference(policy, new_adapter=False)
    move(policy)
    assert torch.allclose(reference_logits(reference, policy), logits(saved), atol=1e-6)


def test_what_is_trainable_stays_so_when_the_reference_was_evaluated():
    adapted = get_peft_model(make_model(), LoraConfig(r=2, target_modules=["q_proj"]))
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    before = {name: parameter.requires_grad for name, parameter in adapted.named_parameters()}
    reference = Reference(adapted, new_adapter=False)
    with reference.evaluating(adapted):
        pass
    after = {name: parameter.requires_grad for name, parameter in adapted.named_parameters()}
    assert {name: flag for name, flag in after.items() if flag} == {name: flag for name, flag in before.items() if flag}


def test_a_second_reference_of_the_same_adapter_starts_from_what_it_is_then():
    adapted = get_peft_model(make_model(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    Reference(adapted, new_adapter=False)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".default." in name:
                parameter.add_(1.0)
    reference = Reference(adapted, new_adapter=False)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad(), reference.evaluating(adapted) as model:
        copied = model(ids).logits
    torch.testing.assert_close(copied, adapted(ids).logits)


def test_the_reference_of_a_trained_prompt_is_that_prompt_as_it_was():
    policy = get_peft_model(make_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    before = logits(policy)
    reference = Reference(policy, new_adapter=False)
    move(policy)
    assert not torch.allclose(logits(policy), before)
    assert torch.equal(reference_logits(reference, policy), before)


def test_a_model_that_cannot_be_copied_has_no_reference(model):
    model.lock = threading.Lock()
    with pytest.raises(ValueError, match=r"needs a copy of the model .*cannot be copied .*lock"):
        Reference(model, new_adapter=False)
