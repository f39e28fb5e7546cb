"""The advantage estimators, ratios and losses that people use, held against the theorems.

    python -m lab.estimators     # -> results/theorems.json, from which lab/tables.py makes tables

Each is an adapter of a few lines around a library's own function. One whose library is not
installed keeps the verdicts that stand in results/ already. None of these is a dependency of this
project: `pip install torchrl trl stable-baselines3 verl ray`, in an environment of its own.
"""

import importlib.metadata
import time
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import torch

import baselines
import checkpoint
import sapo
from lab.common import command_line, read_outcome
from lab.sweep import ROOT
from lab.theorems import EXAMPLES, Claimant, asked, verdicts

FILE = ROOT / "results" / "theorems.json"


# --------------------------------------------------------------------------------- this project


def sapo_gae(rewards, values, ends, mask, gamma, lam):
    """Segment GAE (Eq. 6 and 7), V at a segment's start."""
    return sapo.segment_gae(rewards, values, ends, mask, gamma, lam)


def sapo_released(rewards, values, ends, mask, gamma, lam):
    """As the released code hands its advantages to the loss: V at the end, whitened, clamped."""
    # Equal to what their code gives: tests/test_sapo_released.py
    advantages, _ = sapo.segment_gae(rewards, values, ends, mask, gamma, lam, value_at="end")
    return sapo.whiten(advantages, mask).clamp(-5, 5)


def sapo_value_at_end(rewards, values, ends, mask, gamma, lam):
    """The same, with V read before a segment's last token."""
    return sapo.segment_gae(rewards, values, ends, mask, gamma, lam, value_at="end")


def sapo_token_gae(rewards, values, mask, gamma, lam):
    """Every token a segment: PPO's GAE (Eq. 4)."""
    return sapo.segment_gae(rewards, values, sapo.token_ends(mask), mask, gamma, lam)


def sapo_ratio(logp, old_logp, ends, mask):
    """The geometric mean over a segment (Eq. 8)."""
    return sapo.segment_ratio(logp, old_logp, ends, mask)


def sapo_product(logp, old_logp, ends, mask):
    """A segment's true weight, the product of its token ratios (Eq. 19)."""
    return sapo.importance_ratio(logp, old_logp, ends, mask, "product")


def sapo_response_ratio(logp, old_logp, mask):
    """The geometric mean over a response (GSPO)."""
    return sapo.importance_ratio(logp, old_logp, mask, mask, "response")


def sapo_loss(logp, old_logp, advantages, ends, mask):
    """The clipped objective with the segment ratio (Eq. 9)."""
    ratio = sapo.segment_ratio(logp, old_logp, ends, mask)
    return sapo.policy_loss(ratio, advantages, mask)


def sapo_released_loss(logp, old_logp, advantages, ends, mask):
    """As released: the mean over all tokens, clipped at 0.2 and 0.28, dual clip 3."""
    ratio = sapo.segment_ratio(logp, old_logp, ends, mask)
    return sapo.policy_loss(ratio, advantages, mask, 0.2, 0.28, dual_clip=3.0, average="token")


def sapo_product_loss(logp, old_logp, advantages, ends, mask):
    """Eq. 9 with the product in the ratio's place."""
    ratio = sapo.importance_ratio(logp, old_logp, ends, mask, "product")
    return sapo.policy_loss(ratio, advantages, mask)


def ppo_loss(logp, old_logp, advantages, mask):
    """Eq. 9 with the token ratio (Eq. 2)."""
    ratio = sapo.importance_ratio(logp, old_logp, mask, mask, "token")
    return sapo.policy_loss(ratio, advantages, mask)


def group_advantages(rewards, group):
    """GRPO's: less the group's mean, over its spread."""
    return baselines.group_advantages(rewards, group)


# ----------------------------------------------------------------------------------------- verl


def verl_gae(rewards, values, mask, gamma, lam):
    """verl's GAE before it is whitened."""
    from verl.trainer.ppo import core_algos

    weights = mask.to(values.dtype)  # verl's masks are numbers
    _, returns = core_algos.compute_gae_advantage_return(rewards, values, weights, gamma, lam)
    return returns - values


def verl_whitened(rewards, values, mask, gamma, lam):
    """verl's GAE, as its loss gets it."""
    from verl.trainer.ppo import core_algos

    weights = mask.to(values.dtype)
    return core_algos.compute_gae_advantage_return(rewards, values, weights, gamma, lam)


def verl_group(name, **options):
    """A group advantage of verl: one reward per response, on its only token."""

    def advantages(rewards, group):
        from verl.trainer.ppo import core_algos

        index = np.arange(len(rewards)) // group
        estimate = getattr(core_algos, name)
        one_token = torch.ones(len(rewards), 1, dtype=rewards.dtype)
        answer, _ = estimate(rewards[:, None].clone(), one_token, index=index, **options)
        return answer[:, 0]

    return advantages


def verl_loss(name, mode):
    """A policy loss of verl, clipped at 0.2 on both sides."""

    def loss(logp, old_logp, advantages, mask):
        from verl.trainer.ppo import core_algos
        from verl.workers.config import ActorConfig

        config = ActorConfig(
            strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, clip_ratio=0.2
        )
        weights = mask.to(logp.dtype)
        return getattr(core_algos, name)(
            old_logp, logp, advantages, weights, loss_agg_mode=mode, config=config
        )

    return loss


# ------------------------------------------------------------------------------------------ TRL


def trl_loss(loss_type, level="token"):
    """The loss of TRL's GRPOTrainer: its own `_compute_loss`, with a trainer's settings around it
    and no model. By sequence there is one advantage per response."""

    def by_token(logp, old_logp, advantages, mask):
        from trl import GRPOTrainer

        scored = logp, torch.zeros_like(logp), None  # log-probabilities, entropies, no router
        trainer = SimpleNamespace(
            _get_per_token_logps_and_entropies=lambda *_, **__: scored,
            accelerator=SimpleNamespace(
                gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1
            ),
            args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
            model=SimpleNamespace(training=True),
            loss_type=loss_type,
            importance_sampling_level=level,
            epsilon_low=0.2,
            epsilon_high=0.2,
            beta=0.0,
            max_completion_length=8,
            top_entropy_quantile=1.0,
            off_policy_mask_threshold=None,
            use_vllm=False,
            aux_loss_enabled=False,
            _entropy_bonus_enabled=False,
            current_gradient_accumulation_steps=1,
            _metrics=defaultdict(lambda: defaultdict(list)),
        )
        inputs = {
            "prompt_ids": torch.zeros(len(logp), 1, dtype=torch.long),
            "prompt_mask": torch.ones(len(logp), 1, dtype=torch.long),
            "completion_ids": torch.zeros(mask.shape, dtype=torch.long),
            "completion_mask": mask.long(),
            "advantages": advantages,
            "old_per_token_logps": old_logp,
            "num_items_in_batch": mask.sum(),
        }
        return GRPOTrainer._compute_loss(trainer, None, inputs)

    def by_sequence(logp, old_logp, response_advantages, mask):
        return by_token(logp, old_logp, response_advantages, mask)

    return by_token if level == "token" else by_sequence


def trl_group(scale_rewards):
    """The group advantages of TRL's GRPOTrainer: its own `_generate_and_score_completions`, with a
    trainer's settings around it, and in place of model and rewards what they gave: an answer of one
    token to each prompt, and its reward."""

    def advantages(rewards, group):
        from trl import GRPOTrainer

        ids = [[0]] * len(rewards)
        answers = ids, ids, None, ids, None, {}, None, None  # prompts, answers, no tools, no images
        trainer = SimpleNamespace(
            _generate=lambda prompts: answers,
            _calculate_rewards=lambda *_: rewards[:, None].clone(),  # (B, 1): one reward function
            accelerator=SimpleNamespace(device=rewards.device, gather=lambda x: x, process_index=0),
            args=SimpleNamespace(
                per_device_train_batch_size=len(rewards),
                steps_per_generation=1,
                gradient_accumulation_steps=1,
                gradient_checkpointing_kwargs=None,
            ),
            model=SimpleNamespace(training=True, is_gradient_checkpointing=False),
            _tokenizer=SimpleNamespace(pad_token_id=0),
            num_generations=group,
            num_iterations=1,
            scale_rewards=scale_rewards,
            multi_objective_aggregation="sum_then_normalize",
            reward_weights=torch.ones(1, dtype=rewards.dtype),
            reward_func_names=["reward"],
            beta=0.0,
            use_vllm=False,
            mask_truncated_completions=False,
            environment_factories=None,
            environments=None,
            tools=None,
            pad_to_multiple_of=None,
            _metrics=defaultdict(lambda: defaultdict(list)),
            _logs=defaultdict(list) | {"rewards": defaultdict(list)},
            _pending_extra_logs={},
            _pending_metrics={},
        )
        inputs = [{"prompt": ""} for _ in rewards]
        return GRPOTrainer._generate_and_score_completions(trainer, inputs)["advantages"]

    return advantages


# ----------------------------------------------------------------- torchrl and stable-baselines3


def torchrl_gae(name):
    """A GAE of torchrl, which knows no padding but episodes that are done."""

    def advantages(rewards, values, lengths, gamma, lam):
        from torchrl.objectives.value import functional

        done = torch.arange(values.shape[1]) == lengths[:, None] - 1
        after = torch.nn.functional.pad(values[:, 1:], (0, 1))
        as_they_take_it = (x[..., None] for x in (values, after, rewards, done))
        value, next_value, reward, over = as_they_take_it
        answer, _ = getattr(functional, name)(gamma, lam, value, next_value, reward, over)
        return answer[..., 0]

    return advantages


def sb3_gae(rewards, values, lengths, gamma, lam):
    """stable-baselines3's rollout buffer, a response at a time: it has no padding."""
    from gymnasium.spaces import Box
    from stable_baselines3.common.buffers import RolloutBuffer

    space = Box(0, 1, (1,))
    advantages = torch.zeros(values.shape, dtype=torch.float32)
    for row, length in enumerate(lengths.tolist()):  # its buffer has no padding
        if length == 0:
            continue
        buffer = RolloutBuffer(length, space, space, gae_lambda=lam, gamma=gamma)
        buffer.rewards[:, 0], buffer.values[:, 0] = rewards[row, :length], values[row, :length]
        buffer.compute_returns_and_advantage(torch.zeros(1), dones=np.ones(1))
        advantages[row, :length] = torch.from_numpy(buffer.advantages[:, 0])
    return advantages


# -------------------------------------------------------------------------------------- the table

# package -> name in the table -> function; "" is this project
ESTIMATORS = {
    "": {
        "`sapo.segment_gae`": sapo_gae,
        "V at the end": sapo_value_at_end,
        "SAPO as released": sapo_released,
        "`--method ppo`": sapo_token_gae,
        "`--method grpo`": group_advantages,
        "`sapo.segment_ratio`": sapo_ratio,
        "`--ratio product`": sapo_product,
        "`--ratio response`": sapo_response_ratio,
        "SAPO, Eq. 9": sapo_loss,
        "SAPO's loss as released": sapo_released_loss,
        "Eq. 9 with the product": sapo_product_loss,
        "token ratio, Eq. 9": ppo_loss,
    },
    "verl": {
        "verl, returns - V": verl_gae,
        "verl, whitened": verl_whitened,
        "verl, GRPO": verl_group("compute_grpo_outcome_advantage"),
        "verl, Dr. GRPO": verl_group(
            "compute_grpo_outcome_advantage", norm_adv_by_std_in_grpo=False
        ),
        "verl, RLOO": verl_group("compute_rloo_outcome_advantage"),
        "verl, token mean": verl_loss("compute_policy_loss_vanilla", "token-mean"),
        "verl, GSPO": verl_loss("compute_policy_loss_gspo", "seq-mean-token-mean"),
    },
    "trl": {
        "TRL, GRPO": trl_group("group"),
        "TRL, Dr. GRPO": trl_group("none"),
        "TRL, grpo": trl_loss("grpo"),
        "TRL, dapo": trl_loss("dapo"),
        "TRL, dr_grpo": trl_loss("dr_grpo"),
        "TRL, grpo by sequence": trl_loss("grpo", "sequence"),
    },
    "torchrl": {
        "torchrl": torchrl_gae("generalized_advantage_estimate"),
        "torchrl, vectorised": torchrl_gae("vec_generalized_advantage_estimate"),
    },
    "stable-baselines3": {"stable-baselines3": sb3_gae},
}


def version(package):
    """The version of an installed package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def row_of(name, function, package, examples) -> dict:
    """The verdicts on one function, as they stand in results/."""
    found = {}
    for verdict in verdicts(function, examples):
        found[verdict.theorem.name] = {"outcome": verdict.outcome}
        if verdict.reason:
            found[verdict.theorem.name]["reason"] = verdict.reason
        if verdict.calls:
            found[verdict.theorem.name]["asked"] = asked(verdict.calls)
    return {
        "name": name,
        "package": package,
        "version": version(package) if package else None,
        "kind": Claimant(function).kind,
        "examples": examples,
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "verdicts": found,
    }


def write_table(examples: int = EXAMPLES) -> str:
    """Run every estimator that is installed, write results/theorems.json. -> what was done."""
    kept = {}
    if FILE.is_file():
        kept = {row["name"]: row for row in read_outcome(FILE)["rows"]}
    rows, said = [], []
    for package, functions in ESTIMATORS.items():
        for name, function in functions.items():
            if package and version(package) is None:
                said.append(f"{name}: {package} is not installed")
                rows += [kept[name]] if name in kept else []
                continue
            row = row_of(name, function, package, examples)
            failing = [
                of for of, verdict in row["verdicts"].items() if verdict["outcome"] == "fails"
            ]
            said.append(f"{name}: {', '.join(failing) or 'none'} fail")
            rows.append(row)
    content = {"command": "python -m lab.estimators", "rows": rows}
    checkpoint.write_json(FILE, content)
    return "\n".join(said)


if __name__ == "__main__":
    command_line("estimators", __doc__).parse_args()
    print(write_table())
