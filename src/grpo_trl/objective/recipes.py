"""The published objectives, each a choice of four things that do not know of each other.

To add one: a row here with its paper, and in `surrogates.py` or `aggregation.py` what no other row has yet.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

from torch import Tensor

from .aggregation import CONSTANT, LENGTH_WEIGHTED, PER_COMPLETION, PER_TOKEN, Aggregation
from .kl import KL_ESTIMATORS
from .options import ObjectiveOptions
from .ratios import RATIOS
from .surrogates import Cispo, Clip, Sapo, Surrogate, Vespo


@dataclass(frozen=True)
class SurrogateChoice:
    """How a surrogate is made of options."""

    make: Callable[[ObjectiveOptions], Surrogate]
    reads: frozenset[str]
    """The options that it reads, of those that only some surrogates do."""


def _epsilon_high(options: ObjectiveOptions) -> float:
    return options.epsilon if options.epsilon_high is None else options.epsilon_high


CLIP = SurrogateChoice(
    lambda o: Clip(o.epsilon, _epsilon_high(o), o.delta), frozenset({"epsilon", "epsilon_high", "delta"})
)
CISPO = SurrogateChoice(lambda o: Cispo(_epsilon_high(o)), frozenset({"epsilon", "epsilon_high"}))
SAPO = SurrogateChoice(
    lambda o: Sapo(o.sapo_temperature_pos, o.sapo_temperature_neg),
    frozenset({"sapo_temperature_pos", "sapo_temperature_neg"}),
)
VESPO = SurrogateChoice(
    lambda o: Vespo(o.vespo_k_pos, o.vespo_lambda_pos, o.vespo_k_neg, o.vespo_lambda_neg),
    frozenset({"vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"}),
)
SURROGATE_OPTIONS = CLIP.reads | CISPO.reads | SAPO.reads | VESPO.reads


@dataclass(frozen=True)
class Recipe:
    """What a paper chooses."""

    ratio: str
    """A key of `RATIOS`."""
    surrogate: SurrogateChoice
    kl_units: str
    """A key of `RATIOS`: what one KL estimate belongs to."""
    aggregation: Aggregation
    papers: tuple[str, ...]
    """Numbers on arXiv."""
    levels: tuple[str, ...] = ("token", "sequence")
    """The values of `importance_sampling_level` that may replace its ratio."""
    corrects_ratio: bool = False
    """Whether the weights of old policy over sampler multiply the ratio; else they multiply the policy term."""


LOSS_TYPES = {
    "grpo": Recipe("token", CLIP, "token", PER_COMPLETION, ("2402.03300",)),
    "dr_grpo": Recipe("token", CLIP, "token", CONSTANT, ("2503.20783",)),
    "dapo": Recipe("token", CLIP, "token", PER_TOKEN, ("2503.14476",)),
    "bnpo": Recipe("token", CLIP, "token", PER_TOKEN, ("2503.14476",)),
    "cispo": Recipe("token", CISPO, "token", PER_TOKEN, ("2506.13585", "2510.13786")),
    "sapo": Recipe("token", SAPO, "token", PER_COMPLETION, ("2511.20347",)),
    "luspo": Recipe("sequence_mean", CLIP, "token", LENGTH_WEIGHTED, ("2602.05261",)),
    "vespo": Recipe("token", VESPO, "token", PER_TOKEN, ("2602.10693",), levels=("token",), corrects_ratio=True),
}
"""`loss_type` -> what it chooses. `grpo` is DeepSeekMath's, Eq. (3) and (4). VESPO multiplies the token ratios
itself, and its ratio is that of the policy over what sampled."""

LOSS_LEVELS = {
    "token": LOSS_TYPES["grpo"],
    "sequence": Recipe("sequence", CLIP, "sequence", PER_COMPLETION, ("2405.04434", "2412.19437"), levels=()),
}
"""`loss_level` -> what it chooses without a `loss_type`: DeepSeekMath; DeepSeek-V2, section 4.2, and V3, section 5.2.2."""

IMPORTANCE_SAMPLING_LEVELS = {"token": "token", "sequence": "sequence_mean"}
"""`importance_sampling_level` -> key of `RATIOS`. `"sequence"` is GSPO, arXiv 2507.18071."""
GSPO_PAPER = "2507.18071"


@dataclass(frozen=True)
class Objective:
    """A recipe with its numbers."""

    ratio: Callable[[Tensor, Tensor], Tensor]
    """See `RATIOS`."""
    surrogate: Surrogate
    kl_units: Callable[[Tensor, Tensor], Tensor]
    """See `RATIOS`."""
    kl_estimator: Callable[[Tensor], Tensor]
    """See `KL_ESTIMATORS`."""
    beta: float
    """Weight of the KL term."""
    kl_times_ratio: bool
    """Whether the KL term is multiplied by the ratio."""
    off_policy_threshold: float | None
    """See `ObjectiveOptions.off_policy_mask_threshold`."""
    aggregation: Aggregation
    papers: tuple[str, ...]
    """Numbers on arXiv."""
    corrects_ratio: bool
    """See `Recipe`."""


def make_objective(options: ObjectiveOptions) -> Objective:
    """Build the objective that the options name.

    Raises:
        ValueError: Options do not go together; the message names what would.
    """
    _check_combination(options)
    recipe = recipe_of(options)
    level = options.importance_sampling_level
    ratio = recipe.ratio if level is None else IMPORTANCE_SAMPLING_LEVELS[level]
    return Objective(
        ratio=RATIOS[ratio],
        surrogate=recipe.surrogate.make(options),
        kl_units=RATIOS[recipe.kl_units],
        kl_estimator=KL_ESTIMATORS[options.kl_estimator],
        beta=options.beta,
        kl_times_ratio=options.use_bias_correction_kl,
        off_policy_threshold=options.off_policy_mask_threshold,
        aggregation=recipe.aggregation,
        papers=(*recipe.papers, *([GSPO_PAPER] if ratio == "sequence_mean" else [])),
        corrects_ratio=recipe.corrects_ratio,
    )


def recipe_of(options: ObjectiveOptions) -> Recipe:
    """Look up the row that the options name."""
    return LOSS_LEVELS[options.loss_level] if options.loss_type is None else LOSS_TYPES[options.loss_type]


def _check_combination(options: ObjectiveOptions) -> None:
    level, kind, ratio = options.loss_level, options.loss_type, options.importance_sampling_level
    if kind is not None and LOSS_LEVELS[level] is not LOSS_TYPES["grpo"]:
        raise ValueError(
            f"loss_level={level!r} is an objective of its own and does not go with loss_type={kind!r}; use "
            f"loss_level='token' with it, or loss_type=None."
        )
    recipe = recipe_of(options)
    if ratio is not None and ratio not in recipe.levels:
        name = f"loss_level={level!r}" if kind is None else f"loss_type={kind!r}"
        raise ValueError(
            f"importance_sampling_level={ratio!r} does not go with {name}, whose ratio is fixed; use "
            "importance_sampling_level=None, or for GSPO loss_level='token', loss_type='grpo' and "
            "importance_sampling_level='sequence'."
        )
    for option in fields(ObjectiveOptions):
        unread = option.name in SURROGATE_OPTIONS - recipe.surrogate.reads
        if unread and getattr(options, option.name) != option.default:
            users = [repr(name) for name, row in LOSS_TYPES.items() if option.name in row.surrogate.reads]
            raise ValueError(
                f"{option.name}={getattr(options, option.name)} has no effect with loss_type={kind!r}; leave it at "
                f"{option.default}, or use loss_type={' or '.join(users)}."
            )
