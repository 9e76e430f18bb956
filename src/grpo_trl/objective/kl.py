"""Estimators of the KL divergence from the policy to the reference, from r = ref_logp - logp.

Source: Schulman, "Approximating KL divergence", http://joschu.net/blog/kl-approx.html.
"""

from collections.abc import Callable

from torch import Tensor

from .ratios import exp_tangent


def k1(r: Tensor) -> Tensor:
    """Compute -r: unbiased; its gradient is 0 on average on policy, unless it is weighted by the ratio."""
    return -r


def k2(r: Tensor) -> Tensor:
    """Compute r^2 / 2: biased; on policy its gradient is an unbiased estimate of that of the KL divergence."""
    return r.square() / 2


def k3(r: Tensor) -> Tensor:
    """Compute e^r - r - 1: unbiased, at least 0, with little variance. Source: DeepSeekMath, arXiv 2402.03300, Eq. (4)."""
    return exp_tangent(r) - r - 1


KL_ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}
