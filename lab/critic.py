"""What makes a critic see? Variants of it learn from the same rollouts of one frozen policy.

    python -m lab.critic                          # all variants, all tasks -> results/critic.json
    python -m lab.critic --tasks dice --seeds 10  # one task, one seed more
    python -m lab.critic --run runs/<name>        # a run as it is: does its critic see the slips?

The policy does not move, so what differs is the critic alone. After every few rollouts each variant
is measured on held-out responses whose steps are known to be right or wrong:

    explained variance    of the outcome, at segment starts (sapo.credit_metrics)
    auroc                 do TD errors (GAE at lambda 0) tell right steps from wrong ones, within
                          responses that have a wrong step? lab.truth.accuracy_of has the two ways
    share of blame        on the first wrong step, by GAE at lambda 0.99

The outcomes are written after each variant, each with its command and date. What stands in the file
already is not measured again: an interrupted command goes on, and another task or seed joins it. A
file of other variants or sizes (--rollouts, --states-of, --continuations) is left as it is, and the
command refused.

The ceiling is the same three for V by 64 fresh continuations of every segment's start: what a
critic without a flaw would show, but for the noise of 64 coins.
"""

import argparse
import copy
import shlex
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers

import checkpoint
import models
import rollout
import sapo
import train
import vlm
from lab.common import LARGEST_SEED, command_line, read_outcome, whole, writable
from lab.sweep import ROOT
from lab.truth import accuracy_of

# {task: flags of train.py}
TASKS = {
    "dice": [],
    "later": [],
    "nine": ["--env_args", "n=9", "--max_new_tokens", "96", "--warm_start_steps", "1200"],
    "arrows": [
        *("--env", "SAPO/ArrowPath-v0", "--env_args", "length=10", "grid=4"),
        *("--warm_start_steps", "2400"),  # after 600 it cannot see the arrows yet
    ],
}
HELD_OUT = 256  # responses, as many as a rollout has
BATCH = ["--batch", str(HELD_OUT), "--minibatch", "64"]
# {task: flags of the training that its policy has had}; of the others it is the warm start. "later"
# is right three or four times in five. The warm start of "nine" is right 3 times in 100: of so few
# no critic can learn anything.
TRAINED = {
    "later": ["--iterations", "6", "--critic_hears", "nothing"],
    "nine": ["--iterations", "12", "--critic_hears", "nothing", "--lam", "0.95"],
}
EVERY = 4  # rollouts between two measurements


@dataclass(frozen=True)
class Variant:
    """One way to make and teach a critic."""

    lr: float = 2e-3
    minibatch: int = 64
    passes: int = 2  # over each rollout
    hears: bool = True  # the surprise of what was written: sapo.SegmentCritic
    reads: bool = True  # the picture and the text
    logistic: bool = False  # V is a sigmoid, and learns by cross-entropy
    at_the_mean: bool = False  # the head's bias starts at the mean reward
    demonstrations: int = 0  # batches of 128 demonstrations with known outcomes, read first


PLAIN = Variant(hears=False)
VARIANTS = {
    # the default until November 2026
    "as before": Variant(lr=4e-4, minibatch=128, passes=1, hears=False),
    "more and larger steps": PLAIN,
    "four passes": replace(PLAIN, passes=4),
    "logistic": replace(PLAIN, logistic=True),
    "starts at the mean": replace(PLAIN, at_the_mean=True),
    "demonstrations first": replace(PLAIN, demonstrations=100),
    "hears": Variant(),
    "hears, reads nothing": Variant(lr=2e-2, reads=False),  # two numbers to learn
    "hears, logistic": Variant(logistic=True),
}


# ------------------------------------------------------------------------------ what is learned


class Nothing(torch.nn.Module):
    """A backbone that reads nothing: hidden states of zero. All that a critic on it can learn is a
    constant and what a nat of surprise is worth: V = b + u surprise."""

    def __init__(self, hidden_size):
        super().__init__()
        self.hidden_size = hidden_size

    def forward(self, input_ids, **_):
        return torch.zeros(*input_ids.shape, self.hidden_size)


def teach(critic, optimizer, variant, batch, targets, rows):
    """One optimizer step on some responses of a batch. targets (B, T): the batch's outcomes."""
    values = rollout.values_of(critic, batch, batch.rollout.logp, rows)
    targets = targets[rows]
    ends, mask = batch.rollout.ends[rows], batch.rollout.mask[rows]
    if variant.logistic:
        reads = sapo.boundaries(ends, mask)
        losses = F.binary_cross_entropy_with_logits(values, targets, reduction="none")
        loss = ((losses * reads).sum(1) / reads.sum(1)).mean()
    else:
        loss, _ = sapo.value_loss(values, targets, ends, mask)
    descend(critic, optimizer, loss)


def descend(critic, optimizer, loss):
    """One optimizer step, gradients scaled down to norm 1 as in training."""
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(critic.parameters(), 1.0)
    optimizer.step()


def read_demonstrations(run, critic, optimizer, variant):
    """Teach a critic by demonstrations and whether each ended well, at every prefix.

    No policy wrote them, so they have no surprise: only for a critic that does not hear.
    """
    task, policy = run.grading_env.unwrapped.task, run.models.policy
    rng = np.random.default_rng(run.settings.seed + 1)
    for _ in range(variant.demonstrations):
        examples = [task.example_at(int(index)) for index in rng.integers(2**31, size=128)]
        texts = [task.demonstrate(example, rng, run.settings.error_rate) for example in examples]
        rewards = [task.grade(example, text) for example, text in zip(examples, texts, strict=True)]
        pictures = [example.image for example in examples]
        inputs = vlm.encode(policy, [example.question for example in examples], pictures)
        tokens, mask = vlm.encode_responses(policy, texts)
        values = vlm.prefix_values(critic, inputs, tokens, mask)
        targets = values.new_tensor(rewards)[:, None].expand_as(values)
        loss, _ = sapo.value_loss(values, targets, mask, mask)  # every token a segment
        descend(critic, optimizer, loss)


# ---------------------------------------------------------------------------- what it then sees


@torch.no_grad()
def valued(critic, variant, batch):
    """The batch with the critic's values in place of those it has."""
    values = []
    for rows in torch.arange(len(batch.tokens)).split(128):
        values.append(rollout.values_of(critic, batch, batch.rollout.logp, rows))
    values = torch.cat(values)
    if variant.logistic:
        values = torch.where(batch.rollout.mask, values.sigmoid(), 0.0)
    return replace(batch, rollout=replace(batch.rollout, values=values))


def sight(batch, config):
    """What the values in a batch see: the measures above, AUROC in both ways."""
    td_errors, _ = sapo.credit(batch.rollout, replace(config, lam=0.0))
    blame, _ = sapo.credit(batch.rollout, replace(config, lam=0.99))
    seen = accuracy_of(td_errors, batch, draws=0)
    return {
        "explained_variance": sapo.credit_metrics(batch.rollout, td_errors, config)[
            "explained_variance"
        ],
        "auroc_in_wrong_responses": seen["auroc_in_wrong_responses"],
        "auroc_of_first_wrong_step": seen["auroc_of_first_wrong_step"],
        "share_of_blame": accuracy_of(blame, batch, draws=0)["share_on_first_wrong_step"],
        "wrong_responses": seen["wrong_responses"],
    }


def ceiling(run, batch, responses, continuations):
    """`sight` of V by Monte Carlo, on the first responses of a batch."""
    rows = torch.arange(responses)
    some = rollout.Responses(
        batch.indices[:responses],
        batch.envs[:responses],
        vlm.take(batch.inputs, rows),
        batch.tokens[rows],
        batch.written[rows],
        batch.texts[:responses],
        tree=None,
        transcripts=None,
    )
    episodes = batch.rollout.take(rows)
    settings = replace(run.settings, continuations=continuations)
    sampling = replace(run, settings=settings)
    episodes.values = rollout.sampled_values(sampling, some, episodes.ends, episodes.mask, "eval")
    exact = rollout.Batch(
        **vars(some), rollout=episodes, entropy=batch.entropy[rows], infos=[], generated_tokens=0
    )
    return {"responses": responses, "continuations": continuations, **sight(exact, run.config)}


# ----------------------------------------------------------------------------- the experiment


def frozen_run(task, seed, runs):
    """The run whose policy all variants meet."""
    flags = [*BATCH, *TASKS[task], "--seed", str(seed), "--runs", runs]
    if task in TRAINED:
        folder = Path(runs) / f"critic-{task}-seed{seed}"
        if not (folder / "summary.json").is_file():
            train.main([*flags, *TRAINED[task], "--name", folder.name])
        if not (folder / "summary.json").is_file():  # stopped by Ctrl-C or SIGTERM
            raise SystemExit(f"{folder}: its training was stopped, so no critic is measured on it")
        flags += ["--model", str(folder / "checkpoint")]
    return train.build(*train.parse([*flags, "--name", f"frozen-{task}-seed{seed}"]))


def learned(run, variant, batches, held_out):
    """Make a critic, teach it by the batches one after the other. -> its sight along the way."""
    torch.manual_seed(run.settings.seed)
    policy = run.models.policy
    reads = variant.reads
    backbone = copy.deepcopy(policy.model.base_model) if reads else Nothing(policy.hidden_size)
    critic = sapo.SegmentCritic(backbone, policy.hidden_size, variant.hears)
    optimizer = models.Adam(critic.parameters(), variant.lr)
    if variant.at_the_mean:
        rewards = torch.cat([batch.rollout.rewards.sum(1) for batch in batches])
        torch.nn.init.constant_(critic.head.bias, rewards.mean().item())
    read_demonstrations(run, critic, optimizer, variant)
    steps, tokens, curve = variant.demonstrations, 0, []
    for number, batch in enumerate(batches, 1):
        targets = sapo.outcomes(batch.rollout, run.config)
        for _ in range(variant.passes):
            for rows in torch.randperm(len(batch.tokens)).split(variant.minibatch):
                teach(critic, optimizer, variant, batch, targets, rows)
                steps += 1
        tokens += batch.generated_tokens
        if number % EVERY == 0 or number == len(batches):
            seen = sight(valued(critic, variant, held_out), run.config)
            curve.append({"optimizer_steps": steps, "generated_tokens": tokens, **seen})
    return curve


def flags_of(task):
    """What train.py is told for the policy of a task, in one line."""
    return shlex.join([*BATCH, *TASKS[task], *TRAINED.get(task, [])])


def experiment(tasks, seeds, runs, how, told, done=()):
    """Every variant on every task and seed, but for those that are done. Yields the outcomes so
    far, as a list of dicts.

    how: "rollouts", "states_of" and "continuations", the sizes. told: what each new outcome says of
    itself, its command and date.
    """
    done = list(done)
    for task in tasks:
        for seed in seeds:
            of_one = {"task": task, "seed": seed, "flags": flags_of(task)}
            here = {row["variant"] for row in done if of_one.items() <= row.items()}
            if here == {*VARIANTS, "ceiling"}:
                continue
            run = frozen_run(task, seed, runs)
            torch.manual_seed(seed)
            indices = [rollout.train_indices(run.settings, 1 + i) for i in range(how["rollouts"])]
            batches = [rollout.collect(run, of_one) for of_one in indices]
            # The last one keeps the environments, which know what is right
            held_out = rollout.collect(run, np.arange(run.settings.batch), "eval")
            accuracy = np.mean([info["correct"] for info in held_out.infos]).item()
            where = {**of_one, **told, "accuracy": accuracy}
            for name, variant in VARIANTS.items():
                if name in here:
                    continue
                curve = learned(run, variant, batches, held_out)
                done.append({**where, "variant": name, "curve": curve})
                yield done
            if "ceiling" not in here:
                torch.manual_seed(seed)
                best = ceiling(run, held_out, how["states_of"], how["continuations"])
                done.append({**where, "variant": "ceiling", "curve": [best]})
            yield done


def kept(file, how) -> list[dict]:
    """The outcomes that a file has. SystemExit where they were measured in another way, so that
    they cannot stand beside new ones."""
    if not file.is_file():
        return []
    before = read_outcome(file)
    for name, value in how.items():
        if before.get(name) != value:
            raise SystemExit(
                f"{file}: {name} was {before.get(name)}, and is {value} now; expected the same, or "
                "--results with another folder"
            )
    return before["measured"]


def of_run(folder, count):
    """`sight` of a trained run's own critic on `count` held-out responses, and of its own credit:
    how well its advantages, at its own lambda, tell right steps from wrong ones."""
    run = train.build(*train.parse(["--resume", str(folder)]))
    # More environments than its batch has. --batch would do it too, but change the run's settings
    run = replace(run, envs=[train.make_env(run.settings) for _ in range(count)])
    torch.manual_seed(0)
    batch = rollout.collect(run, np.arange(count), "eval")
    credit = train.assign_credit(run, batch)
    return {
        "iteration": run.progress.iteration,
        "lam": run.config.lam,
        "responses": count,
        **sight(batch, run.config),
        "own_credit": accuracy_of(credit.advantages, batch),
    }


# --------------------------------------------------------------------------- the command line


def parse(argv=None) -> argparse.Namespace:
    """The command line -> its arguments."""
    parser = command_line("critic", main.__doc__)
    parser.add_argument(
        "--run", help="only this: the folder of a run, whose own critic is measured"
    )
    parser.add_argument(
        "--responses", type=whole(1, 65536), default=256, help="held-out responses for --run"
    )
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=whole(0, LARGEST_SEED), default=[10, 11])
    parser.add_argument("--rollouts", type=whole(1), default=16, help="that teach a critic")
    parser.add_argument(
        "--continuations", type=whole(1), default=64, help="of a state, for the ceiling"
    )
    parser.add_argument(
        "--states-of", type=whole(1, HELD_OUT), default=96, help="responses, for the ceiling"
    )
    parser.add_argument("--runs", default="runs", help="folder of all runs")
    parser.add_argument("--results", default="results", help="folder of the outcome")
    return parser.parse_args(argv)


def main(argv=None):
    """Teach variants of the critic from one frozen policy, and measure what each of them sees."""
    argv = sys.argv[1:] if argv is None else argv
    arguments = parse(argv)
    try:
        answer(arguments, argv)
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"python -m lab.critic: {error}") from error


def answer(arguments, argv):
    """Measure what was asked for. argv: the words that asked."""
    if arguments.run:
        print(checkpoint.as_json(of_run(arguments.run, arguments.responses), indent=1))
        return
    how = {
        "rollouts": arguments.rollouts,
        "states_of": arguments.states_of,
        "continuations": arguments.continuations,
        "variants": {name: asdict(variant) for name, variant in VARIANTS.items()},
    }
    told = {
        "command": shlex.join(["python", "-m", "lab.critic", *argv]),
        "date": time.strftime("%Y-%m-%d"),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    file = writable(ROOT / arguments.results / "critic.json")
    done = kept(file, how)
    for measured in experiment(arguments.tasks, arguments.seeds, arguments.runs, how, told, done):
        checkpoint.write_json(file, {**how, "measured": measured})
    print(file)


if __name__ == "__main__":
    main()
