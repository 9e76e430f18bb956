import pytest
import torch
from peft import LoraConfig, get_peft_model

from grpo_trl.rollout.group import cpu_kernels, fused_layers
from grpo_trl.rollout.group.engine import GroupEngine
from grpo_trl.rollout.group.fused_layers import CompiledLayer, FusedLayer, KernelLayer, laid_out
from tests.helpers.families import FAMILIES, WINDOWED, make_family

from .test_engine import assert_follows_from_seeds, ids, make_options, make_request, sample, warnings


FUSED = ("qwen2", "qwen3", "llama", "mistral", "phi3", "gemma2", "gemma3", "granite", "olmo2")
ROOM = 1e12
BIASED = {"attention_bias": True, "mlp_bias": True}
CASES = {name: (name, {}) for name in FUSED}
CASES |= {f"{name} windowed": (name, WINDOWED[name]) for name in WINDOWED}
CASES |= {"llama with biases": ("llama", BIASED), "phi3 turned in part": ("phi3", {"partial_rotary_factor": 0.5})}


def is_fused(model) -> list[bool]:
    layers = [m for m in model.modules() if type(m).__name__.endswith("DecoderLayer")]
    return [isinstance(layer.forward, FusedLayer) for layer in layers]


@pytest.fixture
def steps(monkeypatch):
    """How many steps of layers were computed fused."""
    calls = []
    for kind in (FusedLayer, KernelLayer, CompiledLayer):
        step = kind._step
        monkeypatch.setattr(kind, "_step", lambda *args, step=step: calls.append(1) or step(*args))
    return calls


@pytest.mark.parametrize("family, changes", CASES.values(), ids=CASES)
def test_fused_layers_sample_what_plain_forwards_give(family, changes, steps):
    if "partial_rotary_factor" in changes:
        changes = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, **changes}}
    model, options = make_family(family, **changes).double(), make_options(max_completion_length=16)
    engine = GroupEngine(model, options, max_rows_in_flight=6)
    rollout = engine.rollout(make_request())
    assert engine._reason is None
    assert steps
    assert_follows_from_seeds(model, rollout, make_request(), options)


@pytest.mark.parametrize("family, changes", CASES.values(), ids=CASES)
def test_fused_layers_give_the_completions_of_the_models_own(family, changes, monkeypatch):
    if "partial_rotary_factor" in changes:
        changes = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, **changes}}
    model = make_family(family, **changes).double()
    fused = sample(model)
    monkeypatch.setattr(fused_layers, "llama_layers", lambda model: [])
    for mine, own in zip(fused.completions, sample(model).completions, strict=True):
        assert mine.ids == own.ids
        assert mine.sampler_logps == pytest.approx(own.sampler_logps, abs=2e-6)  # norms of float64 models are float32


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(FUSED)))
def test_other_families_compute_as_they_do(family, steps):
    sample(make_family(family))
    assert not steps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_rounding_is_that_of_the_dtype(family, dtype, steps, caplog):
    sample(make_family(family).to(dtype))
    assert steps
    assert not warnings(caplog)


def test_under_autocast_weights_are_laid_out_in_half_precision(steps, caplog):
    model = make_family("qwen2")
    context = lambda: torch.autocast("cpu", torch.bfloat16)  # noqa: E731
    GroupEngine(model, make_options(), context=context, mixed_precision=True).rollout(make_request())
    assert steps
    assert not warnings(caplog)
    with torch.autocast("cpu", torch.bfloat16), laid_out(model, ROOM):
        product = model.model.layers[0].forward._qkv
        assert product(torch.ones(2, 16)).dtype == torch.bfloat16


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("disabled", [False, True])
def test_adapters_are_merged_into_the_weights(merged, disabled, steps):
    targets = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    base = make_family("qwen2").double()
    policy = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules=targets, r=2, lora_alpha=6)).double()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter += 0.3 * torch.randn_like(parameter)
    if merged:
        policy.merge_adapter()
    before = [p.clone() for p in policy.parameters()]
    options = make_options()
    if disabled and not merged:
        with policy.disable_adapter():
            rollout = GroupEngine(policy, options).rollout(make_request())
            assert_follows_from_seeds(policy, rollout, make_request(), options)
    else:
        rollout = GroupEngine(policy, options).rollout(make_request())
        assert_follows_from_seeds(policy, rollout, make_request(), options)
    assert steps
    assert all(map(torch.equal, policy.parameters(), before))


@pytest.mark.parametrize("config", [{"use_dora": True}, {"lora_bias": True}], ids=str)
def test_adapters_of_other_kinds_are_not_fused(config, steps):
    base = make_family("llama", **BIASED)
    policy = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2, **config))
    assert ids(sample(policy)) == ids(sample(make_family("llama", **BIASED)))
    with laid_out(policy, ROOM):
        assert is_fused(policy) == [False, False]


def test_weights_are_laid_out_again_for_each_rollout():
    model, options = make_family("qwen2").double(), make_options()
    engine = GroupEngine(model, options)
    engine.rollout(make_request())
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.7)
        model.model.layers[0].self_attn.k_proj.bias.add_(0.5)
    assert_follows_from_seeds(model, engine.rollout(make_request()), make_request(), options)


def test_a_layer_in_which_something_listens_is_not_fused():
    """Hooks, and forwards that accelerate or the user has put on a module, are in force."""
    model = make_family("qwen2", num_hidden_layers=3)
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda *call: None)
    model.model.layers[1].self_attn.q_proj.forward = lambda x: x
    with laid_out(model, ROOM):
        assert is_fused(model) == [False, False, True]
    assert is_fused(model) == [False] * 3


def test_weights_that_would_take_much_of_the_memory_stay_as_they_are():
    model = make_family("qwen2")
    size = sum(p.nbytes for p in model.parameters() if p.ndim > 1) / fused_layers.LAID_OUT_SHARE
    for free, fused in ((0.9 * size, False), (1.1 * size, True)):
        with laid_out(model, free):
            assert is_fused(model) == [fused] * 2
            assert ("forward" in vars(model.lm_head)) == (fused and cpu_kernels.compiled() is not None)


def test_layers_are_as_they_were_after_an_exception():
    model = make_family("qwen2")
    with pytest.raises(RuntimeError, match="stop"), laid_out(model, ROOM):
        raise RuntimeError("stop")
    assert not any("forward" in vars(module) for module in model.modules())
