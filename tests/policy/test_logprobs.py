import pytest
import torch
from torch import nn

from grpo_trl.policy import Completion, make_piece, score, score_completions

from ..conftest import ARCHITECTURES, make_model


ROWS = [([5, 6, 7], [8, 9]), ([5], [4, 3, 2, 1]), ([9, 8, 7, 6, 5], []), ([30, 31], [32])]


def completions(rows=ROWS):
    return [Completion(prompt, ids, [True] * len(ids)) for prompt, ids in rows]


def piece_of(rows=ROWS, pad_token_id=0):
    return make_piece(completions(rows), num_completions=len(rows), pad_token_id=pad_token_id)


def alone(model, prompt, ids, temperature=1.0):
    """Log-probabilities and entropies of one completion without any padding."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + ids])).logits[0].double() / temperature
    logps = logits[len(prompt) - 1 : len(prompt) - 1 + len(ids)].log_softmax(-1)
    return logps[range(len(ids)), ids], -(logps.exp() * logps).sum(-1)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_padding_and_neighbours_change_nothing(architecture, temperature):
    model = make_model(architecture).eval()
    scores = score(model, piece_of(), temperature)
    for row, (prompt, ids) in enumerate(ROWS):
        logps, entropy = alone(model, prompt, ids, temperature)
        torch.testing.assert_close(scores.logps_BT[row, : len(ids)].double(), logps, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(scores.entropy_BT[row, : len(ids)].double(), entropy, rtol=1e-5, atol=1e-5)
        assert (scores.logps_BT[row, len(ids) :] == 0).all()
        assert (scores.entropy_BT[row, len(ids) :] == 0).all()


def test_the_pad_token_is_never_read():
    model = make_model().eval()
    with torch.no_grad():
        assert torch.equal(
            score(model, piece_of(), 1.0).logps_BT, score(model, piece_of(pad_token_id=47), 1.0).logps_BT
        )


def test_a_piece_of_empty_completions_has_a_gradient_of_zero():
    model = make_model()
    score(model, piece_of([([5, 6], []), ([7], [])]), 1.0).logps_BT.sum().backward()
    assert all(p.grad is None or (p.grad == 0).all() for p in model.parameters())


def test_masked_tokens_score_zero():
    model = make_model().eval()
    row = Completion([5, 6], [7, 8, 9], [True, False, True])
    scores = score(model, make_piece([row], num_completions=1, pad_token_id=0), 1.0)
    expected, _ = alone(model, [5, 6], [7, 8, 9])
    torch.testing.assert_close(scores.logps_BT[0].double(), expected * torch.tensor([1, 0, 1]), rtol=1e-5, atol=1e-5)


def test_entropy_has_no_gradient_and_logps_have():
    scores = score(make_model(), piece_of(), 1.0)
    assert scores.logps_BT.requires_grad
    assert not scores.entropy_BT.requires_grad


class Plain(nn.Module):
    """A model whose forward knows no `logits_to_keep`."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, input_ids, use_cache=False):
        return self.inner(input_ids=input_ids)


class Wrapper(nn.Module):
    """Like DDP: takes anything, and holds the model as `module`."""

    def __init__(self, module):
        super().__init__()
        self.module = module
        self.seen = {}

    def forward(self, *inputs, **kwargs):
        self.seen = kwargs
        return self.module(*inputs, **kwargs)


def test_models_with_and_without_logits_to_keep_agree():
    model = make_model().eval()
    expected = score(model, piece_of(), 1.0).logps_BT
    torch.testing.assert_close(score(Plain(model), piece_of(), 1.0).logps_BT, expected)
    wrapped = Wrapper(model)
    torch.testing.assert_close(score(wrapped, piece_of(), 1.0).logps_BT, expected)
    assert wrapped.seen["logits_to_keep"] < piece_of().input_ids_BS.shape[1] + 1


@pytest.mark.parametrize("batch_size", [1, 3, 10])
def test_scoring_many_completions_is_without_dropout_and_without_trace(batch_size):
    model = make_model(attention_dropout=0.5).train()
    before = torch.get_rng_state()
    logps = score_completions(model, completions(), temperature=1.0, batch_size=batch_size, pad_token_id=0)
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)
    model.eval()
    for values, (prompt, ids) in zip(logps, ROWS, strict=True):
        assert values.shape == (len(ids),)
        assert not values.requires_grad
        torch.testing.assert_close(values.double(), alone(model, prompt, ids)[0], rtol=1e-5, atol=1e-5)


def test_a_piece_has_optional_tensors_only_where_every_completion_does():
    both = [Completion([1], [2], [True], sampler_logps=[-1.0]), Completion([1], [2, 3], [True] * 2, [-1.0, -2.0])]
    piece = make_piece(both, num_completions=7, pad_token_id=0)
    assert piece.sampler_logps_BT.tolist() == [[-1.0, 0.0], [-1.0, -2.0]]
    assert piece.old_logps_BT is None
    assert piece.num_completions == 7
    one = make_piece([both[0], Completion([1], [2], [True])], num_completions=2, pad_token_id=0)
    assert one.sampler_logps_BT is None
