import contextlib
import copy
import inspect
from dataclasses import replace

import pytest
import torch
import transformers
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen2Model

from grpo_trl.attention.shared_prefix import serve_shared_prefix
from grpo_trl.logprobs import head
from grpo_trl.logprobs.compute import compute_logprobs
from grpo_trl.logprobs.head import LogprobRequest, enable_logprobs
from grpo_trl.logprobs.packing import Packer
from grpo_trl.model_utils import causal_lm
from tests.helpers.families import RAGGED, make_completions, make_family, plain_copy
from tests.helpers.models import make_model


HEADS = {
    "soft cap": ("gemma2", {}),
    "soft cap, untied": ("gemma2", {"tie_word_embeddings": False}),
    "logit_scale": ("cohere", {}),
    "logits_scaling": ("granite", {}),
    "untied": ("qwen3", {"tie_word_embeddings": False}),
    "tied": ("qwen3", {"tie_word_embeddings": True}),
    "another prefix": ("gpt_neox", {}),
}
HEAD = pytest.mark.parametrize("name, changes", HEADS.values(), ids=HEADS)
INPUT_IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])
POSITIONS = torch.tensor([0, 1, 4, 2, 6, 7, 11, 7, 9, 10])
TARGETS = torch.tensor([3, 47, 0, 20, 21, 3, 9, 1, 30, 8])
WEIGHTS = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0, -1.0, 1.5, 0.7, -0.3, 2.0])


def evaluate(model, temperature=1.0):
    """Log-probabilities and entropy of the positions, and the gradient of a weighted sum of the first."""
    model.zero_grad()
    logps_M, entropy_M = model(
        input_ids=INPUT_IDS,
        use_cache=False,
        logprob_request=LogprobRequest(POSITIONS, TARGETS, temperature, INPUT_IDS.shape[1]),
    )
    assert logps_M.requires_grad
    assert not entropy_M.requires_grad
    (logps_M * WEIGHTS).sum().backward()
    return logps_M.detach(), entropy_M, gradient_of(model)


def evaluate_whole(model, temperature=1.0):
    """The same from all logits at once."""
    model.zero_grad()
    logits_MV = model(input_ids=INPUT_IDS, use_cache=False).logits.flatten(0, 1)[POSITIONS].float()
    probs_MV = (logits_MV / temperature).softmax(-1)
    logps_M = probs_MV[range(len(TARGETS)), TARGETS].log()
    (logps_M * WEIGHTS).sum().backward()
    entropy_M = -(probs_MV * probs_MV.log()).sum(-1)
    return logps_M.detach(), entropy_M.detach(), gradient_of(model)


def gradient_of(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(actual, expected):
    for mine, other in zip(actual[:2], expected[:2], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
    assert actual[2].keys() == expected[2].keys()
    for name, values in expected[2].items():
        torch.testing.assert_close(actual[2][name], values, rtol=1e-4, atol=1e-5 * float(values.norm()) + 1e-6)


@HEAD
@pytest.mark.parametrize("slice_length", [1, 3, 10, 256])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_slices_give_what_all_logits_at_once_give(name, changes, slice_length, temperature, monkeypatch):
    monkeypatch.setattr(head, "slice_tokens", lambda *_: slice_length)
    model = make_family(name, **changes)
    plain = plain_copy(model)
    enable_logprobs(model)
    assert_same(evaluate(model, temperature), evaluate_whole(plain, temperature))


@pytest.mark.parametrize("changes", [{"final_logit_softcapping": None}, {"final_logit_softcapping": 1.0}])
def test_what_follows_the_head_is_the_models_own(changes):
    """Without the soft cap, or with another, the small model scores otherwise; so it tests the soft cap."""
    scores = []
    for model in (make_family("gemma2"), make_family("gemma2", **changes)):
        enable_logprobs(model)
        scores.append(evaluate(model)[0])
    assert (scores[0] - scores[1]).abs().max() > 0.1


@pytest.mark.parametrize("slice_length", [3, 256])
def test_a_head_that_an_adapter_trains_as_a_whole_gets_its_gradient(slice_length, monkeypatch):
    monkeypatch.setattr(head, "slice_tokens", lambda *_: slice_length)
    model = make_family("qwen2")
    enable_logprobs(model)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with torch.no_grad():
        next(p for name, p in adapted.named_parameters() if "lm_head.modules_to_save" in name).mul_(2)
    actual = evaluate(adapted)
    assert_same(actual, evaluate_whole(adapted))
    assert any("lm_head.modules_to_save" in name for name in actual[2])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("slice_length", [3, 256])
def test_adapters_on_the_head_get_their_gradient(tied, slice_length, monkeypatch):
    monkeypatch.setattr(head, "slice_tokens", lambda *_: slice_length)
    model = make_family("qwen2", tie_word_embeddings=tied)
    enable_logprobs(model)
    config = LoraConfig(r=2, target_modules=["lm_head", "q_proj", "up_proj"], lora_dropout=0.0, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    actual = evaluate(adapted)
    assert_same(actual, evaluate_whole(adapted))
    assert any("lm_head.lora_A" in name for name in actual[2])
    assert all("lora" in name for name in actual[2])


def test_dropout_in_an_adapter_of_the_head_is_drawn_once(monkeypatch):
    """What is recomputed in the backward pass drops the same; else the gradient would be that of another loss."""
    monkeypatch.setattr(head, "slice_tokens", lambda *_: 4)
    model = make_family("qwen2").double()
    enable_logprobs(model)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head"], lora_dropout=0.5)).train().double()
    weight = next(p for name, p in adapted.named_parameters() if "lm_head.lora_B" in name)
    with torch.no_grad():
        weight.normal_(std=0.3)

    def loss():
        torch.manual_seed(0)
        request = LogprobRequest(POSITIONS, TARGETS, 1.0, INPUT_IDS.shape[1])
        return (adapted(input_ids=INPUT_IDS, use_cache=False, logprob_request=request)[0] * WEIGHTS).sum()

    loss().backward()
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    slope = (weight.grad * direction).sum().item()
    losses = []
    for step in (1e-5, -1e-5):
        with torch.no_grad():
            weight.add_(step * direction)
            losses.append(loss().item())
            weight.sub_(step * direction)
    assert abs(slope) > 0.1
    assert (losses[0] - losses[1]) / 2e-5 == pytest.approx(slope, rel=1e-4)


@pytest.mark.parametrize("slice_length", [3, 256])
def test_a_token_that_cannot_come_leaves_entropy_and_gradient_finite(slice_length, monkeypatch):
    monkeypatch.setattr(head, "slice_tokens", lambda *_: slice_length)
    model = make_family("qwen2")
    enable_logprobs(model)
    plain = model.lm_head.forward
    impossible = torch.arange(48) >= 40
    model.lm_head.forward = lambda hidden: plain(hidden).masked_fill(impossible, -torch.inf)
    targets = TARGETS % 40
    request = LogprobRequest(POSITIONS, targets, 1.0, INPUT_IDS.shape[1])
    logps_M, entropy_M = model(input_ids=INPUT_IDS, logprob_request=request)
    logps_M.sum().backward()
    logits_MV = model(input_ids=INPUT_IDS).logits.flatten(0, 1)[POSITIONS, :40]
    expected = torch.distributions.Categorical(logits=logits_MV)
    torch.testing.assert_close(logps_M, expected.log_prob(targets), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy_M, expected.entropy().detach(), rtol=1e-5, atol=1e-5)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_half_precision_logprobs_are_float32_and_double_ones_float64():
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        model = make_family("qwen2").to(dtype)
        enable_logprobs(model)
        logps_M, entropy_M = model(
            input_ids=INPUT_IDS, logprob_request=LogprobRequest(POSITIONS, TARGETS, 1.0, INPUT_IDS.shape[1])
        )
        assert logps_M.dtype == entropy_M.dtype == expected


def test_nothing_to_score_is_two_empty_tensors_with_a_gradient_of_zero():
    model = make_family("qwen2")
    enable_logprobs(model)
    nothing = torch.zeros(0, dtype=torch.long)
    request = LogprobRequest(nothing, nothing, 1.0, INPUT_IDS.shape[1])
    logps_M, entropy_M = model(input_ids=INPUT_IDS, logprob_request=request)
    assert logps_M.shape == entropy_M.shape == (0,)
    logps_M.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


class Sizes(TorchDispatchMode):
    """Notes the elements of the largest tensor that an operation inside makes."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        result = func(*args, **kwargs)
        made = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        sizes = [x.numel() for x in made if x.untyped_storage().data_ptr() not in given]  # the others are views
        self.largest = max([self.largest, *sizes])
        return result


@pytest.mark.parametrize("name", ["qwen2", "gemma2", "cohere"])
@pytest.mark.parametrize("shared_prefix", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_logits_of_one_slice_are_all_that_is_ever_held(name, shared_prefix, checkpointing, monkeypatch):
    monkeypatch.setattr(head, "slice_tokens", lambda *_: 4)
    vocabulary = 400
    model = make_family(name, vocab_size=vocabulary, num_hidden_layers=2).train()
    enable_logprobs(model)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    completions = make_completions([(5, [8, 9, 7]), (3, [9, 8])])
    micro_batch = replace(Packer(9, None, 0), shared_prefix=shared_prefix).micro_batch(completions, 5)
    with Sizes() as sizes, serve_shared_prefix(model) if shared_prefix else contextlib.nullcontext():
        compute_logprobs(model, micro_batch, 0.7).logps_BT.sum().backward()
    hidden = model.config.hidden_size
    assert sizes.largest == hidden * vocabulary  # the gradient of the head
    assert sizes.largest < len(micro_batch.targets_M) * vocabulary
    with Sizes() as sizes:  # that all logits would have been noticed
        model(input_ids=micro_batch.input_ids_RS, use_cache=False).logits.sum().backward()
    assert sizes.largest > len(micro_batch.targets_M) * vocabulary


def test_no_more_than_a_slice_is_held_without_gradient_either(monkeypatch):
    monkeypatch.setattr(head, "slice_tokens", lambda *_: 4)
    model = make_family("qwen2", vocab_size=400)
    enable_logprobs(model)
    micro_batch = Packer(9, None, 0).micro_batch(make_completions([(5, [8, 9, 7])]), 3)
    with Sizes() as sizes, torch.no_grad():
        compute_logprobs(model, micro_batch, 0.7)
    assert sizes.largest == 4 * 400


@pytest.mark.parametrize("lengths", [[1], [8, 9, 7, 12, 11]], ids=["fewer tokens than slices", "more"])
def test_where_the_head_gathers_weights_inside_every_rank_has_as_many_slices(lengths, monkeypatch):
    """As ZeRO-3 does for an adapter of the head: ranks of other tokens would wait for each other."""
    base = make_family("qwen2", vocab_size=400)
    config = LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(base, config).double()
    enable_logprobs(model)
    micro_batch = Packer(10**6, None, 0).micro_batch(make_completions([(5, lengths)]), 3)

    def gradients():
        model.zero_grad()
        logps = compute_logprobs(model, micro_batch, 0.7).logps_BT
        logps.sum().backward()
        return [logps.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    expected, calls = gradients(), []
    monkeypatch.setattr(head, "_gathers_inside", lambda head: True)
    handle = causal_lm(model).lm_head.lora_A.default.register_forward_hook(lambda *call: calls.append(1))
    with Sizes() as sizes:
        found = gradients()
    handle.remove()
    assert len(calls) == 2 * head.GATHERS  # each once more in the backward pass
    assert all(torch.allclose(mine, other, atol=1e-6) for mine, other in zip(found, expected, strict=True))
    if sum(lengths) > head.GATHERS:
        assert sizes.largest < len(micro_batch.targets_M) * 400


def test_the_backward_pass_keeps_no_logits_of_several_slices(monkeypatch):
    """A slice at a time would be worth little if all slices stayed for the backward pass."""
    monkeypatch.setattr(head, "slice_tokens", lambda *_: 4)
    model = make_family("gemma2", vocab_size=400)
    enable_logprobs(model)
    kept = []

    def keep(tensor):
        kept.append(tensor.shape)
        return tensor

    micro_batch = Packer(9, None, 0).micro_batch(make_completions([(5, [8, 9, 7])]), 3)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        compute_logprobs(model, micro_batch, 0.7)
    assert kept
    assert not [shape for shape in kept if shape and shape[-1] == 400]


def evaluate_in_bfloat16(model, hidden_MD, targets_M):
    """Log-probabilities, entropies and the gradient of the head's weight, from hidden states of the last layer."""
    model.zero_grad()
    handle = model.model.register_forward_hook(lambda module, args, output: replaced(output, hidden_MD))
    request = LogprobRequest(torch.arange(len(targets_M)), targets_M, 1.0, len(targets_M))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logps_M, entropy_M = model(input_ids=targets_M[None], use_cache=False, logprob_request=request)
    handle.remove()
    (logps_M * torch.linspace(-1, 1, len(targets_M))).sum().backward()
    return logps_M.detach(), entropy_M, model.lm_head.weight.grad.clone()


def replaced(output, hidden_MD):
    output.last_hidden_state = hidden_MD[None]
    return output


def test_the_number_of_slices_adds_no_rounding_to_the_gradient_of_the_head(monkeypatch):
    model = make_family("qwen2", tie_word_embeddings=False)
    enable_logprobs(model)
    generator = torch.Generator().manual_seed(0)
    hidden_MD = (torch.randn(512, 16, generator=generator) + 1).bfloat16()
    targets_M = torch.randint(0, 48, (512,), generator=generator)

    def error(slice_length):
        monkeypatch.setattr(head, "slice_tokens", lambda *_: slice_length)
        gradient = evaluate_in_bfloat16(model, hidden_MD, targets_M)[2]
        return (gradient.double() - exact).norm() / exact.norm()

    with torch.no_grad():
        logits_MV = model.lm_head(hidden_MD.float()).double()
    probs_MV = logits_MV.softmax(-1)
    slopes_MV = torch.nn.functional.one_hot(targets_M, 48) - probs_MV
    exact = (slopes_MV * torch.linspace(-1, 1, 512)[:, None]).T @ hidden_MD.double()
    assert error(4) < 1.2 * error(512) < 0.02


def test_entropy_is_that_of_float32_under_autocast():
    model = make_family("qwen2", tie_word_embeddings=False)
    enable_logprobs(model)
    hidden_MD = torch.randn(6, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    entropy_M = evaluate_in_bfloat16(model, hidden_MD, TARGETS[:6])[1]
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        logits_MV = model.lm_head(hidden_MD).float()
    torch.testing.assert_close(entropy_M, torch.distributions.Categorical(logits=logits_MV).entropy())


SMALL = {"vocab_size": 48, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
MAMBA = {"mamba_d_ssm": 16, "mamba_n_heads": 4, "mamba_d_head": 4, "mamba_d_state": 4, "mamba_chunk_size": 8}
READERS = {
    "attributes of the output": ("GPT2LMHeadModel", "GPT2Config", {
        "vocab_size": 48, "n_embd": 16, "n_layer": 2, "n_head": 4, "bos_token_id": None, "eos_token_id": 1,
    }),
    "a module of the backbone": ("OPTForCausalLM", "OPTConfig", SMALL | {"ffn_dim": 16, "word_embed_proj_dim": 16}),
    "the weight of the head": ("MambaForCausalLM", "MambaConfig", SMALL | {"state_size": 4}),
    "a number of the backbone": ("FalconH1ForCausalLM", "FalconH1Config", SMALL | MAMBA | {
        "num_key_value_heads": 2, "head_dim": 4, "intermediate_size": 16,
    }),
    "the shape of its input": ("Gemma4ForCausalLM", "Gemma4TextConfig", SMALL | {
        "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 8, "intermediate_size": 24,
        "hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 48, "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"],
    }),
}  # fmt: skip
"""By what a model's own forward reads besides the last hidden state."""


@pytest.mark.parametrize("reads", READERS)
def test_a_forward_that_reads_more_of_its_backbone_and_head_computes_logprobs_too(reads):
    model_class, config_class, values = READERS[reads]
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**values)).eval()
    plain = plain_copy(model)
    enable_logprobs(model)
    assert_same(evaluate(model), evaluate_whole(plain))


@pytest.mark.parametrize("config", [PromptTuningConfig, PrefixTuningConfig])
def test_virtual_tokens_before_the_prompt_shift_no_position(config):
    adapted = get_peft_model(make_family("qwen2"), config(num_virtual_tokens=3, task_type="CAUSAL_LM")).eval()
    completions = make_completions([(5, [4, 6])])
    with torch.no_grad():
        logits = [adapted(input_ids=torch.tensor([c.prompt_ids + c.ids])).logits[0] for c in completions]
    enable_logprobs(adapted)
    scores = compute_logprobs(adapted, Packer(9, None, 0, shared_prefix=False).micro_batch(completions, 2), 1.0)
    for row, (values, completion) in enumerate(zip(logits, completions, strict=True)):
        count = len(completion.ids)
        expected = values[-count - 1 : -1].log_softmax(-1)[range(count), completion.ids]
        torch.testing.assert_close(scores.logps_BT[row, :count].detach(), expected, rtol=1e-5, atol=1e-5)


# ---- All else stays as it is ----


def generated(model):
    torch.manual_seed(0)
    return model.generate(INPUT_IDS, attention_mask=torch.ones_like(INPUT_IDS), max_new_tokens=6, do_sample=True)


@pytest.mark.parametrize("name", ["qwen2", "gemma2", "gpt_neox", "qwen3_moe"])
def test_a_model_that_computes_logprobs_is_otherwise_as_before(name, tmp_path):
    model = make_family(name).eval()
    with torch.no_grad():
        before = model(input_ids=INPUT_IDS, labels=INPUT_IDS)
    signature, keys, tokens = inspect.signature(model.forward), list(model.state_dict()), generated(model)
    modules = [name for name, _ in model.named_modules()]
    enable_logprobs(model)
    assert inspect.signature(model.forward) == signature
    assert list(model.state_dict()) == keys
    assert [name for name, _ in model.named_modules()] == modules
    assert torch.equal(generated(model), tokens)
    evaluate(model)
    assert torch.equal(generated(model), tokens)
    with torch.no_grad():
        after = model(input_ids=INPUT_IDS, labels=INPUT_IDS)
    assert torch.equal(after.logits, before.logits)
    assert torch.equal(after.loss, before.loss)
    model.save_pretrained(tmp_path)
    loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True, dtype=model.dtype)
    assert not any(report.values())
    assert all(
        torch.equal(x, y) for x, y in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True)
    )


def test_an_adapted_model_generates_as_before():
    plain, scoring = (get_peft_model(make_family("qwen2"), LoraConfig(task_type="CAUSAL_LM")) for _ in range(2))
    scoring.load_state_dict(plain.state_dict())
    enable_logprobs(scoring)
    ids = {
        "input_ids": INPUT_IDS,
        "attention_mask": torch.ones_like(INPUT_IDS),
        "max_new_tokens": 5,
        "do_sample": False,
    }
    assert torch.equal(scoring.eval().generate(**ids), plain.eval().generate(**ids))


def test_a_copy_computes_logprobs_with_its_own_weights():
    model = make_family("qwen2")
    enable_logprobs(model)
    before = evaluate(model)[0]
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.model.embed_tokens.weight.mul_(0.5)
        copied.lm_head.weight.mul_(2.0)
    fresh = plain_copy(copied)
    enable_logprobs(fresh)
    assert torch.equal(evaluate(copied)[0], evaluate(fresh)[0])
    assert not torch.equal(evaluate(copied)[0], before)
    assert torch.equal(evaluate(model)[0], before)
    model.zero_grad(set_to_none=True)
    evaluate(copied)
    assert all(p.grad is None for p in model.parameters())


def test_enabling_twice_changes_nothing():
    model = make_family("qwen2")
    enable_logprobs(model)
    forward, before = model.forward, evaluate(model)[0]
    enable_logprobs(model)
    enable_logprobs(get_peft_model(model, LoraConfig(task_type="CAUSAL_LM")))
    assert model.forward == forward
    assert torch.equal(evaluate(model)[0], before)


def test_the_backbone_is_back_after_an_exception():
    model = make_family("qwen2")
    enable_logprobs(model)
    backbone = model.model

    def fail(*args):
        raise ZeroDivisionError

    handle = model.lm_head.register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        evaluate(model)
    handle.remove()
    assert model.model is backbone
    evaluate(model)


def test_a_model_without_a_backbone_is_an_error():
    with pytest.raises(TypeError, match=r"Qwen2Model is not a backbone .*'model'.* and a head"):
        enable_logprobs(Qwen2Model(make_model().config))
    headed = make_family("qwen2")
    headed.base_model_prefix = "elsewhere"  # as of Llama4ForCausalLM, whose backbone has another name
    with pytest.raises(TypeError, match=r"Qwen2ForCausalLM is not a backbone .*'elsewhere'"):
        enable_logprobs(headed)
    with pytest.raises(TypeError, match=r"Linear holds no transformers\.PreTrainedModel"):
        enable_logprobs(torch.nn.Linear(1, 1))


def test_the_language_model_is_found_under_wrappers():
    model = make_family("qwen2")
    assert causal_lm(model) is model
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM"))
    assert causal_lm(adapted) is model
    assert causal_lm(torch.nn.DataParallel(adapted)) is model
    assert causal_lm(torch.compile(adapted)) is model


def test_all_completions_of_a_micro_batch_get_their_logprobs_whatever_the_slice(monkeypatch):
    model = make_family("qwen3")
    enable_logprobs(model)
    micro_batch = Packer(99, None, 0).micro_batch(make_completions(RAGGED, masked=0.3), 25)
    with torch.no_grad():
        expected = compute_logprobs(model, micro_batch, 0.8)
        monkeypatch.setattr(head, "slice_tokens", lambda *_: 7)
        actual = compute_logprobs(model, micro_batch, 0.8)
    torch.testing.assert_close(actual.logps_BT, expected.logps_BT, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(actual.entropy_BT, expected.entropy_BT, rtol=1e-5, atol=1e-5)
