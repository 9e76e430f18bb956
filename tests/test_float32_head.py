"""A language modeling head that is kept and computed in float32."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from grpo_trl.models import compute_head_in_float32
from tests.helpers.models import make_model


INPUT = torch.tensor([[5, 6, 7, 8]])


def untied(**changes):
    return make_model(tie_word_embeddings=False, **changes)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_head_in_float32_is_computed_in_float32_whatever_comes_before(autocast):
    model = untied().to(torch.float32 if autocast else torch.bfloat16).eval()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        hidden = model.model(input_ids=INPUT).last_hidden_state
        assert model(input_ids=INPUT).logits.dtype == torch.bfloat16
        compute_head_in_float32(model)
        output = model(input_ids=INPUT).logits
    assert output.dtype == model.lm_head.weight.dtype == torch.float32
    torch.testing.assert_close(output, hidden.float() @ model.lm_head.weight.T)


def test_a_copy_of_a_model_with_a_head_in_float32_uses_its_own_head():
    model = untied()
    compute_head_in_float32(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert (model(input_ids=INPUT).logits == 0).all()
    assert (twin(input_ids=INPUT).logits != 0).any()


def test_an_embedding_with_the_weights_of_the_head_keeps_the_precision_of_its_output():
    model = make_model(tie_word_embeddings=True).to(torch.bfloat16).eval()
    hidden = model.model(input_ids=INPUT).last_hidden_state
    compute_head_in_float32(model)
    output = copy.deepcopy(model)(input_ids=INPUT).logits
    assert model.get_input_embeddings().weight is model.lm_head.weight
    assert model.get_input_embeddings()(INPUT).dtype == torch.bfloat16
    assert output.dtype == model.lm_head.weight.dtype == torch.float32
    torch.testing.assert_close(output, hidden.float() @ model.lm_head.weight.T)


def test_a_head_with_an_adapter_is_refused():
    adapted = get_peft_model(untied(), LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(ValueError, match=r"without an adapter.*target_modules"):
        compute_head_in_float32(adapted)
