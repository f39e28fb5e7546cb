"""SAPO as a trainer on top of TRL's GRPOTrainer: vLLM, LoRA, FSDP and many cards are the engine's.

Meant is *Segment-Aligned* Policy Optimization (arXiv:2605.01327). TRL's loss_type="sapo" is *Soft
Adaptive* Policy Optimization (arXiv:2511.20347), another method.

TRL samples, rewards, scores and steps; sapo.py values, cuts, credits and makes the losses. Where
the engine decides, this differs from train.py: docs/models.md, "Where TRL stands in the way".

Shapes. B responses of one process, T completion tokens (right-padded), H hidden size.
"""

import inspect
import math
from pathlib import Path

import torch
import torch.nn.functional as F

import models
import sapo

try:
    import trl

    if tuple(map(int, trl.__version__.split(".")[:2])) < (1, 16):
        raise ImportError(f"{trl.__version__} is installed")
except ImportError as error:  # of TRL, or of what TRL itself imports
    raise ImportError(
        f'lab.trl_trainer needs TRL: pip install "trl>=1.16,<1.17" ({error})'
    ) from error

# What GRPOConfig says of TRL's own losses and of GRPO's groups is not read here, so it is refused:
# by name, and by how a name begins
OF_GRPO = (
    *("loss_type", "epsilon", "epsilon_high", "delta", "importance_sampling_level"),
    *("scale_rewards", "multi_objective_aggregation", "off_policy_mask_threshold"),
    *("top_entropy_quantile", "use_adaptive_entropy", "use_bias_correction_kl"),
    "router_aux_loss_coef",
)
OF_OTHER_LOSSES = ("sapo_", "vespo_", "entropy_")  # sapo_: of Soft Adaptive Policy Optimization
OF_ROLLOUT = ("mask", "ends", "logp", "rewards", "values")  # travel in TRL's batches


def engine_config(config: sapo.SAPOConfig, batch: int, processes: int = 1, **options):
    """The GRPOConfig of a SAPOConfig. batch: responses per rollout, on all processes together.

    A minibatch is spread over processes and gradient accumulation; micro_batch is what one process
    holds at once. TRL wants num_generations >= 2 responses to a prompt. Here they are independent
    episodes: advantages come from the critic, and the group is never compared.

    options: GRPOConfig's. ValueError where the parts do not give the mean over the whole, and for
    an option that only GRPO's loss reads; TypeError for one that config or batch says already.
    """
    alone = processes == 1
    size = config.micro_batch or max(config.minibatch // processes, 1)
    accumulation, rest = divmod(config.minibatch, size * processes)
    in_one = alone and accumulation == 1
    at_once = f"a multiple of {size} responses at once on each of {processes} processes"
    for name, fits, expected in (
        ("minibatch", accumulation and not rest, at_once),
        (
            "minibatch",
            batch % config.minibatch == 0,
            f"a divisor of the rollout's {batch} responses",
        ),
        ("average", in_one or config.average == "response", "'response' for a minibatch in parts"),
        ("whiten_advantages", alone or not config.whiten_advantages, "False on many processes"),
        ("target_kl", config.target_kl == math.inf, "inf: transformers' Trainer skips no step"),
    ):
        if not fits:
            raise ValueError(f"{name}: {getattr(config, name)!r}, expected {expected}")
    for name in options:
        if name in OF_GRPO or name.startswith(OF_OTHER_LOSSES):
            raise ValueError(f"{name}: only TRL's own losses read it; leave it out")
    group = options.get("num_generations", 2)
    if not isinstance(group, int) or group < 2:
        raise ValueError(f"num_generations: {group!r}, expected a whole number of at least 2")
    usual = {
        "num_generations": 2,
        "adam_epsilon": 1e-5,
        "disable_dropout": True,
        "num_train_epochs": 1,
        "logging_steps": config.epochs * batch // config.minibatch,  # those of a rollout
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
    }
    return trl.GRPOConfig(
        learning_rate=config.actor_lr,
        max_grad_norm=config.max_grad_norm,
        num_iterations=config.epochs,
        beta=config.kl_coef,  # TRL then scores a reference; the penalty is on rewards
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation,
        generation_batch_size=batch,
        **usual | options,
    )


class SegmentAlignedTrainer(trl.GRPOTrainer):
    """Segment-Aligned Policy Optimization (arXiv:2605.01327) by sapo.py's own functions.

    args: of `engine_config`; config: the algorithm's settings; hears: the critic is told the
    surprise (sapo.SegmentCritic). Other keywords are GRPOTrainer's.

    The critic is a `SegmentCritic` head on the policy's last hidden states, detached, with an Adam
    of its own, and is no part of the wrapped model: vLLM would be sent its weights, and each way of
    sharding would treat them in its own manner. Its gradient is averaged over the processes here.
    It is saved as critic.pt beside each checkpoint, and resumed from there.
    """

    _tag_names = ["trl", "segment-aligned-policy-optimization"]
    _name = "SegmentAlignedTrainer"
    _paper = {"title": "Segment-Aligned Policy Optimization", "id": "2605.01327"}
    loss_is_scaled_for_ga = False  # by accumulation steps: Trainer does it

    def __init__(self, model, reward_funcs, args, config: sapo.SAPOConfig, hears=True, **kwargs):
        if kwargs.get("eval_dataset") is not None:
            raise ValueError("eval_dataset: nothing is evaluated here; see evaluation.py")
        super().__init__(model, reward_funcs, args, **kwargs)
        self.config, self.passes = config, []
        self.backbone = self.model.get_decoder()  # the module stays, however it is wrapped later
        width = self.model.config.get_text_config().hidden_size
        critic = sapo.SegmentCritic(torch.nn.Identity(), width, hears)
        self.critic = critic.to(self.accelerator.device)
        self.critic_optimizer = models.Adam(self.critic.parameters(), config.critic_lr)

    # ----------------------------------------------------------------------- score and value

    def _get_per_token_logps_and_entropies(self, model, ids, mask, length, *args, **options):
        """TRL's. `self.passes` keeps (logp, entropy, hidden states) of each pass of the policy."""
        hidden = []  # of each chunk (b, T, H): position t has read what is before token t

        def keep(module, inputs, output):
            hidden.append(output.last_hidden_state[:, -length - 1 : -1].detach())

        options["compute_entropy"] = model is not self.ref_model  # which has none
        with self.backbone.register_forward_hook(keep):
            scores = super()._get_per_token_logps_and_entropies(
                model, ids, mask, length, *args, **options
            )
        if hidden:  # not the reference's
            self.passes.append((*scores[:2], torch.cat(hidden)))
        return scores

    def score(self, model, batch, at_once=None):
        """A batch as TRL keeps it -> (logp, entropy) (B, T) in nats, hidden states (B, T, H).

        at_once: responses in one forward pass; None: all of them.
        """
        named = inspect.signature(trl.GRPOTrainer._get_per_token_logps_and_entropies).parameters
        pictures = {name: batch[name] for name in named if name in batch}
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
        length = batch["completion_ids"].shape[1]
        self._get_per_token_logps_and_entropies(
            model, ids, mask, length, batch_size=at_once, **pictures
        )
        return self.passes.pop()

    def values(self, hidden, old_logp, mask):
        """V of the prefix before each token, (B, T), 0 off the mask."""
        heard = F.pad(sapo.surprise(old_logp, mask), (1, -1))  # up to the token before
        return torch.where(mask, self.critic(hidden, surprise=heard), 0.0)

    # ---------------------------------------------------------------------------- the rollout

    def _calculate_rewards(self, *args, **kwargs):
        """TRL's, and kept: (responses of all processes, reward functions)."""
        self.rewards_per_func = super()._calculate_rewards(*args, **kwargs)
        return self.rewards_per_func

    @torch.no_grad()
    def _generate_and_score_completions(self, inputs):
        """TRL writes, scores and rewards; sapo.py values, cuts and credits (Eq. 6, 7, 11)."""
        config, self.passes = self.config, []
        batch = super()._generate_and_score_completions(inputs)
        of_all = self.rewards_per_func.chunk(self.accelerator.num_processes)
        mine = of_all[self.accelerator.process_index]  # (B, functions)
        reward = (mine * self.reward_weights.to(mine.device)).nansum(1)  # (B,)
        mask = (batch["completion_mask"] * batch.get("tool_mask", 1)).bool()  # (B, T)
        mask = mask & ~mine.isnan().all(1, keepdim=True)  # nobody could judge it: not learned
        last = mask & (mask.cumsum(1) == mask.sum(1, keepdim=True))
        if "old_per_token_logps" in batch:  # TRL has scored; a reference came after the policy
            logp, entropy, hidden = self.passes[0]
        else:
            at_once = self.args.per_device_train_batch_size
            logp, entropy, hidden = self.score(self.model, batch, at_once)
        self.passes = []
        rollout = sapo.Rollout(
            mask,
            sapo.entropy_ends(entropy, mask, config.top_k),
            logp,
            torch.where(last, reward[:, None], 0.0),
            self.values(hidden, logp, mask),
            batch.get("ref_per_token_logps"),
        )
        advantages, returns = sapo.credit(rollout, config)
        self.note(sapo.credit_metrics(rollout, advantages, config))
        advantages = sapo.scaled_advantages(advantages, mask, config)
        # vLLM's correction, a weight w >= 0 of each token's loss: min(r w A, clip(r) w A)
        batch["advantages"] = advantages * batch.get("importance_sampling_ratio", 1.0)
        batch |= {"returns": returns, "old_per_token_logps": logp}
        return batch | {name: getattr(rollout, name) for name in OF_ROLLOUT}

    # ----------------------------------------------------------------------------- the update

    def _compute_loss(self, model, inputs):
        """The policy's loss (Eq. 8, 9), and a backward pass of the critic's (Eq. 10)."""
        rollout = sapo.Rollout(**{name: inputs[name] for name in OF_ROLLOUT})
        logp, entropy, hidden = self.score(model, inputs)
        values = self.values(hidden, rollout.logp, rollout.mask)
        loss, stats = sapo.actor_loss(logp, entropy, rollout, inputs["advantages"], self.config)
        value_loss, _ = sapo.critic_loss(values, rollout, inputs["returns"], self.config)
        (value_loss / self.current_gradient_accumulation_steps).backward()
        if self.accelerator.sync_gradients:
            self.step_critic()
        self.note(stats | {"value_loss": value_loss.item(), "policy_loss": loss.item()})
        return loss

    def _clip_grad_norm(self, model):
        """Trainer's. FloatingPointError where a step would leave no weight of the policy whole."""
        norm = super()._clip_grad_norm(model)
        if norm is not None and not math.isfinite(norm):  # None: DeepSpeed has no norm as yet
            raise FloatingPointError(
                f"the policy's gradient has the norm {float(norm)}, expected a finite one: lower "
                "the learning rates"
            )
        return norm

    def step_critic(self):
        """One step of the critic's Adam, by the mean of all processes' gradients."""
        parameters = list(self.critic.parameters())
        for parameter in parameters:
            parameter.grad = self.accelerator.reduce(parameter.grad, reduction="mean")
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm)
        if norm.isfinite():
            self.critic_optimizer.step()
        self.critic_optimizer.zero_grad(set_to_none=True)

    def note(self, numbers):
        """Log the mean over processes of each one's numbers."""
        mine = torch.tensor(list(numbers.values()), device=self.accelerator.device)
        means = self.accelerator.reduce(mine, reduction="mean").tolist()
        for name, mean in zip(numbers, means, strict=True):
            self._metrics["train"][name].append(mean)

    # ------------------------------------------------------------------------ the checkpoints

    def save_model(self, output_dir=None, _internal_call=False):
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)  # a sharded policy may not be written
            state = [self.critic.state_dict(), self.critic_optimizer.state_dict()]
            torch.save(state, folder / "critic.pt")

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            file = Path(checkpoint) / "critic.pt"
            weights, adam = torch.load(file, self.accelerator.device, weights_only=True)
            self.critic.load_state_dict(weights)
            self.critic_optimizer.load_state_dict(adam)
