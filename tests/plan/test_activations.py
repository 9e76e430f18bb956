"""Bytes per token, counted from what autograd keeps of real layers."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, Qwen2Config, Qwen2ForCausalLM

from grpo_trl.plan import (
    Shape,
    activation_bytes_per_token,
    activations,
    key_value_bytes_per_token,
    largest_micro_batch,
    logits_bytes,
    slice_tokens,
)


SIZES = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 32,
}
FAMILIES = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}
PRECISIONS = ("bf16", "autocast", "float32")
SEVEN = Shape(layers=28, hidden=3584, key_value=512, intermediate=18944, vocabulary=152_064)


def kept(family, layers, tokens, precision):
    """Bytes that autograd keeps for the backward pass of the backbone, parameters apart; and the shape."""
    config_class, model_class = FAMILIES[family]
    model = model_class(config_class(num_hidden_layers=layers, **SIZES)).train()
    if precision == "bf16":
        model = model.bfloat16()
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage  # alive, so that no address comes twice
        return tensor

    autocast = torch.autocast("cpu", torch.bfloat16) if precision == "autocast" else nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        model.model(input_ids=torch.zeros(1, tokens, dtype=torch.long), use_cache=False)
    return sum(storage.nbytes() for storage in storages.values()), Shape.of(model.config)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_layer_keeps_what_the_formula_says(family, precision):
    counted = {(layers, tokens): kept(family, layers, tokens, precision) for layers in (1, 2) for tokens in (16, 48)}
    (a, _), (b, _), (c, small), (d, large) = (counted[key] for key in ((1, 16), (1, 48), (2, 16), (2, 48)))
    assert small == large
    planned = activation_bytes_per_token(replace(small, layers=2), precision, False) - activation_bytes_per_token(
        replace(small, layers=1), precision, False
    )
    assert ((d - c) - (b - a)) / 32 == pytest.approx(planned, rel=0.01)


@pytest.mark.parametrize("precision, residual", [("bf16", 2), ("autocast", 4), ("float32", 4)])
def test_checkpointing_keeps_the_residual_stream_of_a_layer_alone(precision, residual):
    deeper = replace(SEVEN, layers=29)
    grown = activation_bytes_per_token(deeper, precision) - activation_bytes_per_token(SEVEN, precision)
    assert grown == residual * SEVEN.hidden


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_largest_micro_batch_fits_and_one_token_more_does_not(precision, checkpointing):
    free = 10 * 2**30
    tokens = largest_micro_batch(SEVEN, free, precision, checkpointing)
    assert activations(SEVEN, tokens, precision, checkpointing) <= free
    assert activations(SEVEN, tokens + 1, precision, checkpointing) > free
    assert largest_micro_batch(SEVEN, logits_bytes(SEVEN, precision), precision, checkpointing) == 0
    assert largest_micro_batch(SEVEN, 0, precision, checkpointing) == 0


def test_slices_are_larger_on_a_gpu_with_room_for_their_logits():
    assert slice_tokens(152_064) == slice_tokens(152_064, 40 * 2**30) == 256
    assert slice_tokens(152_064, 80 * 2**30) == slice_tokens(32_000, 24 * 2**30) == 2048
    assert logits_bytes(SEVEN, gpu_bytes=80 * 2**30) == 8 * logits_bytes(SEVEN) / 5  # 2,048 tokens, 4 bytes a logit


def test_shapes_of_configurations():
    config = Qwen2Config(num_hidden_layers=3, **SIZES)
    assert Shape.of(config) == Shape(layers=3, hidden=64, key_value=32, intermediate=160, vocabulary=32)
    assert key_value_bytes_per_token(Shape.of(config)) == 2 * 2 * 3 * 32
    experts = MixtralConfig(num_hidden_layers=1, num_experts_per_tok=2, **SIZES)
    assert Shape.of(experts).intermediate == 2 * 160


def test_a_configuration_without_sizes_is_refused():
    class Strange:
        def get_text_config(self):
            return self

    with pytest.raises(ValueError, match="cannot read the sizes of a Strange"):
        Shape.of(Strange())
