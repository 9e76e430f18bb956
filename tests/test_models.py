import os

import pytest
import torch
from peft import (
    PeftModel,
    PrefixTuningConfig,
    get_peft_model,
)
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
    add_adapter,
    check_checkpointing,
    context_length,
    eos_token_ids,
    load_policy,
    load_tokenizer,
)
from tests.helpers.models import SIZES, logits, lora, make_adapted, make_model, make_tokenizer


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


def test_a_prefix_cannot_be_recomputed():
    prefix = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match=r"prefix tuning.*set gradient_checkpointing=False"):
        check_checkpointing(get_peft_model(make_model(), prefix))
    check_checkpointing(make_adapted())


def test_a_second_adapter_is_refused_with_the_ways_out():
    with pytest.raises(ValueError, match=r"peft_config came with a PeftModel.*peft_config=None.*merge_and_unload"):
        add_adapter(make_adapted(), lora())
