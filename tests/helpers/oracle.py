"""The papers' formulas as plain loops over Python floats (float64). Nothing here imports the package.

Source: DeepSeekMath, arXiv 2402.03300, Eq. (3) and (4); DeepSeek-V2, arXiv 2405.04434, section 4.2.
"""

import math


def exp(x: float) -> float:
    """exp, continued by its tangent above 20."""
    return math.exp(20) * (1 + x - 20) if x > 20 else math.exp(x)


def exp_slope(x: float) -> float:
    return math.exp(min(x, 20))


def clipped_term(log_ratio: float, advantage: float, low: float, high: float) -> tuple[float, float]:
    """min(w A, clip(w) A) and its derivative with respect to the log-ratio."""
    ratio = exp(log_ratio)
    bounded = min(max(ratio, 1 - low), 1 + high)
    if ratio * advantage <= bounded * advantage:
        return ratio * advantage, exp_slope(log_ratio) * advantage
    return bounded * advantage, 0.0


def kl_term(log_ratio: float) -> tuple[float, float]:
    """exp(r) - r - 1 and its derivative with respect to the policy's log-probability, r = ref - policy."""
    return exp(log_ratio) - log_ratio - 1, -(exp_slope(log_ratio) - 1)


def grpo(
    level: str,
    logps: list[list[float]],
    old: list[list[float]],
    advantages: list[float],
    low: float,
    high: float,
    beta: float = 0.0,
    ref: list[list[float]] | None = None,
) -> tuple[float, list[list[float]]]:
    """Minus the sum over completions of the objective, and its gradient with respect to `logps`.

    Each completion is a list of its tokens' log-probabilities; there is no padding.
    """
    loss = 0.0
    gradient = []
    for i, completion in enumerate(logps):
        tokens = len(completion)
        differences = [completion[t] - old[i][t] for t in range(tokens)]
        ref_differences = [ref[i][t] - completion[t] for t in range(tokens)] if ref is not None else []
        if level == "token":
            units = [([t], 1 / tokens) for t in range(tokens)]
        else:
            units = [(list(range(tokens)), 1.0)] if tokens else []
        slopes = [0.0] * tokens
        for members, weight in units:
            value, slope = clipped_term(sum(differences[t] for t in members), advantages[i], low, high)
            if ref is not None:
                kl, kl_slope = kl_term(sum(ref_differences[t] for t in members))
                value, slope = value - beta * kl, slope - beta * kl_slope
            loss -= weight * value
            for t in members:
                slopes[t] -= weight * slope
        gradient.append(slopes)
    return loss, gradient


def advantages(rewards: list[float | None], divisor: float | None = None) -> list[float]:
    """Advantages of one group; `divisor` replaces the group's standard deviation (0 divides by nothing)."""
    known = [r for r in rewards if r is not None]
    if len(known) < 2 or max(known) == min(known):
        return [0.0] * len(rewards)
    mean = math.fsum(known) / len(known)
    if divisor is None:
        divisor = math.sqrt(math.fsum((r - mean) ** 2 for r in known) / (len(known) - 1))
    scale = 1.0 if divisor == 0 else divisor + 1e-4
    return [0.0 if r is None else (r - mean) / scale for r in rewards]
