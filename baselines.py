"""The neighbours of SAPO, each as what differs from it. They call sapo.py's functions; none has a loss of its own.

    PPO    every token is a segment:       ends = sapo.token_ends(mask), token ratio, lambda 0.95
    GRPO   a whole response is a segment:  ends = sapo.response_ends(mask), token ratio, the group's mean for a critic
"""

from torch import Tensor

# What a method changes in SAPOConfig. The paper runs PPO at lambda 0.95 and SAPO at 0.99: --lam undoes that confound.
SETTINGS = {"sapo": {}, "ppo": {"ratio": "token", "lam": 0.95}, "grpo": {"ratio": "token"}}


def group_advantages(rewards: Tensor, group: int) -> Tensor:
    """GRPO's advantage: (R - mean) / (std + 1e-6) within the group of responses to one prompt (arXiv:2402.03300).

    rewards (B,), one per response, groups of `group` side by side -> (B,). std has Bessel's correction; equal rewards
    give zeros. Raises ValueError when B is not a multiple of `group`, or group < 2.
    """
    if group < 2 or rewards.dim() != 1 or len(rewards) % group:
        raise ValueError(f"group: {group} for rewards of shape {tuple(rewards.shape)}, expected (B,) with B a multiple "
                         "of the group, and at least 2 responses per group")
    grouped = rewards.view(-1, group)  # (B / group, group)
    grouped = grouped - grouped[:, :1]  # equal rewards become exact zeros, whatever their size
    centred = grouped - grouped.mean(1, keepdim=True)
    return (centred / (grouped.std(1, keepdim=True) + 1e-6)).flatten()
