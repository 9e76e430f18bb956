import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_trl.logprobs.compute import TokenLogprobs
from grpo_trl.logprobs.packing import Packer
from grpo_trl.metrics import Max, Mean, Metric, MetricLog, Min, Quantile, RunningMean, Std
from grpo_trl.objective import ObjectiveOptions, grpo_loss, make_objective
from grpo_trl.trainer.loss_metrics import loss_metrics
from grpo_trl.types import Completion


NAN = math.nan
KINDS = ["mean", "running mean", "max", "min", "std", "quantile"]


def metric_of(kind: str, values: torch.Tensor) -> Metric:
    everywhere = torch.ones_like(values, dtype=torch.bool)
    return {
        "mean": lambda: Mean.of(values),
        "running mean": lambda: RunningMean.of(values),
        "max": lambda: Max.of(values, everywhere),
        "min": lambda: Min.of(values, everywhere),
        "std": lambda: Std.of(values),
        "quantile": lambda: Quantile.of(values, 0.1),
    }[kind]()


def expected_of(kind: str, values: np.ndarray) -> float | None:
    if kind == "std":
        return float(np.std(values, ddof=1)) if len(values) > 1 else None
    if kind == "quantile":
        return float(np.quantile(values, 0.1))
    return float({"mean": np.mean, "running mean": np.mean, "max": np.max, "min": np.min}[kind](values))


@st.composite
def numbers_in_parts(draw) -> list[list[float]]:
    """Numbers in at most five parts, some of which may be empty, but not all."""
    number = st.floats(-1e6, 1e6).map(lambda x: round(x, 3))
    return draw(st.lists(st.lists(number, max_size=6), min_size=1, max_size=5).filter(any))


@pytest.mark.parametrize("kind", KINDS)
@given(parts=numbers_in_parts(), on_cpu=st.lists(st.booleans(), min_size=5, max_size=5))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_split_of_the_data_gives_the_value_of_the_whole(kind, parts, on_cpu):
    metrics = [metric_of(kind, torch.tensor(part, dtype=torch.float64)) for part in parts]
    metrics = [m.on_cpu() if early else m for m, early in zip(metrics, on_cpu, strict=False)]
    total = metrics[0]
    for metric in metrics[1:]:
        total = total + metric
    expected = expected_of(kind, np.array([x for part in parts for x in part]))
    for value in (total.value, total.on_cpu().value):
        assert value == (None if expected is None else pytest.approx(expected, rel=1e-9, abs=1e-6))
        assert value is None or type(value) is float


@pytest.mark.parametrize("kind", KINDS)
def test_parts_may_be_added_in_any_grouping(kind):
    a, b, c = (metric_of(kind, torch.tensor(part)) for part in ([1.0, 4.0], [-2.5], [7.0, 0.25, 3.0]))
    assert ((a + b) + c).value == pytest.approx((a + (b + c)).value, rel=1e-12)


def test_metrics_of_numbers_keep_the_precision_of_python():
    assert (Max(0.1) + Max(0.05)).value == 0.1
    assert (Min(0.1) + Min(0.2)).value == 0.1
    assert (Mean(0.1) + Mean(0.3)).value == (0.1 + 0.3) / 2


def test_float32_tensors_are_summed_in_float64():
    values = torch.full((100_000,), 0.1)
    assert Mean.of(values).value == pytest.approx(float(values[0]), rel=1e-12)


def test_a_mask_says_what_counts():
    values = torch.tensor([[1.0, NAN, 5.0], [-math.inf, 2.0, 9.0]])
    mask = torch.tensor([[True, False, True], [False, True, False]])
    assert Mean.of(values, mask).value == pytest.approx(8 / 3)
    assert Max.of(values, mask).value == 5.0
    assert Min.of(values, mask).value == 1.0


def test_nothing_has_no_value():
    nothing = torch.zeros(2, dtype=torch.bool)
    values = torch.tensor([1.0, 2.0])
    empty = [Mean.of(values, nothing), Max.of(values, nothing), Min.of(values, nothing), Std.of(torch.full((2,), NAN))]
    for metric in empty:
        assert metric.value is None
        assert metric.on_cpu().value is None
        assert (metric + metric).value is None
    something = [Mean.of(values), Max.of(values, ~nothing), Min.of(values, ~nothing), Std.of(values)]
    for metric, other in zip(empty, something, strict=True):
        assert (metric + other).value == (other + metric).value == other.value


def test_std_leaves_out_what_is_nan_and_needs_two_values():
    assert Std.of(torch.tensor([1.0, NAN, 3.0, NAN])).value == pytest.approx(math.sqrt(2))
    assert Std.of(torch.tensor([1.0, NAN])).value is None
    assert (Std.of(torch.tensor([1.0])) + Std.of(torch.tensor([3.0]))).value == pytest.approx(math.sqrt(2))


def test_std_does_not_cancel_far_from_zero():
    values = torch.tensor([1e9 + x for x in (0.0, 1.0, 2.0, 3.0)], dtype=torch.float64)
    assert (Std.of(values[:1]) + Std.of(values[1:])).value == pytest.approx(np.std([0, 1, 2, 3], ddof=1), rel=1e-9)


@pytest.mark.parametrize("size", [1e-100, 1e200, 1e307])
def test_deviations_of_values_of_any_size_do_not_overflow(size):
    values = size * torch.tensor([0.0, 1.0, -2.0, 3.0, 1.0], dtype=torch.float64)
    expected = size * np.std([0, 1, -2, 3, 1], ddof=1)
    for split in range(6):
        assert (Std.of(values[:split]) + Std.of(values[split:])).value == pytest.approx(expected, rel=1e-9)
        mean = RunningMean.of(values[:split]) + RunningMean.of(values[split:])
        assert mean.value == pytest.approx(size * 0.6, rel=1e-9)
    huge = torch.full((8,), 1.7e308, dtype=torch.float64)
    assert (RunningMean.of(huge) + RunningMean.of(huge)).value == pytest.approx(1.7e308)
    assert Std.of(1.7e308 * torch.tensor([1.0, -1.0]).double()).value > 1e308
    (Std.of(torch.tensor([1.7e308]).double()) + Std.of(torch.tensor([-1.7e308]).double())).value  # noqa: B018 - no error


def test_metrics_hold_no_graph():
    values = torch.ones(2, requires_grad=True)
    everywhere = torch.ones(2, dtype=torch.bool)
    assert not Mean.of(values).total.requires_grad
    assert not Max.of(values, everywhere).largest.requires_grad
    assert not Min.of(values, everywhere).smallest.requires_grad


# ---- The log ----
def alone(parts: list) -> list:
    return parts


def test_reduce_gives_floats_and_starts_anew():
    log = MetricLog()
    log.add("a", Mean(torch.tensor(3.0), torch.tensor(2)))
    log.add("a", Mean(1.0))
    log.add_all({"b": Min(2), "c": Max(torch.tensor(-1.0)), "nothing": Mean(0.0, 0.0)})
    reduced = log.reduce(alone)
    assert reduced == {"a": pytest.approx(4 / 3), "b": 2.0, "c": -1.0}
    assert all(type(value) is float for value in reduced.values())
    assert log.reduce(alone) == {}
    log.add("a", Mean(5.0))
    assert log.reduce(alone) == {"a": 5.0}


def test_reduce_gathers_plain_numbers_once():
    log, calls = MetricLog(), []
    log.add("a", Mean(torch.tensor(3.0), torch.tensor(2)))
    log.add("b", Min(torch.tensor(1.5)))
    log.reduce(lambda parts: calls.append(parts) or parts)
    assert calls == [[{"a": Mean(3.0, 2.0), "b": Min(1.5)}]]
    assert {type(number) for number in (calls[0][0]["a"].total, calls[0][0]["b"].smallest)} == {float}


def test_ranks_may_have_other_names():
    logs = [MetricLog(), MetricLog()]
    logs[0].add_all({"both": Mean(6.0, 2.0), "first": Min(1.0), "largest": Max(0.1)})
    logs[1].add_all({"second": Std.of(torch.tensor([1.0, 3.0])), "both": Mean(0.0), "largest": Max(0.3)})
    parts: list = []
    for log in logs:
        log.reduce(lambda own: parts.extend(own) or own)
    expected = {"both": 2.0, "first": 1.0, "second": pytest.approx(math.sqrt(2)), "largest": 0.3}
    for log in logs:  # every rank ends up with the same, and with what the others alone have
        assert log.reduce(lambda own: parts) == expected


def test_timed_adds_seconds_and_counts_nothing():
    log = MetricLog()
    with log.timed("b"):
        pass
    with pytest.raises(RuntimeError), log.timed("a"):
        raise RuntimeError
    assert {name: metric.count for name, metric in log._metrics.items()} == {"a": 0.0, "b": 0.0}
    assert all(metric.total >= 0 for metric in log._metrics.values())
    log.add("a", Mean(0.0, 2.0))
    assert set(log.reduce(alone)) == {"a"}


# ---- What a loss says of itself ----
LOGPS = torch.tensor([[-1.0, -2.0, -0.5], [-1.0, -3.0, 0.0], [-0.2, 0.0, 0.0]])
ENTROPY = torch.tensor([[0.5, 1.5, 1.0], [2.0, 3.0, 99.0], [4.0, 99.0, 99.0]])
MASKS = [[True, False, True], [True, True], [False]]
OLD = [[-1.5, 0.0, -0.5], [-0.1, -3.0], [-9.0]]  # ratios e^0.5, 1; e^-0.9, 1
REF = [[-0.5, 7.0, -0.5], [-1.0, -2.0], [3.0]]
SAMPLER = [[-1.25, 0.0, NAN], [-0.5, -3.0], [-0.2]]
ADVANTAGES = [2.0, -0.5, 1.0]


def make_metrics(loss_level: str, old=True, ref=True, sampler=True, rows=(0, 1, 2)) -> dict[str, float | None]:
    completions = [
        Completion(
            prompt_ids=[5],
            ids=[6] * len(MASKS[i]),
            mask=MASKS[i],
            advantage=ADVANTAGES[i],
            old_logps=torch.tensor(OLD[i]) if old else None,
            ref_logps=torch.tensor(REF[i]) if ref else None,
            sampler_logps=SAMPLER[i] if sampler else None,
        )
        for i in rows
    ]
    micro_batch = Packer(batch_size=3, max_tokens=None, pad_token_id=0).micro_batch(completions, divisor=3)
    width = micro_batch.mask_BT.shape[1]
    scores = TokenLogprobs(LOGPS[list(rows), :width], ENTROPY[list(rows), :width])
    output = grpo_loss(
        scores.logps_BT,
        scores.logps_BT if micro_batch.old_logps_BT is None else micro_batch.old_logps_BT,
        micro_batch.advantages_BU,
        micro_batch.mask_BT,
        objective=make_objective(ObjectiveOptions(loss_level=loss_level, epsilon_high=0.3, beta=0.1 if ref else 0.0)),
        ref_logps_BT=micro_batch.ref_logps_BT,
    )
    metrics = loss_metrics(output, scores, micro_batch, None)
    return {name: metric.value for name, metric in metrics.items()}


def k3(log_ratio: float) -> float:
    return math.exp(log_ratio) - log_ratio - 1


def test_loss_metrics_of_the_token_level_are_means_over_tokens():
    metrics = make_metrics("token")
    assert metrics == {
        # e^0.5 is clipped above; of the second completion e^-0.9 is clipped below; the third has no token
        "policy_signal": pytest.approx((0.5 * 1 * 2.0 + 0.5 * 1 * 0.5 + 0) / 3),
        "entropy": pytest.approx((0.5 + 1.0 + 2.0 + 3.0) / 4),
        "log_ratio_tail": 0.0,
        "clip_ratio/region_mean": pytest.approx(2 / 4),
        "clip_ratio/low_mean": pytest.approx(1 / 4),
        "clip_ratio/high_mean": pytest.approx(1 / 4),
        "clip_ratio/low_min": 0.0,
        "clip_ratio/high_max": pytest.approx(1 / 2),
        "kl": pytest.approx((k3(0.5) + k3(0.0) + k3(0.0) + k3(1.0)) / 4),
        # |old - sampler|, without the token whose sampler is unknown
        "sampling/sampling_logp_difference/mean": pytest.approx((0.25 + 0.4 + 0.0) / 3),
        "sampling/sampling_logp_difference/max": pytest.approx(0.4),
    }


def test_loss_metrics_of_the_sequence_level_are_means_over_completions():
    metrics = make_metrics("sequence")
    assert metrics["policy_signal"] == pytest.approx(0.0)  # e^0.5 is clipped above, e^-0.9 below
    assert metrics["clip_ratio/region_mean"] == pytest.approx(1.0)
    assert metrics["clip_ratio/low_mean"] == metrics["clip_ratio/high_mean"] == pytest.approx(1 / 2)
    assert (metrics["clip_ratio/low_min"], metrics["clip_ratio/high_max"]) == (0.0, 1.0)
    assert metrics["kl"] == pytest.approx((k3(0.5) + k3(1.0)) / 2)
    assert metrics["entropy"] == pytest.approx((0.5 + 1.0 + 2.0 + 3.0) / 4)


def test_a_completion_without_tokens_is_no_completion_without_clipping():
    metrics = make_metrics("sequence", rows=(1, 2))
    assert metrics["clip_ratio/low_min"] == 1.0
    assert (metrics["clip_ratio/high_max"], metrics["clip_ratio/low_mean"]) == (0.0, 1.0)


def test_on_policy_the_sampler_is_compared_with_the_policy_itself():
    metrics = make_metrics("token", old=False)
    assert metrics["sampling/sampling_logp_difference/mean"] == pytest.approx((0.25 + 0.5 + 0.0) / 3)
    assert metrics["clip_ratio/region_mean"] == 0.0
    assert metrics["policy_signal"] == pytest.approx((2.0 + 0.5 + 0.0) / 3)


def test_without_reference_and_sampler_their_metrics_are_left_out():
    names = set(make_metrics("token", ref=False, sampler=False))
    assert names == set(make_metrics("token")) - {
        "kl",
        "sampling/sampling_logp_difference/mean",
        "sampling/sampling_logp_difference/max",
    }


@pytest.mark.parametrize("loss_level", ["token", "sequence"])
def test_a_micro_batch_without_completions_has_the_same_metrics_without_values(loss_level):
    assert make_metrics(loss_level, rows=()) == dict.fromkeys(make_metrics(loss_level))


def test_a_log_ratio_above_20_counts_as_tail(monkeypatch):
    monkeypatch.setitem(globals(), "REF", [[20.5, 0.0, -0.5], *REF[1:]])
    assert make_metrics("token")["log_ratio_tail"] == pytest.approx(1 / 8)
    assert make_metrics("sequence")["log_ratio_tail"] == pytest.approx(1 / 4)
