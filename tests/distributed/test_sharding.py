"""What is known of sharded weights without an engine; tests/distributed/test_backends.py has the rest."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from grpo_trl.distributed.sharding import (
    BACKEND_MARK,
    GatheredWeights,
    check_backend_config,
    check_sharding,
    check_whole,
    groups_of_bytes,
    prepare_frozen,
)
from tests.helpers.models import make_model


def parameter(numel, dtype=torch.bfloat16):
    return SimpleNamespace(ds_numel=numel, element_size=lambda: dtype.itemsize)


@pytest.mark.parametrize(
    "sizes, groups",
    [
        ([], []),
        ([3], [[3]]),
        ([4, 4, 1], [[4, 4], [1]]),
        ([20, 1, 1], [[20], [1, 1]]),  # one alone may be larger
        ([1, 20, 8], [[1], [20], [8]]),
    ],
)
def test_neighbours_are_gathered_together_up_to_a_limit(sizes, groups):
    parameters = [parameter(size) for size in sizes]
    assert [[p.ds_numel for p in group] for group in groups_of_bytes(parameters, most=16)] == groups


def test_bytes_are_those_of_the_precision():
    assert len(groups_of_bytes([parameter(4, torch.float32)] * 2, most=16)) == 2


def test_a_model_that_is_not_sharded_is_left_alone():
    model = nn.Linear(2, 2)
    with GatheredWeights().of(model):
        assert model.weight.shape == (2, 2)


def test_a_model_that_zero_3_could_not_shard_is_told_with_its_size(monkeypatch, caplog):
    model = nn.Linear(2**14, 2**14, bias=False, device="meta")
    check_sharding(model, 8)
    assert not caplog.text
    monkeypatch.setattr("grpo_trl.distributed.sharding.is_deepspeed_zero3_enabled", lambda: True)
    check_sharding(model, 8)
    assert "each of the 8 ranks holds all 1.00 GiB" in caplog.text
    caplog.clear()
    model.weight.ds_id = 0
    check_sharding(model, 8)
    assert not caplog.text


def test_a_model_in_shards_is_refused_where_the_run_has_none():
    model = nn.Linear(2, 2)
    model.weight.ds_id = 0
    with pytest.raises(ValueError, match=r"its weights are sharded.*deepspeed=\.\.\. with stage 3"):
        check_sharding(model, 1)


def test_a_quantized_model_is_never_sharded_as_it_is_loaded(monkeypatch, caplog):
    monkeypatch.setattr("grpo_trl.distributed.sharding.is_deepspeed_zero3_enabled", lambda: True)
    model = nn.Linear(2, 2)
    model.is_quantized = True
    check_sharding(model, 8)
    assert not caplog.text


def test_a_model_of_another_engine_is_refused():
    model = nn.Sequential(nn.Linear(2, 2))
    setattr(model, BACKEND_MARK, True)
    with pytest.raises(ValueError, match=r"engine of an earlier trainer.*save_model\(path\)"):
        check_sharding(model, 2)


@pytest.mark.parametrize("block, option", [("optimizer", "optim"), ("scheduler", "lr_scheduler_type")])
def test_a_block_that_overrules_an_option_is_told(caplog, block, option):
    check_backend_config(SimpleNamespace(config={"zero_optimization": {}}))
    assert not caplog.text
    check_backend_config(SimpleNamespace(config={block: {"type": "AdamW"}}, mismatches=[]))
    assert f"has '{block}', so that {option} has no effect" in caplog.text


def test_a_configuration_that_contradicts_an_option_is_refused():
    config = SimpleNamespace(config={}, mismatches=["- ds gradient_clipping=1.0 vs hf max_grad_norm=0.5"])
    with pytest.raises(ValueError, match=r'\(ds gradient_clipping=1.0 vs hf max_grad_norm=0.5\)\. Write "auto"'):
        check_backend_config(config)


def test_a_reward_model_in_shards_is_refused():
    model = nn.Linear(2, 2)
    check_whole(model, "The judge")
    model.weight.ds_id = 0
    with pytest.raises(ValueError, match=r"The judge was loaded while ZeRO-3.*Pass its path"):
        check_whole(model, "The judge")


@pytest.fixture
def bf16():
    AcceleratorState._reset_state(True)
    yield Accelerator(cpu=True, mixed_precision="bf16")
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize("tied", [True, False])
def test_a_frozen_model_takes_half_of_the_memory_and_computes_the_same(bf16, tied):
    model = make_model(tie_word_embeddings=tied).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(ids).logits
        frozen = prepare_frozen(make_model(tie_word_embeddings=tied).eval(), bf16)
        assert torch.equal(frozen(ids).logits, expected.float())
    assert frozen.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert frozen.model.embed_tokens.weight.dtype == torch.float32
    moving = prepare_frozen(make_model(), bf16, moves=True)
    assert {p.dtype for p in moving.parameters()} == {torch.float32}
