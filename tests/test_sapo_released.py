"""sapo.py, with the settings of `SAPOConfig.released()`, against the authors' released code.

released_public.json holds what their functions return on random inputs.
"""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import sapo
from sapo import Rollout, SAPOConfig, sapo_update

CASES = json.loads((Path(__file__).parent / "released_public.json").read_text())["cases"]


def as_tensors(fields):
    """float64 tensors for the lists among some fields; the others as they are."""
    tensors = {}
    for name, value in fields.items():
        is_list = isinstance(value, list)
        tensors[name] = torch.tensor(value, dtype=torch.float64) if is_list else value
    return tensors


@pytest.fixture(params=CASES, ids=lambda case: f"seed{case['seed']}")
def released(request):
    """One case: its inputs, the `mask`, our `config`, and in `out` what the released code gave.

    The settings are those of `released()`, but for three that the cases vary. The rewards have
    their KL penalty in them already.
    """
    case = SimpleNamespace(**as_tensors(request.param))
    case.out = as_tensors(case.out)
    case.mask = torch.arange(case.values.shape[1]) < case.lengths[:, None]
    case.config = replace(
        SAPOConfig.released(), gamma=case.gamma, lam=case.lam, top_k=case.top_k, kl_coef=0.0
    )
    case.ends = sapo.entropy_ends(case.entropy, case.mask, case.top_k)
    return case


def credit_of(case):
    """Advantages as the released code hands them to its loss, and the critic's returns."""
    config, mask = case.config, case.mask
    advantages, returns = sapo.segment_gae(
        case.rewards, case.values, case.ends, mask, config.gamma, config.lam, config.value_at
    )
    advantages = sapo.whiten(advantages, mask)
    return advantages.clamp(-config.advantage_clamp, config.advantage_clamp), returns


def same(ours, theirs):
    """Equal to the six decimals that matter."""
    ours, theirs = (torch.as_tensor(number, dtype=torch.float64) for number in (ours, theirs))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["clip_low", "clip_high", "dual_clip", "value_clip"])
def test_released_settings_are_those_of_the_cases(released, name):
    assert getattr(released.config, name) == getattr(released, name)


def test_advantages_and_returns(released):
    advantages, returns = credit_of(released)
    mask = released.mask
    same(advantages[mask], released.out["advantages"][mask])
    same(returns[mask], released.out["returns"][mask])


def test_segment_ratio(released):
    mask = released.mask
    ratio = sapo.segment_ratio(released.logp, released.old_logp, released.ends, mask)
    same(ratio.log()[mask], released.out["segment_log_ratio"][mask])


def test_policy_loss(released):
    config, mask = released.config, released.mask
    advantages, _ = credit_of(released)
    ratio = sapo.segment_ratio(released.logp, released.old_logp, released.ends, mask)
    loss, stats = sapo.policy_loss(
        ratio,
        advantages,
        mask,
        config.clip_low,
        config.clip_high,
        config.dual_clip,
        config.average,
    )
    same(loss, released.out["policy_loss"])
    same(stats["clip_fraction"], released.out["clip_fraction"])


def test_value_loss(released):
    """Their factor 0.5 is our value_coef."""
    config = released.config
    _, returns = credit_of(released)
    loss, stats = sapo.value_loss(
        released.value_pred,
        returns,
        released.ends,
        released.mask,
        config.value_at,
        released.values,
        config.value_clip,
        config.average,
    )
    same(config.value_coef * loss, released.out["value_loss"])
    same(stats["value_clip_fraction"], released.out["value_clip_fraction"])


def test_approx_kl_is_another_estimate_and_never_negative(released):
    """What the released code logs as approximate KL is the mean of minus the log-ratio ("k1"): it
    can be negative, and in most cases here it is. Ours, from the same tokens, cannot."""
    logp, old_logp, mask = released.logp, released.old_logp, released.mask
    ratio = sapo.segment_ratio(logp, old_logp, released.ends, mask)
    same(-ratio.log()[mask].mean(), released.out["approx_kl"])
    assert sapo.approx_kl(logp, old_logp, mask) >= 0


def test_update(released):
    """The same numbers come out of `sapo_update`: it puts the pieces together in their order."""
    rollout = Rollout(
        released.mask, released.ends, released.old_logp, released.rewards, released.values
    )
    advantages, returns = sapo.credit(rollout, released.config)
    logp = released.logp.clone().requires_grad_()
    values = released.value_pred.clone().requires_grad_()
    [metrics] = sapo_update(
        rollout,
        advantages,
        returns,
        lambda rows: (logp[rows], released.entropy[rows]),
        lambda rows: values[rows],
        (torch.optim.SGD([logp], lr=0), torch.optim.SGD([values], lr=0)),
        released.config,
    )
    for name in ("policy_loss", "clip_fraction", "value_loss", "value_clip_fraction"):
        assert metrics[name] == pytest.approx(released.out[name], abs=1e-6), name
