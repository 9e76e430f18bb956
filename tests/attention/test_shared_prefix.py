import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from grpo_trl.attention import flash, shared_prefix
from grpo_trl.attention.flash import flash_attention
from grpo_trl.attention.layout import Layout
from grpo_trl.attention.shared_prefix import (
    NAME,
    blocked_attention,
    dense_attention,
    serve_shared_prefix,
    shared_prefix_attention,
)
from grpo_trl.logprobs.compute import compute_logprobs
from grpo_trl.logprobs.head import enable_logprobs
from grpo_trl.logprobs.packing import Packer
from tests.helpers.families import make_completions, make_family
from tests.helpers.models import make_model


LAYOUTS = {
    "one group": Layout.of([(5, [3, 7, 1])]),
    "empty branches": Layout.of([(4, [0, 3, 0, 0, 2])]),
    "several groups": Layout.of([(3, [2, 0]), (1, [4]), (6, []), (2, [5, 1, 1]), (1, [0])]),
    "a prompt alone": Layout.of([(4, [])]),
    "branches that are all empty": Layout.of([(3, [0, 0]), (2, [0])]),
    "one token": Layout.of([(1, [])]),
    "branches longer than prompts": Layout.of([(1, [13, 17]), (2, [11])]),
    "more than a block of keys": Layout.of([(70, [65, 1, 130]), (129, [17])]),
    "sixteen branches": Layout.of([(7, [2, 5, 0, 1, 3, 8, 4, 4, 1, 0, 6, 2, 9, 3, 1, 5])]),
}
HEADS = {
    "own keys": (2, 2, 4, 4),
    "shared keys": (6, 2, 4, 4),
    "one key head": (4, 1, 3, 3),
    "smaller values": (4, 2, 6, 3),
    "larger values": (2, 1, 3, 5),
}
"""Query heads, key heads, head size, and that of the values."""
LAYOUT = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
HEAD = pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)

SCALING = 0.9


def tensors(layout, heads, dtype=torch.float64, seed=0):
    """Query, key, value, and the gradient of the output."""
    num_heads, key_heads, size, value_size = heads
    generator = torch.Generator().manual_seed(seed)

    def draw(rows, columns):
        return torch.randn(1, rows, layout.num_tokens, columns, generator=generator, dtype=torch.float64).to(dtype)

    inputs = draw(num_heads, size), draw(key_heads, size), draw(key_heads, value_size)
    return [x.requires_grad_() for x in inputs], draw(num_heads, value_size)


def evaluate(attention, layout, heads, *args, dtype=torch.float64):
    """Output, and gradients of query, key and value."""
    inputs, grad = tensors(layout, heads, dtype)
    output = attention(*inputs, layout, SCALING, *args)
    return [output.detach(), *torch.autograd.grad(output, inputs, grad, allow_unused=True)]


def assert_all_close(actual, expected, within=1e-10):
    for mine, other in zip(actual, expected, strict=True):
        assert mine.shape == other.shape
        assert ((mine.double() - other.double()).abs() <= within).all()


def alone(query, key, value, layout, scaling, window=None, softcap=None):
    """Every completion after its own copy of the prompt, by a softmax that is written out."""
    copies = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(copies, dim=1) for x in (key, value))

    def causal(places):
        q, k, v = (x[0][:, places] for x in (query, key, value))
        scores = torch.einsum("hld,hnd->hln", q, k) * scaling
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        rows = []
        for i in range(len(places)):
            first = 0 if window is None else max(0, i - window + 1)
            weights = scores[:, i, first : i + 1].exp()
            weights = weights / weights.sum(-1, keepdim=True)
            rows.append(torch.einsum("hn,hnd->hd", weights, v[:, first : i + 1]))
        return torch.stack(rows, dim=1)

    parts, end = [], 0
    for group in layout.groups:
        prompt = list(range(end, end + group.prompt.length))
        parts.append(causal(prompt))
        end += len(prompt)
        for branch in group.branches:
            own = list(range(end, end + branch.length))
            parts.append(causal(prompt + own)[:, len(prompt) :])
            end += len(own)
    return torch.cat(parts, dim=1).unsqueeze(0)


def pairs(*choices):
    """Every layout with every element of each of `choices`, which are combined in turn rather than in full."""
    longest = max(map(len, choices))
    return [
        (layout, *(values[(i + j) % len(values)] for values in choices))
        for i, layout in enumerate(LAYOUTS.values())
        for j in range(longest)
    ]


@pytest.mark.parametrize(
    "layout, heads, window, softcap", pairs(list(HEADS.values()), [None, 1, 4], [None, 1.5, None, 1.5]), ids=str
)
def test_dense_attention_is_each_completion_after_its_prompt(layout, heads, window, softcap):
    expected = evaluate(alone, layout, heads, window, softcap)
    assert_all_close(evaluate(dense_attention, layout, heads, window, softcap), expected)


@LAYOUT
def test_dense_attention_agrees_with_torchs_own(layout):
    query, key, value = tensors(layout, HEADS["shared keys"])[0]
    output = dense_attention(query, key, value, layout, SCALING)
    for group in layout.groups:
        for branch in group.branches:
            places = [*range(group.prompt.start, group.prompt.stop), *range(branch.start, branch.stop)]
            parts = (x[:, :, places] for x in (query, key, value))
            expected = scaled_dot_product_attention(*parts, is_causal=True, scale=SCALING, enable_gqa=True)
            assert_all_close([output[:, :, places]], [expected])


@pytest.mark.parametrize(
    "layout, heads, block, options",
    pairs(
        [HEADS["shared keys"], HEADS["smaller values"]],
        [1, 3, 256, 3, 1],
        [(None, None), (None, 1.5), (1, None), (3, None), (6, 1.5), (100, None)],
    ),
    ids=str,
)
def test_blocked_attention_agrees_with_dense_attention(layout, heads, block, options, monkeypatch):
    monkeypatch.setattr(shared_prefix, "BLOCK", block)
    expected = evaluate(dense_attention, layout, heads, *options)
    assert_all_close(evaluate(blocked_attention, layout, heads, *options), expected)


@pytest.mark.parametrize("window", [None, 20])
def test_blocked_attention_without_gradient_agrees_too_and_holds_no_square(window, monkeypatch):
    monkeypatch.setattr(shared_prefix, "BLOCK", 8)
    layout = Layout.of([(40, [33, 50])])
    (query, key, value), _ = tensors(layout, (2, 1, 4, 4))
    expected = dense_attention(query, key, value, layout, SCALING, window)
    largest = []
    attend = shared_prefix._attend

    def spy(block, parts, *args):
        largest.append(sum(block.shape[2] * mask.shape[1] for _, _, mask in parts))
        return attend(block, parts, *args)

    monkeypatch.setattr(shared_prefix, "_attend", spy)
    with torch.no_grad():
        output = blocked_attention(query, key, value, layout, SCALING, window)
    assert_all_close([output], [expected])
    assert max(largest) <= 8 * (90 if window is None else 20 + 7)


@LAYOUT
@HEAD
def test_flash_attention_agrees_with_dense_attention(layout, heads):
    assert_all_close(evaluate(flash_attention, layout, heads), evaluate(dense_attention, layout, heads))


@HEAD
@pytest.mark.parametrize("dtype, within", [(torch.float32, 1e-5), (torch.bfloat16, 0.15)])
def test_flash_attention_of_less_precision_is_as_good_as_that(heads, dtype, within):
    layout = LAYOUTS["several groups"]
    actual = evaluate(flash_attention, layout, heads, dtype=dtype)
    assert all(x.dtype == dtype for x in actual)
    assert_all_close(actual, evaluate(dense_attention, layout, heads), within)


def test_flash_attention_takes_scores_far_apart():
    """The part with the higher scores takes it all, and nothing overflows."""
    layout = Layout.of([(3, [2, 4]), (2, [1])])
    for factor in (30.0, 300.0):
        (query, key, value), grad = tensors(layout, (2, 2, 4, 4))
        inputs = [(query * factor).detach().requires_grad_(), key, value]
        actual, expected = (attention(*inputs, layout, SCALING) for attention in (flash_attention, dense_attention))
        gradients = [torch.autograd.grad(output, inputs, grad) for output in (actual, expected)]
        assert actual.isfinite().all()
        assert_all_close([actual], [expected], 1e-9)
        assert_all_close(*gradients, 1e-7)


@HEAD
def test_flash_attention_takes_tensors_of_any_stride(heads):
    """Models make heads by transposing, and a sum's gradient is one number everywhere."""
    layout = LAYOUTS["several groups"]
    inputs, _ = tensors(layout, heads)
    turned = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in inputs]
    flash_attention(*turned, layout, SCALING).sum().backward()
    dense_attention(*inputs, layout, SCALING).sum().backward()
    assert_all_close([x.grad for x in turned], [x.grad for x in inputs])


# ---- The CUDA kernels' index arithmetic, on the CPU ----


def expand(x_SKD, num_heads):
    return x_SKD.repeat_interleave(num_heads // x_SKD.shape[1], dim=1).double()


class Kernels:
    """torch's two kernels for sequences one behind the other, written out; they notice what CUDA would not take."""

    def __init__(self):
        self.forwards = self.backwards = 0

    def check(self, tensors, queries, keys, max_query, max_key, dropout):
        query, key, value = tensors[:3]
        assert dropout == 0.0
        assert all(x.stride(-1) == 1 and x.ndim == 3 for x in tensors)
        for ends, longest, tokens in ((queries, max_query, query), (keys, max_key, key)):
            assert ends.dtype == torch.int32
            assert ends.tolist()[0] == 0
            assert ends.tolist()[-1] == len(tokens)
            assert longest == ends.diff().max() > 0
        assert len(queries) == len(keys)
        assert key.shape[:2] == value.shape[:2]
        assert query.shape[-1] == key.shape[-1] == value.shape[-1]

    def spans(self, queries, keys):
        ends = zip(queries.tolist(), queries.tolist()[1:], keys.tolist(), keys.tolist()[1:], strict=False)
        return [(slice(a, b), slice(c, d)) for a, b, c, d in ends]

    def scores(self, query, key, causal, scale):
        scores = torch.einsum("lhd,nhd->hln", query.double(), key) * scale
        if causal:
            mask = torch.ones(scores.shape[1:], dtype=torch.bool).tril(scores.shape[2] - scores.shape[1])
            scores = scores.masked_fill(~mask, -math.inf)
        return scores

    def _flash_attention_forward(
        self, query, key, value, queries, keys, max_query, max_key, dropout, causal, debug, *, scale
    ):
        self.forwards += 1
        self.check((query, key, value), queries, keys, max_query, max_key, dropout)
        assert not debug
        num_heads = query.shape[1]
        output = torch.full(query.shape, math.nan, dtype=query.dtype)
        lse = torch.full((num_heads, len(query)), math.nan, dtype=torch.promote_types(query.dtype, torch.float32))
        for q, k in self.spans(queries, keys):
            scores = self.scores(query[q], expand(key[k], num_heads), causal, scale)
            lse[:, q] = scores.logsumexp(-1).to(lse.dtype)
            weighted = torch.einsum("hln,nhd->lhd", scores.softmax(-1), expand(value[k], num_heads))
            output[q] = weighted.to(output.dtype)
        return output, lse, *self.state(causal), torch.zeros(0)

    def state(self, causal):
        """What a kernel says of its dropout, and the backward pass of the same kernel wants to have."""
        return torch.tensor([causal, 7]).to(torch.uint64), torch.tensor(int(causal), dtype=torch.uint64)

    def _flash_attention_backward(
        self,
        grad,
        query,
        key,
        value,
        output,
        lse,
        queries,
        keys,
        max_query,
        max_key,
        dropout,
        causal,
        rng_state,
        unused,
        *,
        scale,
    ):
        self.backwards += 1
        self.check((query, key, value, grad, output), queries, keys, max_query, max_key, dropout)
        assert all(torch.equal(x, y) for x, y in zip((rng_state, unused), self.state(causal), strict=True))
        assert all(x.is_contiguous() for x in (grad, query, key, value, output, lse))
        num_heads, key_heads = query.shape[1], key.shape[1]
        assert lse.shape == (num_heads, len(query))
        grads = [torch.full_like(x, math.nan) for x in (query, key, value)]

        def shared(x_SHD):
            return x_SHD.unflatten(1, (key_heads, -1)).sum(2)

        for q, k in self.spans(queries, keys):
            keys_NHD, values_NHD = expand(key[k], num_heads), expand(value[k], num_heads)
            weights = (self.scores(query[q], keys_NHD, causal, scale) - lse[:, q, None].double()).exp()
            slope = torch.einsum("lhd,nhd->hln", grad[q].double(), values_NHD)
            slope = weights * (slope - (grad[q].double() * output[q].double()).sum(-1).T.unsqueeze(-1)) * scale
            parts = (
                torch.einsum("hln,nhd->lhd", slope, keys_NHD),
                shared(torch.einsum("hln,lhd->nhd", slope, query[q].double())),
                shared(torch.einsum("hln,lhd->nhd", weights, grad[q].double())),
            )
            for total, place, part in zip(grads, (q, k, k), parts, strict=True):
                total[place] = part.to(total.dtype)
        return tuple(grads)


@pytest.fixture
def kernels(monkeypatch):
    fake = Kernels()
    monkeypatch.setattr(flash, "_aten", fake)
    return fake


EQUAL = {name: heads for name, heads in HEADS.items() if heads[2] == heads[3]}


@pytest.mark.parametrize(
    "layout, heads, precision",
    pairs(list(EQUAL.values()), [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 0.15)]),
    ids=str,
)
def test_the_cuda_path_asks_the_kernels_for_the_right_sequences(layout, heads, precision, kernels):
    dtype, within = precision
    layout = Layout(layout.groups)  # without what an earlier test may have left in it
    inputs, grad = tensors(layout, heads, dtype)
    query, key, value = (x.detach() for x in inputs)
    before = [x.clone() for x in (query, key, value, grad)]
    output, lse, *states = flash._cuda_forward(query, key, value, layout, SCALING)
    gradients = flash._cuda_backward(grad, (query, key, value, output, lse, *states), layout, SCALING)
    assert_all_close([output, *gradients], evaluate(dense_attention, layout, heads), within)
    assert lse.shape == query.shape[:3]
    assert all(torch.equal(x, y) for x, y in zip((query, key, value, grad), before, strict=True))
    calls = 2 if layout.crossings else 1
    assert (kernels.forwards, kernels.backwards) == (calls, calls)


def test_the_cuda_path_takes_what_models_hand_over(kernels):
    """Transposed heads, and a gradient that is transposed too."""
    layout = Layout.of([(3, [2, 0, 4]), (2, [1])])
    inputs, grad = tensors(layout, (6, 2, 4, 4))
    turned = [x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in (*inputs, grad)]
    output, *rest = flash._cuda_forward(*turned[:3], layout, SCALING)
    gradients = flash._cuda_backward(turned[3], (*turned[:3], output, *rest), layout, SCALING)
    assert_all_close([output, *gradients], evaluate(dense_attention, layout, (6, 2, 4, 4)))


def test_the_places_of_a_layout_are_made_once_for_all_layers():
    layout = Layout.of([(3, [2, 0])])
    cpu = torch.device("cpu")
    assert flash._Varlen.of(layout, cpu) is flash._Varlen.of(layout, cpu)


@pytest.mark.parametrize("device, dtype, size, expected", [
    ("cuda", torch.bfloat16, 128, True),
    ("cuda", torch.float16, 256, True),
    ("cuda", torch.float32, 128, False),
    ("cuda", torch.bfloat16, 264, False),
    ("cpu", torch.float64, 300, True),
    ("mps", torch.float32, 64, False),
])  # fmt: skip
def test_flash_is_for_what_torch_has_a_kernel(device, dtype, size, expected):
    query = SimpleNamespace(device=torch.device(device), dtype=dtype, shape=(1, 2, 3, size))
    assert flash.has_flash(query) == expected


# ---- What models call ----


@pytest.mark.parametrize("options", [
    {},
    {"scaling": 0.3},
    {"sliding_window": 4},
    {"sliding_window": 9},
    {"softcap": 1.5},
    {"sliding_window": 2, "softcap": 2.0, "scaling": 1.0},
    {"attention_mask": None, "position_ids": 1, "is_causal": True, "dropout": 0.0, "s_aux": None},
], ids=str)  # fmt: skip
@HEAD
@pytest.mark.parametrize("kernel", [True, False])
def test_models_get_their_attention_with_its_options(options, heads, kernel, monkeypatch):
    monkeypatch.setattr(shared_prefix, "has_flash", lambda query: kernel)
    layout = Layout.of([(5, [3, 4]), (2, [0, 1])])  # longest 9
    inputs, _ = tensors(layout, heads)
    arguments = {"attention_mask": None} | options
    output, weights = shared_prefix_attention(torch.nn.Module(), *inputs, shared_prefix=layout, **arguments)
    scaling = options.get("scaling", heads[2] ** -0.5)
    expected = dense_attention(*inputs, layout, scaling, options.get("sliding_window"), options.get("softcap"))
    assert weights is None
    assert output.is_contiguous()
    assert_all_close([output], [expected.transpose(1, 2)])


@pytest.mark.parametrize(
    "options, kernel",
    [({}, True), ({"sliding_window": 9}, True), ({"sliding_window": 8}, False), ({"softcap": 50.0}, False)],
    ids=str,
)
def test_the_kernels_serve_what_they_can(options, kernel, monkeypatch):
    layout = Layout.of([(5, [3, 4]), (2, [0, 1])])
    called = []

    def spy(name):
        plain = getattr(shared_prefix, name)
        monkeypatch.setattr(shared_prefix, name, lambda *args: called.append(name) or plain(*args))

    spy("flash_attention")
    spy("blocked_attention")
    inputs, _ = tensors(layout, (2, 2, 4, 4))
    shared_prefix_attention(torch.nn.Module(), *inputs, None, shared_prefix=layout, **options)
    assert called == ["flash_attention" if kernel else "blocked_attention"]


@pytest.mark.parametrize(
    "options, words",
    [
        ({"dropout": 0.1}, r"dropout of attention, 0\.1"),
        ({"s_aux": torch.zeros(2)}, "attention sinks"),
        ({"shared_prefix": None}, "does not pass keywords"),
    ],
)
def test_what_has_no_packed_form_is_an_error(options, words):
    layout = Layout.of([(2, [1])])
    inputs, _ = tensors(layout, (2, 2, 4, 4))
    with pytest.raises(NotImplementedError, match=words):
        shared_prefix_attention(torch.nn.Module(), *inputs, None, **({"shared_prefix": layout} | options))


def test_dropout_of_attention_in_training_is_an_error_and_in_evaluation_none():
    model = make_model(attention_dropout=0.5)
    enable_logprobs(model)
    micro_batch = Packer(4, None, 0).micro_batch(make_completions([(3, [2, 1])]), 2)
    with pytest.raises(NotImplementedError, match=r"dropout of attention, 0\.5"):
        compute_logprobs(model.train(), micro_batch, 1.0)
    assert model.config._attn_implementation == "sdpa"
    compute_logprobs(model.eval(), micro_batch, 1.0)


def test_a_forward_without_a_layout_is_an_error_while_packing_is_served():
    model = make_model()
    with serve_shared_prefix(model), pytest.raises(NotImplementedError, match="does not pass keywords"):
        model(input_ids=torch.tensor([[5, 6, 7]]))


def test_attention_sinks_are_an_error():
    model = make_gpt_oss()
    enable_logprobs(model)
    micro_batch = Packer(4, None, 0).micro_batch(make_completions([(3, [2, 1])]), 2)
    with pytest.raises(NotImplementedError, match="attention sinks"):
        compute_logprobs(model, micro_batch, 1.0)


def make_gpt_oss():
    from transformers import GptOssConfig, GptOssForCausalLM

    return GptOssForCausalLM(
        GptOssConfig(
            vocab_size=48,
            hidden_size=16,
            intermediate_size=8,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=4,
            num_local_experts=2,
            num_experts_per_tok=1,
            pad_token_id=0,
            eos_token_id=1,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        )
    )


class Two(torch.nn.Module):
    """Two models of which each has a configuration of its own, and a module with one that is no transformers'."""

    def __init__(self):
        super().__init__()
        self.first = make_family("llama", attn_implementation="eager")
        self.second = make_family("qwen2", attn_implementation="sdpa")
        self.third = torch.nn.Linear(1, 1)
        self.third.config = {"model_type": "custom"}


def test_every_configuration_is_restored_after_an_exception_too():
    model = Two()
    configs = [model.first.config, model.second.config]
    assert [c._attn_implementation for c in configs] == ["eager", "sdpa"]
    with serve_shared_prefix(model):
        assert [c._attn_implementation for c in configs] == [NAME, NAME]
    assert [c._attn_implementation for c in configs] == ["eager", "sdpa"]
    with pytest.raises(ZeroDivisionError), serve_shared_prefix(model):
        1 / 0  # noqa: B018
    assert [c._attn_implementation for c in configs] == ["eager", "sdpa"]
    with serve_shared_prefix(model), serve_shared_prefix(model):
        pass
    assert [c._attn_implementation for c in configs] == ["eager", "sdpa"]


def test_configurations_within_a_configuration_are_restored():
    """A model of text and images sets the attention of its parts with its own."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = make_family("gemma3").config.to_dict()
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 8, "patch_size": 4}
    model = Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=47)
    )
    configs = [model.config, model.config.text_config, model.config.vision_config]
    model.config.text_config._attn_implementation = "eager"
    before = [config._attn_implementation for config in configs]
    assert before == ["sdpa", "eager", "sdpa"]
    with serve_shared_prefix(model):
        assert model.config.text_config._attn_implementation == NAME
    assert [config._attn_implementation for config in configs] == before
