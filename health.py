"""Signs that a run is breaking, each said in one line, while it can still be stopped.

A collapse announces itself: the policy moves far within one rollout, every advantage has the same
sign because the critic lags behind, nearly all are negative because it still expects what the
policy can no longer do, or the critic becomes worse than a constant. `warnings` looks for these
four in the metrics of each iteration. A sign that goes and comes back is said again.
"""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Sign:
    """Something in an iteration's metrics that healthy runs do not show for long."""

    metric: str  # the number that shows it
    holds: Callable[[dict], bool]  # metrics of an iteration -> is it there?
    patience: int  # iterations in a row that it must last before it is worth a line
    meaning: str
    remedy: str


# Nats per token. Of ten runs of the default nine stay far below it, and collapses reach 1. But one
# of the ten passed it in one rollout, two of four epochs did, too, and all three ended well: a line
# is a warning and no verdict.
KL_BOUND = 0.2


def _moves_too_far(metrics):
    return metrics.get("approx_kl", 0.0) > KL_BOUND


def _has_one_sign(metrics):
    return metrics["advantage_std"] > 0 and metrics["positive_advantages"] in (0.0, 1.0)


def _is_mostly_blame(metrics):
    is_low = metrics["advantage_mean"] < -0.5 * metrics["advantage_std"]
    return is_low and metrics["positive_advantages"] < 0.2


def _is_worse_than_a_constant(metrics):
    return metrics.get("explained_variance", 0.0) < -0.5


SIGNS = (
    Sign(
        "approx_kl",
        _moves_too_far,
        1,
        f"above {KL_BOUND}: one rollout moves the policy too far",
        "lower --actor_lr or --epochs",
    ),
    Sign(
        "positive_advantages",
        _has_one_sign,
        3,
        "every advantage has the same sign: the critic lags behind the policy",
        "lower --actor_lr or --epochs",
    ),
    Sign(
        "advantage_mean",
        _is_mostly_blame,
        2,
        "the mean is half a standard deviation below 0, and fewer than one advantage in five is "
        "positive: the critic expects what the policy can no longer do",
        "lower --actor_lr or --epochs, or raise --lam",
    ),
    Sign(
        "explained_variance",
        _is_worse_than_a_constant,
        3,
        "below -0.5: the critic is worse than a constant",
        "lower --critic_lr",
    ),
)


def warnings(metrics: dict, since: dict[str, int]) -> list[str]:
    """The lines that an iteration gives reason for.

    metrics: of one iteration, as iterate() returns them, with its number as "iteration".
    since: {metric: the iteration that its sign has been there from}; brought up to date here, and
        kept by the caller from one iteration to the next.
    """
    lines = []
    for sign in SIGNS:
        if not sign.holds(metrics):
            since.pop(sign.metric, None)
            continue
        first = since.setdefault(sign.metric, metrics["iteration"])
        if metrics["iteration"] - first + 1 == sign.patience:
            lines.append(
                f"warning: {sign.metric} is {metrics[sign.metric]:.3g} since iteration {first}, "
                f"{sign.meaning}; {sign.remedy}"
            )
    return lines
