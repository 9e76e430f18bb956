import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_trl.objective import Counts, ObjectiveOptions, grpo_loss, make_objective
from grpo_trl.objective.ratios import exp_tangent
from tests.helpers import oracle


LEVELS = ["token", "sequence"]
LEVEL = pytest.mark.parametrize("level", LEVELS)
CLIP = {"epsilon": 0.2, "epsilon_high": 0.28}


def make_batch(lengths, spread=0.5, seed=0):
    """Ragged completions as lists, and the same as padded tensors with NaN in the padding."""
    generator = torch.Generator().manual_seed(seed)

    def draw(scale, offset):
        return [(torch.randn(n, generator=generator, dtype=torch.float64) * scale + offset).tolist() for n in lengths]

    logps, noise, ref_noise = draw(1.0, -3.0), draw(spread, 0.0), draw(spread, 0.0)
    lists = {
        "logps": logps,
        "old": [[a + b for a, b in zip(x, y, strict=True)] for x, y in zip(logps, noise, strict=True)],
        "ref": [[a + b for a, b in zip(x, y, strict=True)] for x, y in zip(logps, ref_noise, strict=True)],
    }
    advantages = torch.randn(len(lengths), generator=generator, dtype=torch.float64).tolist()
    return lists, advantages


def pad(rows, width=None, fill=math.nan, dtype=torch.float64):
    width = width or max(1, max(map(len, rows)))
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows], dtype=dtype)


def run(level, lists, advantages, beta=0.0, width=None, dtype=torch.float64, **options):
    """Loss, and gradient with respect to each completion's log-probabilities as ragged lists."""
    logps = pad(lists["logps"], width, dtype=dtype).requires_grad_()
    lengths = [len(row) for row in lists["logps"]]
    mask = torch.arange(logps.shape[1])[None] < torch.tensor(lengths)[:, None]
    output = grpo_loss(
        logps,
        pad(lists["old"], width, dtype=dtype),
        torch.tensor(advantages, dtype=torch.float64).unsqueeze(1),
        mask,
        objective=make_objective(ObjectiveOptions(loss_level=level, beta=beta, **(CLIP | options))),
        ref_logps_BT=pad(lists["ref"], width, dtype=dtype) if beta else None,
    )
    output.loss.backward()
    assert (logps.grad[~mask] == 0).all()
    return output, [row[:n].tolist() for row, n in zip(logps.grad, lengths, strict=True)]


def assert_like(actual, expected, tolerance=1e-10):
    loss, gradient = actual
    expected_loss, expected_gradient = expected
    assert loss == pytest.approx(expected_loss, rel=tolerance, abs=tolerance)
    for row, expected_row in zip(gradient, expected_gradient, strict=True):
        assert row == pytest.approx(expected_row, rel=tolerance, abs=tolerance)


@LEVEL
@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    spread=st.sampled_from([0.0, 0.05, 0.5, 5.0, 40.0]),
    beta=st.sampled_from([0.0, 0.04, 1.0]),
    seed=st.integers(0, 1000),
)
def test_loss_and_gradient_agree_with_the_papers_formula(level, lengths, spread, beta, seed):
    lists, advantages = make_batch(lengths, spread, seed)
    output, gradient = run(level, lists, advantages, beta)
    ref = lists["ref"] if beta else None
    expected = oracle.grpo(level, lists["logps"], lists["old"], advantages, 0.2, 0.28, beta, ref)
    assert_like((output.loss.item(), gradient), expected)


@LEVEL
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_any_cut_order_and_padding_give_the_same_sum(level, beta):
    lists, advantages = make_batch([3, 0, 7, 1, 5, 4])
    whole, gradient = run(level, lists, advantages, beta)
    order = [4, 1, 0, 5, 3, 2]
    total, parts = 0.0, {}
    for cut, width in (([0, 1], 11), ([2], None), ([3, 4, 5], 20)):
        rows = [order[i] for i in cut]
        part = {name: [values[i] for i in rows] for name, values in lists.items()}
        output, part_gradient = run(level, part, [advantages[i] for i in rows], beta, width)
        total += output.loss.item()
        parts.update(zip(rows, part_gradient, strict=True))
    assert_like((total, [parts[i] for i in range(6)]), (whole.loss.item(), gradient))


def test_on_policy_the_token_level_is_reinforce_weighted_by_length():
    lists, advantages = make_batch([4, 1, 6], spread=0.0)
    _, gradient = run("token", lists, advantages)
    for row, advantage in zip(gradient, advantages, strict=True):
        assert row == pytest.approx([-advantage / len(row)] * len(row))


def test_on_policy_the_sequence_level_is_reinforce_unweighted():
    lists, advantages = make_batch([4, 1, 6], spread=0.0)
    _, gradient = run("sequence", lists, advantages)
    for row, advantage in zip(gradient, advantages, strict=True):
        assert row == pytest.approx([-advantage] * len(row))


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_levels_are_equal_for_completions_of_one_token(beta):
    lists, advantages = make_batch([1] * 8, spread=1.0)
    token, token_gradient = run("token", lists, advantages, beta)
    sequence, sequence_gradient = run("sequence", lists, advantages, beta)
    assert_like((token.loss.item(), token_gradient), (sequence.loss.item(), sequence_gradient))


@LEVEL
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_and_gradient_are_finite_for_log_ratios_up_to_a_million(level, dtype):
    for tokens, size, sign, advantage in itertools.product([1, 100], [30.0, 1e3, 1e6], [-1, 1], [-1.5, 1.5]):
        step = sign * size / tokens
        lists = {"logps": [[0.0] * tokens], "old": [[step] * tokens], "ref": [[-step] * tokens]}
        output, gradient = run(level, lists, [advantage], beta=0.04, dtype=dtype)
        assert math.isfinite(output.loss.item())
        assert all(map(math.isfinite, gradient[0]))


@LEVEL
def test_the_kl_gradient_pulls_towards_the_reference_however_far_it_is(level):
    for log_ratio in (-1e6, -30.0, -1.0, -1e-3, 1e-3, 1.0, 19.0, 21.0, 50.0, 1e3, 1e6):
        lists = {"logps": [[0.0]], "old": [[0.0]], "ref": [[log_ratio]]}
        _, gradient = run(level, lists, [0.0], beta=1.0, dtype=torch.float32)
        # Gradient descent moves the log-probability against the gradient: up where the reference is higher.
        assert math.copysign(1, -gradient[0][0]) == math.copysign(1, log_ratio)


def test_the_kl_gradient_above_twenty_is_as_steep_as_at_twenty():
    lists = {"logps": [[0.0]], "old": [[0.0]], "ref": [[21.0]]}
    _, gradient = run("token", lists, [0.0], beta=1.0)
    assert gradient[0][0] == pytest.approx(-(math.exp(20) - 1))


@LEVEL
def test_an_empty_completion_contributes_nothing(level):
    lists = {"logps": [[], [-1.0]], "old": [[], [-1.0]], "ref": [[], [-1.5]]}
    with_empty, _ = run(level, lists, [7.0, 1.0], beta=0.1)
    alone, _ = run(level, {name: rows[1:] for name, rows in lists.items()}, [1.0], beta=0.1)
    assert with_empty.loss.item() == alone.loss.item()
    assert with_empty.signal_B[0] == 0
    assert not with_empty.mask_BU[0].any()
    assert not with_empty.kl.mask_BK[0].any()
    assert not (with_empty.tail_BU | with_empty.clipped.low_BU | with_empty.clipped.high_BU)[0].any()


@LEVEL
def test_tokens_outside_the_mask_are_as_if_absent(level):
    """An environment's tokens stand between the model's own."""
    lists, advantages = make_batch([4])
    mask = torch.tensor([[True, False, True, True]])
    logps = pad(lists["logps"]).requires_grad_()
    objective = make_objective(ObjectiveOptions(loss_level=level, beta=0.1, **CLIP))
    old, ref = pad(lists["old"]), pad(lists["ref"])
    output = grpo_loss(logps, old, torch.tensor(advantages).unsqueeze(1), mask, objective=objective, ref_logps_BT=ref)
    kept = {name: [[row[i] for i in (0, 2, 3)] for row in rows] for name, rows in lists.items()}
    expected, _ = oracle.grpo(level, kept["logps"], kept["old"], advantages, 0.2, 0.28, 0.1, kept["ref"])
    assert output.loss.item() == pytest.approx(expected, rel=1e-6)


@LEVEL
def test_clipping_is_counted_where_it_takes_the_gradient(level):
    # log-ratios: below and above the range, each with an advantage of either sign, and one within
    ratios, advantages = [-1.0, -1.0, 1.0, 1.0, 0.1], [1.0, -1.0, 1.0, -1.0, 1.0]
    lists = {"logps": [[r] for r in ratios], "old": [[0.0]] * 5, "ref": [[0.0]] * 5}
    output, gradient = run(level, lists, advantages)
    assert output.clipped.low_BU.flatten().tolist() == [False, True, False, False, False]
    assert output.clipped.high_BU.flatten().tolist() == [False, False, True, False, False]
    assert [row[0] == 0 for row in gradient] == [False, True, True, False, False]


@LEVEL
def test_signal_is_the_size_of_the_gradient_that_is_left(level):
    lists, advantages = make_batch([4, 2, 0, 7], spread=0.3)
    output, gradient = run(level, lists, advantages)
    for signal, row in zip(output.signal_B.tolist(), gradient, strict=True):
        per_unit = row if level == "token" else row[:1]
        assert signal == pytest.approx(sum(map(abs, per_unit)))


def test_tail_counts_log_ratios_above_twenty_of_policy_and_reference():
    lists = {"logps": [[25.0, 0.0, 0.0, 15.0]], "old": [[0.0] * 4], "ref": [[25.0, 21.0, 19.0, 10.0]]}
    token, _ = run("token", lists, [1.0], beta=0.1)
    assert token.tail_BU.tolist() == [[True, False, False, False]]
    assert token.kl.tail_BK.tolist() == [[False, True, False, False]]
    sequence, _ = run("sequence", lists, [1.0], beta=0.1)
    assert (sequence.tail_BU.tolist(), sequence.kl.tail_BK.tolist()) == ([[True]], [[True]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exp_is_untouched_up_to_twenty_and_its_tangent_above(dtype):
    x = torch.tensor([-50.0, -1.0, 0.0, 19.999, 20.0, 20.001, 25.0, 1e6], dtype=dtype, requires_grad=True)
    y = exp_tangent(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert (y[:5] == x[:5].exp()).all()
    assert y.tolist() == pytest.approx([oracle.exp(v) for v in x.tolist()], rel=1e-5)
    assert slope.tolist() == pytest.approx([oracle.exp_slope(v) for v in x.tolist()], rel=1e-5)


def test_a_missing_reference_is_an_error_that_names_beta():
    one = torch.zeros(1, 1)
    mask = torch.ones(1, 1, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"beta=0\.1 needs ref_logps_BT"):
        grpo_loss(one, one, torch.zeros(1, 1), mask, objective=make_objective(ObjectiveOptions(beta=0.1)))


def test_epsilon_high_is_epsilon_by_default():
    alone, both = ObjectiveOptions(epsilon=0.1), ObjectiveOptions(epsilon=0.1, epsilon_high=0.1)
    assert make_objective(alone) == make_objective(both)


@LEVEL
def test_both_levels_divide_by_the_completions_of_the_mini_batch(level):
    divisor = make_objective(ObjectiveOptions(loss_level=level)).aggregation.divisor
    assert divisor(Counts(12, 100, 120) + Counts(4, 9, 40)) == 16.0
