"""The options of the objective: names, meanings and defaults of TRL's `GRPOConfig`, and `loss_level`."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal


LossLevel = Literal["token", "sequence"]
LossType = Literal["grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"]
ScaleRewards = Literal["group", "batch", "none"]
MultiObjectiveAggregation = Literal["sum_then_normalize", "normalize_then_sum"]


@dataclass
class ObjectiveOptions:
    """What is trained for. `make_objective` checks what goes together."""

    loss_level: LossLevel = field(
        default="token",
        metadata={
            "help": "The published objective: 'token' is DeepSeekMath's (arXiv 2402.03300), a ratio and a KL per token; "
            "'sequence' is that of DeepSeek-V2 and V3 (arXiv 2405.04434, 2412.19437), a ratio and a KL per completion."
        },
    )
    loss_type: LossType | None = field(
        default=None,
        metadata={"help": "A variant of loss_level='token'; docs/objective.md has the table. Default: 'grpo'."},
    )
    importance_sampling_level: LossLevel | None = field(
        default=None,
        metadata={
            "help": "The ratio of loss_level='token': each token's own ('token'), or the geometric mean over the "
            "completion ('sequence', GSPO). Default: as in the paper of loss_type, 'token' for most."
        },
    )
    beta: float = field(
        default=0.0, metadata={"help": "Weight of the KL term to the reference. 0: no reference is kept or evaluated."}
    )
    kl_estimator: Literal["k1", "k2", "k3"] = field(
        default="k3", metadata={"help": "Estimator of the KL divergence from r = log(reference / policy)."}
    )
    use_bias_correction_kl: bool = field(
        default=False,
        metadata={"help": "Multiply the KL term by the importance ratio, as DeepSeek-V3.2 (arXiv 2512.02556) does."},
    )
    epsilon: float = field(default=0.2, metadata={"help": "The ratio is clipped below 1 - epsilon."})
    epsilon_high: float | None = field(
        default=None,
        metadata={
            "help": "The ratio is clipped above 1 + epsilon_high; with loss_type='cispo' above epsilon_high itself, e.g. "
            "5.0. Default: epsilon."
        },
    )
    delta: float | None = field(
        default=None,
        metadata={
            "help": "Bound the ratio of completions with a negative advantage too (two-sided clipping), e.g. 4.0."
        },
    )
    sapo_temperature_neg: float = field(
        default=1.05, metadata={"help": "Temperature of SAPO's gate for advantages that are not positive."}
    )
    sapo_temperature_pos: float = field(
        default=1.0, metadata={"help": "Temperature of SAPO's gate for positive advantages."}
    )
    vespo_k_pos: float = field(default=2.0, metadata={"help": "Power of VESPO's weight for advantages of 0 or more."})
    vespo_lambda_pos: float = field(
        default=3.0, metadata={"help": "Decay of VESPO's weight for advantages of 0 or more."}
    )
    vespo_k_neg: float = field(default=3.0, metadata={"help": "Power of VESPO's weight for negative advantages."})
    vespo_lambda_neg: float = field(default=2.0, metadata={"help": "Decay of VESPO's weight for negative advantages."})
    off_policy_mask_threshold: float | None = field(
        default=None,
        metadata={
            "help": "Drop the policy term of completions with a negative advantage whose mean log-ratio of the sampler to "
            "the policy exceeds this, e.g. 0.5 (DeepSeek-V3.2)."
        },
    )
    mask_truncated_completions: bool = field(
        default=False, metadata={"help": "Do not train on completions that max_completion_length cut off (DAPO)."}
    )
    top_entropy_quantile: float = field(
        default=1.0,
        metadata={
            "help": "Share of a mini-batch's tokens, those of highest entropy, that the policy term is restricted to. "
            "Below 1.0 each optimizer step evaluates its completions once more."
        },
    )
    entropy_coef: float = field(
        default=0.0,
        metadata={"help": "Weight of the mean entropy per token, as a bonus; with use_adaptive_entropy at first."},
    )
    use_adaptive_entropy: bool = field(
        default=False, metadata={"help": "Steer entropy_coef towards entropy_target (Skywork-OR1, arXiv 2505.22312)."}
    )
    entropy_coef_min: float = field(default=0.0, metadata={"help": "Lower bound of the adaptive entropy_coef."})
    entropy_coef_max: float = field(default=1.0, metadata={"help": "Upper bound of the adaptive entropy_coef."})
    entropy_coef_delta: float = field(
        default=0.005, metadata={"help": "Step of the adaptive entropy_coef, once per optimizer step."}
    )
    entropy_target: float = field(
        default=0.2, metadata={"help": "Mean entropy per token (nats) at or below which the adaptive bonus applies."}
    )
    scale_rewards: ScaleRewards = field(
        default="group",
        metadata={
            "help": "What advantages are divided by: the standard deviation of the 'group', of the 'batch' (the whole "
            "generation batch on all ranks), or nothing ('none')."
        },
    )
    multi_objective_aggregation: MultiObjectiveAggregation = field(
        default="sum_then_normalize",
        metadata={
            "help": "Sum rewards, then compare within the group, or compare each reward within the group, then sum "
            "('normalize_then_sum', GDPO)."
        },
    )

    def check_objective(self) -> None:
        """Check values and combinations.

        Raises:
            ValueError: An option has a value that cannot work; the message names one that would.
        """
        self._check_objective_ranges()
        self._check_objective_entropy()

    @property
    def has_entropy_bonus(self) -> bool:
        """Whether the loss has an entropy term, be its coefficient 0 at times."""
        return self.use_adaptive_entropy or self.entropy_coef != 0

    def _check_objective_ranges(self) -> None:
        self._require("beta", 0 <= self.beta < math.inf, "it must be 0 or more, e.g. 0.04")
        self._require("epsilon", 0 < self.epsilon < 1, "it must be between 0 and 1, e.g. 0.2")
        self._require(
            "epsilon_high", self.epsilon_high is None or self.epsilon_high > 0, "it must be above 0, e.g. 0.28"
        )
        self._require("delta", self.delta is None or self.delta > 1, "it must be above 1 + epsilon_high, e.g. 4.0")
        positive = ("sapo_temperature_neg", "sapo_temperature_pos", "vespo_lambda_pos", "vespo_lambda_neg")
        for name in positive:
            self._require(name, getattr(self, name) > 0, "it must be above 0")
        for name in ("vespo_k_pos", "vespo_k_neg"):
            self._require(name, getattr(self, name) >= 0, "it must be 0 or more")
        sums = self.multi_objective_aggregation == "normalize_then_sum"
        self._require(
            "scale_rewards",
            not (sums and self.scale_rewards == "none"),
            "multi_objective_aggregation='normalize_then_sum' always divides; use 'group', or 'sum_then_normalize'",
        )
        threshold = self.off_policy_mask_threshold
        self._require("off_policy_mask_threshold", threshold is None or threshold > 0, "it must be above 0, e.g. 0.5")

    def _check_objective_entropy(self) -> None:
        self._require(
            "top_entropy_quantile", 0 <= self.top_entropy_quantile <= 1, "it must be between 0 and 1, e.g. 0.2"
        )
        self._require("entropy_coef", math.isfinite(self.entropy_coef), "it must be a finite number such as 0.001")
        self._require("entropy_coef_delta", self.entropy_coef_delta >= 0, "it must be 0 or more")
        self._require(
            "entropy_coef_min",
            self.entropy_coef_min <= self.entropy_coef_max,
            f"it must be at most entropy_coef_max={self.entropy_coef_max}",
        )

    def _require(self, name: str, ok: bool, remedy: str) -> None:
        value: Any = getattr(self, name)
        if not ok:
            raise ValueError(f"{name}={value} cannot work; {remedy}.")
