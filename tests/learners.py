"""The smallest learner that sapo_update can teach: a free number for every token."""

import torch
from plain_loops import random_batch, random_rollout

import sapo


class FreeNumbers:
    """A rollout of eight responses, the last one empty, and what learns from it.

    `logp` and `values` (B, T) stand in for a policy's log-probabilities and a critic's values; both
    are learned, by plain gradient descent. `fields` replace those of the rollout.
    """

    def __init__(self, **fields):
        batch = random_batch(0)
        order = [0, 1, 3, 4, 5, 6, 7, 2]  # as in random_rollout
        self.rollout = random_rollout(0, **fields)
        self.logp = batch.logp[order].requires_grad_()
        self.values = batch.old_values[order].requires_grad_()
        self.entropy = batch.entropy[order]
        self.optimizers = (
            torch.optim.SGD([self.logp], lr=2.0),
            torch.optim.SGD([self.values], lr=3.0),
        )

    def score(self, rows):
        return self.logp[rows], self.entropy[rows]

    def value(self, rows):
        return self.values[rows]


def update(learner, config, seed=0, skipped_in_a_row=0):
    """Credit from the learner's critic, then the update. -> the metrics of each epoch."""
    advantages, returns = sapo.credit(learner.rollout, config)
    return sapo.sapo_update(
        learner.rollout,
        advantages,
        returns,
        learner.score,
        learner.value,
        learner.optimizers,
        config,
        torch.Generator().manual_seed(seed),
        skipped_in_a_row,
    )


def update_policy(learner, advantages, config, seed=0):
    """The update with given advantages and without a critic: GRPO's way."""
    return sapo.sapo_update(
        learner.rollout,
        advantages,
        None,
        learner.score,
        None,
        (learner.optimizers[0], None),
        config,
        torch.Generator().manual_seed(seed),
    )
