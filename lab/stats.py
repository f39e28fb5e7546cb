"""The statistics of this repository: intervals, interquartile mean, AUROC, Lift; numpy alone.

Means over seeds and their intervals follow Agarwal et al. (arXiv:2108.13264, the rliable paper).
Left out: significance tests; read the intervals.
"""

import numpy as np


def iqm(values):
    """Interquartile mean along the last axis: the mean of the middle half of the values.

    Of n values the floor(n / 4) smallest and as many of the largest are left out, as scipy's
    trim_mean(0.25) does. Less swayed by one odd seed than the mean, less wasteful than the median.
    Source: Agarwal et al. (arXiv:2108.13264).  (…, n) -> (…).
    """
    values = np.sort(values, axis=-1)
    n = values.shape[-1]
    trimmed = n // 4
    return values[..., trimmed : n - trimmed].mean(-1)


def interval(values, statistic=iqm, draws=2000, seed=0):
    """A statistic of the values and its 95% interval: (value, low, high), in their unit.

    Percentile bootstrap: the 2.5% and 97.5% quantiles of the statistic over `draws` samples of n
    values drawn with replacement from the n given. `statistic` reduces the last axis. The same at
    every call, by `seed`. Source: Efron and Tibshirani (1993), chapter 13; over seeds as in Agarwal
    et al. (arXiv:2108.13264).
    """
    values = np.asarray(values, float)
    rng = np.random.default_rng(seed)
    resampled = values[rng.integers(len(values), size=(draws, len(values)))]  # (draws, n)
    low, high = np.quantile(statistic(resampled), (0.025, 0.975)).tolist()
    return float(statistic(values)), low, high


def probability_of_improvement(values, others, draws=2000, seed=0):
    """P(a run of one method ends above a run of another), and its 95% interval: (p, low, high).

    The share of all pairs, ties counting half; the interval by bootstrap, each side resampled by
    itself. The same at every call, by `seed`. Source: Agarwal et al. (arXiv:2108.13264).
    """
    values, others = np.asarray(values, float), np.asarray(others, float)
    above = np.sign(values[:, None] - others[None]) / 2 + 0.5  # (n, m): 1, 0, or 0.5 for a tie
    rng = np.random.default_rng(seed)
    rows = rng.integers(len(values), size=(draws, len(values), 1))
    columns = rng.integers(len(others), size=(draws, 1, len(others)))
    low, high = np.quantile(above[rows, columns].mean((1, 2)), (0.025, 0.975)).tolist()
    return float(above.mean()), low, high


def of_reuse(runs):
    """What is told of a variant that uses its rollouts often: the interquartile mean of the
    accuracy, the mean share of tokens clipped, the largest approx_kl of any run (parts of a curve
    that are NaN have none)."""
    accuracy = float(iqm([run["accuracy"] for run in runs]))
    clipped = float(np.mean([np.nanmean(run["curve"]["clip_fraction"]) for run in runs]))
    divergences = np.concatenate([run["curve"]["approx_kl"] for run in runs])
    return accuracy, clipped, float(np.nanmax(divergences))


def auroc(scores, right):
    """P(score of a right step > score of a wrong one), ties count half: 1 is perfect, 0.5 is blind.

    From ranks, the Mann-Whitney statistic: (R − n (n + 1) / 2) / (n m), where R is the sum of the
    ranks of the n right steps among all n + m, from 1, equal scores sharing their mean rank.
    `scores` and `right` are (steps,); NaN where no step is right or none is wrong. Source: Hanley
    and McNeil (1982).
    """
    scores = np.asarray(scores)
    right = np.asarray(right, bool)
    _, place, count = np.unique(scores, return_inverse=True, return_counts=True)
    # The k-th distinct score fills `count[k]` ranks, up to count.cumsum()[k]; its steps share
    # the middle of them.
    rank = (count.cumsum() - (count - 1) / 2)[place]
    n = right.sum()
    m = (~right).sum()
    if n == 0 or m == 0:
        return float("nan")
    return float((rank[right].sum() - n * (n + 1) / 2) / (n * m))


def lift(entropy, jump, q, top=0.1):
    """Lift of large value jumps at tokens of high entropy, Eq. 12:  Lift(q) = P(D | A) / P(D).

    A: the tokens in the top share `q` of entropy. D: those in the top share `top` of |V_t −
    V_{t+1}|. Above 1: V jumps where entropy is high. `entropy` (nats) and `jump` are (tokens,).
    Tokens equal to a threshold count as above it, so that D holds more than `top` where many jumps
    are equal. Source: SAPO (arXiv:2605.01327), Eq. 12.
    """
    uncertain = entropy >= np.quantile(entropy, 1 - q)
    large = jump >= np.quantile(jump, 1 - top)
    return float(large[uncertain].mean() / large.mean())
