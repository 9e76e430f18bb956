"""Every row of the table of objectives, against its paper's formula and the rules that all of them keep."""

import itertools
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from grpo_trl.objective import Counts, ObjectiveOptions, grpo_loss, make_objective
from grpo_trl.objective.recipes import LOSS_TYPES

from . import variants


VARIANTS = {
    "grpo": {"loss_type": "grpo"},
    "two-sided": {"delta": 1.5},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "dapo": {"loss_type": "dapo"},
    "bnpo": {"loss_type": "bnpo"},
    "gspo": {"importance_sampling_level": "sequence"},
    "luspo": {"loss_type": "luspo"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.2},
    "sapo": {"loss_type": "sapo"},
    "vespo": {"loss_type": "vespo"},
}
EVERY = pytest.mark.parametrize("name", VARIANTS)
READS_CLIP = {name for name in VARIANTS if name not in ("sapo", "vespo", "cispo")}
LENGTHS = [3, 0, 7, 1, 5, 4]


def options_of(name, **options):
    bounds = {"epsilon": variants.EPSILON, "epsilon_high": variants.EPSILON_HIGH} if name in READS_CLIP else {}
    return ObjectiveOptions(**(bounds | VARIANTS[name] | options))


def make_batch(lengths, spread=0.4, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def rows(scale, offset):
        return [(torch.randn(n, generator=generator).double() * scale + offset).tolist() for n in lengths]

    def shifted(other):
        return [[a + b for a, b in zip(x, y, strict=True)] for x, y in zip(logps, other, strict=True)]

    logps = rows(1.0, -3.0)
    return {
        "logps": logps,
        "old": shifted(rows(spread, 0.0)),
        "ref": shifted(rows(spread, 0.0)),
        "entropy": rows(0.5, 2.0),
        "sampler": shifted(rows(spread, 0.0)),
        "advantages": torch.randn(len(lengths), generator=generator).double().tolist(),
    }


def rows_of(batch, indices):
    return {name: [values[i] for i in indices] for name, values in batch.items()}


def counts_of(batch):
    size = len(batch["logps"])
    return Counts(size, sum(map(len, batch["logps"])), size * variants.MAX_LENGTH)


def pad(rows, width, fill=math.nan):
    return torch.tensor([list(row) + [fill] * (width - len(row)) for row in rows], dtype=torch.float64).view(-1, width)


def run(options, batch, counts=None, width=None, dtype=torch.float64, keep=None, **given):
    """The mini-batch's loss and its gradient as ragged rows; NaN stands in all padding."""
    lengths = [len(row) for row in batch["logps"]]
    width = width or max(1, *lengths)
    objective = make_objective(options)
    logps = pad(batch["logps"], width).to(dtype).requires_grad_()
    mask = torch.arange(width)[None] < torch.tensor(lengths)[:, None]
    optional = {"ref_logps_BT": "ref"} if options.beta else {}
    optional |= {"sampler_logps_BT": "sampler"} if options.off_policy_mask_threshold else {}
    optional |= {"entropy_BT": "entropy"} if given else {}
    output = grpo_loss(
        logps,
        pad(batch["old"], width).to(dtype),
        torch.tensor(batch["advantages"]).view(len(lengths), -1),
        mask,
        objective=objective,
        mask_policy_BT=None if keep is None else pad(keep, width, fill=1).bool(),
        **{name: pad(batch[key], width).to(dtype) for name, key in optional.items()},
        **given,
    )
    loss = output.loss / objective.aggregation.divisor(counts or counts_of(batch))
    loss.backward()
    assert (logps.grad[~mask] == 0).all()
    return loss.item(), [row[:n].tolist() for row, n in zip(logps.grad, lengths, strict=True)], output


def assert_like(actual, loss, gradient, tolerance):
    assert actual[0] == pytest.approx(loss, rel=tolerance, abs=tolerance)
    for row, expected in zip(actual[1], gradient, strict=True):
        assert row == pytest.approx(expected, rel=tolerance, abs=tolerance)


def assert_is(actual, objective, batch, tolerance=1e-6):
    """`actual` is minus `objective`, a function of logprobs, at those of `batch`."""
    loss = -objective(batch["logps"])
    slopes = variants.gradient(objective, batch["logps"])
    assert_like(actual, loss, [[-x for x in row] for row in slopes], tolerance)


@EVERY
@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=5).filter(any),
    spread=st.sampled_from([0.0, 0.05, 0.5, 2.0]),
    seed=st.integers(0, 1000),
)
def test_loss_and_gradient_are_those_of_the_paper(name, lengths, spread, seed):
    batch = make_batch(lengths, spread, seed)
    ratios = [w for row in zip(batch["logps"], batch["old"], strict=True) for w in variants.ratios(*row)]
    assume(all(abs(w - kink) > 1e-3 for w in ratios for kink in (0.8, 1.2, 1.28, 1.5)))
    assert_is(run(options_of(name), batch), lambda logps: variants.policy_objective(name, batch, logps), batch)


@EVERY
def test_any_cut_order_and_padding_give_the_same_gradient(name):
    batch = make_batch(LENGTHS)
    options = options_of(name, beta=0.1, use_bias_correction_kl=True, off_policy_mask_threshold=0.1)
    keep = [[(t + i) % 3 > 0 for t in range(n)] for i, n in enumerate(LENGTHS)]
    whole = run(options, batch, keep=keep, entropy_weight=0.01)
    loss, rows = 0.0, {}
    for cut, width in (([4, 1], 11), ([0], None), ([5, 3, 2], 20)):
        part_keep = [keep[i] for i in cut]
        part = run(options, rows_of(batch, cut), counts_of(batch), width, keep=part_keep, entropy_weight=0.01)
        loss += part[0]
        rows |= dict(zip(cut, part[1], strict=True))
    assert_like(whole, loss, [rows[i] for i in range(len(LENGTHS))], 1e-10)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_and_gradient_are_finite_for_log_ratios_up_to_a_million(name, dtype):
    options = options_of(name, beta=0.04, use_bias_correction_kl=True)
    for tokens, size, sign, advantage in itertools.product([1, 100], [30.0, 1e6], [-1, 1], [-1.5, 1.5]):
        step = sign * size / tokens
        logps = [[0.0] * tokens]
        batch = {"logps": logps, "old": [[step] * tokens], "ref": [[-step] * tokens], "advantages": [advantage]}
        loss, gradient, _ = run(options, batch, dtype=dtype)
        assert math.isfinite(loss)
        assert all(map(math.isfinite, gradient[0]))


@EVERY
def test_on_policy_every_variant_is_reinforce_up_to_the_weight_of_a_token(name):
    """Where bounds do not bind: a token's gradient is its advantage times what the aggregation gives it."""
    batch = make_batch(LENGTHS, spread=0.0)
    _, gradient, output = run(options_of(name), batch)
    tokens = sum(LENGTHS)
    weights = {
        **dict.fromkeys(("grpo", "two-sided", "sapo", "gspo"), lambda n: 1 / n / len(LENGTHS)),
        "dr_grpo": lambda n: 1 / len(LENGTHS) / variants.MAX_LENGTH,
        "luspo": lambda n: 1 / len(LENGTHS),
        **dict.fromkeys(("dapo", "bnpo", "cispo", "vespo"), lambda n: 1 / tokens),
    }
    for row, advantage, signal in zip(gradient, batch["advantages"], output.signal_B.tolist(), strict=True):
        assert row == pytest.approx([-advantage * weights[name](len(row))] * len(row) if row else [])
        assert signal == pytest.approx(abs(advantage) if row else 0.0)


@EVERY
def test_signal_is_the_size_of_the_gradient_that_is_left(name):
    """With respect to the log-ratio of a unit: a token's, or the sum over tokens of the mean ratio's."""
    batch = make_batch(LENGTHS, spread=0.3)
    _, gradient, output = run(options_of(name), batch)
    divisor = make_objective(options_of(name)).aggregation.divisor(counts_of(batch))
    for signal, row in zip(output.signal_B.tolist(), gradient, strict=True):
        length = 1 if name in ("grpo", "two-sided", "sapo", "gspo") else max(len(row), 1)
        assert signal == pytest.approx(sum(map(abs, row)) * divisor / length)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("corrected", [False, True])
def test_the_kl_term_is_that_of_its_estimator(estimator, corrected):
    batch = make_batch(LENGTHS) | {"advantages": [0.0] * len(LENGTHS)}
    options = ObjectiveOptions(beta=0.3, kl_estimator=estimator, use_bias_correction_kl=corrected)
    actual = run(options, batch)
    assert_is(actual, lambda logps: -0.3 * variants.kl_of_means(batch, logps, estimator, corrected), batch)
    kl = actual[2].kl
    known = [variants.ESTIMATORS[estimator](b - a) for x, y in zip(batch["logps"], batch["ref"], strict=True)
             for a, b in zip(x, y, strict=True)]  # fmt: skip
    assert kl.kl_BK[kl.mask_BK].tolist() == pytest.approx(known)


def test_on_policy_the_corrected_kl_has_the_gradient_of_the_reverse_kl():
    """In expectation over the policy: sum_a p(a) * gradient of the term at a, for a distribution over three tokens."""
    logits = torch.tensor([0.3, -1.0, 0.7], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.0, 0.5, -0.5], dtype=torch.float64).log_softmax(0)
    policy = logits.log_softmax(0)
    (expected,) = torch.autograd.grad((policy.exp() * (policy - reference)).sum(), logits, retain_graph=True)
    for estimator in ("k1", "k3"):
        objective = make_objective(ObjectiveOptions(beta=1.0, kl_estimator=estimator, use_bias_correction_kl=True))
        rows, mask = policy[:, None], torch.ones(3, 1, dtype=torch.bool)
        total = 0.0
        for i, p in enumerate(policy.exp().tolist()):
            one = grpo_loss(
                rows[i : i + 1], rows[i : i + 1].detach(), torch.zeros(1, 1), mask[:1],
                objective=objective, ref_logps_BT=reference[i].view(1, 1),
            )  # fmt: skip
            total = total + p * one.loss
        (actual,) = torch.autograd.grad(total, logits, retain_graph=True)
        torch.testing.assert_close(actual, expected)


def test_far_off_policy_completions_with_a_negative_advantage_lose_their_policy_term_only():
    batch = make_batch([4, 4, 4, 4])
    batch["advantages"] = [-1.0, -1.0, 1.0, -1.0]
    batch["sampler"] = [
        [logp + gap for logp in row] for row, gap in zip(batch["logps"], [0.6, 0.4, 0.6, 0.4], strict=True)
    ]
    batch["sampler"][3] = [batch["logps"][3][0] + 1.9, *[math.nan] * 3]  # a mean of 1.9 / 4, the unknown as equal
    _, all_kept, _ = run(ObjectiveOptions(), batch)
    _, gradient, output = run(ObjectiveOptions(off_policy_mask_threshold=0.5), batch)
    assert gradient == [[0.0] * 4, *all_kept[1:]]
    assert (output.signal_B > 0).tolist() == [False, True, True, True]
    _, with_kl, _ = run(ObjectiveOptions(off_policy_mask_threshold=0.5, beta=0.1), batch)
    assert all(with_kl[0])


def test_without_a_sampler_the_old_policy_is_what_a_completion_is_compared_with():
    batch = make_batch([3, 3]) | {"advantages": [-1.0, -1.0]}
    batch["old"] = [[logp + gap for logp in row] for row, gap in zip(batch["logps"], [0.6, 0.4], strict=True)]
    objective = make_objective(ObjectiveOptions(off_policy_mask_threshold=0.5, epsilon=0.9))
    logps, mask = pad(batch["logps"], 3), torch.ones(2, 3, dtype=torch.bool)
    output = grpo_loss(logps, pad(batch["old"], 3), torch.tensor([[-1.0], [-1.0]]), mask, objective=objective)
    assert (output.signal_B > 0).tolist() == [False, True]


@EVERY
def test_dropped_tokens_lose_their_policy_term_and_count_in_the_divisor(name):
    batch = make_batch([4, 2])
    keep = [[True, False, True, False], [False, False]]
    _, gradient, _ = run(options_of(name), batch, keep=keep)
    _, everything, _ = run(options_of(name), batch)
    assert gradient[1] == [0.0, 0.0]
    share = 0.5 if name in ("gspo", "luspo") else 1.0  # the completion's ratio depends on all of its tokens
    expected = [share * x if kept or share < 1 else 0.0 for x, kept in zip(everything[0], keep[0], strict=True)]
    assert gradient[0] == pytest.approx(expected)


def test_the_entropy_bonus_is_a_weighted_sum_over_kept_tokens():
    batch = make_batch([3, 1])
    keep = [[True, False, True], [True]]
    entropy = pad(batch["entropy"], 3).requires_grad_()
    mask = torch.tensor([[True] * 3, [True, False, False]])
    logps = pad(batch["logps"], 3)
    common = {"objective": make_objective(ObjectiveOptions()), "mask_policy_BT": pad(keep, 3, fill=1).bool()}
    advantages = torch.tensor(batch["advantages"]).unsqueeze(1)
    without = grpo_loss(logps, logps, advantages, mask, **common).loss
    loss = grpo_loss(logps, logps, advantages, mask, entropy_BT=entropy, entropy_weight=0.25, **common).loss
    first, second = batch["entropy"]
    assert (without - loss).item() == pytest.approx(0.25 * (first[0] + first[2] + second[0]))
    loss.backward()
    assert entropy.grad.tolist() == [[-0.25, 0.0, -0.25], [-0.25, 0.0, 0.0]]


@EVERY
def test_advantages_of_tokens_that_are_equal_are_those_of_the_completion(name):
    batch = make_batch(LENGTHS)
    loss, gradient, _ = run(options_of(name), batch)
    per_token = batch | {
        "advantages": pad([[a] * n for a, n in zip(batch["advantages"], LENGTHS, strict=True)], 7).tolist()
    }
    assert_like(run(options_of(name), per_token), loss, gradient, 1e-10)


def test_each_token_has_its_own_advantage():
    batch = make_batch([3], spread=0.0) | {"advantages": [[1.0, 0.0, -2.0]]}
    assert run(ObjectiveOptions(), batch)[1] == [pytest.approx([-1 / 3, 0.0, 2 / 3])]


def test_luspo_with_token_ratios_sums_the_tokens_of_a_completion():
    batch = make_batch([2, 5])
    summed = options_of("luspo", importance_sampling_level="token")
    constant = options_of("dr_grpo")
    _, expected, _ = run(constant, batch)
    assert_like(run(summed, batch), run(constant, batch)[0] * variants.MAX_LENGTH,
                [[x * variants.MAX_LENGTH for x in row] for row in expected], 1e-10)  # fmt: skip


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"loss_level": "sequence", "loss_type": "dapo"},
            "loss_level='sequence'.*loss_type='dapo'.*loss_level='token'",
        ),
        (
            {"loss_level": "sequence", "importance_sampling_level": "sequence"},
            "ratio is fixed.*GSPO loss_level='token'",
        ),
        ({"loss_type": "vespo", "importance_sampling_level": "sequence"}, "does not go with loss_type='vespo'"),
        ({"loss_type": "sapo", "delta": 4.0}, "delta=4.0 has no effect with loss_type='sapo'.*'grpo'"),
        ({"sapo_temperature_pos": 2.0}, "sapo_temperature_pos=2.0 has no effect.*use loss_type='sapo'"),
        ({"loss_type": "vespo", "epsilon": 0.1}, "epsilon=0.1 has no effect"),
    ],
)
def test_what_does_not_go_together_is_an_error_that_names_what_would(options, message):
    with pytest.raises(ValueError, match=message):
        make_objective(ObjectiveOptions(**options))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"beta": -1.0}, r"beta=-1\.0 cannot work"),
        ({"delta": 0.5}, r"delta=0\.5 cannot work"),
        ({"top_entropy_quantile": 1.5}, r"top_entropy_quantile=1\.5 cannot work"),
        ({"entropy_coef_min": 2.0}, r"entropy_coef_min=2\.0 cannot work; it must be at most entropy_coef_max=1\.0"),
        ({"vespo_lambda_pos": 0.0}, r"vespo_lambda_pos=0\.0 cannot work"),
        ({"off_policy_mask_threshold": 0.0}, r"off_policy_mask_threshold=0\.0 cannot work"),
        (
            {"multi_objective_aggregation": "normalize_then_sum", "scale_rewards": "none"},
            "scale_rewards=none cannot work",
        ),
    ],
)
def test_values_that_cannot_work_are_errors_that_name_the_option(options, message):
    with pytest.raises(ValueError, match=message):
        ObjectiveOptions(**options).check_objective()


def test_every_row_has_a_paper_and_every_loss_type_a_row():
    for loss_type, recipe in LOSS_TYPES.items():
        ObjectiveOptions(loss_type=loss_type).check_objective()
        assert make_objective(ObjectiveOptions(loss_type=loss_type)).papers[: len(recipe.papers)] == recipe.papers
        assert recipe.papers
