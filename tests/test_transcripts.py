"""vlm.Transcripts and rollout.play: what was written and heard stays aligned, turn by turn."""

import re

import numpy as np
import pytest
import torch
from games import Spell
from helpers import picture
from small_runs import rows_of
from torch.testing import assert_close as close

import env
import evaluation
import rollout
import sapo
import tasks
import tiny
import train
import vlm

# Families whose replies may have pictures, and one of each way to hold them
FAMILIES = ["idefics3", "idefics3_split", "llava", "llava_next"]
# Of each row its turns after the first: (what the policy writes, the reply before it, pictures)
REPLIES = [
    [("on it goes", [1]), ("well", [])],
    [],
    [("no", [2]), ("yes, and so on", [3]), ("now", [4])],
]
LATER = [REPLIES[0], REPLIES[1], [*REPLIES[2][:2], ("now or never", [4])]]  # other words at the end


def transcripts_of(model, replies=REPLIES, changed=(), prompts=(0, None, 9)):
    """Episodes of 1 to 4 turns, each turn 3 random tokens. `changed`: pictures to exchange."""
    pictures = [None if seed is None else picture(seed) for seed in prompts]
    inputs = vlm.encode(model, ["Go.", "What is there to see?", "Hm"], pictures)
    transcripts = vlm.Transcripts(model, inputs)
    allowed = (~model.banned).nonzero().flatten()
    draws = torch.Generator().manual_seed(0)
    for row, of_row in enumerate(replies):
        for words, seeds in [(None, []), *of_row]:
            if words is not None:
                own = [picture(seed + 100 * (seed in changed), (40, 56)) for seed in seeds]
                transcripts.hear(row, *vlm.encode_replies(model, [words], [own])[0])
            drawn = allowed[torch.randint(len(allowed), (3,), generator=draws)]
            transcripts.write(row, drawn)
    return transcripts


@torch.no_grad()
def alone(model, transcripts, row):
    """Oracle: one transcript by itself, unpadded, the model called directly. -> logp (T, V)."""
    inputs, tokens, _ = transcripts.tensors([row])
    count = inputs["input_ids"].shape[1]
    kept = inputs["attention_mask"][0].bool()
    whole = torch.cat([inputs["input_ids"][0][kept], tokens[0]])[None]
    pixels = {
        name: tensor
        for name, tensor in inputs.items()
        if name not in ("heard", "input_ids", "attention_mask", "token_type_ids")
    }
    output = model.model(input_ids=whole, attention_mask=torch.ones_like(whole), **pixels)
    logits = output.logits[0, int(kept.sum()) - 1 : -1].clone()
    assert len(logits) == tokens.shape[1] and count >= kept.sum()
    logits[:, model.banned] = -torch.inf
    return logits.log_softmax(-1)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_transcript_scores_as_it_does_alone(open_family, family):
    """Prompts and episodes of different lengths, with and without pictures, in one batch."""
    model = open_family(family)
    transcripts = transcripts_of(model)
    inputs, tokens, written = transcripts.tensors()
    assert written.sum(1).tolist() == [9, 3, 12]
    logp, _ = vlm.score(model, inputs, tokens, written)
    for row in range(3):
        length = len(transcripts.tokens[row])
        expected = alone(model, transcripts, row).gather(1, tokens[row, :length, None])[:, 0]
        mask = written[row, :length]
        close(logp[row, :length][mask], expected[mask], rtol=0, atol=1e-4)
    rows = torch.tensor([2, 0])  # and so do its rows when they are taken by themselves
    some, _ = vlm.score(model, vlm.take(inputs, rows), tokens[rows], written[rows])
    close(some, logp[rows], rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reply_and_its_picture_matter_to_what_comes_after_alone(open_family, family):
    model = open_family(family)
    variants = {
        "as it is": transcripts_of(model),
        "third picture": transcripts_of(model, changed=(3,)),
        "last picture": transcripts_of(model, changed=(4,)),
        "last words": transcripts_of(model, LATER),
    }
    logps = {}
    for name, transcripts in variants.items():
        inputs, tokens, written = transcripts.tensors()
        logps[name] = vlm.score(model, inputs, tokens, written)[0][written]
    before = {"third picture": 18, "last picture": 21, "last words": 21}  # of 9 + 3 + 12 tokens
    for name, count in before.items():
        moved = ((logps[name] - logps["as it is"]).abs() > 1e-4).tolist()
        assert not any(moved[:count]), f"{name}: the other rows, and what stands before"
        assert any(moved[count:]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_and_values_are_kept_between_turns(open_family, family):
    """Four turns of which ever fewer rows take part, sampled with what was kept, scored anew. What
    was kept is copied only where a row leaves."""
    model = open_family(family)
    asked = vlm.encode(
        model, ["Go.", "What is there to see?", "Hm"], [picture(0), None, picture(9)]
    )
    transcripts, inputs = vlm.Transcripts(model, asked), vlm.with_cache(model, asked)
    sampled = [[], [], []]  # log-probabilities as they were drawn, of each row
    # rows, pictures of their replies; in the third turn all go on
    turns = [([0, 1, 2], None), ([0, 2], [2, 3]), ([0, 2], [3, 5]), ([2], [4])]
    live, tokens, mask = [], None, None
    torch.manual_seed(0)
    for rows, seeds in turns:
        if seeds is not None:
            replies = vlm.encode_replies(
                model,
                ["so " * seed for seed in seeds],
                [[picture(seed, (40, 56))] * (seed != 3) for seed in seeds],
            )
            for row, reply in zip(rows, replies, strict=True):
                transcripts.hear(row, *reply)
            going_on = [live.index(row) for row in rows]
            kept = inputs["past_key_values"].layers[0].keys
            inputs = vlm.continued(model, inputs, going_on, tokens, mask, replies)
            is_copied = inputs["past_key_values"].layers[0].keys is not kept
            assert is_copied == (rows != live)
        tokens, mask, logp = vlm.generate(model, inputs, 5 + len(rows), 0.8, return_logp=True)
        mask[-1, 3:] = False  # as if this row had closed its turn before the others
        for k, row in enumerate(rows):
            transcripts.write(row, tokens[k][mask[k]])
            sampled[row] += logp[k][mask[k]].tolist()
        live = rows
    whole, tokens, written = transcripts.tensors()
    scored, _ = vlm.score(model, whole, tokens, written, 0.8)
    for row in range(3):
        close(scored[row][written[row]], torch.tensor(sampled[row]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["idefics3", "llava", "paligemma"])
def test_what_is_sampled_in_a_later_turn_is_what_is_scored(open_family, family):
    model = open_family(family)
    if family == "paligemma":  # its processor wants a picture, and puts it first
        replies = [[(words, []) for words, _ in of_row] for of_row in REPLIES]
        transcripts = transcripts_of(model, replies, prompts=(0, 5, 9))
    else:
        transcripts = transcripts_of(model)
    for row in range(3):
        transcripts.hear(row, *vlm.encode_replies(model, ["and?"], [[]])[0])
    torch.manual_seed(0)
    tokens, mask, logp = vlm.generate(model, transcripts.prompts([0, 2]), 7, 0.8, return_logp=True)
    for k, row in enumerate((0, 2)):
        transcripts.write(row, tokens[k][mask[k]])
    inputs, tokens, written = transcripts.tensors([0, 2])
    scored, _ = vlm.score(model, inputs, tokens, written, 0.8)
    for k in range(2):
        drawn = int(mask[k].sum())
        close(scored[k][written[k]][-drawn:], logp[k][mask[k]], rtol=0, atol=1e-4)


def test_a_reply_reads_as_the_chat_template_has_it(open_family):
    model = open_family("idefics3")
    ids, pictures = vlm.encode_replies(model, ["Well?"], [[picture(0)]])[0]
    turns = [vlm._turn("user", "A"), vlm._turn("assistant", "B"), vlm._turn("user", "Well?", 1)]
    whole = model.processor.apply_chat_template(turns, add_generation_prompt=True)
    read = model.tokenizer.decode(ids)
    assert "Well?" in read and whole.endswith(read[read.index("Well?") :])
    assert "pixel_values" in pictures and model.stacks_pictures >= {"pixel_values"}


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llava_onevision", "batch_num_images"),
        ("paligemma", "token_type_ids"),
        ("qwen2_5_vl", "mm_token_type_ids"),
    ],
)
def test_a_model_that_is_told_of_its_prompts_pictures_is_refused(open_family, family, name):
    with pytest.raises(ValueError, match=f"{name} is not supported; expected a model"):
        vlm.encode_replies(open_family(family), ["See"], [[picture(1, (56, 56))]])


# --------------------------------------------------------------------------------------- play
GAME = ["--env", "SAPO/Treasure-v0", "--env_args", "size=3", "shortest=2", "longest=4"]
QUICK = ["--batch", "4", "--minibatch", "4", "--max_new_tokens", "40", "--warm_start_steps", "0"]


@pytest.fixture
def spelling(tmp_path, monkeypatch):
    """A run whose environments play `Spell`, and whose policy writes what `script` says.

    script: {row: its turns}; what is written stands in a list of prompts' token ids.
    """
    run = train.build(*train.parse([*GAME, *QUICK, "--runs", str(tmp_path)]))
    run.envs = [env.GameEnv(Spell(pictured=True)) for _ in run.envs]
    run.grading_env = env.GameEnv(Spell(pictured=True))
    run.script = {}
    run.limits = []
    asked = []

    def write(run, inputs, temperature, top_p=1.0, limit=None):
        live = [row for row, turns in run.script.items() if turns]
        asked.append(len(inputs["input_ids"]))
        run.limits.append(limit)
        texts = [run.script[row].pop(0) for row in live]
        policy = run.models.policy
        rows = [torch.tensor(ids) for ids in policy.tokenizer(texts)["input_ids"]]
        tokens = torch.nn.utils.rnn.pad_sequence(rows, True, policy.eos_ids[0])
        mask = vlm._up_to(torch.tensor([len(row) for row in rows]), tokens.shape[1])
        return tokens, mask, vlm.token_texts(policy, tokens, mask, env.END)

    monkeypatch.setattr(rollout, "write", write)
    run.asked = asked
    return run


def act(letter):
    return f"<act>{letter}</act>"


def test_episodes_go_on_until_each_is_over(spelling):
    """The words are cab, a, bacab and ab: of three turns, one, five and two, less who gives up."""
    script = {0: ["c", "x", "a", "b"], 1: ["a"], 2: ["b", "a"], 3: ["a"]}
    spelling.script = {row: [act(letter) for letter in turns] for row, turns in script.items()}
    spelling.script[2].append("<think>well")  # cut off at --max_new_tokens
    spelling.script[3].append("no" + "<end_of_utterance>")
    batch = rollout.collect(spelling, np.array([1, 2, 3, 0]))
    assert spelling.asked == [4, 3, 2, 1], "an episode that is over is not asked again"
    assert [info["correct"] for info in batch.infos] == [True, True, False, False]
    assert batch.infos[3]["end_reason"] == "end"

    written = batch.rollout.mask
    texts = [
        "".join(piece for t, piece in enumerate(pieces) if written[row, t])
        for row, pieces in enumerate(batch.texts)
    ]
    assert texts[0] == act("c") + act("x") + act("a") + act("b")
    for episode, said in zip(spelling.envs, texts, strict=True):
        assert episode.response == said, "a game is told nothing of its own replies"
    assert texts[2] == act("b") + act("a") + "<think>well"
    assert texts[3] == act("a") + "no" + env.END
    heard = batch.inputs["heard"]
    assert not (heard & written).any()
    assert [len(pieces) for pieces in batch.texts] == (heard | written).sum(1).tolist()
    reply = "".join(piece for t, piece in enumerate(batch.texts[2]) if heard[2, t])
    assert reply.count("Yes.") == 2 and reply.count("<global-img>") == 2

    # A reward stands on the last token of the segment that closed the command.
    ends = batch.rollout.ends
    paid = [batch.rollout.rewards[row][ends[row]] for row in range(4)]
    assert [rewards.sum().item() for rewards in paid] == [3.0, 1.0, 2.0, 1.0]
    positions = batch.rollout.rewards[0].nonzero().flatten().tolist()
    assert [batch.texts[0][t] for t in positions] == ["</act>"] * 3


def test_a_turn_played_on_from_its_middle_has_what_is_left_of_its_tokens(spelling):
    """Of five. The first row has written three of its turn, the second none of its next one."""
    spelling.settings.max_new_tokens = 5
    spelling.script = {0: ["<think>ab"], 1: [act("c"), "<think>"]}
    responses = rollout.collect(spelling, np.array([1, 1]))
    lengths = [3, len(responses.transcripts.tokens[1]) - 1]
    shorter = responses.transcripts.up_to(torch.tensor([0, 1]), torch.tensor(lengths))
    assert [shorter.open_turn(row) for row in range(2)] == [3, 0]
    for row, prefix in enumerate(["<think>ab", act("c")]):
        spelling.envs[row].reset(options={"index": 1, "response": prefix})
    spelling.limits.clear()
    spelling.script = {0: ["defg"], 1: [act("a"), "<think>x" + act("b")]}
    texts, rewards = rollout.play_on(spelling, spelling.envs[:2], shorter, 1.0)
    assert "".join(texts[0]) == "de" and shorter.open_turn(0) == 5
    assert "".join(texts[1]).endswith("<think>x" + act("b"))
    assert rewards == [0.0, 2.0] and spelling.limits == [5, 5]


def test_a_segment_does_not_cross_a_reply_and_credit_crosses_it(spelling):
    spelling.script = {row: [act("c"), act("a"), act("b")] for row in range(4)}
    batch = rollout.collect(spelling, np.array([1, 1, 1, 1]))
    mask, ends = batch.rollout.mask, batch.rollout.ends
    last_before_a_reply = mask[:, :-1] & ~mask[:, 1:]
    assert (ends[:, :-1] & last_before_a_reply).sum() == last_before_a_reply.sum() > 0
    config = sapo.SAPOConfig(lam=1.0, gamma=0.5)
    rollout_of_turns = sapo.Rollout(
        mask, sapo.response_ends(mask), batch.rollout.logp, batch.rollout.rewards
    )
    earned = sapo.outcomes(rollout_of_turns, config)[0][mask[0]]
    assert earned.unique().tolist() == [1.0, 1.5, 1.75], "each turn earns 1, later ones count half"


def explored(index, split="train"):
    """The explorer's turns in a small Treasure, right in every part."""
    task = tasks.games.GameTask(tasks.Treasure(size=3, shortest=2, longest=4))
    return task.transcript(task.example_at(index, split), np.random.default_rng(index))


def test_the_steps_of_a_game_stand_on_the_tokens_that_were_written(spelling):
    """Position by position, though replies stand in between."""
    settings = {"size": 3, "shortest": 2, "longest": 4}
    spelling.envs = [env.GameEnv("Treasure", **settings) for _ in range(2)]
    spelling.grading_env = env.GameEnv("Treasure", **settings)
    turns = {row: [text for _, _, text in explored(row)] for row in range(2)}
    spelling.script = {row: list(texts) for row, texts in turns.items()}
    batch = rollout.collect(spelling, np.array([0, 1]))
    assert [info["correct"] for info in batch.infos] == [True, True]
    advantages = torch.zeros(batch.tokens.shape)
    for row, sample in enumerate(evaluation.samples(spelling, batch, advantages)):
        read = ["".join(sample["tokens"][first : last + 1]) for first, last, _ in sample["steps"]]
        parts = [re.search(r"<think>(\w\d) (.*)</think><act>(.*)</act>", t) for t in turns[row]]
        assert read == [part[i] for part in parts for i in (1, 2, 3)]
        assert all(right for *_, right in sample["steps"])


def test_a_game_is_evaluated_by_who_wins(spelling):
    """Of the four games (ab, cab, a, bacab) two are won, one is given up, one is cut off."""
    spelling.settings.eval_episodes = 4
    script = {0: ["a", "b"], 1: ["c"], 2: ["a"], 3: ["b"]}
    spelling.script = {row: [act(letter) for letter in turns] for row, turns in script.items()}
    spelling.script[1].append("<end_of_utterance>")
    spelling.script[3].append("<think>")
    assert evaluation.evaluate(spelling)["eval_accuracy"] == 0.5


def test_demonstrations_are_transcripts_as_in_training(tmp_path):
    task = tasks.games.GameTask(tasks.Treasure(size=3, shortest=2, longest=4))
    model = vlm.load(tiny.build_tiny(tmp_path / "tiny", 48, tags=task.tags))
    examples = [task.example_at(index) for index in range(3)]
    rng = np.random.default_rng(0)
    inputs, tokens, mask = tiny.demonstrations(model, task, examples, rng, 0.0)
    rng = np.random.default_rng(0)
    for row, example in enumerate(examples):
        turns = task.transcript(example, rng)
        assert model.tokenizer.decode(tokens[row][mask[row]]) == "".join(t for *_, t in turns)
        heard = model.tokenizer.decode(tokens[row][inputs["heard"][row]])
        replies = [reply for reply, _, _ in turns[1:]]
        assert re.findall("Go on.|The key!", heard) == replies
        (count,) = vlm.take(inputs, [row])["pixel_values"].abs().sum((2, 3, 4)).count_nonzero(1)
        assert count == len(turns), "the prompt's picture, and one for each reply"


def test_in_demonstrations_of_turns_alone_each_is_a_row(tmp_path):
    task = tasks.games.GameTask(tasks.Treasure(size=3, shortest=2, longest=4))
    model = vlm.load(tiny.build_tiny(tmp_path / "tiny", 48, tags=task.tags))
    examples = [task.example_at(index) for index in range(3)]
    rng = np.random.default_rng(0)
    inputs, tokens, mask = tiny.demonstrations(model, task, examples, rng, 0.0, turns_alone=True)
    rng = np.random.default_rng(0)
    turns = [turn for example in examples for turn in task.transcript(example, rng)]
    prompts = model.tokenizer.batch_decode(inputs["input_ids"], skip_special_tokens=True)
    assert [prompt.strip() for prompt in prompts] == [heard for heard, _, _ in turns]
    written = [model.tokenizer.decode(row[own]) for row, own in zip(tokens, mask, strict=True)]
    assert written == [text for *_, text in turns]
    assert torch.equal(
        inputs["pixel_values"],
        vlm.encode(model, prompts, [seen for _, seen, _ in turns])["pixel_values"],
    )


def test_a_chat_template_that_drops_earlier_answers_is_refused(spelling, monkeypatch):
    monkeypatch.setattr(spelling.models.policy.processor, "chat_template", "no turn at all")
    with pytest.raises(ValueError, match="leaves out what the assistant said"):
        vlm.encode_replies(spelling.models.policy, ["Well."], [[]])


def test_an_episode_stops_where_its_next_turn_would_not_fit_into_the_context(spelling, monkeypatch):
    spelling.script = {row: [act("c"), act("a"), act("b")] for row in range(2)}
    batch = rollout.collect(spelling, np.array([1, 1]))
    lengths = [batch.transcripts.length(row) for row in range(2)]
    room = lengths[0] - 3 - 1  # a token less than its last turn, of three tokens, begins after
    longest = spelling.settings.max_new_tokens
    monkeypatch.setattr(vlm, "context_tokens", lambda _: room + longest)
    spelling.script = {row: [act("c"), act("a"), act("b")] for row in range(2)}
    batch = rollout.collect(spelling, np.array([1, 1]))
    assert spelling.script == {0: [act("b")], 1: [act("b")]}
    assert [info["correct"] for info in batch.infos] == [False, False]
    assert batch.rollout.rewards.sum(1).tolist() == [2.0, 2.0]


def test_a_game_is_played_on_from_its_middle(spelling):
    """From the second turn of "bacab" and from within the second of "cab": what was earned before
    does not count, and pictures and replies come along."""
    script = {0: ["c", "x", "a", "b"], 1: ["b", "a", "c", "a", "b"]}
    spelling.script = {row: [act(letter) for letter in turns] for row, turns in script.items()}
    batch = rollout.collect(spelling, np.array([1, 3]))
    said = "".join(batch.texts[1])
    second_turn = next(
        t
        for t in range(len(batch.texts[1]))
        if "".join(batch.texts[1][:t]) == said[: said.index("<act>a")]
    )
    starts_turn = (batch.rollout.mask[0] & ~batch.rollout.mask[0].roll(1)).nonzero().flatten()
    within = int(starts_turn[1]) + 1  # "<act>" has been written
    spelling.script = {0: ["a</act>", act("b")], 1: [act(letter) for letter in "acza"]}
    spelling.script[1].append("<end_of_utterance>")
    spelling.asked.clear()
    rows, positions = torch.tensor([0, 1]), torch.tensor([within, second_turn])
    earned = rollout._played_after(spelling, batch, rows, positions, "train")
    assert earned == [2.0, 3.0]
    assert spelling.asked == [2, 2, 1, 1, 1]

    shorter = batch.transcripts.up_to(rows, positions)
    inputs, tokens, written = shorter.tensors()
    assert [len(shorter.pictures[k]) for k in range(2)] == [1, 1]
    assert torch.equal(tokens[0][: positions[0]], batch.tokens[0][: positions[0]])
    assert [shorter.open_turn(k) for k in range(2)] == [1, 0]
    assert [batch.transcripts.open_turn(k) for k in range(2)] == [3, 3]


@pytest.mark.parametrize("method", ["vineppo", "spo-chain"])
def test_sampled_values_of_a_game_are_shares_and_leave_the_games_where_they_were(tmp_path, method):
    argv = [*GAME, *QUICK, "--runs", str(tmp_path), "--method", method, "--continuations", "2"]
    argv += ["--max_new_tokens", "12", "--warm_start_steps", "3", "--warm_start_batch", "4"]
    run = train.build(*train.parse(argv))
    batch = rollout.collect(run, np.arange(4))
    values = batch.rollout.values[sapo.boundaries(batch.rollout.ends, batch.rollout.mask)]
    assert set(values.tolist()) <= {0.0, 0.5, 1.0}
    train_split = [f"train/{index}" for index in range(4)]
    assert [episode.unwrapped.example.key for episode in batch.envs] == train_split
    assert np.isfinite(train.iterate(run)["policy_loss"])


@pytest.mark.parametrize("flags", [[], ["--method", "ppo"], ["--method", "grpo", "--group", "2"]])
def test_a_game_is_trained_end_to_end(tmp_path, flags):
    argv = [*GAME, *QUICK, "--runs", str(tmp_path), "--name", "game", *flags]
    argv += ["--warm_start_steps", "3", "--warm_start_batch", "4", "--error_rate", "0.3"]
    train.main([*argv, "--iterations", "2", "--eval_episodes", "4", "--max_new_tokens", "12"])
    rows = rows_of(tmp_path / "game" / "metrics.jsonl")
    assert rows[-1]["iteration"] == 2 and np.isfinite(rows[-1]["policy_loss"])
    (row, *_) = rows_of(tmp_path / "game" / "samples.jsonl")
    assert len(row["tokens"]) == len(row["advantages"]) == len(row["ends"])


def test_a_game_demonstrates_with_the_habits_of_the_command_line():
    made = [train.make_env(train.parse([*GAME, *flags])[0]) for flags in ([], ["--habits", "0.25"])]
    assert [episode.unwrapped.task.game.habits for episode in made] == [0.6, 0.25]


def test_a_turn_can_be_the_segment(tmp_path):
    settings, _ = train.parse(["--cut", "turn"])
    mask = torch.tensor([[True, True, False, True, True]])
    ends = train.baselines.cut(settings.cut, mask, None, None, None)
    assert ends.tolist() == [[False, True, False, False, True]]


@pytest.mark.parametrize("method", ["spo-tree", "srpo"])
def test_methods_for_one_turn_are_refused_in_one_line(tmp_path, method):
    argv = [*GAME, "--batch", "64", "--method", method, "--runs", str(tmp_path)]
    with pytest.raises(SystemExit, match=f"--method {method}: SAPO/Treasure-v0 replies"):
        train.main(argv)


def test_a_game_without_demonstrations_says_so():
    task = tasks.games.GameTask(Spell())
    with pytest.raises(
        ValueError, match=r"Spell.*no demonstrations; expected --warm_start_steps 0"
    ):
        task.transcript(task.example_at(0), np.random.default_rng(0))
