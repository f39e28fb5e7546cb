"""--device cuda without a card: under every setting no devices mix, and the CPU seldom waits.

tests/pretended_card.py says what is pretended. The first tests are of that helper itself.
"""

import copy
import dataclasses
import json
from pathlib import Path

import count_syncs
import numpy as np
import pytest
import torch
from families import SUPPORTED, encoded_prompts
from pretended_card import CARD, PretendedCard, on_card
from small_runs import TASK, check_samples, resumed
from small_sweeps import LEARNED, SUM_TASK, parsed_sweep

import baselines
import checkpoint
import evaluation
import sapo
import tiny
import train
import vlm
from lab import critic, treasure, truth
from tasks import games


# -------------------------------------------------------------------------- the card itself
@pytest.fixture
def card():
    with PretendedCard() as entered:
        yield entered


MIXED = {
    "sum": lambda here, there: here + there,
    "product of matrices": lambda here, there: there @ here,
    "concatenation": lambda here, there: torch.cat([there, here]),
    "choice": lambda here, there: torch.where(there > 0, there, here),
    "written into the CPU": lambda here, there: here.add_(there),
    "index from the card": lambda here, there: here[there.argmax(1)],
    "values put into the card": lambda here, there: there.index_put_((torch.tensor([0]),), here[0]),
    "a number among tensors": lambda here, there: torch.stack([there[0, 0], here[0, 0]]),
    "gradient": lambda here, there: torch.autograd.grad(
        (there.requires_grad_() * there).sum() + there.sum(), there, here.sum()
    ),
}


@pytest.mark.parametrize("mix", MIXED.values(), ids=MIXED)
def test_devices_that_meet_are_an_error(mix, card):
    here, there = torch.ones(3, 3), torch.ones(3, 3, device="cuda")
    with pytest.raises(RuntimeError, match="same device.*cuda:0 and cpu"):
        mix(here, there)


def test_what_cuda_lets_meet_may_meet(card):
    there = torch.arange(6.0, device="cuda").view(2, 3)
    for result in (
        there + torch.tensor(1.0),  # a number
        torch.where(there > 2, there, 0.0),
        there.masked_fill(there > 2, torch.tensor(0.0)),
        there[torch.tensor([1, 0])],  # indexed from the CPU
        there.to("cpu").to(there),
        torch.zeros(2).to("cuda:0"),
        torch.zeros_like(there),
        torch.nn.utils.rnn.pad_sequence([there[0], there[1, :2]]),
    ):
        assert result.device == CARD and result.is_cuda and not result.is_cpu
    there.copy_(torch.zeros(2, 3))  # a copy may cross
    for result in (there.cpu(), there.to("cpu"), torch.zeros_like(there, device="cpu")):
        assert result.device == torch.device("cpu") and not result.is_cuda


def test_numpy_gets_no_tensor_of_the_card(card):
    there = torch.ones(2, device="cuda")
    for read in (torch.Tensor.numpy, np.asarray):
        with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
            read(there[1:])
    assert there.cpu().numpy().tolist() == [1, 1]


def test_views_gradients_and_copies_lie_where_their_tensor_does(card):
    layer = torch.nn.Linear(2, 2).to("cuda")
    weight = layer.weight
    loss = layer(torch.ones(1, 2, device="cuda")).sum()
    loss.backward()
    optimizer = torch.optim.Adam(layer.parameters(), fused=True)
    optimizer.step()
    moments = optimizer.state[weight].values()
    copied = copy.deepcopy(layer).weight
    for tensor in (weight, weight[0], weight.detach(), weight.grad, loss, copied, *moments):
        assert on_card(tensor)
    for make in (torch.as_tensor, torch.asarray):
        here = torch.ones(2)
        assert on_card(make(here, device="cuda")) and not on_card(here)


@pytest.mark.parametrize(
    ("wait", "direction"),
    [
        (lambda there: there.tolist(), "to host"),
        (lambda there: there.cpu(), "to host"),
        (lambda there: there.sum().item(), "to host"),
        (lambda there: bool(there.any()), "to host"),
        (lambda there: int(there[0]), "to host"),
        (lambda there: there.nonzero(), "to host"),
        (lambda there: there[there > 0], "to host"),
        (lambda there: torch.zeros(3).copy_(there), "to host"),
        (lambda there: there[torch.tensor([1])], "to card"),
        (lambda there: there.copy_(torch.zeros(3)), "to card"),
        (lambda there: torch.tensor([1], device=there.device), "to card"),
        (lambda there: torch.zeros(3).to("cuda"), "to card"),
    ],
)
def test_a_wait_counts_for_the_line_that_waits(wait, direction, card):
    wait(torch.ones(3, device="cuda"))
    ((line, way),) = card.syncs
    number = wait.__code__.co_firstlineno
    assert (line, way) == (f"tests/test_pretended_card.py:{number} <lambda>", direction)
    assert card.counted() == card.counted(direction) == 1


def test_a_draw_waits_twice(card):
    """Before it draws, CUDA's multinomial reads two answers of the card."""
    torch.multinomial(torch.ones(2, 3, device="cuda"), 1)
    assert card.counted("to host") == card.counted() == 2


def test_what_stays_where_it_is_does_not_wait(card):
    there = torch.ones(3, device="cuda")
    there.to("cuda"), there.to(torch.bfloat16), there[1:], there[0] + 1, torch.zeros(3).tolist()
    there[1] = 0
    assert card.counted() == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_the_card_answers_for_itself_and_is_gone_afterwards():
    with PretendedCard():
        train.check_device("cuda")
        there = torch.ones(2, device="cuda")
    with pytest.raises(ValueError, match="--device cuda"):
        train.check_device("cuda")
    assert there.device == torch.device("cpu")


# ------------------------------------------------------------------------- whole iterations
SMALL = [
    *("--device", "cuda", "--iterations", "2", "--batch", "8", "--minibatch", "8"),
    *("--eval_episodes", "8", "--max_new_tokens", "10", "--epochs", "1", "--group", "4"),
    *("--continuations", "1", "--branching", "2", "2", "--segment_tokens", "3"),
]
ALL_AT_ONCE = "--dtype bfloat16 --gradient_checkpointing --kl_coef 0.1 --micro_batch 4"
RELEASED = (
    "--value_at end --average token --clip_high 0.28 --dual_clip 3 --whiten_advantages "
    "--advantage_clamp 5 --value_clip 0.5 --value_coef 0.5 --kl_coef 0.001"
)
DICE = "--env SAPO/DiceSum-v0 --env_args n=3 --model tiny --warm_start_steps 1"
GAME = (
    "--env SAPO/Treasure-v0 --env_args size=3 shortest=2 longest=4 max_turns=2 --model tiny "
    "--warm_start_steps 1 --warm_start_batch 4"
)
CASES = {
    "sapo": "",
    "released": f"--cut causal {RELEASED}",
    "ppo": f"--method ppo {ALL_AT_ONCE}",
    "vc-ppo": "--method vc-ppo --critic shared --kl_coef 0.1 --value_pretraining 1",
    "lora": f"--cut fixed --lora 2 {ALL_AT_ONCE}",
    "grpo": "--method grpo --lora 2 --dtype bfloat16",
    "gspo": "--method gspo --generate_batch 3",
    "srpo": f"--method srpo {DICE} --lora 2",
    "spo-chain": "--method spo-chain",
    "vineppo": "--method vineppo",
    "spo-tree": "--method spo-tree",
    "game": f"--cut turn {GAME}",
    "continued games": f"--method vineppo {GAME} --batch 4 --max_new_tokens 6",
}
RESUMED = ("sapo", "ppo", "lora", "game")


@pytest.fixture(scope="module")
def start(runs):
    """Flags for the task and the warm start that small runs share."""
    settings, _ = train.parse([*TASK, "--runs", str(runs)])
    folder = tiny.cached_warm_start(train.make_env(settings).unwrapped.task, settings)
    return [*TASK, "--model", str(folder), *SMALL, "--runs", str(runs)]


@pytest.fixture(autouse=True)
def every_turn_closes(monkeypatch):
    """A game goes on after whatever was written: an untrained policy would not close its turn."""
    monkeypatch.setattr(games, "until_end", lambda text: (text, "act"))


def one_iteration(start, name):
    """Build a run of CASES, take one iteration, and read its samples. -> the run."""
    flags = [*CASES[name].split(), "--name", f"card-{name}"]
    run = train.build(*train.parse([*start, *flags]))
    metrics = train.iterate(run)
    assert metrics["skipped_steps"] == 0
    if GAME in CASES[name]:
        assert metrics["response_tokens"] > run.settings.max_new_tokens  # more than one turn
    check_samples(train.samples(run), run.settings.credit in ("critic", "continuations"))
    return run


def tensors_of(run):
    """Everything of a run that an iteration computes with."""
    optimizers = [run.models.actor_optimizer, run.models.critic_optimizer]
    modules = [run.models.policy.model, run.models.critic]
    for optimizer in filter(None, optimizers):
        for state in optimizer.state.values():
            yield from state.values()
    for module in filter(None, modules):
        yield from module.parameters()


@pytest.mark.parametrize("name", CASES)
def test_an_iteration_mixes_no_devices(name, start, card):
    """Nor do a checkpoint and the iteration after it, nor what lab/ reads of a run."""
    if "--lora" in CASES[name]:
        pytest.importorskip("peft")
    run = one_iteration(start, name)
    assert all(map(on_card, tensors_of(run)))
    if name in RESUMED:
        checkpoint.save(run)
        again = resumed(run.folder)
        assert again.progress == run.progress and all(map(on_card, tensors_of(again)))
        assert train.iterate(again)["skipped_steps"] == 0
    if name == "sapo":
        assert critic.of_run(run.folder, 4)["responses"] == 4
    if name == "game":
        assert treasure.measure(run, count=4)["states"] > 0


def test_a_card_takes_larger_pieces_of_logits(start, card, monkeypatch):
    run = train.build(*train.parse([*start, "--name", "card-pieces"]))
    batch = evaluation.rollout.collect(run, np.arange(4), "eval")
    sizes, scores = [], vlm._token_scores

    def counted(head, hidden, *more):
        sizes.append(len(hidden))
        return scores(head, hidden, *more)

    monkeypatch.setattr(vlm, "_token_scores", counted)
    V = len(run.models.policy.banned)
    monkeypatch.setattr(vlm, "PIECE", V)
    monkeypatch.setattr(vlm, "PIECE_ON_CARD", 3 * V)
    evaluation.rollout.score(run, run.models.policy, batch)
    assert max(sizes) == 3


def test_every_method_and_every_cut_is_among_them():
    settings = [train.parse(flags.split())[0] for flags in CASES.values()]
    assert {case.method for case in settings} == set(baselines.SETTINGS)
    cuts = baselines.Method.__dataclass_fields__["cut"].type.__args__
    assert {case.cut for case in settings} == set(cuts)


def test_the_card_changes_no_number(start):
    """What is computed on the pretended card is what a CPU computes: the helper only looks on."""

    def outcome(device):
        run = train.build(*train.parse([*start, "--device", device, "--name", f"on-{device}"]))
        return train.iterate(run), train.samples(run), torch.get_rng_state().tolist()

    with PretendedCard():
        there = outcome("cuda")
    assert there == outcome("cpu")


# --------------------------------------------------------------------------- what runs beside
def test_a_sweeps_ground_truth_is_measured_on_the_card(start, runs, card, monkeypatch):
    """The lift, with a whole training from the command line to its last picture, and the truth."""
    sweep, extra = parsed_sweep(*SUM_TASK, "--runs", str(runs), *LEARNED)
    model = start[start.index("--model") :][:2]
    extra = [*extra, *model, "--device", "cuda", "--batch", "8", "--eval_episodes", "4"]
    extra += ["--max_new_tokens", "6"]
    monkeypatch.setattr(truth, "execute", lambda folder, flags: train.main(flags))
    lift = dataclasses.replace(sweep, experiment="lift", seeds=1, tokens=40, tag="card")
    early = next(truth.lifts(lift, extra, rollouts=0, continuations=1, responses=8))["early"]
    assert early["states"] > 0 and early["steps"] and early["critic"]["lift"]
    sweep = dataclasses.replace(sweep, methods=["grpo"])
    sizes = {"count": 1, "rollouts": 0, "continuations": 1, "large": 2, "responses": 8}
    *_, measured = truth.truth(sweep, extra, **sizes, budget=1)
    assert measured["methods"].keys() == {"grpo"} and len(measured["values"]) == 2


@pytest.mark.parametrize("family", SUPPORTED)
def test_no_family_of_models_mixes_devices(family, open_family, card):
    """Opened, asked with pictures, answered in parts and at once, scored, valued, and taught."""
    model = open_family(family, device="cuda")
    _, inputs = encoded_prompts(model, family)
    tokens, mask = vlm.generate(model, inputs, 4, at_once=2)
    vlm.generate(model, vlm.extended(inputs, tokens, mask.sum(1)), 2)
    critic = sapo.SegmentCritic(model.model.base_model, model.hidden_size, hears=True).to("cuda")
    logp, _ = vlm.score(model, inputs, tokens, mask)
    surprise = sapo.surprise(logp.detach(), mask)
    values = vlm.prefix_values(critic, inputs, tokens, mask, surprise)
    (logp.sum() + values.sum()).backward()
    part = vlm.take(inputs, torch.tensor([2, 0]))
    vlm.score(model, vlm.noised(part), tokens[[2, 0]], mask[[2, 0]])
    assert on_card(logp) and on_card(values) and on_card(critic.head.weight.grad)


# --------------------------------------------------------------------------------- the waits
@pytest.fixture(scope="module")
def waits():
    """Of the default run, with few tokens."""
    return count_syncs.measure("--max_new_tokens", "8")


@pytest.mark.parametrize(
    ("part", "most"), [("iteration", 150), ("train.samples", 65), ("evaluation.samples", 8)]
)
def test_an_iteration_and_its_samples_seldom_wait_for_the_card(part, most, waits):
    assert waits[part]["to host"] <= most, waits[part]["lines"]


def test_responses_share_their_waits(start, card):
    """Twice the responses, with as many tokens each, wait no more often to be read."""
    run = train.build(*train.parse([*start, "--name", "card-shared"]))
    counts = []
    for count in (4, 8):
        batch = evaluation.rollout.collect(run, np.arange(count), "eval")
        advantages = train.assign_credit(run, batch).advantages
        card.syncs.clear()
        evaluation.samples(run, batch, advantages)
        counts.append(card.counted())
    assert counts[0] == counts[1] > 0


def test_the_results_hold_what_was_won():
    file = Path(count_syncs.ROOT) / "results" / "pretended_card.json"
    stored = json.loads(file.read_text())
    assert {"command", "date", "versions", "flags"} <= stored.keys() and "runs" not in stored
    before, after = (
        {part: counts["to host"] + counts["to card"] for part, counts in stored[when].items()}
        for when in ("before", "after")
    )
    assert after["iteration"] < 0.5 * before["iteration"]
    assert after["train.samples"] < 0.4 * before["train.samples"]
    assert after["evaluation.samples"] < 0.05 * before["evaluation.samples"]
