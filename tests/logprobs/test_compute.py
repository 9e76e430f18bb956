import pytest
import torch
from torch import nn

from grpo_trl.logprobs.compute import compute_completion_logprobs, compute_logprobs
from grpo_trl.logprobs.head import enable_logprobs
from grpo_trl.logprobs.packing import Packer
from grpo_trl.objective import ObjectiveOptions, grpo_loss, make_objective
from grpo_trl.types import Completion, Ranks
from tests.helpers.models import ARCHITECTURES, make_model


PACKED = pytest.mark.parametrize("shared_prefix", [True, False], ids=["packed", "padded"])
ROWS = [
    ([5, 6, 7], [8, 9]),
    ([5, 6, 7], [4]),
    ([5, 6, 7], []),
    ([5, 6, 7], [8, 9, 2, 11]),
    ([5], [4, 3, 2, 1]),
    ([9, 8, 7, 6, 5], []),
    ([30, 31], [32]),
]
MASKED = [
    Completion([5, 6], [7, 8, 9], [True, False, True]),
    Completion([5, 6], [9, 8, 7], [False, True, False]),
    Completion([5, 6], [7, 8], [False, False]),
    Completion([8], [3, 4, 5, 6], [True, False, False, False]),
]


def completions(rows=ROWS):
    return [Completion(prompt, ids, [True] * len(ids)) for prompt, ids in rows]


def make_packer(shared_prefix=True, batch_size=8, max_tokens=None, pad_token_id=0, **options):
    return Packer(batch_size, max_tokens, pad_token_id, shared_prefix=shared_prefix, **options)


def micro_batch_of(made, shared_prefix, pad_token_id=0):
    return make_packer(shared_prefix, pad_token_id=pad_token_id).micro_batch(made, divisor=float(len(made)))


def make_evaluator(architecture="qwen2", **changes):
    model = make_model(architecture, **changes).eval()
    enable_logprobs(model)
    return model


def alone(model, completion, temperature=1.0):
    """Log-probabilities and entropies of one completion without any neighbour, 0 where it is not trained."""
    prompt, ids = completion.prompt_ids, completion.ids
    logits = model(torch.tensor([prompt + ids])).logits[0].double() / temperature
    logps = logits[len(prompt) - 1 : len(prompt) - 1 + len(ids)].log_softmax(-1)
    mask = torch.tensor(completion.mask, dtype=torch.bool)
    return logps[range(len(ids)), ids] * mask, -(logps.exp() * logps).sum(-1) * mask


def assert_close(actual, expected):
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


@PACKED
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@torch.no_grad()
def test_padding_and_neighbours_change_nothing(shared_prefix, architecture, temperature):
    model = make_evaluator(architecture)
    scores = compute_logprobs(model, micro_batch_of(completions(), shared_prefix), temperature)
    assert scores.logps_BT.shape == scores.entropy_BT.shape == (len(ROWS), 4)
    assert scores.logps_BT.dtype == scores.entropy_BT.dtype == torch.float32
    for row, completion in enumerate(completions()):
        logps, entropy = alone(model, completion, temperature)
        length = len(completion.ids)
        assert_close(scores.logps_BT[row, :length], logps)
        assert_close(scores.entropy_BT[row, :length], entropy.detach())
        assert (scores.logps_BT[row, length:] == 0).all()
        assert (scores.entropy_BT[row, length:] == 0).all()


@PACKED
@torch.no_grad()
def test_tokens_that_are_not_trained_score_zero_and_are_read_by_those_behind_them(shared_prefix):
    model = make_evaluator()
    scores = compute_logprobs(model, micro_batch_of(MASKED, shared_prefix), 1.0)
    for row, completion in enumerate(MASKED):
        logps, entropy = alone(model, completion)
        assert_close(scores.logps_BT[row, : len(logps)], logps)
        assert_close(scores.entropy_BT[row, : len(logps)], entropy)
        assert (scores.logps_BT[row, len(logps) :] == 0).all()


@torch.no_grad()
def test_the_pad_token_is_never_read():
    model = make_evaluator()
    first, second = (micro_batch_of(completions(), False, pad_token_id) for pad_token_id in (0, 47))
    assert not torch.equal(first.input_ids_RS, second.input_ids_RS)
    assert torch.equal(compute_logprobs(model, first, 1.0).logps_BT, compute_logprobs(model, second, 1.0).logps_BT)


@PACKED
def test_the_gradient_is_that_of_the_plain_forward(shared_prefix):
    model = make_evaluator().double()
    made = completions() + MASKED
    weights = torch.linspace(-1.0, 2.0, len(made), dtype=torch.float64)
    run_on_all_ranks = compute_logprobs(model, micro_batch_of(made, shared_prefix), 0.7).logps_BT.sum(1)
    actual = torch.autograd.grad((run_on_all_ranks * weights).sum(), list(model.parameters()))
    plain = torch.stack([alone(model, completion, 0.7)[0].sum() for completion in made])
    expected = torch.autograd.grad((plain * weights).sum(), list(model.parameters()))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)  # the norms round to float32
    assert all((gradient != 0).any() for gradient in actual)


@PACKED
@pytest.mark.parametrize("rows", [[], [([5, 6], []), ([7], [])]], ids=["no completions", "empty completions"])
def test_a_micro_batch_without_tokens_has_no_loss_and_gives_every_parameter_a_gradient_of_zero(shared_prefix, rows):
    model = make_evaluator()
    micro_batch = micro_batch_of(completions(rows), shared_prefix)
    scores = compute_logprobs(model, micro_batch, 1.0)
    assert scores.logps_BT.shape == micro_batch.mask_BT.shape == (len(rows), 1)
    loss = grpo_loss(
        scores.logps_BT,
        scores.logps_BT.detach(),
        micro_batch.advantages_BU,
        micro_batch.mask_BT,
        objective=make_objective(ObjectiveOptions()),
    ).loss
    loss.backward()
    assert loss == 0
    assert all(p.grad is not None and (p.grad == 0).all() for p in model.parameters())  # what ranks wait for


@PACKED
def test_entropy_has_no_gradient_and_logps_have(shared_prefix):
    scores = compute_logprobs(make_evaluator(), micro_batch_of(completions(), shared_prefix), 1.0)
    assert scores.logps_BT.requires_grad
    assert not scores.entropy_BT.requires_grad


@PACKED
def test_entropy_has_its_gradient_where_it_is_asked_for(shared_prefix):
    model, made = make_evaluator().double(), completions() + MASKED
    entropy_BT = compute_logprobs(model, micro_batch_of(made, shared_prefix), 0.7, entropy_gradient=True).entropy_BT
    actual = torch.autograd.grad(entropy_BT.sum(), list(model.parameters()))
    plain = sum(alone(model, completion, 0.7)[1].sum() for completion in made)
    expected = torch.autograd.grad(plain, list(model.parameters()))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


class Wrapper(nn.Module):
    """Like DDP: takes anything, and holds the model as `module`."""

    def __init__(self, module):
        super().__init__()
        self.module = module
        self.calls = 0

    def forward(self, *inputs, **kwargs):
        self.calls += 1
        return self.module(*inputs, **kwargs)


@PACKED
@torch.no_grad()
def test_a_wrapped_model_computes_the_same_logprobs(shared_prefix):
    model, micro_batch = make_evaluator(), micro_batch_of(completions(), shared_prefix)
    torch.testing.assert_close(
        compute_logprobs(Wrapper(model), micro_batch, 1.0).logps_BT, compute_logprobs(model, micro_batch, 1.0).logps_BT
    )


@PACKED
@pytest.mark.parametrize("batch_size, max_tokens", [(1, None), (3, None), (10, None), (3, 8), (3, 12), (3, 100)])
def test_scoring_many_completions_is_without_dropout_and_without_trace(shared_prefix, batch_size, max_tokens):
    model = make_evaluator(attention_dropout=0.5).train()
    model.lm_head.eval()
    modes = [module.training for module in model.modules()]
    attention = model.config._attn_implementation
    before = torch.get_rng_state()
    packer = make_packer(shared_prefix, batch_size, max_tokens)
    logps = compute_completion_logprobs(model, completions(), packer, temperature=0.8)
    assert [module.training for module in model.modules()] == modes
    assert model.config._attn_implementation == attention
    assert torch.equal(torch.get_rng_state(), before)
    model.eval()
    for values, completion in zip(logps, completions(), strict=True):
        assert values.shape == (len(completion.ids),)
        assert not values.requires_grad
        with torch.no_grad():
            assert_close(values, alone(model, completion, 0.8)[0])


@PACKED
@pytest.mark.parametrize("batch_size, max_tokens", [(1, None), (3, None), (10, None), (3, 14)])
@torch.no_grad()
def test_logprobs_come_in_the_order_of_the_completions(shared_prefix, batch_size, max_tokens):
    model = make_evaluator()
    mixed = [(completions() + MASKED)[i] for i in (7, 3, 4, 9, 0, 6, 10, 1, 5, 8, 2)]  # prompts apart
    logps = compute_completion_logprobs(model, mixed, make_packer(shared_prefix, batch_size, max_tokens), 1.0)
    for values, completion in zip(logps, mixed, strict=True):
        assert_close(values, alone(model, completion)[0])


@PACKED
@pytest.mark.parametrize("rows", [[], ROWS])
def test_a_rank_with_fewer_completions_calls_its_model_as_often_as_the_others(shared_prefix, rows):
    model = make_evaluator()
    wrapped = Wrapper(model)
    packer = make_packer(shared_prefix, batch_size=3, ranks=Ranks(gather=lambda numbers: [*numbers, 40]))
    logps = compute_completion_logprobs(wrapped, completions(rows), packer, 1.0)
    assert wrapped.calls == -(-(len(completions(rows)) + 40) // 6)
    torch.testing.assert_close(
        logps, compute_completion_logprobs(model, completions(rows), make_packer(shared_prefix), 1.0)
    )
