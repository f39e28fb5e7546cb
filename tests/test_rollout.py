"""rollout.py: replaying responses through real environments, and what a collected batch holds."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_runs import SMALL, an_episode, built, tokens_of

import baselines
import env
import rollout
import sapo
import train
import vlm

# ------------------------------------------------------------------------------------- replay


@given(st.data())
def test_replay_passes_every_segment_and_pays_at_the_right_token(data):
    """Whatever the cut: the environments get the text as it was written, and the reward stands on
    the last segment."""
    good, right = an_episode()
    bad, _ = an_episode()
    texts = [tokens_of(right), tokens_of(right.replace("<answer>", "<answer>1"))]
    T = max(map(len, texts)) + 2
    mask = torch.arange(T) < torch.tensor([[len(pieces)] for pieces in texts])
    marks = data.draw(st.lists(st.booleans(), min_size=2 * T, max_size=2 * T))
    ends = torch.tensor(marks).view(2, T) & mask | sapo.response_ends(mask)
    rewards, used, infos = rollout.replay([good, bad], texts, ends, mask)
    for row, (episode, pieces) in enumerate(zip((good, bad), texts, strict=True)):
        places = [-1, *ends[row].nonzero().flatten().tolist()]
        segments = []
        for last_before, last in zip(places, places[1:], strict=False):
            segments.append("".join(pieces[last_before + 1 : last + 1]))
        assert episode.unwrapped.segments == segments
        assert episode.unwrapped.response == "".join(pieces)
    assert torch.equal(used, mask)
    expected = torch.zeros(2, T)
    expected[0, len(texts[0]) - 1] = 1
    assert torch.equal(rewards, expected)
    assert [info["correct"] for info in infos] == [True, False]


def test_tokens_after_the_end_of_the_episode_leave_the_mask():
    """The policy may write an end that generation does not stop at, "<end>" in single characters
    say."""
    episode, right = an_episode()
    texts = [tokens_of(right) + list("and on"), list("1<end>") + tokens_of(right)]
    T = max(map(len, texts))
    mask = torch.arange(T) < torch.tensor([[len(pieces)] for pieces in texts])
    kept = mask.clone()
    other_episode, _ = an_episode()
    rewards, used, infos = rollout.replay(
        [episode, other_episode], texts, sapo.token_ends(mask), mask
    )
    assert torch.equal(mask, kept)  # the argument is not changed
    assert used.sum(1).tolist() == [len(tokens_of(right)), len("1<end>")]
    assert used[0, : used[0].sum()].all() and used[1, : used[1].sum()].all()
    assert rewards.sum(1).tolist() == [1, 0] and rewards[0, used[0].sum() - 1] == 1
    assert [info["end_reason"] for info in infos] == ["answer", "end"]


def test_a_whole_segment_behind_the_end_leaves_the_mask():
    """Not its last token alone."""
    episode, right = an_episode()
    first = tokens_of(right)
    texts = [first + list("and on")]
    mask = torch.ones(1, len(texts[0]), dtype=torch.bool)
    ends = sapo.response_ends(mask)
    ends[0, len(first) - 1] = True
    _, used, _ = rollout.replay([episode], texts, ends, mask)
    assert used[0].tolist() == [True] * len(first) + [False] * len("and on")


def test_a_truncated_episode_ends_the_response_too():
    episode, right = an_episode(max_segments=4)
    texts = [tokens_of(right)]
    mask = torch.ones(1, len(texts[0]), dtype=torch.bool)
    rewards, used, infos = rollout.replay([episode], texts, sapo.token_ends(mask), mask)
    assert used.sum() == 4 and rewards.sum() == 0 and infos[0]["end_reason"] == "max_segments"


# ----------------------------------------------------------------------------- which examples


def test_every_iteration_sees_fresh_examples():
    settings, _ = train.parse(["--batch", "12", "--group", "4"])
    indices = [rollout.train_indices(settings, iteration).tolist() for iteration in (1, 2, 3)]
    assert sum(indices, []) == list(range(36))


def test_the_responses_of_a_group_stand_side_by_side():
    settings, _ = train.parse(["--batch", "12", "--group", "4", "--method", "grpo"])
    indices = [rollout.train_indices(settings, iteration).tolist() for iteration in (1, 2)]
    assert indices == [[0] * 4 + [1] * 4 + [2] * 4, [3] * 4 + [4] * 4 + [5] * 4]


def test_a_tree_asks_each_prompt_once():
    settings, _ = train.parse(
        ["--batch", "12", "--method", "spo-tree", "--branching", "2", "2", "--segment_tokens", "2"]
    )
    assert rollout.train_indices(settings, 2).tolist() == [3, 4, 5]


# -------------------------------------------------------------------------- a collected batch


def collected(runs, name, *flags):
    """A run with a reference model, and its first batch, about which all methods promise this: it
    is scored as the model scores it, paid as it was right, and cut as its settings say."""
    run = built(
        runs, *SMALL, *flags, "--name", f"collected-{name}", "--batch", "32", "--kl_coef", "0.1"
    )
    run.progress.threshold = 0.1  # nats, for the causal cut
    batch = rollout.collect(run, rollout.train_indices(run.settings, 1))
    episodes, mask = batch.rollout, batch.rollout.mask
    logp, entropy = vlm.score(run.models.policy, batch.inputs, batch.tokens, mask)
    torch.testing.assert_close(episodes.logp * mask, logp, rtol=0, atol=1e-5)
    torch.testing.assert_close(batch.entropy * mask, entropy, rtol=0, atol=1e-5)
    # no step was made yet: the reference is the same model
    torch.testing.assert_close(episodes.ref_logp * mask, logp, rtol=0, atol=1e-5)
    assert not episodes.logp.requires_grad and episodes.rewards.sum() > 0
    assert torch.equal(episodes.rewards.sum(1), rewards_of(batch))
    assert (episodes.rewards[~episodes.ends] == 0).all()
    responses = ["".join(pieces) for pieces in batch.texts]
    assert responses == [episode.unwrapped.response for episode in batch.envs]
    ends = baselines.cut(
        run.settings.cut,
        mask,
        batch.entropy,
        episodes.logp,
        batch.texts,
        run.config.top_k,
        run.progress.threshold,
        run.settings.segment_tokens,
    )
    assert torch.equal(episodes.ends, ends)
    assert batch.generated_tokens == run.tokens_written
    return run, batch


def rewards_of(batch):
    return torch.tensor([float(info["correct"]) for info in batch.infos])


def test_what_stands_behind_an_episodes_end_is_no_segment_and_not_learned(runs, monkeypatch):
    """The third token of each response reads as the end mark here; generation went on."""
    run = built(runs, "--name", "behind-the-end", "--cut", "token")
    token_texts = vlm.token_texts

    def ended_early(*args):
        texts = token_texts(*args)
        return [[*pieces[:2], env.END, *pieces[3:]] for pieces in texts]

    monkeypatch.setattr(vlm, "token_texts", ended_early)
    batch = rollout.collect(run, np.arange(16))
    used = batch.written & (torch.arange(batch.tokens.shape[1]) < 3)
    assert not torch.equal(used, batch.written)
    assert torch.equal(batch.rollout.mask, used) and torch.equal(batch.rollout.ends, used)


def test_the_reference_scores_as_it_began_while_the_policy_moves(runs):
    run = built(runs, "--name", "reference", "--kl_coef", "0.1")
    train.iterate(run)
    batch = rollout.collect(run, np.arange(16))
    episodes = batch.rollout
    ref_logp, _ = vlm.score(run.models.reference, batch.inputs, batch.tokens, batch.written)
    torch.testing.assert_close(episodes.ref_logp, ref_logp.detach(), rtol=0, atol=1e-5)
    assert (episodes.ref_logp - episodes.logp).abs().max() > 1e-3


WITH_A_CRITIC = {
    "topk": [],
    "causal": ["--cut", "causal"],
    "fixed": ["--cut", "fixed"],
    "ppo": ["--method", "ppo"],
    "vc-ppo": ["--method", "vc-ppo"],
}


@pytest.mark.parametrize("which", WITH_A_CRITIC)
def test_a_critic_values_every_prefix(runs, which):
    run, batch = collected(runs, which, *WITH_A_CRITIC[which])
    assert run.models.critic is not None and batch.rollout.values.shape == batch.tokens.shape
    assert batch.generated_tokens >= int(batch.written.sum())
    credit = train.assign_credit(run, batch)
    advantages, returns = sapo.credit(batch.rollout, run.config)
    assert torch.equal(credit.advantages, advantages) and torch.equal(credit.returns, returns)
    assert credit.loss_mask is None


@pytest.mark.parametrize("critic_hears", ["nothing", "logp"])
def test_the_values_of_some_rows_are_those_of_the_rollout(runs, critic_hears):
    """So the update begins at the rollout's values; a critic that hears is told log pi_old."""
    flags = ["--critic_hears", critic_hears, "--micro_batch", "4"]
    run = built(runs, "--name", f"hears-{critic_hears}", *flags)
    critic = run.models.critic
    torch.nn.init.normal_(critic.head.weight)
    if critic.hears:
        torch.nn.init.constant_(critic.per_nat, 0.5)
    batch = rollout.collect(run, np.arange(16))
    logp, values = batch.rollout.logp, batch.rollout.values
    rows = torch.tensor([3, 14, 2, 9, 5])
    some = rollout.values_of(critic, batch, logp, rows)
    torch.testing.assert_close(some.detach(), values[rows], rtol=0, atol=1e-4)
    assert some.requires_grad and not values.requires_grad
    other = rollout.values_of(critic, batch, logp - 1.0, rows)
    assert torch.equal(other, some) is not critic.hears
    if critic.hears:  # every token after the first has heard of one nat more
        heard = batch.written[rows][:, 1:]
        nats = (some - other)[:, 1:][heard].detach()
        torch.testing.assert_close(nats, torch.full_like(nats, 0.5), rtol=0, atol=1e-4)


def test_the_first_causal_threshold_takes_a_batch_of_its_own(runs):
    run = built(runs, *SMALL, "--cut", "causal", "--name", "first-threshold", "--batch", "32")
    batch = rollout.collect(run, rollout.train_indices(run.settings, 1))
    assert batch.generated_tokens > int(batch.written.sum())
    assert run.progress.threshold is None  # training sets it, by its own rollouts


@pytest.mark.parametrize("method", ["grpo", "gspo"])
def test_a_group_answers_one_prompt_and_is_its_own_baseline(runs, method):
    run, batch = collected(runs, method, "--method", method)
    assert run.models.critic is None and batch.rollout.values is None
    prompts = batch.inputs["input_ids"][:4].tolist()
    assert prompts[0] == prompts[1] == prompts[2] == prompts[3]
    credit = train.assign_credit(run, batch)
    expected = baselines.group_advantages(rewards_of(batch), 4)[:, None] * batch.rollout.mask
    torch.testing.assert_close(credit.advantages, expected)
    assert credit.returns is None and credit.loss_mask is None


def test_a_kl_penalty_lowers_the_rewards_that_a_group_compares(runs):
    run, batch = collected(runs, "grpo-penalty", "--method", "grpo")
    batch.rollout.ref_logp = batch.rollout.logp - torch.rand(batch.tokens.shape)
    drifts = (batch.rollout.logp - batch.rollout.ref_logp) * batch.rollout.mask
    rewards = rewards_of(batch) - 0.1 * drifts.sum(1)
    expected = baselines.group_advantages(rewards, 4)[:, None] * batch.rollout.mask
    credit = train.assign_credit(run, batch)
    torch.testing.assert_close(credit.advantages, expected, rtol=0, atol=1e-4)


def test_the_segments_of_a_tree_have_their_length(runs):
    """Two tokens each; what ends a response is shorter, or on the last level longer."""
    run, batch = collected(runs, "spo-tree-lengths", "--method", "spo-tree")
    prompts = [node for node, parent in enumerate(batch.tree.parent) if parent < 0]
    inner = set(batch.tree.parent) - {-1, *prompts}
    assert len(inner) > len(prompts)
    for node in inner:
        lengths = (batch.written & (batch.tree.nodes == node)).sum(1)
        assert set(lengths.tolist()) <= {0, 2}
    assert batch.written.sum(1).max() <= run.settings.max_new_tokens


def test_a_trees_advantages_may_be_over_the_siblings_spread(runs):
    more = ["--method", "spo-tree", "--tree_advantage", "grpo"]
    run, batch = collected(runs, "spo-tree-spread", *more)
    credit = train.assign_credit(run, batch)
    expected, _ = baselines.tree_credit(batch.tree, rewards_of(batch), batch.rollout.mask, "grpo")
    assert torch.equal(credit.advantages, expected) and expected.abs().max() > 0.6


def test_a_tree_trains_each_edge_once_and_counts_each_token_once(runs):
    run, batch = collected(runs, "spo-tree", "--method", "spo-tree")
    assert run.models.critic is None
    assert set(batch.indices) == {0, 1, 2, 3} and list(batch.indices) == sorted(batch.indices)
    credit = train.assign_credit(run, batch)
    advantages, edges = baselines.tree_credit(batch.tree, rewards_of(batch), batch.rollout.mask)
    assert torch.equal(credit.advantages, advantages) and torch.equal(credit.loss_mask, edges)
    assert edges.any() and credit.returns is None
    rewards = torch.rand(len(batch.tokens))  # no edge has advantage 0
    _, every_edge = baselines.tree_credit(batch.tree, rewards, batch.written)
    assert run.tokens_written == int(every_edge.sum())


@pytest.mark.parametrize("method", ["spo-chain", "vineppo"])
def test_continuations_value_the_segment_starts_and_count_as_generated(runs, method):
    run, batch = collected(runs, method, "--method", method)
    episodes = batch.rollout
    assert run.models.critic is None
    reads = sapo.boundaries(episodes.ends, episodes.mask)
    assert (episodes.values[~reads] == 0).all()
    assert batch.generated_tokens > int(batch.written.sum())
    torch.testing.assert_close(episodes.values * 3, (episodes.values * 3).round())  # of three


@pytest.mark.parametrize("split", ["train", "eval"])
def test_a_continuation_is_graded_as_an_answer_to_its_own_prompt(runs, monkeypatch, split):
    """Every continuation gives the right answer to its row's example here: it earns 1."""
    flags = ["--credit", "continuations", "--cut", "response", "--continuations", "2"]
    run = built(runs, "--name", f"graded-{split}", *flags)
    task = run.grading_env.unwrapped.task

    def right_answers(run, inputs, rows, prefix, lengths, limit):
        answers = [task.example_at(3 + row, split).answer for row in rows.tolist()]
        return None, None, [[f"<answer>{answer}</answer>"] for answer in answers]

    monkeypatch.setattr(rollout, "continue_responses", right_answers)
    batch = rollout.collect(run, np.arange(3, 19), split)
    assert (batch.rollout.values[:, 0] == 1).all()


def test_continuations_stop_at_the_longest_response(runs, monkeypatch):
    """They are asked for together, by what the shortest prefix may add, and cut off one by one."""
    run = built(runs, "--name", "longest", "--max_new_tokens", "6")
    batch = rollout.collect(run, np.arange(4))
    limits, graded = [], []

    def continued(run, inputs, rows, prefix, lengths, limit):
        limits.append(limit)
        return None, None, [["x"] * limit for _ in rows]

    monkeypatch.setattr(rollout, "continue_responses", continued)
    monkeypatch.setattr(run.grading_env, "step", lambda text: (graded.append(text), 1.0))
    rows, positions = torch.tensor([0, 1]), torch.tensor([0, 2])
    assert rollout._answered_after(run, batch, rows, positions, "train") == [1.0, 1.0]
    assert limits == [6] and graded == ["x" * 6, "x" * 4]


def test_spo_chain_learns_from_improbable_tokens_alone(runs):
    run, batch = collected(runs, "spo-chain-mask", "--method", "spo-chain")
    credit = train.assign_credit(run, batch)
    improbable = batch.rollout.mask & (batch.rollout.logp.exp() <= 0.9)
    assert torch.equal(credit.loss_mask, improbable) and improbable.any()
    learned, advantages = baselines.restrict(batch.rollout, credit.advantages, credit.loss_mask)
    assert torch.equal(learned.mask, improbable) and torch.equal(learned.ends, improbable)
    assert (advantages[~improbable] == 0).all() and (credit.advantages[~improbable] != 0).any()


def test_vineppo_learns_from_every_token(runs):
    run, batch = collected(runs, "vineppo-mask", "--method", "vineppo")
    credit = train.assign_credit(run, batch)
    assert credit.loss_mask is None and (credit.advantages != 0).any()


def seen_dice(runs, *flags):
    """A run on dice, and a batch whose first three tokens of each response read as perception."""
    run = train.build(
        *train.parse(
            [
                *("--env_args", "n=2", "--warm_start_steps", "2", "--warm_start_batch", "4"),
                *("--runs", str(runs), "--batch", "8", "--group", "4", "--max_new_tokens", "24"),
                *flags,
            ]
        )
    )
    torch.manual_seed(0)
    batch = rollout.collect(run, rollout.train_indices(run.settings, 1))
    reasoning = ["x"] * (batch.tokens.shape[1] - 3)
    batch.texts = [["<see>", "3", "</see>", *reasoning]] * 8
    return run, batch


def test_srpos_perception_rests_on_the_picture_and_its_reasoning_on_the_perception(tmp_path):
    """Other noise in the picture's place changes the signal of the perception alone."""
    run, batch = seen_dice(tmp_path, "--method", "srpo")
    perceives = batch.written & (torch.arange(batch.tokens.shape[1]) < 3)
    reasons = batch.written & ~perceives
    signals = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        signals.append(rollout.role_signal(run, batch))
    one, other = signals
    assert (one[perceives] != other[perceives]).any()
    assert torch.equal(one[reasons], other[reasons]) and one[reasons].abs().max() > 1e-4


def test_srpos_temperature_reaches_its_weights(tmp_path):
    """At inf every weight is 1."""
    run, batch = seen_dice(tmp_path, "--method", "srpo", "--role_temperature", "inf")
    batch.rollout.rewards[::2, 0] = 1.0  # an untrained model is never right
    advantages = train.assign_credit(run, batch).advantages
    plain = baselines.group_advantages(batch.rollout.rewards.sum(1), 4)[:, None]
    torch.testing.assert_close(advantages, plain * batch.rollout.mask)


def test_srpo_weighs_what_the_picture_and_the_perception_carry(tmp_path):
    """On dice: the corrupted picture matters to the perception, the hidden perception to the
    reasoning."""
    run, batch = seen_dice(tmp_path, "--method", "srpo")
    grpo, _ = seen_dice(tmp_path, "--method", "grpo")
    batch.rollout.rewards[::2, 0] = 1.0  # an untrained model is never right
    weighted = train.assign_credit(run, batch).advantages
    plain = train.assign_credit(grpo, batch).advantages
    assert torch.equal(plain.sign(), weighted.sign()) and not torch.equal(plain, weighted)
    torch.testing.assert_close(weighted.sum(1), plain.sum(1))  # weights of mean 1


def test_a_rollout_is_scored_and_valued_in_micro_batches(runs, monkeypatch):
    run = built(runs, "--name", "parts", "--micro_batch", "4")
    sizes = []
    for name in ("score", "prefix_values"):
        whole = getattr(vlm, name)

        def counted(model, inputs, tokens, *more, whole=whole):
            sizes.append(len(tokens))
            return whole(model, inputs, tokens, *more)

        monkeypatch.setattr(vlm, name, counted)
    rollout.collect(run, np.arange(16))
    assert sizes == [4] * 8


def test_srpos_second_scoring_is_in_micro_batches_too(tmp_path, monkeypatch):
    run, batch = seen_dice(tmp_path, "--method", "srpo", "--micro_batch", "2")
    sizes, whole = [], vlm.score
    torch.manual_seed(0)
    signal = rollout.role_signal(run, batch)

    def counted(model, inputs, tokens, *more):
        sizes.append(len(tokens))
        return whole(model, inputs, tokens, *more)

    monkeypatch.setattr(vlm, "score", counted)
    run.config.micro_batch = 8
    torch.manual_seed(0)
    torch.testing.assert_close(rollout.role_signal(run, batch), signal, rtol=0, atol=1e-4)
    run.config.micro_batch = 2
    rollout.role_signal(run, batch)
    assert sizes == [8] * 2 + [2] * 8


@pytest.mark.parametrize("credit", ["critic", "continuations", "tree"])
def test_no_more_responses_are_written_at_a_time_than_generate_batch(runs, monkeypatch, credit):
    run = built(runs, "--name", "few", *SMALL, "--credit", credit, "--generate_batch", "3")
    sizes, whole = [], vlm.VLM.enter

    def counted(policy):
        model = whole(policy)
        generate = model.generate

        def few(input_ids, **more):
            sizes.append(len(input_ids))
            return generate(input_ids=input_ids, **more)

        return SimpleNamespace(generate=few, base_model=model.base_model)

    monkeypatch.setattr(vlm.VLM, "enter", counted)
    batch = rollout.collect(run, rollout.train_indices(run.settings, 1))
    assert max(sizes) == 3 and len(batch.tokens) == 16


def test_games_are_the_same_however_few_are_played_at_a_time(tmp_path):
    """Greedy, of an untrained model."""
    flags = ["--env", "SAPO/Treasure-v0", "--env_args", "picture=false", "--warm_start_steps", "2"]
    flags += ["--warm_start_batch", "2", "--batch", "6", "--max_new_tokens", "8"]
    run = train.build(*train.parse([*flags, "--runs", str(tmp_path)]))
    indices = np.arange(6)
    whole = rollout.play(run, indices, "train", temperature=0)
    run.settings.generate_batch = 4
    parts = rollout.play(run, indices, "train", temperature=0)
    assert torch.equal(parts.tokens, whole.tokens) and torch.equal(parts.written, whole.written)
    assert parts.texts == whole.texts


def test_a_response_without_a_segment_is_refused():
    episode, right = an_episode()
    mask = torch.ones(1, len(tokens_of(right)), dtype=torch.bool)
    with pytest.raises(ValueError, match="response 0 has no segment"):
        rollout.replay([episode], [tokens_of(right)], torch.zeros_like(mask), mask)
