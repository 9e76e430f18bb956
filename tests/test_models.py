import copy
import logging
import os
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
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from grpo_trl.models import (
    Reference,
    add_adapter,
    check_checkpointing,
    context_length,
    eos_token_ids,
    load_policy,
    load_tokenizer,
)
from tests.helpers.models import SIZES, make_model, make_tokenizer


INPUT = torch.tensor([[5, 6, 7, 8]])


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=INPUT).logits.clone()


# ---- The policy ----
def test_a_model_that_is_loaded_already_is_the_policy_itself(model):
    assert load_policy(model, {}) is model
    adapted = make_adapted()
    assert load_policy(adapted, {}) is adapted


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_path_is_loaded_in_float32_unless_told(tmp_path, dtype):
    make_model().to(torch.bfloat16).save_pretrained(tmp_path)
    policy = load_policy(str(tmp_path), {} if dtype is None else {"dtype": dtype})
    assert type(policy) is Qwen2ForCausalLM
    assert {p.dtype for p in policy.parameters()} == {torch.float32 if dtype is None else torch.bfloat16}


@pytest.mark.parametrize("path", ["nowhere", "nobody/nothing", "/not/a/folder", "./not/a/folder"])
def test_a_wrong_path_is_an_error_that_names_it_and_asks_for_a_local_model(path):
    with pytest.raises(OSError, match="Pass the path of a local model") as raised:
        load_policy(path, {})
    assert f"model={path!r} could not be loaded" in str(raised.value)


@pytest.mark.parametrize("adapted", [True, False])
def test_model_init_kwargs_with_a_loaded_model_are_said_to_have_no_effect(adapted, caplog):
    model = make_adapted() if adapted else make_model()
    assert load_policy(model, {"dtype": "bfloat16"}) is model
    assert "loaded already, and dtype of model_init_kwargs has no effect" in caplog.text


def test_arguments_that_from_pretrained_does_not_take_are_named(tmp_path):
    make_model().save_pretrained(tmp_path)
    for wrong in ({"dtypo": "bfloat16"}, {"dtype": "float13"}, {"hidden_size": 8}):
        name = next(iter(wrong))
        with pytest.raises(ValueError, match=rf"causal language model with model_init_kwargs=.*'{name}'"):
            load_policy(str(tmp_path), wrong)


TINY = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 8}


def other_kinds() -> dict[str, nn.Module]:
    bert = BertConfig(**TINY)
    t5 = T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=8)
    return {
        "an encoder and a decoder": T5ForConditionalGeneration(t5),
        "no head that predicts tokens": AutoModelForSequenceClassification.from_config(make_model().config),
        "no head that predicts": make_model().model,
        "no left-to-right attention": BertForMaskedLM(bert),
        "no left-to-right": BertLMHeadModel(bert),
    }


@pytest.mark.parametrize("has", other_kinds())
def test_models_of_other_kinds_are_refused_with_the_class_that_works(has):
    with pytest.raises(TypeError, match=rf"has {has}.*; pass a causal language model.*AutoModelForCausalLM"):
        load_policy(other_kinds()[has], {})


@pytest.mark.parametrize("kind", ["an encoder and a decoder", "no left-to-right attention"])
def test_a_path_with_a_model_of_another_kind_is_refused(tmp_path, kind):
    other_kinds()[kind].save_pretrained(tmp_path)
    with pytest.raises((TypeError, ValueError), match="causal language model"):
        load_policy(str(tmp_path), {})


@pytest.mark.parametrize("kind", ["no head that predicts tokens", "no head that predicts"])
def test_a_checkpoint_without_the_weights_of_a_head_is_refused(tmp_path, kind):
    other_kinds()[kind].save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"has no weights for 1 parameters \(lm_head.weight, ...\), which would be random"
    ):
        load_policy(str(tmp_path), {})


def test_a_checkpoint_without_a_layer_is_refused(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path, state_dict={n: p for n, p in model.state_dict().items() if "layers.1." not in n})
    with pytest.raises(ValueError, match=r"has no weights for .*model\.layers\.1\."):
        load_policy(str(tmp_path), {})


@pytest.mark.parametrize("size", [0, 7, 300])
def test_a_damaged_file_of_weights_is_named_as_one(tmp_path, size):
    make_model().save_pretrained(tmp_path)
    os.truncate(tmp_path / "model.safetensors", size)
    with pytest.raises(OSError, match=f"model='{tmp_path}' has a damaged file of weights"):
        load_policy(str(tmp_path), {})


def test_an_adapter_whose_name_is_a_path_is_refused():
    with pytest.raises(ValueError, match="adapter 'a/b' has a '/' in its name"):
        load_policy(make_adapted("a/b"), {})


def test_weights_that_have_no_values_are_refused():
    with pytest.raises(ValueError, match="parameters on the device 'meta', which have no values"):
        load_policy(make_model().to("meta"), {})


@pytest.mark.parametrize("wrong", [None, 3, nn.Linear(2, 2)])
def test_what_is_no_model_is_refused_by_its_type(wrong):
    with pytest.raises(TypeError, match=f"model is a {type(wrong).__name__}; pass a path"):
        load_policy(wrong, {})


# ---- The tokenizer ----
def test_a_tokenizer_that_is_given_is_taken(model, tokenizer):
    assert load_tokenizer(tokenizer, model, trust_remote_code=False) is tokenizer


def test_the_tokenizer_beside_the_model_is_the_default(tmp_path, tokenizer):
    make_model().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(None, load_policy(str(tmp_path), {}), trust_remote_code=False)
    assert loaded("ab12=")["input_ids"] == tokenizer("ab12=")["input_ids"]
    assert loaded.chat_template == tokenizer.chat_template


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama"])
def test_a_folder_without_tokenizer_is_refused(tmp_path, architecture):
    make_model(architecture).save_pretrained(tmp_path)
    policy = load_policy(str(tmp_path), {})
    with pytest.raises(ValueError, match="tokenizer"):
        load_tokenizer(None, policy, trust_remote_code=False)


def test_a_model_that_was_loaded_from_nowhere_needs_a_tokenizer(model):
    with pytest.raises(ValueError, match=r"processing_class=None.*pass a tokenizer"):
        load_tokenizer(None, model, trust_remote_code=False)


def test_what_is_no_tokenizer_is_refused_by_its_type(model):
    with pytest.raises(TypeError, match="processing_class is a str; pass a tokenizer"):
        load_tokenizer("tokenizer", model, trust_remote_code=False)


def test_a_tokenizer_without_end_is_refused_with_how_to_set_it(model):
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"eos_token=None.*set it, e\.g\. tokenizer\.eos_token = "):
        load_tokenizer(tokenizer, model, trust_remote_code=False)


def test_a_missing_pad_token_is_the_end_token_with_a_line(model, caplog):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    assert load_tokenizer(tokenizer, model, trust_remote_code=False).pad_token == "<eos>"
    assert "its end token '<eos>' pads" in caplog.text


@pytest.mark.parametrize("token", ["pad_token", "eos_token", "bos_token"])
def test_a_special_token_without_an_embedding_is_refused_with_both_sizes(model, token):
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({token: "[NEW]"})
    size = len(tokenizer)
    with pytest.raises(
        ValueError, match=rf"{token} '\[NEW\]' is token {size - 1}.* 43 .*resize_token_embeddings\({size}\)"
    ):
        load_tokenizer(tokenizer, make_model(vocab_size=43), trust_remote_code=False)
    resized = make_model(vocab_size=43)
    resized.resize_token_embeddings(size)
    assert load_tokenizer(tokenizer, resized, trust_remote_code=False) is tokenizer


def test_tokens_that_are_never_used_need_no_embedding(model):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"[{i}]" for i in range(60)])
    assert load_tokenizer(tokenizer, model, trust_remote_code=False) is tokenizer


@pytest.mark.parametrize("declared, expected", [(None, (1,)), (1, (1,)), (2, (1, 2)), ([4, 1, 2], (1, 4, 2))])
def test_the_end_tokens_are_those_of_tokenizer_and_model(model, tokenizer, declared, expected):
    model.generation_config.eos_token_id = declared
    assert eos_token_ids(model, tokenizer) == expected


def test_without_generation_settings_the_tokenizer_alone_names_the_end(model, tokenizer):
    model.generation_config = None
    assert eos_token_ids(model, tokenizer) == (1,)


def test_the_context_is_the_number_of_positions_if_there_is_one(model):
    assert context_length(model) == SIZES["max_position_embeddings"]
    assert context_length(make_adapted()) == SIZES["max_position_embeddings"]


def test_a_model_without_a_number_of_positions_has_no_context():
    config = MambaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, state_size=4)
    assert context_length(MambaForCausalLM(config)) is None


# ---- Adapters ----
def lora(**changes) -> LoraConfig:
    return LoraConfig(**({"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "v_proj"]} | changes))


def make_adapted(name: str = "default", **changes) -> PeftModel:
    """A policy with an adapter that does something, as after some training."""
    policy = get_peft_model(make_model(), lora(**changes), adapter_name=name)
    torch.manual_seed(1)
    move(policy)
    return policy


def move(policy: nn.Module) -> None:
    """Change everything that is trained."""
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)


def test_without_peft_config_the_policy_stays_as_it_is(model):
    assert add_adapter(model, None) is model


def test_a_new_adapter_changes_nothing_yet(model):
    before = logits(model)
    policy = add_adapter(model, lora())
    assert isinstance(policy, PeftModel)
    assert torch.equal(logits(policy), before)


def test_what_is_no_peft_config_is_refused_by_its_type(model):
    with pytest.raises(TypeError, match=r"peft_config is a dict; pass a peft\.PeftConfig"):
        add_adapter(model, {"r": 4})


def test_an_adapter_that_cannot_be_trained_is_refused(model):
    with pytest.raises(ValueError, match="LoraConfig with inference_mode=True"):
        add_adapter(model, lora(inference_mode=True))


def test_a_model_that_cannot_be_recomputed_is_refused(model):
    check_checkpointing(model)
    model.supports_gradient_checkpointing = False
    with pytest.raises(ValueError, match="Qwen2ForCausalLM does not support it; set gradient_checkpointing=False"):
        check_checkpointing(model)


def test_a_model_that_cannot_be_copied_has_no_reference(model):
    model.lock = threading.Lock()
    with pytest.raises(ValueError, match=r"needs a copy of the model .*cannot be copied .*lock"):
        Reference(model, new_adapter=False)


def test_a_prefix_cannot_be_recomputed():
    prefix = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match=r"prefix tuning.*set gradient_checkpointing=False"):
        check_checkpointing(get_peft_model(make_model(), prefix))
    check_checkpointing(make_adapted())


def test_a_second_adapter_is_refused_with_the_ways_out():
    with pytest.raises(ValueError, match=r"peft_config came with a PeftModel.*peft_config=None.*merge_and_unload"):
        add_adapter(make_adapted(), lora())


# ---- The reference ----
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
