"""The weights of old policy over sampler: against plain loops, and an expectation under top-p against exact sums."""

import math

import pytest
import torch
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from grpo_trl.objective import ObjectiveOptions, grpo_loss, make_objective
from grpo_trl.objective.correction import Correction


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


@pytest.mark.parametrize("warper", [TopPLogitsWarper(0.8), TopKLogitsWarper(5), MinPLogitsWarper(0.2)])
def test_the_estimate_of_an_expectation_is_unbiased_over_what_can_be_drawn(warper):
    """20,000 tokens from a truncated distribution; the exact sum is over the tokens that it has."""
    draws, source = 20_000, torch.Generator().manual_seed(0)
    logits_V = 2 * torch.randn(48, generator=source, dtype=torch.float64)
    value_V = torch.rand(48, generator=source, dtype=torch.float64)
    policy_V = (logits_V / 0.7).softmax(-1)
    drawn_V = warper(torch.zeros(1, 1, dtype=torch.long), logits_V[None] / 0.7)[0].softmax(-1)
    tokens_R = drawn_V.multinomial(draws, replacement=True, generator=source)
    exact = (policy_V * value_V)[drawn_V > 0].sum()

    old_R1, drawn_R1 = policy_V.log()[tokens_R, None], drawn_V.log()[tokens_R, None]
    weights_R1 = Correction("token_truncate", None).weights(old_R1, drawn_R1, torch.ones_like(old_R1, dtype=torch.bool))
    terms_R, uncorrected_R = weights_R1[:, 0] * value_V[tokens_R], value_V[tokens_R]
    assert abs(terms_R.mean() - exact) < 4 * terms_R.std() / draws**0.5 + 1e-12
    assert abs(uncorrected_R.mean() - exact) > 10 * uncorrected_R.std() / draws**0.5, "weights make no difference here"


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("mode", ["token_truncate", "sequence_mask"])
def test_weights_scale_the_policy_term_of_the_loss_and_not_the_kl(level, mode):
    objective = make_objective(ObjectiveOptions(loss_level=level, beta=0.3))
    correction_BT = Correction(mode).weights(OLD, DRAWN, MASK)
    advantages_B1 = torch.tensor([[1.0], [-2.0], [3.0]]).double()

    def gradient(beta_objective, **options):
        logps_BT = (OLD + 0.01).requires_grad_()
        grpo_loss(
            logps_BT, OLD, advantages_B1, MASK, objective=beta_objective, ref_logps_BT=OLD - 0.2, **options
        ).loss.backward()
        return logps_BT.grad

    plain = gradient(make_objective(ObjectiveOptions(loss_level=level)))
    kl = gradient(objective) - plain
    corrected = gradient(objective, correction_BT=correction_BT) - kl
    weights_BT = correction_BT
    if level == "sequence":  # one term per completion, which has the mean weight of its tokens
        weights_BT = (correction_BT.sum(1) / MASK.sum(1).clamp(min=1))[:, None]
    torch.testing.assert_close(corrected, plain * weights_BT)


def gamma(log_ratio, advantage):
    k, decay = (2.0, 3.0) if advantage >= 0 else (3.0, 2.0)
    return math.exp(decay + k * log_ratio - decay * math.exp(log_ratio))


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask"])
def test_vespo_s_ratio_is_that_of_the_policy_over_what_sampled(mode):
    """The weights of a completion's tokens multiply its ratio; one that is 0 leaves nothing of its term."""
    advantages = [1.0, -2.0, 3.0]
    objective = make_objective(ObjectiveOptions(loss_type="vespo", beta=0.3, use_bias_correction_kl=True))
    correction_BT = Correction(mode).weights(OLD, DRAWN, MASK)
    shift = 0.1

    def gradient(**options):
        logps_BT = (OLD + shift).requires_grad_()
        advantages_B1 = torch.tensor(advantages).double()[:, None]
        output = grpo_loss(logps_BT, OLD, advantages_B1, MASK, objective=objective, ref_logps_BT=OLD - 0.2, **options)
        output.loss.backward()
        return logps_BT.grad

    for row, mask in enumerate(MASK.tolist()):
        log_ratio = shift * sum(mask)
        weights = [weight for weight, counts in zip(correction_BT[row].tolist(), mask, strict=True) if counts]
        corrected = log_ratio + sum(math.log(max(weight, 1e-8)) for weight in weights)
        change = gamma(corrected, advantages[row]) - gamma(log_ratio, advantages[row])
        difference = (gradient(correction_BT=correction_BT) - gradient())[row]
        for counts, slope in zip(mask, difference.tolist(), strict=True):
            assert slope == pytest.approx(-change * advantages[row] * counts, abs=1e-12)
    assert 0 in correction_BT[MASK]
