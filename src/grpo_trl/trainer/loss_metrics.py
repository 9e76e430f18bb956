"""Metrics of a micro-batch's loss."""

from torch import Tensor

from ..logprobs.compute import TokenLogprobs
from ..metrics import Max, Mean, Metric, Min, Sum
from ..objective import Clipped, LossOutput
from ..types import MicroBatch


def loss_metrics(
    output: LossOutput, logprobs: TokenLogprobs, micro_batch: MicroBatch, correction_BT: Tensor | None
) -> dict[str, Metric]:
    """Describe a micro-batch's loss, under TRL's names where TRL has one.

    `policy_signal` explains a loss near 0, which on policy it is by construction: the mean over completions of
    `LossOutput.signal_B`, 0 where nothing can be learned.
    """
    mask_BU = output.mask_BU
    metrics: dict[str, Metric] = {
        "policy_signal": Mean.of(output.signal_B),
        "entropy": Mean.of(logprobs.entropy_BT, micro_batch.mask_BT),
    }
    metrics |= {name: Mean.of(values_BU, mask_BU) for name, values_BU in output.means.items()}
    if output.clipped is not None:
        metrics |= _clip_metrics(output.clipped, mask_BU)
    tail = Mean.of(output.tail_BU.float(), mask_BU)
    if output.kl is not None:
        metrics["kl"] = Mean.of(output.kl.kl_BK, output.kl.mask_BK)
        tail += Mean.of(output.kl.tail_BK.float(), output.kl.mask_BK)
    metrics["log_ratio_tail"] = tail
    return metrics | _sampler_metrics(logprobs, micro_batch) | _correction_metrics(correction_BT, micro_batch)


def _clip_metrics(clipped: Clipped, mask_BU: Tensor) -> dict[str, Metric]:
    """Count the units that are clipped, over all and within each completion."""
    metrics: dict[str, Metric] = {
        "clip_ratio/region_mean": Mean.of((clipped.low_BU | clipped.high_BU).float(), mask_BU)
    }
    units_B = mask_BU.sum(1)
    for side, clipped_BU, extreme in (("low", clipped.low_BU, Min), ("high", clipped.high_BU, Max)):
        share_B = clipped_BU.sum(1).float() / units_B.clamp(min=1)
        metrics[f"clip_ratio/{side}_mean"] = Mean.of(clipped_BU.float(), mask_BU)
        metrics[f"clip_ratio/{side}_{extreme.__name__.lower()}"] = extreme.of(share_B, units_B > 0)
    return metrics


def _sampler_metrics(logprobs: TokenLogprobs, micro_batch: MicroBatch) -> dict[str, Metric]:
    """Compare the logprobs of the sampler with the trainer's."""
    if micro_batch.sampler_logps_BT is None:
        return {}
    old_BT = logprobs.logps_BT.detach() if micro_batch.old_logps_BT is None else micro_batch.old_logps_BT
    difference_BT = (old_BT - micro_batch.sampler_logps_BT).abs()
    known_BT = micro_batch.mask_BT & ~difference_BT.isnan()
    return {
        "sampling/sampling_logp_difference/mean": Mean.of(difference_BT, known_BT),
        "sampling/sampling_logp_difference/max": Max.of(difference_BT, known_BT),
    }


def _correction_metrics(correction_BT: Tensor | None, micro_batch: MicroBatch) -> dict[str, Metric]:
    """Describe the weights of old policy over sampler, token by token."""
    if correction_BT is None or micro_batch.drawn_logps_BT is None:
        return {}
    mask_BT = micro_batch.mask_BT
    return {
        "sampling/importance_sampling_ratio/min": Min.of(correction_BT, mask_BT),
        "sampling/importance_sampling_ratio/mean": Mean.of(correction_BT, mask_BT),
        "sampling/importance_sampling_ratio/max": Max.of(correction_BT, mask_BT),
        "sampling/unknown_logprobs": Sum(float((micro_batch.drawn_logps_BT.isnan() & mask_BT).sum())),
    }
