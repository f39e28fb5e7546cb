"""lab/episode.py: which response is chosen, and what one step of REINFORCE does to it."""

import numpy as np
import pytest
import torch

import rollout
import train
import vlm
from lab import episode

QUICK = ["--batch", "4", "--minibatch", "4", "--warm_start_steps", "0", "--max_new_tokens", "12"]


@pytest.mark.parametrize(
    ("wrong", "reward", "clear"),
    [
        *(([1], 0, True), ([2], 0, True), ([0], 0, False), ([3], 0, False)),
        *(([5], 0, False), ([1, 5], 0, False), ([], 0, False), ([1], 1, False)),
    ],
)
def test_a_clear_response_has_one_reading_wrong(wrong, reward, clear):
    steps = [[t, t, t not in wrong] for t in range(8)]
    assert episode.is_clear({"reward": reward, "steps": steps}) == clear


@pytest.fixture
def run(tmp_path):
    return train.build(*train.parse([*QUICK, "--runs", str(tmp_path)]))


def test_the_probabilities_of_digits_are_the_policys(run):
    batch = rollout.collect(run, np.arange(4), "eval")
    shares = episode.digit_probabilities(run.models.policy, batch, 2, 1)
    assert shares.shape == (10,) and 0 < shares.sum() < 1
    tokens = batch.tokens[2:3].clone()
    tokens[0, 1] = run.models.policy.tokenizer.convert_tokens_to_ids("7")
    inputs = vlm.take(batch.inputs, torch.tensor([2]))
    with torch.no_grad():
        logp, _ = vlm.score(run.models.policy, inputs, tokens, batch.written[2:3])
    assert shares[7].item() == pytest.approx(logp[0, 1].exp().item(), rel=1e-5)


@pytest.mark.parametrize("advantage", [-0.5, 0.5])
def test_a_step_of_reinforce_makes_a_response_likelier_or_rarer(run, advantage):
    batch = rollout.collect(run, np.arange(4), "eval")
    rows, policy = torch.tensor([1]), run.models.policy

    def likelihood():
        inputs = vlm.take(batch.inputs, rows)
        with torch.no_grad():
            logp, _ = vlm.score(policy, inputs, batch.tokens[rows], batch.written[rows])
        return logp.sum().item()

    before = likelihood()
    episode.reinforce_step(policy, batch, 1, advantage)
    assert (likelihood() > before) == (advantage > 0) and likelihood() != before


def test_where_no_response_is_clear_that_is_said(run):
    with pytest.raises(ValueError, match="none of 4 responses has one reading wrong"):
        episode.record(run, run)
