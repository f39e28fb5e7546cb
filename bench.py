"""How fast, and how much memory: as ratios within one run.

    python bench.py                             # the mathematics at (512, 2048); writes results/bench_math.json
    python bench.py --batch 64 --tokens 512     # another size, printed only
    python bench.py memory                      # scoring at a vocabulary of 151,936; writes results/bench_memory.json
    python bench.py iteration                   # SAPO, GRPO and TRL's GRPO; writes results/bench_iteration.json
    python bench.py gpu                         # true sizes, random weights, a CUDA card; writes results/gpu.json

The mathematics: advantages, returns and ratios of ragged responses, cut at the 30% of highest entropy, by sapo.py
and by loops over responses and their segments. Three kinds of loop: on slices of torch tensors, as one would write it
in a trainer (of the loops only this one can carry the ratio's gradient, or stay on a GPU); on slices of NumPy arrays;
on lists of Python floats, conversion from and to tensors included. All must give the same numbers.

Everyone has one thread, and what counts is its processor time, the best of several: so neither the number of cores nor
the machine's other work takes part.

The other three say in their functions what they measure.
"""

import argparse
import copy
import json
import math
import resource
import sys
import tempfile
import threading
import time
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import sapo

GAMMA, LAM = 1.0, 0.99


def peak_megabytes():
    """The most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def out_of_memory(run, error):
    """What took a run's memory, measured at the failure, and what to lower. Other errors are raised again."""
    if not isinstance(error, torch.OutOfMemoryError) and "t allocate memory" not in str(error):  # CUDA's; the CPU's
        raise error
    models = [x for x in (run.policy.model, run.critic, run.reference and run.reference.model) if x]
    optimizers = [x for x in (run.actor_optimizer, run.critic_optimizer) if x]
    held = {p: p.nbytes for model in models for p in model.parameters()}
    held |= {p: 4 * p.nbytes for x in optimizers for p in x.param_groups[0]["params"]}  # gradient, Adam's two moments
    fixed = sum(held.values()) / 2**30
    peak = torch.cuda.max_memory_allocated() / 2**30 if "cuda" in run.settings.device else peak_megabytes() / 2**10
    size = run.config.micro_batch or run.config.minibatch
    return (f"out of memory beyond {peak:.2f} GiB. Measured: weights, gradients and Adam take {fixed:.2f}, and {size} "
            f"responses at once at least {max(peak - fixed, 0) / size:.3f} each. Lower --micro_batch to "
            f"{max(size // 2, 1)} or less, then --batch (all {run.settings.batch} are written at once) or "
            "--max_new_tokens; or add --gradient_checkpointing, --dtype bfloat16, --lora 16. `python train.py "
            f"--resume {run.folder}` goes on from the last checkpoint. ({str(error).splitlines()[0]})")


def make_batch(rows, tokens, seed, dtype=torch.float32):
    """Ragged responses with a reward each, cut at the 30% of highest entropy: the six tensors (B, T) of the contest."""
    generator = torch.Generator().manual_seed(seed)
    uniform = lambda: torch.rand(rows, tokens, generator=generator, dtype=dtype)
    lengths = torch.randint(1, tokens + 1, (rows,), generator=generator)
    mask = torch.arange(tokens) < lengths[:, None]
    ends = sapo.entropy_ends(uniform(), mask, 0.3)
    rewards = torch.where(sapo.response_ends(mask), uniform().round(), 0.0)
    old_logp = -2 * uniform()
    return rewards, uniform(), old_logp + 0.2 * (uniform() - 0.5), old_logp, ends, mask


def by_sapo(rewards, values, logp, old_logp, ends, mask):
    """(advantages, returns, ratios), (B, T) each."""
    return (*sapo.segment_gae(rewards, values, ends, mask, GAMMA, LAM), sapo.segment_ratio(logp, old_logp, ends, mask))


# --------------------------------------------------------------------------------- the same in loops, in three dialects
def segments_backwards(ends):
    """The first and the last position of each segment of a response, the last segment first."""
    first, found = 0, []
    for last in ends:
        found.append((first, last))
        first = last + 1
    return reversed(found)


def by_torch_slices(rewards, values, logp, old_logp, ends, mask):
    """Advantages and ratios by loops over responses and segments, on slices of torch tensors."""
    advantages, returns = torch.zeros_like(values), torch.zeros_like(values)
    ratio = torch.ones_like(values)
    for b in range(len(mask)):
        advantage = next_value = 0.0
        for first, last in segments_backwards(ends[b].nonzero()[:, 0].tolist()):
            z = slice(first, last + 1)
            value = values[b, first]
            advantage = rewards[b, z].sum() + GAMMA * next_value - value + GAMMA * LAM * advantage
            advantages[b, z], returns[b, z] = advantage, advantage + value
            ratio[b, z] = (logp[b, z] - old_logp[b, z]).clamp(-20, 20).mean().exp()
            next_value = value
    return advantages, returns, ratio


def by_numpy_slices(*batch):
    """The same loops on slices of NumPy arrays."""
    rewards, values, logp, old_logp, ends, mask = (x.numpy() for x in batch)
    advantages, returns, ratio = np.zeros_like(values), np.zeros_like(values), np.ones_like(values)
    for b in range(len(mask)):
        advantage = next_value = 0.0
        for first, last in segments_backwards(np.flatnonzero(ends[b]).tolist()):
            z = slice(first, last + 1)
            value = values[b, first]
            advantage = rewards[b, z].sum() + GAMMA * next_value - value + GAMMA * LAM * advantage
            advantages[b, z], returns[b, z] = advantage, advantage + value
            ratio[b, z] = np.exp((logp[b, z] - old_logp[b, z]).clip(-20, 20).mean())
            next_value = value
    return torch.from_numpy(advantages), torch.from_numpy(returns), torch.from_numpy(ratio)


def by_python_floats(*batch):
    """The same loops on lists of Python floats."""
    tokens, advantages, returns, ratio = batch[0].shape[1], [], [], []
    for rewards, values, logp, old_logp, ends, _ in zip(*(x.tolist() for x in batch), strict=True):
        a, r, s = [0.0] * tokens, [0.0] * tokens, [1.0] * tokens
        advantage = next_value = 0.0
        for first, last in segments_backwards([t for t, end in enumerate(ends) if end]):
            value, length = values[first], last + 1 - first
            advantage = sum(rewards[first:last + 1]) + GAMMA * next_value - value + GAMMA * LAM * advantage
            mean = sum(max(-20.0, min(20.0, logp[t] - old_logp[t])) for t in range(first, last + 1)) / length
            for t in range(first, last + 1):
                a[t], r[t], s[t] = advantage, advantage + value, math.exp(mean)
            next_value = value
        advantages, returns, ratio = [*advantages, a], [*returns, r], [*ratio, s]
    return tuple(torch.tensor(x, dtype=batch[0].dtype) for x in (advantages, returns, ratio))


LOOPS = {"torch slices": by_torch_slices, "numpy slices": by_numpy_slices, "python floats": by_python_floats}


# ---------------------------------------------------------------------------------------------------------- the contest
def seconds(function, batch):
    """(CPU seconds, result) of one call."""
    start = time.process_time()
    result = function(*batch)
    return time.process_time() - start, result


def race(rows, tokens, repeats, seed):
    """Everyone in turn, `repeats` times (sapo.py before each loop): the best time of each, and how far numbers differ.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    batch = make_batch(rows, tokens, seed)
    expected = by_sapo(*batch)  # also warms up
    times, differences = {name: [] for name in ("sapo.py", *LOOPS)}, {}
    for _ in range(repeats):
        for name, loop in LOOPS.items():
            times["sapo.py"].append(seconds(by_sapo, batch)[0])
            taken, found = seconds(loop, batch)
            times[name].append(taken)
            differences[name] = max((a - b).abs().max().item() for a, b in zip(expected, found, strict=True))
    torch.set_num_threads(threads)
    return {name: min(x) for name, x in times.items()}, differences


# --------------------------------------------------------------------------------------- memory of scoring, three ways
def memory(rows=4, tokens=512, vocabulary=151_936):
    """Peak memory of scoring (rows, tokens) and of its gradient: the head on all positions at once, by log_softmax or
    by torch.distributions, and in pieces under checkpointing as `vlm.score` does. One small text model for all."""
    import transformers

    import vlm
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=vocabulary, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
                                      num_attention_heads=1, num_key_value_heads=1)
    model = transformers.LlamaForCausalLM(config).eval()
    policy = vlm.VLM(model, None, torch.zeros(vocabulary, dtype=torch.bool), [7])
    inputs = {"input_ids": torch.full((rows, 8), 9), "attention_mask": torch.ones(rows, 8, dtype=torch.long)}
    written, mask = torch.randint(10, vocabulary, (rows, tokens)), torch.ones(rows, tokens, dtype=torch.bool)
    logits = lambda: model(**vlm._joined(inputs, written, mask)).logits[:, 7:-1].float()
    ways = {"in pieces": lambda: vlm.score(policy, inputs, written, mask)[0],
            "log_softmax": lambda: logits().log_softmax(-1).gather(2, written[..., None])[..., 0],
            "torch.distributions": lambda: torch.distributions.Categorical(logits=logits()).log_prob(written)}
    found, expected = {}, None
    for name, way in ways.items():
        model.zero_grad()
        resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20
        before, seen, on = resident(), [0], True

        def watch():
            while on:  # noqa: B023
                seen[0] = max(seen[0], resident())  # noqa: B023
                time.sleep(0.002)
        watcher = threading.Thread(target=watch)
        watcher.start()
        logp = way()
        logp.sum().backward()
        on = False
        watcher.join()
        result = logp.detach(), model.lm_head.weight.grad.clone()
        expected = expected or result
        found[name] = {"megabytes": round(seen[0] - before), "largest_difference": [
            float((a - b).abs().max() / b.abs().max()) for a, b in zip(result, expected, strict=True)]}
        print(f"{name:22}{found[name]['megabytes']:8} MB above the start")
    return {"what": "Peak resident memory above the start, in MB, of log-probabilities and their gradient; differences "
                    "of the two relative to the largest number.", "shape": [rows, tokens, vocabulary], "ways": found}


# ----------------------------------------------------------------------------------------------------- whole iterations
def iteration(rounds=6, each=3):
    """Seconds per iteration on the tiny checkpoint and DiceSum: 256 responses, one scoring pass and one training pass
    in two minibatches, 8 responses to a prompt for both GRPOs. In turn, in one process; the median of rounds x each."""
    import env
    import train
    import vlm
    runs = {method: train.build(*train.parse(["--method", method, "--name", f"bench-{method}"]))
            for method in ("grpo", "sapo")}
    start = train.cached_warm_start(runs["grpo"].settings)

    def by_trl(count):
        import datasets
        import transformers
        import trl
        policy, task, stamps = vlm.load(start), env.DiceSum(), []
        rows = [{"prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": e.question}]}],
                 "image": e.image, "answer": e.answer} for e in map(task.example_at, range(32 * count))]

        def reward(completions, answer, **_):
            return [float(env.read_answer(c[0]["content"]) == a) for c, a in zip(completions, answer, strict=True)]

        class Clock(transformers.TrainerCallback):
            on_step_begin = on_train_end = lambda self, *_, **__: stamps.append(time.perf_counter())
        with tempfile.TemporaryDirectory() as folder:
            config = trl.GRPOConfig(
                folder, per_device_train_batch_size=128, steps_per_generation=2, num_generations=8, learning_rate=3e-4,
                max_completion_length=64, beta=0.0, temperature=1.0, max_steps=2 * count, use_cpu=True, bf16=False,
                report_to="none", save_strategy="no", logging_steps=10**6, disable_tqdm=True,
                gradient_checkpointing=False,
                generation_kwargs={"suppress_tokens": policy.banned.nonzero().flatten().tolist()})
            trl.GRPOTrainer(policy.model, reward, args=config, train_dataset=datasets.Dataset.from_list(rows),
                            processing_class=policy.processor, callbacks=[Clock()]).train()
        return [b - a for a, b in zip(stamps[:-2:2], stamps[2::2], strict=True)]

    def ours(run, count):
        found = []
        for _ in range(count):
            begin = time.perf_counter()
            train.step(run)
            found.append(time.perf_counter() - begin)
        return found
    seconds = {"GRPO": [], "SAPO": []}
    try:
        import trl
        versions, seconds["TRL's GRPO"] = {"trl": trl.__version__}, []
    except ImportError:
        versions = {}
        print("TRL is not installed (pip install trl): it does not take part")
    for _ in range(rounds):
        for name, run in (("GRPO", runs["grpo"]), ("SAPO", runs["sapo"])):
            seconds[name] += ours(run, each)
        if versions:
            seconds["TRL's GRPO"] += by_trl(each)
    median = {name: sorted(x)[len(x) // 2] for name, x in seconds.items()}
    for name, x in median.items():
        print(f"{name:12}{x:8.2f} s   {x / median['GRPO']:.2f} of GRPO")
    return {"what": iteration.__doc__, "threads": torch.get_num_threads(), "versions": versions, "seconds": seconds,
            "median": median, "of_grpo": {name: x / median["GRPO"] for name, x in median.items()}}


# ---------------------------------------------------------------------------------------------- true sizes, on one card
def _smolvlm(hidden, layers, heads, kv_heads, inner, vision, side, scale, tokens):
    import transformers
    text = transformers.LlamaConfig(hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
                                    num_key_value_heads=kv_heads, intermediate_size=inner, vocab_size=49280,
                                    max_position_embeddings=8192)
    config = transformers.Idefics3Config(text_config=text, vision_config=vision | {"image_size": side},
                                         scale_factor=scale, image_token_id=49190)
    picture = lambda rows: {"pixel_values": torch.randn(rows, 1, 3, side, side)}
    return transformers.Idefics3ForConditionalGeneration, config, [49190] * tokens, picture

def _qwen(hidden, layers, heads, kv_heads, inner, vocabulary, tied, **vision):
    import transformers
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    config = transformers.Qwen2_5_VLConfig(
        text_config=dict(hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, vocab_size=vocabulary,
                         num_key_value_heads=kv_heads, intermediate_size=inner, rope_parameters=rope,
                         tie_word_embeddings=tied),
        vision_config=dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=hidden,
                           fullatt_block_indexes=[7, 15, 23, 31]) | vision, tie_word_embeddings=tied)
    picture = lambda rows: {"pixel_values": torch.randn(rows * 576, 1176),  # 24 x 24 patches, so 144 tokens
                            "image_grid_thw": torch.tensor([[1, 24, 24]] * rows)}
    prompt = [config.vision_start_token_id, *[config.image_token_id] * 144, config.vision_end_token_id]
    return transformers.Qwen2_5_VLForConditionalGeneration, config, prompt, picture

SIZES = {  # name: (class, configuration, the tokens of a picture, its tensors), as in the published config.json
    "tiny": lambda: _smolvlm(64, 2, 4, 4, 128, dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                                                    intermediate_size=64, patch_size=8), 32, 2, 4),
    "SmolVLM-256M": lambda: _smolvlm(576, 30, 9, 3, 1536, dict(
        hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072,
        patch_size=16), 512, 4, 64),
    "SmolVLM-2.2B": lambda: _smolvlm(2048, 24, 32, 32, 8192, dict(
        hidden_size=1152, num_hidden_layers=27, num_attention_heads=16, intermediate_size=4304,
        patch_size=14), 378, 3, 81),
    "Qwen2.5-VL-3B": lambda: _qwen(2048, 36, 16, 2, 11008, 151936, True),
    "Qwen2.5-VL-7B": lambda: _qwen(3584, 28, 28, 4, 18944, 152064, False)}


def matrix_rate(device, dtype, side):
    """Operations per second of a large matrix product: what the card can do at best."""
    a = torch.randn(side, side, device=device, dtype=dtype)
    times = []
    for _ in range(5):
        _synchronize(device)
        begin = time.perf_counter()
        for _ in range(4):
            a @ a
        _synchronize(device)
        times.append(time.perf_counter() - begin)
    return 4 * 2 * side**3 / min(times)

def _synchronize(device):
    if "cuda" in str(device):
        torch.cuda.synchronize()

def one_size(name, device, lora, rows, written, prompt=64, micro_batch=4):
    """One SAPO iteration with random weights of a true size, bfloat16, gradient checkpointing: `rows` responses of
    `written` tokens each to a picture and `prompt` tokens. -> one row of results/gpu.json."""
    import vlm
    kind, config, picture_tokens, picture = SIZES[name]()
    torch.manual_seed(0)
    with torch.device(device):
        model = kind._from_config(config, dtype=torch.bfloat16).eval()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    weights = sum(p.numel() for p in model.parameters())
    V = config.get_text_config().vocab_size
    banned = torch.zeros(V, dtype=torch.bool, device=device)
    banned[[config.image_token_id, V - 1]] = True  # V - 1 is the end: banned, so that everyone writes as much
    policy = vlm.VLM(model, SimpleNamespace(tokenizer=None), banned, [V - 1])
    if lora:
        policy, judge, _ = vlm.lora(policy, lora)
    backbone = vlm.Backbone(judge) if lora else copy.deepcopy(model.base_model)
    critic = sapo.SegmentCritic(backbone, config.get_text_config().hidden_size).to(device)
    actor = vlm.adam([p for p in policy.enter().parameters() if p.requires_grad], 1e-6)
    critic_optimizer = vlm.adam(critic.parameters(), 2e-6)
    ids = torch.tensor([[*picture_tokens, *range(10, 10 + prompt)]] * rows)
    tensors = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **picture(rows)}
    if "image_grid_thw" in tensors:
        tensors["mm_token_type_ids"] = (ids == config.image_token_id).long()
    counts = {key: [len(x) // rows] * rows for key, x in tensors.items() if len(x) != rows}
    inputs, seconds = vlm.Inputs({key: x.to(device) for key, x in tensors.items()}, counts), {}

    def timed(what, function):
        _synchronize(device)
        begin = time.perf_counter()
        result = function()
        _synchronize(device)
        seconds[what] = time.perf_counter() - begin
        return result

    def one_iteration():
        torch.manual_seed(1)
        tokens, mask = timed("generate", lambda: vlm.generate(policy, inputs, written))
        part = lambda rows: (vlm.take(inputs, rows), tokens[rows], mask[rows])
        in_parts = lambda function: vlm.in_parts(function, micro_batch, inputs, tokens, mask)
        with torch.no_grad():
            logp, entropy = timed("score", lambda: in_parts(lambda *x: vlm.score(policy, *x)))
            values = timed("values", lambda: in_parts(lambda *x: vlm.prefix_values(critic, *x)))
        rewards = torch.where(sapo.response_ends(mask), torch.rand(mask.shape, device=device).round(), 0.0)
        rollout = sapo.Rollout(mask, sapo.entropy_ends(entropy, mask), logp, rewards, values)
        timed("update", lambda: sapo.sapo_update(
            rollout, lambda rows: vlm.score(policy, *part(rows)), lambda rows: vlm.prefix_values(critic, *part(rows)),
            actor, critic_optimizer, sapo.SAPOConfig(minibatch=rows, micro_batch=micro_batch)))
    one_iteration(), one_iteration()  # the first warms up
    positions = rows * (ids.shape[1] + written)
    peak = torch.cuda.max_memory_allocated() / 2**30 if "cuda" in str(device) else peak_megabytes() / 2**10
    return {"parameters": weights, "peak_gib": peak, "seconds": seconds, "seconds_per_iteration": sum(seconds.values()),
            "trained": sum(p.numel() for x in (actor, critic_optimizer) for p in x.param_groups[0]["params"]),
            "generated_per_second": rows * written / seconds["generate"],
            "scored_per_second": positions / seconds["score"],
            "scoring_rate": 2 * weights * positions / seconds["score"]}

def gpu(device="cuda", sizes=tuple(SIZES)[1:], rank=16, rows=16, written=256):
    """Random weights at true sizes on one card: peak memory, tokens per second, share of the card's matrix rate (2 x
    parameters x positions over the seconds of a scoring pass). A size that does not fit says so."""
    if "cuda" in device and not torch.cuda.is_available():
        raise SystemExit("python bench.py gpu needs a CUDA card, and torch sees none here; nothing was written")
    best, found = matrix_rate(device, torch.bfloat16, 8192 if "cuda" in device else 64), []
    for name in sizes:
        for lora in (0, rank):
            if "cuda" in device:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            try:
                row = one_size(name, device, lora, rows, written)
                row["share_of_matrix_rate"] = row["scoring_rate"] / best
            except torch.OutOfMemoryError as error:
                row = {"out_of_memory": str(error).splitlines()[0]}
            found.append({"model": name, "lora": lora, **row})
            print(json.dumps(found[-1]))
    card = torch.cuda.get_device_name() if "cuda" in device else "cpu"
    return {"what": gpu.__doc__, "card": card, "matrix_rate": best, "responses": rows, "tokens": written, "rows": found}


def written(out, found, command, **more):
    """Write an outcome with what made it."""
    out.parent.mkdir(exist_ok=True)
    made = {"command": command, "date": date.today().isoformat(), **more,
            "versions": {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__}}
    versions = made["versions"] | found.get("versions", {})
    out.write_text(json.dumps(made | found | {"versions": versions}, indent=1) + "\n")
    print(f"written to {out}")

def main(arguments=None):
    """The command line: measure, check that all agree, print, write the outcome."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", nargs="?", default="math", choices=["math", "memory", "iteration", "gpu"])
    parser.add_argument("--batch", type=int, default=512, help="math: responses")
    parser.add_argument("--tokens", type=int, default=2048, help="math: tokens of the longest response")
    parser.add_argument("--repeats", type=int, default=3, help="math: rounds of the race; the best times count")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="where to write the result (default: in results/; not for another "
                                                 "--batch or --tokens)")
    args = parser.parse_args(arguments)
    results = Path(__file__).parent / "results"
    if args.what != "math":
        name = "gpu.json" if args.what == "gpu" else f"bench_{args.what}.json"
        return written(args.out or results / name, {"memory": memory, "iteration": iteration, "gpu": gpu}[args.what](),
                       f"python bench.py {args.what}")
    usual = (args.batch, args.tokens) == (parser.get_default("batch"), parser.get_default("tokens"))
    out = args.out or (results / "bench_math.json" if usual else None)

    times, differences = race(args.batch, args.tokens, args.repeats, args.seed)
    print(f"segment_gae and segment_ratio, ({args.batch}, {args.tokens}), 30% cut: processor time, one thread")
    ratios = {name: times[name] / times["sapo.py"] for name in LOOPS}
    print(f"{'sapo.py':14} {1000 * times['sapo.py']:10.1f} ms")
    for name in LOOPS:
        print(f"{name:14} {1000 * times[name]:10.1f} ms   {ratios[name]:6.1f} times slower   largest difference "
              f"{differences[name]:.1g}")
    if out:
        flags = " ".join(f"--{name} {getattr(args, name)}" for name in ("batch", "tokens", "repeats", "seed"))
        written(out, {"what": "Processor seconds on one thread (best of several) for advantages, returns and ratios, "
                              "by sapo.py and by loops over responses and segments, and how much slower the loops are.",
                      "seconds": times, "ratio": ratios, "largest_difference": differences},
                f"python bench.py {flags}", seeds=[args.seed])
    return times, ratios, differences


if __name__ == "__main__":
    main()
