"""The weights of old policy over sampler: against plain loops, and an expectation under top-p against exact sums."""

import math

import pytest
import torch

from grpo_trl.objective import grpo_loss, make_objective
from grpo_trl.objective.correction import Correction
from grpo_trl.rollout.base import SamplingOptions
from grpo_trl.rollout.sampling import Sampler
from grpo_trl.seeds import uniforms
from tests.conftest import make_model


MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
OLD = torch.tensor([[-1.0, -2.0, -0.5, -9.0], [-0.1, -3.0, -1.0, -2.0], [-1.0, -1.0, -1.0, -1.0]]).double()
DRAWN = torch.tensor([[-0.8, -4.0, -0.5, -1.0], [-2.0, -3.5, math.nan, -1.0], [-1.0, -1.0, -1.0, -1.0]]).double()
MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]]).bool()


def expected(mode, low, high):
    rows = []
    for old, drawn, mask in zip(OLD.tolist(), DRAWN.tolist(), MASK.tolist(), strict=True):
        known = [m and not math.isnan(d) for m, d in zip(mask, drawn, strict=True)]
        ratios = [math.exp(o - d) if k else 1.0 for o, d, k in zip(old, drawn, known, strict=True)]
        if mode.startswith("sequence"):
            ratios = [math.prod(ratios)] * len(ratios)
        if mode.endswith("truncate"):
            ratios = [min(max(r, low), high) for r in ratios]
        else:
            ratios = [r if low <= r <= high else 0.0 for r in ratios]
        rows.append([r if k else 0.0 for r, k in zip(ratios, known, strict=True)])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("low, high", [(None, 3.0), (0.9, 2.0), (None, None)])
def test_weights_are_the_formulas(mode, low, high):
    weights = Correction(mode, high, low).weights(OLD, DRAWN, MASK)
    torch.testing.assert_close(weights, expected(mode, low or 0.0, math.inf if high is None else high))


def test_values_outside_the_mask_are_never_read_and_large_ratios_stay_finite():
    dirty = torch.where(MASK, DRAWN, math.nan)
    for mode in MODES:
        assert Correction(mode).weights(OLD, dirty, MASK).equal(Correction(mode).weights(OLD, DRAWN, MASK))
        assert Correction(mode, None).weights(OLD, DRAWN - 1e6, MASK).isfinite().all()


def test_a_sampler_that_is_the_old_policy_changes_nothing():
    for mode in MODES:
        assert Correction(mode).weights(OLD, OLD, MASK).equal(MASK.double())


@pytest.mark.parametrize("options", [{"top_p": 0.8}, {"top_k": 5}, {"min_p": 0.2, "top_k": 20}])
def test_the_estimate_of_an_expectation_is_unbiased_over_what_can_be_drawn(options):
    """20,000 tokens that the group engine's sampler draws; the exact sum is over the tokens that it can draw."""
    draws = 20_000
    sampling = SamplingOptions(1, pad_token_id=0, eos_token_ids=(1,), temperature=0.7, **options)
    torch.manual_seed(0)
    logits_V = 2 * torch.randn(48)
    sampler = Sampler(make_model(), sampling)
    noise = torch.from_numpy(uniforms(3, 0, draws).copy())
    drawn = sampler.draw(logits_V.expand(draws, -1), noise, [[2]] * draws, [[]] * draws)

    policy_V = (logits_V.double() / 0.7).softmax(-1)
    value_V = torch.rand(48, dtype=torch.float64)
    can_V = torch.zeros(48, dtype=torch.bool)
    can_V[drawn.tokens_R] = True
    exact = (policy_V * value_V)[can_V].sum()

    old_B1 = policy_V.log()[drawn.tokens_R, None]
    weights = Correction("token_truncate", clip_max=None).weights(
        old_B1, drawn.drawn_logps_R[:, None], torch.ones_like(old_B1, dtype=torch.bool)
    )[:, 0]
    terms = weights * value_V[drawn.tokens_R]
    assert can_V.sum() < 48
    assert abs(terms.mean() - exact) < 4 * terms.std() / draws**0.5
    uncorrected = value_V[drawn.tokens_R]
    assert abs(uncorrected.mean() - exact) > 10 * uncorrected.std() / draws**0.5, "the weights make no difference here"


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("mode", ["token_truncate", "sequence_mask"])
def test_weights_scale_the_policy_term_of_the_loss_and_not_the_kl(level, mode):
    objective = make_objective(level, epsilon=0.2, epsilon_high=0.2, beta=0.3)
    correction_BT = Correction(mode).weights(OLD, DRAWN, MASK)
    advantages_B = torch.tensor([1.0, -2.0, 3.0]).double()

    def gradient(beta_objective, **options):
        logps_BT = (OLD + 0.01).requires_grad_()
        grpo_loss(
            logps_BT, OLD, advantages_B, MASK, objective=beta_objective, ref_logps_BT=OLD - 0.2, **options
        ).loss.backward()
        return logps_BT.grad

    plain = gradient(make_objective(level, epsilon=0.2, epsilon_high=0.2, beta=0.0))
    kl = gradient(objective) - plain
    corrected = gradient(objective, correction_BT=correction_BT) - kl
    weights_BT = correction_BT
    if level == "sequence":  # one term per completion, which has the mean weight of its tokens
        weights_BT = (correction_BT.sum(1) / MASK.sum(1).clamp(min=1))[:, None]
    torch.testing.assert_close(corrected, plain * weights_BT)
