"""SAPO on top of TRL: the same step as ours, the same on two processes as on one."""

import dataclasses
import importlib
import json
import math
import os
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import models
import sapo
import train
import vlm

pytest.importorskip("trl", reason='needs: pip install "trl>=1.16,<1.17"')

import data_files
import small_runs
import trl_worker
from accelerate.commands.launch import launch_command_parser
from transformers import TrainerCallback

import lab
from lab import trl_sapo, trl_trainer

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # TRL reports its use otherwise


class Recorder(TrainerCallback):
    """What stood before each optimizer step, and the gradients that it took."""

    def __init__(self, trainer):
        self.trainer, self.steps = trainer, []
        self.note, trainer.note = trainer.note, self.on_note
        trainer.critic_optimizer.register_step_pre_hook(self.on_critic_step)

    def on_step_begin(self, *_, **__):
        self.steps.append({"weights": copied(trl_worker.weights(self.trainer))})

    def on_note(self, numbers):
        self.note(numbers)
        if "policy_loss" in numbers:  # not those of the rollout
            self.steps[-1]["metrics"] = numbers

    def on_critic_step(self, *_):
        self.steps[-1]["critic"] = copied(gradients(self.trainer.critic))

    def on_pre_optimizer_step(self, *_, model, **__):
        self.steps[-1]["policy"] = copied(gradients(model))


def gradients(module):
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def copied(tensors):
    return {name: tensor.clone() for name, tensor in tensors.items()}


def trained(runs, *flags):
    """(run, trainer, recorder) of a training on pictures of dice, from random weights."""
    dice = ["--env", "SAPO/DiceSum-v0", "--warm_start_steps", "0", "--max_new_tokens", "12"]
    words = ["--runs", str(runs), *trl_worker.FLAGS, *trl_worker.RATES, *dice, *flags]
    settings, config = train.parse([*words, "--actor_lr", "3e-2", "--max_grad_norm", "inf"])
    run, trainer = trl_sapo.build(settings, config, {"disable_tqdm": True}, runs / "trl")
    trainer.reward_funcs = [trl_worker.reward]
    torch.nn.init.normal_(trainer.critic.head.weight, std=0.1)
    recorder = Recorder(trainer)
    trainer.add_callback(recorder)
    trainer.train()
    return run, trainer, recorder


def our_step(run, config, batch, weights):
    """(the rollout, advantages, gradients, metrics) of one step of sapo.sapo_update on a batch that
    TRL sampled, from these weights."""
    policy = run.models.policy
    policy.model.load_state_dict({n: w for n, w in weights.items() if "critic" not in n})
    policy.banned[:] = False  # TRL's log-probabilities count them
    critic = sapo.SegmentCritic(models.Backbone(policy), policy.hidden_size, hears=True)
    critic.load_state_dict({n[7:]: w for n, w in weights.items() if n.startswith("critic.")})
    inputs = {"input_ids": batch["prompt_ids"], "attention_mask": batch["prompt_mask"]}
    inputs |= {name: batch[name] for name in batch if name.startswith("pixel_")}
    tokens, mask = batch["completion_ids"], batch["completion_mask"].bool()
    heard = sapo.surprise(batch["old_per_token_logps"], mask)

    def score(rows):
        return vlm.score(policy, vlm.take(inputs, rows), tokens[rows], mask[rows])

    def value(rows):
        taken = vlm.take(inputs, rows)
        return vlm.prefix_values(critic, taken, tokens[rows], mask[rows], heard[rows])

    with torch.no_grad():
        everyone = torch.arange(len(mask))
        logp, entropy = score(everyone)
        texts = [[{"content": text}] for text in policy.processor.batch_decode(tokens, True)]
        rewards = torch.zeros(mask.shape)
        rewards[everyone, mask.sum(1) - 1] = torch.tensor(trl_worker.reward(texts))
        ends = sapo.entropy_ends(entropy, mask, config.top_k)
        rollout = sapo.Rollout(mask, ends, logp, rewards, value(everyone))
    return rollout, score, value, critic


def test_every_step_is_that_of_sapo_update(runs):
    run, trainer, recorder = trained(runs)
    config, batch = run.config, trainer._buffered_inputs[0]
    assert len(recorder.steps) == config.epochs == 3
    rollout, *_ = our_step(run, config, batch, recorder.steps[0]["weights"])
    advantages, returns = sapo.credit(rollout, config)
    assert torch.equal(rollout.ends, batch["ends"])
    torch.testing.assert_close(rollout.logp, batch["old_per_token_logps"], atol=1e-5, rtol=0)
    torch.testing.assert_close(rollout.values, batch["values"], atol=1e-5, rtol=0)
    torch.testing.assert_close(advantages, batch["advantages"], atol=1e-5, rtol=0)
    assert advantages.abs().max() > 0.1

    for step in recorder.steps:
        _, score, value, critic = our_step(run, config, batch, step["weights"])
        taken = {}

        def standing(name, module, taken=taken):
            """An optimizer that keeps the gradients and takes no step."""
            optimizer = torch.optim.SGD(module.parameters(), lr=0.0)

            def keep(*_):
                taken[name] = copied(gradients(module))

            optimizer.register_step_pre_hook(keep)
            return optimizer

        optimizers = standing("policy", run.models.policy.model), standing("critic", critic)
        one_step = train.replace(config, epochs=1)
        (metrics,) = sapo.sapo_update(
            rollout, advantages, returns, score, value, optimizers, one_step
        )
        for name in ("policy", "critic"):
            assert taken[name].keys() == step[name].keys()
            for parameter, gradient in taken[name].items():
                torch.testing.assert_close(gradient, step[name][parameter], atol=1e-5, rtol=0)
        for name in ("policy_loss", "value_loss", "clip_fraction", "approx_kl", "entropy"):
            assert step["metrics"][name] == pytest.approx(metrics[name], rel=0, abs=1e-5), name
    clipped = [step["metrics"]["clip_fraction"] for step in recorder.steps]
    assert clipped[0] == 0 and clipped[2] > 0.05, "the last clips"
    logged = trainer.state.log_history[0]  # of all steps: the means, to four digits
    assert float(logged["clip_fraction"]) == pytest.approx(sum(clipped) / 3, rel=1e-3)


def test_two_processes_take_the_steps_of_one(runs, tmp_path):
    """Three optimizer steps on eight greedy responses: once in a piece; then spread over two
    processes, each of which holds two responses at once."""
    _, alone = trl_worker.build(runs, folder=tmp_path)
    start = copied(trl_worker.weights(alone))
    alone.train()
    expected = trl_worker.outcome(alone)
    out = tmp_path / "two.pt"
    launched = subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"),  # on CPUs: gloo
            *("--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"),
            *("--dynamo_backend", "no", "--main_process_port", "0"),
            *(ROOT / "tests" / "trl_worker.py", runs, out),
        ],
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert launched.returncode == 0, launched.stderr[-3000:]
    processes, left = torch.load(out)
    assert processes == 2 and left.keys() == expected.keys()
    for name, tensor in left.items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-5, rtol=0)
    moved = {name: (left[name] - weight).abs().max() for name, weight in start.items()}
    assert max(moved.values()) > 1e-3 and moved["critic.head.weight"] > 1e-3


@pytest.mark.parametrize("adapters", [("--lora", "2"), ()], ids=["lora", "all"])
def test_a_kl_penalty_counts_with_adapters_and_with_all_weights(adapters, runs, tmp_path):
    if adapters:
        pytest.importorskip("peft", reason="needs: pip install peft")
    flags = [*adapters, "--kl_coef", "0.1", "--iterations", "2", "--actor_lr", "1e-1"]
    run, trainer = trl_worker.build(runs, *flags, folder=tmp_path)
    start = copied(trl_worker.weights(trainer))
    trainer.train()
    moved = {n for n, w in trl_worker.weights(trainer).items() if not torch.equal(w, start[n])}
    of_policy = [name for name in moved if not name.startswith("critic.")]
    assert len(of_policy) < len(moved) and of_policy
    if adapters:
        assert all("lora_" in name for name in of_policy)
    batch = trainer._buffered_inputs[0]
    log_ratio = (batch["old_per_token_logps"] - batch["ref_per_token_logps"]) * batch["mask"]
    assert log_ratio.abs().max() > 1e-3, "after a rollout the policy has left the reference"
    kept = {name: batch[name] for name in trl_trainer.OF_ROLLOUT}
    kept |= {"rewards": torch.zeros(batch["mask"].shape), "ref_logp": batch["ref_per_token_logps"]}
    given = sapo.Rollout(**kept)
    texts = run.models.policy.processor.batch_decode(batch["completion_ids"], True)
    last = batch["mask"].sum(1) - 1
    paid = torch.tensor(trl_worker.reward([[{"content": text}] for text in texts]))
    given.rewards[torch.arange(len(last)), last] = paid
    advantages, _ = sapo.credit(given, run.config)
    torch.testing.assert_close(advantages, batch["advantages"], atol=1e-5, rtol=0)


def test_a_checkpoint_keeps_the_critic_and_its_optimizer(runs, tmp_path):
    _, trainer = trl_worker.build(runs, folder=tmp_path)
    trainer.args.save_strategy = "steps"
    trainer.args.save_steps = 2
    trainer.train()
    kept = trl_worker.weights(trainer)
    _, resumed = trl_worker.build(runs, folder=tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 3
    card = (tmp_path / "README.md").read_text()
    assert "Segment-Aligned Policy Optimization" in card and "GRPO" not in card
    # The third step is on another sample of the rollout, but on the critic that was kept
    saved, _ = torch.load(tmp_path / "checkpoint-2" / "critic.pt", weights_only=True)
    for name, weight in saved.items():
        assert (trl_worker.weights(resumed)[f"critic.{name}"] - weight).abs().max() < 0.011
    steps = [next(iter(t.critic_optimizer.state.values()))["step"] for t in (trainer, resumed)]
    assert steps == [3, 3] and kept.keys() == trl_worker.weights(resumed).keys()


def test_a_row_is_made_when_it_is_asked_for():
    episode = train.make_env(train.parse([])[0])
    rows = trl_sapo.rows_of(episode, 10**6)
    assert len(rows) == 10**6 and episode.unwrapped.end_reason == "not reset"
    (turn,), (picture,) = rows[7]["prompt"], rows[7]["images"]
    observation, _ = episode.reset(options={"index": 7})
    assert [part["type"] for part in turn["content"]] == ["image", "text"]
    assert turn["content"][1]["text"] == observation["prompt"]
    assert picture.size == observation["image"].shape[1::-1] and rows[7]["index"] == 7


def launched_on_the_page():
    """The words of each `accelerate launch` in docs/models.md."""
    page = (ROOT / "docs" / "models.md").read_text().replace("\\\n", " ")
    return [shlex.split(line)[2:] for line in page.splitlines() if line.startswith("accelerate la")]


@pytest.mark.parametrize("words", launched_on_the_page())
def test_the_commands_for_eight_cards_parse_and_fit_them(words):
    launch, of_program = words[: words.index("-m")], words[words.index("-m") :]
    launched = launch_command_parser().parse_args([*launch, *of_program])
    assert (launched.num_processes, launched.training_script) == (8, "lab.trl_sapo")
    settings, config, options, _ = trl_sapo.parse(launched.training_script_args)
    assert settings.device == "cuda"
    assert options.keys() <= {
        field.name for field in dataclasses.fields(trl_trainer.trl.GRPOConfig)
    }
    args = trl_trainer.engine_config(config, settings.batch, launched.num_processes)
    assert 8 * args.per_device_train_batch_size * args.gradient_accumulation_steps == 128


def test_where_trl_scores_no_rollout_micro_batches_of_it_are_scored(runs, tmp_path):
    """One epoch of one minibatch: TRL has no use for old log-probabilities there."""
    rollouts, rows = [], []
    for size in ("8", "2"):
        flags = ("--epochs", "1", "--micro_batch", size)
        _, trainer = trl_worker.build(runs, *flags, folder=tmp_path)
        forward = trainer._get_per_token_logps_and_entropies

        def watched(*args, trainer=trainer, forward=forward, **options):
            def count(module, inputs, output):
                rows.append(len(output.last_hidden_state))

            with trainer.backbone.register_forward_hook(count):
                return forward(*args, **options)

        trainer._get_per_token_logps_and_entropies = watched
        prompts = next(iter(trainer.get_train_dataloader()))
        rollouts.append(trainer._generate_and_score_completions(prompts))
    assert rows == [8, 2, 2, 2, 2]
    whole, parts = rollouts
    assert torch.equal(whole["ends"], parts["ends"])
    for name in ("old_per_token_logps", "values"):
        torch.testing.assert_close(whole[name], parts[name], atol=1e-5, rtol=0)


def test_rewards_have_weights_and_what_nobody_judged_is_not_learned(runs, tmp_path):
    def judged(completions, **_):
        return [None, *range(1, len(completions))]

    _, trainer = trl_worker.build(runs, folder=tmp_path)
    trainer.reward_funcs, trainer.reward_func_names = [judged, judged], ["one", "other"]
    trainer.reward_processing_classes = [None, None]
    trainer.reward_weights = torch.tensor([1.0, 0.5])
    prompts = next(iter(trainer.get_train_dataloader()))
    batch = trainer._generate_and_score_completions(prompts)
    assert batch["rewards"].sum(1).tolist() == [0.0, 1.5, 3.0, 4.5, 6.0, 7.5, 9.0, 10.5]
    assert batch["mask"].any(1).tolist() == [False] + [True] * 7
    last = batch["completion_mask"].sum(1) - 1
    assert batch["rewards"][torch.arange(8), last].sum() == batch["rewards"].sum() == 42


# ---------------------------------------------------------------------------------- bad input
def settings_of(**changes):
    return sapo.SAPOConfig(**{"target_kl": math.inf, "minibatch": 8} | changes)


@pytest.mark.parametrize(
    ("changes", "processes", "line"),
    [
        ({"minibatch": 6}, 4, "minibatch: 6, expected a multiple of 1 responses at once on each"),
        ({"minibatch": 2}, 4, "minibatch: 2, expected a multiple"),
        ({"micro_batch": 3}, 1, "minibatch: 8, expected a multiple of 3 responses at once"),
        ({"average": "token"}, 2, "average: 'token', expected 'response'"),
        ({"average": "token", "micro_batch": 4}, 1, "average: 'token', expected 'response'"),
        (
            {"whiten_advantages": True},
            2,
            "whiten_advantages: True, expected False on many processes",
        ),
        ({"target_kl": 0.01}, 1, "target_kl: 0.01, expected inf"),
        ({"minibatch": 16}, 1, "minibatch: 16, expected a divisor of the rollout's 24 responses"),
    ],
)
def test_what_would_not_be_the_mean_over_the_whole_batch_is_refused(changes, processes, line):
    with pytest.raises(ValueError, match=f"^{line}[^\n]*$"):
        trl_trainer.engine_config(settings_of(**changes), 24, processes)


def test_token_means_and_whitening_are_taken_where_nothing_is_spread():
    trl_trainer.engine_config(settings_of(average="token", whiten_advantages=True), 24)


@pytest.mark.parametrize(
    ("option", "error", "line"),
    [
        ({"learning_rate": 1e-6}, TypeError, "got multiple values for keyword .*'learning_rate'$"),
        ({"num_iterations": 1}, TypeError, "got multiple values for keyword .*'num_iterations'$"),
        (
            {"loss_type": "sapo"},
            ValueError,
            "^loss_type: only TRL's own losses read it; leave it out$",
        ),
        ({"epsilon": 0.3}, ValueError, "^epsilon: only TRL's own losses read it"),
        ({"sapo_temperature_pos": 2}, ValueError, "^sapo_temperature_pos: only TRL's own losses"),
    ],
)
def test_settings_that_contradict_or_would_not_be_read_are_refused(option, error, line):
    with pytest.raises(error, match=line):
        trl_trainer.engine_config(settings_of(), 8, **option)


def test_what_is_called_settings_of_grpos_loss_are_some_of_its_config():
    names = {field.name for field in dataclasses.fields(trl_trainer.trl.GRPOConfig)}
    assert set(trl_trainer.OF_GRPO) < names


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--method", "grpo"], "--method grpo: not read here; leave it out"),
        (["--eval_every", "5"], "--eval_every 5: not read here; leave it out"),
        (["--tensorboard"], "--tensorboard True: not read here; leave it out"),
        (["--iterations", "0"], "--iterations 0: expected at least 1"),
        (["--device", "cuda:1"], "--device cuda:1: expected cpu, or cuda: Accelerate"),
        (["--dtype", "bfloat16"], "--dtype bfloat16: expected float32, as TRL's Adam loses"),
        (["--trl", "bf16"], "--trl bf16: expected name=value"),
        (["--env", "SAPO/Treasure-v0"], "--env SAPO/Treasure-v0: expected a task of one turn"),
        (["--model", "nowhere"], "--model nowhere: neither a folder nor a hub name"),
        (["--target_kl", "0.01"], "target_kl: 0.01, expected inf"),
        (
            ["--trl", "num_generations=0"],
            "num_generations: 0, expected a whole number of at least 2",
        ),
        (
            ["--trl", "num_generations=x"],
            "num_generations: 'x', expected a whole number of at least 2",
        ),
        (["--trl", "no_such=1"], "--trl {'no_such': 1}: .*unexpected keyword argument 'no_such'"),
        (["--trl", "seed=1"], "--trl {'seed': 1}: .* multiple values for keyword argument 'seed'"),
    ],
)
def test_the_command_says_in_one_line_what_is_wrong(words, line):
    with pytest.raises(SystemExit, match=f"^python -m lab.trl_sapo: {line}[^\n]*$"):
        trl_sapo.main(words)


def test_without_trl_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    line = 'lab.trl_trainer needs TRL: pip install "trl>=1.16,<1.17" .import of trl halted.*'
    monkeypatch.delitem(sys.modules, "lab.trl_trainer")
    monkeypatch.delattr(lab, "trl_trainer")
    with pytest.raises(ImportError, match=f"^{line}$"):
        importlib.import_module("lab.trl_trainer")
    monkeypatch.setattr(sys, "argv", ["lab.trl_sapo"])
    with pytest.raises(SystemExit, match=f"^python -m lab.trl_sapo: {line}$"):
        runpy.run_module("lab.trl_sapo", run_name="__main__")


def test_an_older_trl_is_named(monkeypatch):
    line = '.* needs TRL: pip install "trl>=1.16,<1.17" .1.15.2 is installed.$'
    monkeypatch.setattr(trl_trainer.trl, "__version__", "1.15.2")
    monkeypatch.delitem(sys.modules, "lab.trl_trainer")
    monkeypatch.delattr(lab, "trl_trainer")
    with pytest.raises(ImportError, match=line):
        importlib.import_module("lab.trl_trainer")


# ------------------------------------------------------------------------------- what breaks a run
@pytest.mark.parametrize(
    ("error", "line"),
    [
        (sapo.NaNError("logp: NaN on a policy token"), "logp: NaN on a policy token: the weights"),
        (FloatingPointError("the reward is inf"), "the reward is inf"),
        (OSError("no space left"), "no space left"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory: lower --micro_batch, then"),
    ],
)
def test_what_breaks_a_run_is_one_line(error, line, monkeypatch):
    def broken(run, trainer):
        raise error

    monkeypatch.setattr(trl_sapo, "learn", broken)
    trainer = SimpleNamespace(state=SimpleNamespace(global_step=7))
    with pytest.raises(SystemExit, match=f"^step 7: {line}[^\n]*$"):
        trl_sapo.run_to_its_end(None, trainer)


def test_another_error_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(trl_sapo, "learn", lambda run, trainer: [].pop())
    with pytest.raises(IndexError):
        trl_sapo.run_to_its_end(None, None)


def test_a_step_that_is_not_finite_is_not_taken(runs, tmp_path):
    _, trainer = trl_worker.build(runs, folder=tmp_path)
    start = copied(trl_worker.weights(trainer))
    head = trainer.model.get_output_embeddings().weight
    head.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(
        FloatingPointError, match="the policy's gradient has the norm nan, expected"
    ):
        trainer.train()
    left = trl_worker.weights(trainer)
    assert all(torch.equal(left[name], start[name]) for name in start if "critic" not in name)


def test_a_checkpoint_of_another_trainer_is_refused(runs, tmp_path):
    _, trainer = trl_worker.build(runs, folder=tmp_path)
    with pytest.raises(FileNotFoundError, match="critic.pt"):
        trainer._load_optimizer_and_scheduler(tmp_path)


def test_the_outcome_is_written_into_a_folder_that_was_missing(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(trl_sapo, "learn", lambda run, trainer: {"processes": 1})
    words = [*small_runs.TASK, *trl_worker.FLAGS, "--runs", str(runs)]
    file = tmp_path / "of" / "mine" / "outcome.json"
    trl_sapo.main([*words, "--out", str(file)])
    assert json.loads(file.read_text())["processes"] == 1


def test_no_held_out_row_of_a_data_set_is_asked_twice(runs, tmp_path):
    file = data_files.jsonl(tmp_path / "sums.jsonl", data_files.additions(30))
    words = ["--env", "SAPO/Dataset-v0", "--env_args", f"path={file}", "--eval_episodes", "512"]
    words += ["--warm_start_steps", "0", "--target_kl", "inf", *trl_worker.FLAGS]
    words += ["--runs", str(runs)]
    run, _ = trl_sapo.build(*train.parse(words), folder=tmp_path / "trl")
    assert run.settings.eval_episodes == run.grading_env.unwrapped.task.size("eval") < 30
