import itertools
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from grpo_trl.attention.shared_prefix import serve_shared_prefix
from grpo_trl.logprobs.compute import compute_completion_logprobs, compute_logprobs
from grpo_trl.logprobs.head import enable_logprobs
from grpo_trl.logprobs.packing import Packer
from grpo_trl.types import Completion
from tests.helpers.families import (
    FAMILIES,
    RAGGED,
    SHORT,
    WINDOWED,
    make_completions,
    make_family,
    plain_copy,
    score_alone,
)


TEMPERATURE = 0.9
WITHIN = 1e-5
"""Largest difference of log-probabilities (nats), and of gradients relative to their norm."""
CASES = {name: (name, {}) for name in FAMILIES}
CASES |= {f"{name}-window": (name, changes) for name, changes in WINDOWED.items()}
EVERY = pytest.mark.parametrize("case", CASES)
TELLING = ("qwen2", "gemma2-window", "qwen3_moe")
"""Families that see every combination; the others see one, which tells whether they are served at all."""
PACKER = Packer(batch_size=99, max_tokens=None, pad_token_id=0)


def make(case, **changes):
    name, own = CASES[case]
    return make_family(name, **(own | changes))


def make_scored(case, **changes):
    model = make(case, **changes)
    enable_logprobs(model)
    return model


def weights_of(mask_BT):
    """What each token's log-probability counts in the loss: of either sign and of any size."""
    return torch.randn(mask_BT.shape, generator=torch.Generator().manual_seed(1))


def add_lora(model):
    """Adapters of which no part is 0."""
    adapted = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return adapted


def evaluate(model, completions, shared_prefix):
    """TokenLogprobs, and the gradient of a weighted sum of them by parameter."""
    micro_batch = replace(PACKER, shared_prefix=shared_prefix).micro_batch(completions, divisor=float(len(completions)))
    assert (micro_batch.layout is not None) == shared_prefix
    model.zero_grad()
    with serve_shared_prefix(model) if shared_prefix else nullcontext():
        scores = compute_logprobs(model, micro_batch, TEMPERATURE)
        (scores.logps_BT * weights_of(micro_batch.mask_BT)).sum().backward()
    assert scores.logps_BT.abs().max() > 1
    return scores, gradient_of(model)


def evaluate_alone(model, completions):
    """The same from one plain forward per completion."""
    width = max(1, *(len(c.ids) for c in completions))
    mask_BT = torch.zeros(len(completions), width, dtype=torch.bool)
    logps_BT, entropy_BT = torch.zeros(mask_BT.shape), torch.zeros(mask_BT.shape)
    weights_BT = weights_of(mask_BT)
    model.zero_grad()
    for row, completion in enumerate(completions):
        mask = torch.tensor(completion.mask, dtype=torch.bool)
        logps, entropy = score_alone(model, completion, TEMPERATURE)
        (logps * weights_BT[row, : len(mask)])[mask].sum().backward()
        logps_BT[row, : len(mask)] = logps.detach() * mask
        entropy_BT[row, : len(mask)] = entropy.detach() * mask
    return logps_BT, entropy_BT, gradient_of(model)


def gradient_of(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(actual, expected, within=WITHIN):
    assert actual.shape == expected.shape
    assert ((actual.double() - expected.double()).abs() <= within).all()


def assert_same_gradient(actual, expected):
    assert actual.keys() == expected.keys()
    assert len(actual) > 10
    difference = torch.cat([(actual[name] - expected[name]).double().flatten() for name in expected])
    norm = torch.cat([values.double().flatten() for values in expected.values()]).norm()
    assert norm > 0.1
    assert difference.norm() / norm <= WITHIN


@pytest.mark.parametrize("case, masked", [*((case, 0.4) for case in CASES), *((case, 0.0) for case in TELLING)])
def test_a_packed_row_gives_each_completion_the_logprobs_of_one_that_stands_alone(case, masked):
    model = make(case)
    plain = plain_copy(model)
    enable_logprobs(model)
    completions = make_completions(RAGGED, masked=masked)
    expected_BT, expected_entropy_BT, expected_gradient = evaluate_alone(plain, completions)
    for shared_prefix in (True, False):
        scores, gradient = evaluate(model, completions, shared_prefix)
        assert_close(scores.logps_BT, expected_BT)
        assert_close(scores.entropy_BT, expected_entropy_BT)
        assert_same_gradient(gradient, expected_gradient)


@pytest.mark.parametrize(
    "case, checkpointing, lora",
    [
        *itertools.product(TELLING, [False, True], ["", "before", "after"]),
        *((case, True, "before") for case in CASES if case not in TELLING),
    ],
)
def test_packed_and_padded_training_have_the_same_gradient(case, checkpointing, lora):
    """`lora` is when scoring is enabled: before the model is adapted, or after."""
    model = make(case).train()
    if lora != "after":
        enable_logprobs(model)
    adapted = add_lora(model) if lora else model
    enable_logprobs(adapted)
    if checkpointing:
        adapted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if lora:
            adapted.enable_input_require_grads()
    completions = make_completions(RAGGED, masked=0.2)
    packed, packed_gradient = evaluate(adapted, completions, True)
    padded, padded_gradient = evaluate(adapted, completions, False)
    assert_close(packed.logps_BT, padded.logps_BT)
    assert_close(packed.entropy_BT, padded.entropy_BT)
    assert_same_gradient(packed_gradient, padded_gradient)
    assert all(("lora" in name) == bool(lora) for name in packed_gradient)


@pytest.mark.parametrize("case", ["qwen3", "gemma2-window", "deepseek_v3"])
def test_checkpointing_recomputes_the_layers_in_the_backward_pass(case, monkeypatch):
    model = make_scored(case).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    calls = []
    layer = type(model.model.layers[0].self_attn)
    plain = layer.forward
    monkeypatch.setattr(layer, "forward", lambda self, *args, **kwargs: calls.append(1) or plain(self, *args, **kwargs))
    evaluate(model, make_completions([(3, [2, 4])]), True)
    assert len(calls) == 2 * len(model.model.layers)


@pytest.mark.parametrize("case", ["qwen2", "qwen2-window", "gemma2-window", "gpt_neox", "qwen3_moe"])
@pytest.mark.parametrize("batch_size", [3, 7, 99])
def test_logprobs_do_not_depend_on_how_completions_are_cut_into_micro_batches(case, batch_size):
    model = make(case)
    plain = plain_copy(model)
    enable_logprobs(model)
    completions = make_completions(RAGGED, masked=0.3)
    packer = replace(PACKER, batch_size=batch_size)
    for local in (packer, replace(packer, shared_prefix=False), replace(packer, max_tokens=30)):
        logps = compute_completion_logprobs(model, completions, local, TEMPERATURE)
        for values, completion in zip(logps, completions, strict=True):
            with torch.no_grad():
                expected, _ = score_alone(plain, completion, TEMPERATURE)
            assert_close(values, expected * torch.tensor(completion.mask, dtype=torch.bool))


@pytest.mark.parametrize("order", [(0, 3, 1, 4, 2), (0, 1, 3, 4, 2)], ids=str)
def test_a_prompt_may_come_again_later_in_the_generation_batch(order):
    """Two rows of the dataset may hold one prompt, or a generation batch may reach over the end of an epoch."""
    model = make("qwen2")
    plain = plain_copy(model)
    enable_logprobs(model)
    completions = make_completions([(5, [4, 4, 4]), (7, [4, 4])])
    completions = [completions[i] for i in order]
    for values, completion in zip(
        compute_completion_logprobs(model, completions, PACKER, TEMPERATURE), completions, strict=True
    ):
        with torch.no_grad():
            assert_close(values, score_alone(plain, completion, TEMPERATURE)[0])


EDGES = ([(1, [1])], [(7, [20])], [(2, [1, 1, 1])], [(1, [0]), (1, [1])], [(4, [0]), (1, [9, 9])], [(20, [3] * 16)])


@pytest.mark.parametrize(
    "case, groups",
    [*itertools.product(TELLING, EDGES), *((case, EDGES[4]) for case in CASES if case not in TELLING)],
    ids=str,
)
def test_edges_of_groups_score_as_padded(case, groups):
    model = make_scored(case)
    completions = make_completions(groups)
    packed, packed_gradient = evaluate(model, completions, True)
    padded, padded_gradient = evaluate(model, completions, False)
    assert_close(packed.logps_BT, padded.logps_BT)
    assert_same_gradient(packed_gradient, padded_gradient)


@EVERY
def test_neighbours_in_the_row_change_nothing(case):
    """Whatever stands in other branches and other groups, a completion scores the same."""
    model = make_scored(case)
    completions = make_completions(RAGGED)
    changed = [
        c if i % 4 == 0 else Completion(c.prompt_ids, [(token + 7) % 46 + 2 for token in c.ids], c.mask)
        for i, c in enumerate(completions)
    ]
    with torch.no_grad():
        before, after = (
            compute_logprobs(model, PACKER.micro_batch(rows, 1), TEMPERATURE).logps_BT
            for rows in (completions, changed)
        )
    assert_close(after[::4], before[::4])
    assert (after - before).abs().max() > 1


@pytest.mark.parametrize("name", WINDOWED)
@pytest.mark.parametrize("shared_prefix", [True, False])
def test_a_window_shorter_than_the_sequences_changes_their_logprobs(name, shared_prefix):
    completions = make_completions(RAGGED)
    micro_batch = replace(PACKER, shared_prefix=shared_prefix).micro_batch(completions, 1)
    models = [make_scored(name, **WINDOWED[name]), make_scored(name), make_scored(name, **(WINDOWED[name] | LONGER))]
    with torch.no_grad():
        short, whole, longer = (compute_logprobs(model, micro_batch, TEMPERATURE).logps_BT for model in models)
    assert (short - whole).abs().max() > 0.1
    assert_close(longer, whole)
    reached = torch.tensor([i for i, c in enumerate(completions) if len(c.prompt_ids) + len(c.inputs) <= SHORT])
    assert len(reached) > 1
    assert_close(short[reached], whole[reached])


LONGER = {"sliding_window": 40}


@pytest.mark.parametrize(
    "name, changes",
    [
        ("gemma2", {"attn_logit_softcapping": None}),
        ("gemma2", {"final_logit_softcapping": None}),
        ("gemma2", {"query_pre_attn_scalar": 8}),
        ("granite", {"attention_multiplier": 0.4}),
        ("granite", {"residual_multiplier": 1.0}),
        ("granite", {"logits_scaling": 1.0}),
    ],
    ids=str,
)
def test_what_a_family_does_otherwise_matters_in_its_small_model(name, changes):
    """Otherwise a path that leaves it out would agree too."""
    micro_batch = PACKER.micro_batch(make_completions(RAGGED), 1)
    with torch.no_grad():
        own, other = (
            compute_logprobs(m, micro_batch, TEMPERATURE).logps_BT
            for m in (make_scored(name), make_scored(name, **changes))
        )
    assert (own - other).abs().max() > 0.05


def test_mixtures_choose_several_experts_and_values_have_a_size_of_their_own():
    for name in ("qwen3_moe", "deepseek_v3"):
        _, gradient = evaluate(make_scored(name), make_completions(RAGGED), True)
        experts = [values for key, values in gradient.items() if key.endswith("experts.down_proj")]
        assert experts
        assert all(values.flatten(1).any(1).sum() >= 3 for values in experts)
    config = make_family("deepseek_v3").config
    assert config.qk_rope_head_dim + config.qk_nope_head_dim != config.v_head_dim


def test_layers_with_and_without_a_window_stand_in_one_model():
    for name in ("gemma2", "gemma3", "qwen2"):
        kinds = make_family(name, **WINDOWED[name]).config.layer_types
        assert set(kinds) == {"sliding_attention", "full_attention"}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_models_own_attention_is_served_again_afterwards(attention):
    model = make_scored("qwen3", attn_implementation=attention)
    completions = make_completions([(4, [3, 5])])
    with torch.no_grad():
        before = model(input_ids=torch.tensor([completions[0].prompt_ids])).logits
        compute_logprobs(model, PACKER.micro_batch(completions, 1), TEMPERATURE)
        assert model.config._attn_implementation == attention
        assert torch.equal(model(input_ids=torch.tensor([completions[0].prompt_ids])).logits, before)
