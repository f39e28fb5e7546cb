"""train.py on small checkpoints of the families that people use, and on a data set: as a user."""

import json
import zlib

import numpy as np
import pytest
import torch
from families import SUPPORTED
from small_runs import equal, rows_of, without_times

import rollout
import sapo
import tasks
import train
import vlm
from tasks.dataset import STYLES


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    """Twenty of our drawings in the layout of hiyouga/geometry3k."""
    datasets = pytest.importorskip("datasets", reason="SAPO/Dataset-v0 needs datasets")
    examples = [tasks.DiceSum(n=2).example_at(i) for i in range(20)]
    rows = {
        "images": [[example.image] for example in examples],
        "problem": [f"<image>{example.question}" for example in examples],
        "answer": [example.answer for example in examples],
    }
    features = datasets.Features(
        {
            "images": datasets.Sequence(datasets.Image()),
            "problem": datasets.Value("string"),
            "answer": datasets.Value("string"),
        }
    )
    path = tmp_path_factory.mktemp("data") / "geo3k.parquet"
    datasets.Dataset.from_dict(rows, features).to_parquet(str(path))
    return path


@pytest.fixture
def flags(parquet, tmp_path):
    """A function: folder of a model, further flags -> the command line of two small iterations."""

    def command(folder, *more):
        return [
            *("--model", str(folder), "--runs", str(tmp_path)),
            *("--env", "SAPO/Dataset-v0", "--env_args", f"path={parquet}"),
            *("--batch", "4", "--minibatch", "4", "--micro-batch", "2"),
            *("--max-new-tokens", "10", "--iterations", "2"),
            *("--eval_every", "1", "--eval_episodes", "2"),
            *more,
        ]

    return command


@pytest.fixture
def earnings(monkeypatch):
    """A reward that random weights can earn: of any two responses about one does."""
    replay = rollout.replay

    def paid(envs, texts, ends, mask):
        rewards, used, infos = replay(envs, texts, ends, mask)
        for row, pieces in enumerate(texts):
            rewards[row, len(pieces) - 1] += zlib.crc32("".join(pieces).encode()) % 2
        return rewards, used, infos

    monkeypatch.setattr(rollout, "replay", paid)


def metrics_of(folder):
    """The rows of a run's metrics.jsonl: one per iteration, all numbers finite."""
    rows = rows_of(folder / "metrics.jsonl")
    assert [row["iteration"] for row in rows] == list(range(len(rows)))
    numbers = [value for row in rows for value in row.values() if isinstance(value, float)]
    assert np.isfinite(numbers).all()
    return rows


def trainer_state(folder):
    return torch.load(folder / "checkpoint" / "trainer.pt", weights_only=True)


# ---------------------------------------------------------------------------- whole trainings


@pytest.mark.parametrize("family", SUPPORTED)
def test_every_family_trains_through_the_same_flags(
    open_family, family_folder, flags, parquet, tmp_path, earnings, family
):
    as_it_was = open_family(family).model.state_dict()
    more = ["--actor_lr", "1e-3", "--eval_episodes", "99"]
    style = ["--env_args", f"path={parquet}", "style=boxed"]
    argv = flags(family_folder(family), "--name", family, *more, *style)
    run = train.build(*train.parse(argv))
    assert run.models.critic.hears
    assert train.train(run)
    assert run.models.critic.per_nat != 0
    rows = metrics_of(tmp_path / family)
    assert len(rows) == 3 and rows[-1]["response_tokens"] > 0
    assert not equal(vlm.load(tmp_path / family / "checkpoint").model.state_dict(), as_it_was)
    sample = rows_of(tmp_path / family / "samples.jsonl")[0]
    assert sample["image"] and "<image>" not in sample["prompt"] and sample["steps"] == []


def test_the_whole_command_on_a_data_set(family_folder, flags, parquet, tmp_path, earnings):
    """Its last evaluations and pictures know no family; no row is evaluated twice."""
    more = ["--eval_episodes", "99", "--env_args", f"path={parquet}", "style=boxed"]
    argv = flags(family_folder("idefics3"), "--name", "whole", *more)
    train.main(argv)
    files = {file.name for file in (tmp_path / "whole").iterdir()}
    assert {"learning_curve.png", "credit.html", "summary.json"} <= files
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    held_out = train.make_env(train.parse(argv)[0]).unwrapped.task.size("eval")
    assert summary["eval_episodes"] == held_out < 20


@pytest.mark.parametrize("style, stop", [("boxed", None), ("tags", tasks.Task.stop)])
def test_a_style_asks_in_a_system_turn_and_knows_its_end(
    monkeypatch, family_folder, flags, parquet, style, stop
):
    more = ["--method", "grpo", "--group", "2", "--env_args", f"path={parquet}", f"style={style}"]
    run = train.build(*train.parse(flags(family_folder("llava"), *more)))
    _, inputs = rollout.ask(run, [0], "train")
    tokenizer = run.models.policy.tokenizer
    prompt = "".join(tokenizer.batch_decode(inputs["input_ids"][0][:, None]))
    system = STYLES[style]
    assert system.split()[-1] in prompt
    assert prompt.index(system[:12]) < prompt.index("Sum the")
    generate, stops = vlm.generate, []

    def noted(vlm, inputs, max_new_tokens, temperature, top_p, stop, **also):
        stops.append(stop)
        return generate(vlm, inputs, max_new_tokens, temperature, top_p, stop, **also)

    monkeypatch.setattr(vlm, "generate", noted)
    rollout.write(run, inputs, 1.0)
    assert stops == [stop]


# ----------------------------------------------------------------------------------- resuming


@pytest.fixture
def resumed_and_whole(family_folder, flags, tmp_path, earnings):
    """A function: flags -> the folders of two iterations in one go, and of one and another."""

    def trained(*more):
        # one epoch: in a second one every token may be clipped, and have no gradient
        rates = ["--actor_lr", "1e-3", "--critic_lr", "1e-3", "--epochs", "1"]
        argv = flags(family_folder("llava"), *rates, *more)
        whole, halves = tmp_path / "whole", tmp_path / "halves"
        for arguments in (
            [*argv, "--name", "whole"],
            [*argv, "--name", "halves", "--iterations", "1"],
            ["--resume", str(halves), "--iterations", "2"],
        ):
            assert train.train(train.build(*train.parse(arguments)))
        return whole, halves

    return trained


def assert_same_end(whole, halves):
    """Both ended alike, to the last bit; and something was learned, or it would mean little."""
    metrics = metrics_of(whole)
    assert without_times(metrics) == without_times(metrics_of(halves))
    assert metrics[1]["policy_grad_norm"] > 0
    one, other = trainer_state(whole), trainer_state(halves)
    if one["critic"]:  # it hears, and has learned what it is told
        assert one["critic"]["per_nat"] != 0
    for part in ("actor_optimizer", "critic_optimizer", "critic", "weights"):
        assert equal(one[part], other[part]), part


def test_a_resumed_run_with_lora_ends_where_an_uncut_one_does(resumed_and_whole):
    pytest.importorskip("peft", reason="LoRA needs peft")
    memory = ["--dtype", "bfloat16", "--gradient_checkpointing"]
    whole, halves = resumed_and_whole("--lora", "4", "--kl_coef", "0.01", *memory)
    assert_same_end(whole, halves)
    assert trainer_state(whole)["weights"]
    assert (halves / "checkpoint" / "adapter_config.json").is_file()


def test_a_resumed_run_with_a_shared_critic_ends_where_an_uncut_one_does(resumed_and_whole):
    whole, halves = resumed_and_whole("--critic", "shared")
    assert_same_end(whole, halves)
    assert not trainer_state(whole)["weights"]


def test_a_resumed_run_in_bfloat16_ends_where_an_uncut_one_does(resumed_and_whole):
    whole, halves = resumed_and_whole("--dtype", "bfloat16")
    assert_same_end(whole, halves)
    assert trainer_state(whole)["weights"]


def test_a_resumed_run_without_a_critic_ends_where_an_uncut_one_does(resumed_and_whole):
    whole, halves = resumed_and_whole("--method", "grpo", "--group", "2")
    assert_same_end(whole, halves)
    assert trainer_state(whole)["critic"] is None and not trainer_state(whole)["weights"]


# ------------------------------------------------------------------------------ out of memory


def test_out_of_memory_is_one_line_with_what_to_lower(monkeypatch, family_folder, flags):
    def refused(*_):
        return torch.empty(2**60)  # a real refusal of the allocator

    monkeypatch.setattr(sapo, "credit", refused)
    with pytest.raises(SystemExit) as left:
        train.main(flags(family_folder("llava"), "--name", "large"))
    said = str(left.value)
    assert "\n" not in said and "allocate memory" in said and "--micro_batch to 1 or less" in said
    for named in ("GiB", "--max_new_tokens", "--lora", "there is no checkpoint yet"):
        assert named in said


def test_any_other_error_keeps_its_trace(monkeypatch, family_folder, flags):
    def wrong_shapes(*_):
        return torch.zeros(2) @ torch.zeros(3)

    monkeypatch.setattr(sapo, "credit", wrong_shapes)
    with pytest.raises(RuntimeError, match="size"):
        train.main(flags(family_folder("llava"), "--name", "other"))
