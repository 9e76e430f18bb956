from dataclasses import replace
from types import MethodType
from unittest import mock

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model

from grpo_trl.attention.compatibility import ignored_window, incompatibility
from grpo_trl.logprobs.comparison import COARSE_TOLERANCE, TOLERANCE, tolerance
from grpo_trl.logprobs.compute import compute_completion_logprobs, compute_logprobs
from grpo_trl.logprobs.head import enable_logprobs
from grpo_trl.logprobs.packing import Packer
from grpo_trl.logprobs.verify import packed_mismatch
from grpo_trl.types import Completion, Ranks
from tests.helpers.families import FAMILIES, SIZES, WINDOWED, make_completions, make_family
from tests.helpers.models import make_model


PACKER = Packer(batch_size=9, max_tokens=None, pad_token_id=0)
GROUPS = [(5, [4, 3]), (12, [9, 7, 8]), (3, [2])]
CASES = {name: (name, {}) for name in FAMILIES}
CASES |= {f"{name}-window": (name, changes) for name, changes in WINDOWED.items()}
SHAPE = SIZES | {"num_key_value_heads": 2, "head_dim": 8}
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}
LINEAR = {f"linear_{name}": 4 for name in ("key_head_dim", "value_head_dim", "num_key_heads", "num_value_heads")}
MAMBA = {"mamba_d_ssm": 16, "mamba_n_heads": 4, "mamba_d_head": 4, "mamba_d_state": 4, "mamba_chunk_size": 8}
OTHERS = {
    "linear attention": ("Qwen3NextForCausalLM", "Qwen3NextConfig", SHAPE | EXPERTS | LINEAR | {
        "layer_types": ["linear_attention", "full_attention"],
    }),
    "chunks": ("Llama4ForCausalLM", "Llama4TextConfig", SHAPE | {
        "intermediate_size_mlp": 16, "num_local_experts": 2, "attention_chunk_size": 4,
    }),
    "convolutions": ("Lfm2ForCausalLM", "Lfm2Config", SIZES | {
        "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"],
    }),
    "states": ("MambaForCausalLM", "MambaConfig", {
        "vocab_size": 48, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "pad_token_id": 0,
    }),
    "states and attention": ("FalconH1ForCausalLM", "FalconH1Config", SHAPE | MAMBA),
}  # fmt: skip


def make_other(kind):
    model_class, config_class, values = OTHERS[kind]
    torch.manual_seed(0)
    return getattr(transformers, model_class)(getattr(transformers, config_class)(**values))


def compare(model, groups=GROUPS, packer=PACKER, mixed_precision=False):
    enable_logprobs(model)
    return packed_mismatch(model, make_completions(groups), packer, 0.9, mixed_precision)


# ---- What the configuration says ----


@pytest.mark.parametrize("case", CASES)
def test_nothing_speaks_against_the_families_that_are_served(case):
    name, changes = CASES[case]
    model = make_family(name, **changes)
    assert incompatibility(model) is None
    assert (
        incompatibility(get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))) is None
    )


@pytest.mark.parametrize(
    "kind, reason",
    [
        ("linear attention", "Qwen3NextForCausalLM has layers of the kind linear_attention"),
        ("chunks", "Llama4ForCausalLM has layers of the kind chunked_attention"),
        ("convolutions", "Lfm2ForCausalLM has layers of the kind conv"),
        ("states", "MambaForCausalLM has layers of the kind linear_attention"),
        ("states and attention", "FalconH1ForCausalLM has layers of the kind hybrid"),
    ],
)
def test_layers_that_are_no_attention_are_a_reason(kind, reason):
    assert incompatibility(make_other(kind)) == reason


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
@pytest.mark.parametrize("nested", [False, True])
def test_positions_that_depend_on_the_longest_row_are_a_reason(kind, nested):
    model = make_family("llama")
    parameters = {"rope_type": kind, "factor": 2.0, "rope_theta": 10000.0}
    model.config.rope_parameters = {"full_attention": parameters} if nested else parameters
    assert (
        incompatibility(model) == f"LlamaForCausalLM turns positions by the longest row of a batch (rope_type {kind})"
    )


WINDOW_IN_MASK = {
    "Qwen2Moe": EXPERTS
    | {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
    "Phimoe": {"num_key_value_heads": 2, "num_local_experts": 2, "sliding_window": 4},
}


@pytest.mark.parametrize("prefix", WINDOW_IN_MASK)
def test_a_window_that_attention_does_not_hear_of_is_a_reason(prefix):
    config = getattr(transformers, f"{prefix}Config")(**SIZES, **WINDOW_IN_MASK[prefix])
    model = getattr(transformers, f"{prefix}ForCausalLM")(config)
    reason = f"{prefix}ForCausalLM has a window of 4 tokens in its mask alone"
    assert ignored_window(model) == reason
    assert compare(model) == reason


@pytest.mark.parametrize("case", CASES)
def test_served_families_tell_their_attention_of_their_window(case):
    name, changes = CASES[case]
    model = make_family(name, **changes).train()
    before = model.config._attn_implementation
    assert ignored_window(model) is None
    assert model.config._attn_implementation == before
    assert model.training


def test_memory_that_runs_out_is_no_reason():
    """Padding takes more."""
    model = make_family("qwen2")
    enable_logprobs(model)

    def hook(module, args, kwargs):
        if kwargs.get("position_ids") is not None:
            raise torch.OutOfMemoryError("made up")

    model.register_forward_pre_hook(hook, with_kwargs=True)
    with pytest.raises(torch.OutOfMemoryError):
        compare(model)


def test_attention_in_chunks_is_a_reason_whatever_the_layers_are_called():
    model = make_family("llama")
    model.config.attention_chunk_size = 4
    assert incompatibility(model) == "LlamaForCausalLM attends in chunks (attention_chunk_size=4)"


@pytest.mark.parametrize("name", ["qwen2", "gemma2", "gpt_neox", "deepseek_v3"])
def test_dropout_of_attention_is_a_reason(name):
    reason = incompatibility(make_family(name, attention_dropout=0.25))
    assert "drops attention weights (attention_dropout=0.25; disable_dropout=True" in reason
    assert incompatibility(make_family(name, attention_dropout=0.0)) is None


def test_dropout_of_attention_counts_as_a_module_too():
    model = make_family("qwen2")
    model.model.layers[1].self_attn.attention_dropout = torch.nn.Dropout(0.5)
    assert "attention_dropout=0.5" in incompatibility(model)


@pytest.mark.parametrize("config", [
    transformers.GPT2Config(vocab_size=48, n_embd=16, n_layer=1, n_head=4, attn_pdrop=0.5),
    transformers.OPTConfig(vocab_size=48, hidden_size=16, ffn_dim=16, word_embed_proj_dim=16, num_hidden_layers=1,
                           num_attention_heads=4, attention_dropout=0.5),
], ids=lambda config: config.model_type)  # fmt: skip
def test_dropout_of_attention_is_a_reason_whatever_its_name(config):
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    enable_logprobs(model)
    before = torch.get_rng_state()
    assert "dropout of attention, 0.5, has no packed form" in compare(model)
    assert not any(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("config", [PromptTuningConfig, PrefixTuningConfig])
def test_virtual_tokens_are_a_reason(config):
    adapted = get_peft_model(make_family("qwen2"), config(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    assert incompatibility(adapted) == "its adapter puts virtual tokens before the prompt"


# ---- What a comparison shows ----


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("lora", [False, True])
def test_packed_logprobs_of_the_families_agree(case, lora):
    name, changes = CASES[case]
    model = make_family(name, **changes)
    if lora:
        model = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    assert compare(model) is None


@pytest.mark.parametrize(
    "kind",
    [
        "linear attention",
        "convolutions",
        "states",
        "states and attention",
    ],
)
def test_a_model_that_carries_a_state_from_token_to_token_does_not_agree(kind):
    model = make_other(kind)
    with torch.no_grad():  # freshly made, it hardly mixes tokens
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    assert f"packed log-probabilities of {type(model).__name__} differ from padded ones by" in compare(model)


@pytest.mark.parametrize("groups", [
    [(12, [9]), (5, [4, 3]), (3, [7])],
    [(12, [1, 9]), (5, [8, 3])],
    [(12, [9]), (5, [8])],
    [(12, [1]), (5, [1])],
    [(12, [1, 1]), (5, [1, 1])],
], ids=str)  # fmt: skip
def test_what_only_a_second_completion_shows_is_found_whatever_the_groups(groups):
    """A rank can have one completion of a group only, and completions can be single tokens, which nothing reads."""
    model = make_family("qwen2")
    ignore_the_interface(model.model.layers[1].self_attn)
    assert compare(model, groups) is not None


def ignore_the_interface(attention):
    """Attend by torch's own causal attention over the whole row."""

    def forward(self, hidden_states, position_embeddings, **kwargs):
        cos, sin = position_embeddings
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            project(hidden_states).view(shape).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = transformers.models.qwen2.modeling_qwen2.apply_rotary_pos_emb(query, key, cos, sin)
        output = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return self.o_proj(output.transpose(1, 2).flatten(2)), None

    attention.forward = MethodType(forward, attention)


@pytest.mark.parametrize("micro_batches", [{}, {"batch_size": 1}, {"max_tokens": 20}], ids=str)
def test_one_layer_that_ignores_the_interface_is_found(micro_batches):
    """However small the micro-batches of training are, two completions stand in one row here."""
    model = make_family("qwen2")
    enable_logprobs(model)
    completions = make_completions(GROUPS)
    padded = replace(PACKER, shared_prefix=False)
    before = compute_completion_logprobs(model, completions, padded, 0.9)
    ignore_the_interface(model.model.layers[1].self_attn)
    after = compute_completion_logprobs(model, completions, padded, 0.9)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)  # it is that model still, where rows are padded
    reason = compare(model, packer=replace(PACKER, **micro_batches))
    assert "packed log-probabilities of Qwen2ForCausalLM differ from padded ones by" in reason


def test_a_model_that_takes_no_keywords_is_found():
    model = make_family("qwen2")
    layer = model.model.layers[0]
    plain = layer.forward
    layer.forward = lambda hidden_states, **kwargs: plain(
        hidden_states, **{name: value for name, value in kwargs.items() if name != "shared_prefix"}
    )
    reason = compare(model)
    assert reason.startswith("Qwen2ForCausalLM cannot be called with packed rows (NotImplementedError: the model does")


def test_a_forward_that_raises_is_a_reason_and_leaves_the_model_as_it_was():
    model = make_family("qwen2").train()
    plain = model.model.forward

    def forward(input_ids, position_ids=None, **kwargs):
        if position_ids is not None:
            raise KeyError("positions")
        return plain(input_ids=input_ids, **kwargs)

    model.model.forward = forward
    assert compare(model) == "Qwen2ForCausalLM cannot be called with packed rows (KeyError: 'positions')"
    assert model.training
    assert all(module.training for module in model.modules())
    assert model.config._attn_implementation == "sdpa"


def test_logprobs_that_are_no_numbers_are_a_reason():
    model = make_family("qwen2")
    plain = model.model.norm.forward
    calls = []
    model.model.norm.forward = lambda hidden: plain(hidden) * (torch.nan if not calls and not calls.append(1) else 1.0)
    assert "differ from padded ones by nan" in compare(model)


@pytest.mark.parametrize(
    "dtype, mixed_precision, disturbance, agrees",
    [
        (torch.float32, False, 0.02, False),
        (torch.float32, True, 0.02, True),
        (torch.float32, True, 0.2, False),
        (torch.bfloat16, False, 0.02, True),
        (torch.bfloat16, False, 0.4, False),
        (torch.float64, False, 0.02, False),
        (torch.float32, False, 1e-4, True),
    ],
)
def test_how_much_may_differ_depends_on_the_precision(dtype, mixed_precision, disturbance, agrees, monkeypatch):
    """The disturbance is what packed log-probabilities, and only they, are off by."""

    def disturbed(model, micro_batch, temperature):
        scores = compute_logprobs(model, micro_batch, temperature)
        return replace(scores, logps_BT=scores.logps_BT + disturbance) if micro_batch.layout else scores

    monkeypatch.setattr("grpo_trl.logprobs.compute.compute_logprobs", disturbed)
    reason = compare(make_family("qwen2").to(dtype), mixed_precision=mixed_precision)
    assert (reason is None) == agrees


@pytest.mark.parametrize(
    "groups, compared",
    [
        (GROUPS, [(12, 9), (12, 8)]),
        ([(5, [9, 2]), (12, [9, 3])], [(12, 9), (12, 3)]),  # though two prompts would have a longer second one
        ([(5, [2]), (7, [4])], [(5, 2), (7, 4)]),
    ],
    ids=str,
)
def test_two_completions_of_one_prompt_are_compared_if_there_are_two(groups, compared, monkeypatch):
    from grpo_trl.logprobs import verify as support

    seen = []

    def spy(model, completions, packer, temperature):
        seen.append((packer.shared_prefix, [(len(c.prompt_ids), len(c.ids)) for c in completions]))
        return compute_completion_logprobs(model, completions, packer, temperature)

    monkeypatch.setattr(support, "compute_completion_logprobs", spy)
    assert compare(make_family("qwen2"), groups, replace(PACKER, batch_size=1, max_tokens=1)) is None
    assert seen == [(False, compared), (True, compared)]


def test_the_comparison_asks_no_other_rank():
    """Ranks compare what they have, each alone; a gather inside would hang the others."""

    def gather(numbers):
        raise AssertionError

    assert compare(make_family("qwen2"), packer=replace(PACKER, ranks=Ranks(gather=gather))) is None


def test_completions_of_no_token_are_nothing_to_compare():
    assert compare(make_family("qwen2"), [(4, [0, 0])]) is None


# ---- Tolerances ----
@settings(max_examples=30, deadline=None)
@given(difference=st.floats(0, 0.01), noise=st.floats(0, 0.01), thorough=st.booleans())
def test_a_difference_is_allowed_up_to_the_tolerance_or_four_times_the_models_own_noise(difference, noise, thorough):
    def shifted(model, completions, packer, temperature):
        """Packed logprobs differ by `difference`, and those of one padded row from several by `noise`."""
        shift = difference if packer.shared_prefix else noise if packer.batch_size == 1 else 0.0
        return [torch.full((len(c.ids),), shift, dtype=torch.float64) for c in completions]

    model = make_model()
    enable_logprobs(model)
    sample = [Completion([5, 6], [7, 8], [True] * 2), Completion([5, 6], [9], [True])]
    with mock.patch("grpo_trl.logprobs.verify.compute_completion_logprobs", shifted):
        reason = packed_mismatch(model, sample, Packer(2, None, 0), 1.0, False, thorough)
    assert (reason is None) == (difference <= max(TOLERANCE, 4 * noise if thorough else 0))
    if reason is not None:
        assert f"differ from padded ones by {difference:.2g} nats on average over 3 tokens" in reason
        assert (f"differs from itself by {noise:.2g}" in reason) == thorough


@pytest.mark.parametrize("coarse", ["first", "last", "quantized", None])
def test_one_coarse_weight_or_a_quantized_base_makes_the_tolerance_coarse(coarse):
    """As prepare_model_for_kbit_training leaves a model: its first parameter is float32, its products are not."""
    model = make_model()
    parameters = list(model.parameters())
    if coarse == "quantized":
        model.is_quantized = True
    elif coarse:
        parameter = parameters[0 if coarse == "first" else -1]
        parameter.data = parameter.data.bfloat16()
    assert tolerance(model, mixed_precision=False) == (TOLERANCE if coarse is None else COARSE_TOLERANCE)
