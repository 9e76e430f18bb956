"""Every variant's objective as its paper writes it: plain loops over Python floats. Nothing here imports the package.

`loss(name, batch, logps)` is a function of the policy's logprobs `logps` alone: what a paper puts under stop-gradient is
computed from `batch["logps"]`. So the gradient at `logps = batch["logps"]` is a difference quotient.
"""

import math


EPSILON, EPSILON_HIGH, MAX_LENGTH = 0.2, 0.28, 12


def clip(ratio, advantage, delta=math.inf):
    return min(min(ratio, delta) * advantage, min(max(ratio, 1 - EPSILON), 1 + EPSILON_HIGH) * advantage)


def sapo(ratio, advantage, positive=1.0, negative=1.05):
    tau = positive if advantage > 0 else negative
    return 4 / tau / (1 + math.exp(-tau * (ratio - 1))) * advantage


def gamma(ratio, advantage):
    k, decay = (2.0, 3.0) if advantage >= 0 else (3.0, 2.0)
    return math.exp(decay) * ratio**k * math.exp(-decay * ratio)


def ratios(logps, old):
    return [math.exp(a - b) for a, b in zip(logps, old, strict=True)]


def geometric_mean(logps, old):
    return math.prod(ratios(logps, old)) ** (1 / len(logps))


def per_token(term, batch, logps):
    """Terms of each completion's tokens; `term` takes ratio, advantage, logprob, and the ratio under stop-gradient."""
    return [
        [
            term(w, a, logp, fixed)
            for w, logp, fixed in zip(ratios(row, old), row, ratios(batch["logps"][i], old), strict=True)
        ]
        for i, (row, old, a) in enumerate(zip(logps, batch["old"], batch["advantages"], strict=True))
    ]


def of_completions(batch, logps, power):
    """|o_i|^power times the clipped geometric mean, for each completion with a token."""
    rows = zip(logps, batch["old"], batch["advantages"], strict=True)
    return [[len(row) ** power * clip(geometric_mean(row, old), a)] for row, old, a in rows if row]


def vespo(batch, logps):
    terms = []
    for i, (row, old, advantage) in enumerate(zip(logps, batch["old"], batch["advantages"], strict=True)):
        weight = gamma(math.prod(ratios(batch["logps"][i], old)), advantage)
        terms.append([weight * advantage * logp for logp in row])
    return terms


def total(terms):
    return math.fsum(x for row in terms for x in row)


def mean_of_means(terms, batch):
    return math.fsum(math.fsum(row) / len(row) for row in terms if row) / len(batch["logps"])


def tokens(batch):
    return sum(map(len, batch["logps"]))


def policy_objective(name, batch, logps):
    size = len(logps)
    clipped = per_token(lambda w, a, logp, fixed: clip(w, a), batch, logps)
    if name == "grpo":
        return mean_of_means(clipped, batch)
    if name == "two-sided":
        return mean_of_means(per_token(lambda w, a, logp, fixed: clip(w, a, delta=1.5), batch, logps), batch)
    if name == "dr_grpo":
        return total(clipped) / (size * MAX_LENGTH)
    if name in ("dapo", "bnpo"):
        return total(clipped) / tokens(batch)
    if name == "gspo":
        return total(of_completions(batch, logps, 0)) / size
    if name == "luspo":
        return total(of_completions(batch, logps, 1)) / size
    if name == "cispo":
        return total(per_token(lambda w, a, logp, fixed: min(fixed, 1.2) * a * logp, batch, logps)) / tokens(batch)
    if name == "sapo":
        return mean_of_means(per_token(lambda w, a, logp, fixed: sapo(w, a), batch, logps), batch)
    if name == "vespo":
        return total(vespo(batch, logps)) / tokens(batch)
    raise KeyError(name)


ESTIMATORS = {"k1": lambda r: -r, "k2": lambda r: r**2 / 2, "k3": lambda r: math.exp(r) - r - 1}


def kl_of_means(batch, logps, estimator="k3", corrected=False):
    """1/B sum_i 1/|o_i| sum_t k_it, each times its ratio if `corrected`."""
    rows = []
    for row, ref, old in zip(logps, batch["ref"], batch["old"], strict=True):
        rows.append([])
        for logp, ref_logp, old_logp in zip(row, ref, old, strict=True):
            factor = math.exp(logp - old_logp) if corrected else 1.0
            rows[-1].append(factor * ESTIMATORS[estimator](ref_logp - logp))
    return mean_of_means(rows, batch)


def gradient(function, logps, step=1e-5):
    """Central difference quotients of `function` of ragged logprobs."""
    result = []
    for i, row in enumerate(logps):
        result.append([])
        for t in range(len(row)):
            shifted = [
                [*logps[:i], [*row[:t], row[t] + sign * step, *row[t + 1 :]], *logps[i + 1 :]] for sign in (1, -1)
            ]
            result[-1].append((function(shifted[0]) - function(shifted[1])) / (2 * step))
    return result
