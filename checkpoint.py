"""A run's folder on disk: replaced whole or not at all, saved, found again and restored.

A checkpoint has the policy and its processor in Hugging Face format, like any other model, and
everything else in trainer.pt: critic, optimizers, progress, random state. A kill at any moment
leaves a whole one behind, and a resumed run on a CPU ends bit for bit where an uncut one does. Its
manifest.json holds the sha256 of its files, so that damage is seen before it is loaded.
"""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import shutil
import time
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError

import models

CHECKPOINTS = ("checkpoint", "checkpoint.old")  # the latter after a kill between two renames
STATEFUL = ("critic", "actor_optimizer", "critic_optimizer")  # of models.Models, beside the policy


@contextlib.contextmanager
def replacing(folder):
    """`with replacing(folder) as aside`: write `aside`; it takes the folder's place at the end.

    An exception in the block leaves the old folder as it was. Between the two renames only
    `<folder>.old` exists, and `newest` finds it: a kill at any moment leaves a whole one.
    OSError where the disk is full, whoever writes.
    """
    folder = Path(folder)
    aside = Path(f"{folder}.new")
    old = Path(f"{folder}.old")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    with failed_writes_as_oserror(aside):
        yield aside
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    aside.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def failed_writes_as_oserror(folder):
    """Within it a write that fails is an OSError, as it is of every Python file: torch and
    safetensors have errors of their own for a full disk."""
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        of_torch_save = "inline_container" in str(error)  # the file in which it writes an archive
        if not of_torch_save and not isinstance(error, SafetensorError):
            raise
        reason = str(error).splitlines()[0]
        raise OSError(f"{folder} could not be written: is the disk full? ({reason})") from error


@contextlib.contextmanager
def held(folder, within=None):
    """`with held(folder)`: no other process writes into a run's folder. ValueError where one does,
    saying which. The locks go with the process, however that ends.

    within: the folder of all runs. A run that lies deeper in it holds the folders between, too, so
    that none of them becomes a run and is moved away meanwhile. That is shared: the runs of a sweep
    stand side by side in one. ValueError also for a folder inside another run's, or around one.

    The run's lock file is removed with the lock (a killed process leaves it behind, unlocked). The
    shared ones of the folders between stay: a run cannot tell that it is the last to hold one.
    """
    named, folder = folder, Path(folder).resolve()  # one lock, by whatever path the folder is named
    above = []
    if within is not None and Path(within).resolve() in folder.parents:
        depth = len(folder.relative_to(Path(within).resolve()).parts)
        above = folder.parents[: depth - 1]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as locks:
        for parent in above:
            locks.enter_context(_locked(parent, fcntl.LOCK_SH, named))
        own = locks.enter_context(_locked(folder, fcntl.LOCK_EX, named))
        for run in (*above, *(file.parent for file in folder.glob("*/**/metrics.jsonl"))):
            if (run / "metrics.jsonl").exists():
                raise ValueError(
                    f"{named}: {run} is a run, and one cannot lie within another; move it "
                    "elsewhere, or begin a run of another --name"
                )
        own.write(f"process {os.getpid()}")
        own.flush()
        yield


@contextlib.contextmanager
def _locked(folder, kind, named):
    """Hold the lock file beside a folder, shared or not. -> the open file, which names the holder.
    ValueError where another process holds it."""
    file = Path(f"{folder}.lock")
    while True:
        with open(file, "a+") as lock:
            lock.seek(0)
            try:
                fcntl.flock(lock, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                who = lock.read() or "a run within or around it"
                raise ValueError(
                    f"{named}: {who} is writing there; let it end, or begin a run of another --name"
                ) from None
            if not _is_at(lock, file):
                continue  # its holder removed it after it was opened here: it locks nothing
            lock.truncate(0)  # who was named there has ended
            try:
                yield lock
            finally:
                if kind == fcntl.LOCK_EX and _is_at(lock, file):
                    file.unlink(missing_ok=True)  # before it is let go, so that it is nobody else's
            return


def _is_at(opened, file):
    """Is this open file the one that stands there now?"""
    try:
        return os.path.samestat(os.fstat(opened.fileno()), os.stat(file))
    except FileNotFoundError:
        return False


def write_whole(file, text) -> None:
    """Write a text file whole or not at all: a kill leaves the old one."""
    file = Path(file).resolve()  # of a link, what it leads to
    aside = Path(f"{file}.new")
    aside.write_text(text)
    aside.replace(file)


def write_json(file, content) -> None:
    """Write a JSON file, whole or not at all."""
    write_whole(file, as_json(content, indent=1) + "\n")


def as_json(content, indent=None) -> str:
    """Content as JSON that every program reads. Infinity and NaN, which JSON does not have, stand
    there as the words that float() takes: "inf", "-inf", "nan"."""
    return json.dumps(_without_infinity(content), indent=indent, allow_nan=False)


def _without_infinity(content):
    """A copy of lists and dicts with words for numbers that are not finite."""
    if isinstance(content, dict):
        return {key: _without_infinity(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_without_infinity(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return str(float(content))
    return content


def damaged(folder) -> list[str]:
    """The files of a folder that are not as its manifest.json says, or itself if it is lost."""
    manifest = Path(folder) / "manifest.json"
    try:
        expected, found = dict(json.loads(manifest.read_text())), digest(folder)
    except (ValueError, TypeError, OSError):  # no object of JSON; no file at all
        return [manifest.name]
    return sorted(name for name in expected | found if expected.get(name) != found.get(name))


def digest(folder) -> dict:
    """{file name: sha256} of everything in a folder but its manifest.json."""
    hashes = {}
    for file in Path(folder).iterdir():
        if file.name != "manifest.json":
            with open(file, "rb") as stream:  # piece by piece: weights may be larger than memory
                hashes[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return hashes


def set_aside(folder) -> None:
    """Keep an earlier run of the same name, under the time of the move."""
    folder = Path(folder)
    if folder.exists():
        moment = time.strftime("%Y%m%d-%H%M%S")
        folder.rename(f"{folder}-{moment}-{time.time_ns() % 10**6:06d}")


def is_there(folder) -> bool:
    """Has a run's folder a checkpoint, whole or not?"""
    return any((Path(folder) / name / "trainer.pt").is_file() for name in CHECKPOINTS)


def newest(folder) -> Path:
    """The whole checkpoint of a run's folder: `checkpoint`, or `checkpoint.old` after a kill
    between the two renames. ValueError if there is none, or only a damaged one."""
    damage = ""
    for name in CHECKPOINTS:
        stored = Path(folder) / name
        if not stored.exists():
            continue
        files = damaged(stored)
        if not files:
            return stored
        damage = damage or (
            f"{stored}: damaged, {', '.join(files)}; start the run again without --resume, or put "
            "a whole copy there"
        )
    raise ValueError(
        damage or f"{folder}: no checkpoint there yet; start the run again without --resume"
    )


def own_card(device) -> list[torch.device]:
    """The card of a run, in a list, as torch takes the devices of random streams; [] on a CPU. The
    other cards of a machine are none of a run's business: resumed elsewhere, it may see fewer."""
    device = torch.device(device)
    return [device] if device.type == "cuda" and torch.cuda.is_available() else []


def save(run) -> None:
    """Write the run's checkpoint in place of the last one."""
    with replacing(run.folder / "checkpoint") as aside:
        policy = run.models.policy
        policy.enter().save_pretrained(aside)
        policy.processor.save_pretrained(aside)
        state = {"progress": asdict(run.progress), "weights": []}
        for name in STATEFUL:
            part = getattr(run.models, name)
            state[name] = None if part is None else part.state_dict()
        if run.settings.lora or run.settings.dtype != "float32":
            # adapters and float32 copies are not in the policy's own files
            state["weights"] = models.trained_parameters(run.models)
        state["rng"] = torch.get_rng_state()
        cards = own_card(run.settings.device)
        state["cuda_rng"] = [torch.cuda.get_rng_state(card) for card in cards]
        torch.save(state, aside / "trainer.pt")
        (aside / "manifest.json").write_text(json.dumps(digest(aside)))


def restore(run_models, stored, device="cpu") -> dict:
    """Load what `save` wrote into the models and the random streams. -> the progress, as a dict.

    stored: the checkpoint's folder, from `newest`. The policy itself was loaded from it before.
    device: of the run; where it is another kind than before, its random stream begins anew.
    """
    state = torch.load(Path(stored) / "trainer.pt", map_location="cpu", weights_only=True)
    for name in STATEFUL:
        if state[name]:
            getattr(run_models, name).load_state_dict(state[name])
    if state["weights"]:
        parameters = models.trained_parameters(run_models)
        for parameter, kept in zip(parameters, state["weights"], strict=True):
            parameter.data.copy_(kept)
        for optimizer in (run_models.actor_optimizer, run_models.critic_optimizer):
            if optimizer is not None:
                optimizer.write_back()
    torch.set_rng_state(state["rng"])
    streams = state["cuda_rng"]
    for card in own_card(device):
        if len(streams) > 1:  # of all cards that were visible, as earlier versions kept them
            streams = streams[torch.device(card).index or 0 :]
        if streams:  # none: the run was on another kind of device
            torch.cuda.set_rng_state(streams[0], card)
    return state["progress"]


def append_lines(file, rows) -> None:
    """Append JSON lines to a file."""
    with open(file, "a") as stream:
        stream.writelines(as_json(row) + "\n" for row in rows)


def lines_up_to(file, iteration) -> tuple[list[str], list[int]]:
    """A file's JSON lines up to an iteration, and the iterations of these. What a killed run wrote
    after its last checkpoint is not among them, nor a torn last line. ValueError for any other line
    that is no row of a run."""
    lines = file.read_text(errors="replace").splitlines(keepends=True)
    if lines and not lines[-1].endswith("}\n"):
        lines.pop()
    kept, iterations = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            of_line = json.loads(line)["iteration"]
            if of_line <= iteration:
                kept.append(line)
                iterations.append(of_line)
        except (ValueError, TypeError, KeyError):
            raise ValueError(
                f"{file}, line {number}: no row of a run ({line.strip():.40}); take it out, or "
                "start the run again without --resume"
            ) from None
    return kept, iterations
