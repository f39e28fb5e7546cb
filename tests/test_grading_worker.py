"""tasks/judge.py: the process in which math-verify works always answers, and always ends."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from task_responses import latex_soup

from tasks import grading, judge
from tasks.grading import same

pytest.importorskip("math_verify", reason="needs: pip install math-verify")
pytestmark = pytest.mark.usefixtures("dataset_cache")

HALF = r"\frac{x}{2}"  # the answer given, to questions whose true answers only math-verify can read
TOWER = r"\sqrt{9^{9^{9^{9}}}}"  # as a true answer, takes for ever


@pytest.fixture(autouse=True)
def nothing_known():
    same.cache_clear()


def this_worker():
    return grading._MATH_VERIFY.process


@settings(max_examples=25)
@given(latex_soup)
def test_any_text_gets_a_verdict(text):
    assert same(text, HALF) in (True, False)
    assert same(HALF, text) in (True, False)
    assert same("0.5x", HALF) is True  # the worker is in step


def test_an_answer_that_never_ends_is_wrong_and_the_next_one_gets_its_verdict(monkeypatch):
    same(HALF, r"\frac{2x}{4}")  # started
    worker = this_worker()
    monkeypatch.setattr(grading._MATH_VERIFY, "deadline", 1.0)
    same.cache_clear()
    start = time.perf_counter()
    assert same("16", TOWER) is False
    assert 0.9 < time.perf_counter() - start < 4
    assert worker.returncode == -signal.SIGKILL
    assert worker.stdin.closed and worker.stdout.closed
    monkeypatch.setattr(
        grading._MATH_VERIFY, "deadline", 20.0
    )  # a busy machine needs more for the first answer
    assert same(HALF, r"\frac{3x}{6}") is True and this_worker().pid != worker.pid
    start = time.perf_counter()
    assert same("16", TOWER) is False and time.perf_counter() - start < 0.5  # known


def test_a_worker_that_something_else_killed_is_replaced():
    assert same(HALF, r"\frac{2x}{4}")
    this_worker().kill()
    this_worker().wait()
    assert same(HALF, r"\frac{5x}{10}")


def test_a_question_that_was_interrupted_does_not_leave_its_reply_to_the_next(monkeypatch):
    assert same(HALF, r"\frac{2x}{4}")

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(judge, "wait", interrupted)
        same(HALF, r"\frac{7x}{14}")
    assert not same(HALF, r"\frac{1x}{3}")


def test_threads_take_turns():
    fractions = {}
    for i in range(1, 6):
        for j in range(1, 11):
            fractions[rf"\frac{{{i}x}}{{{j}}}"] = 2 * i == j
    verdicts = {}

    def ask(share):
        for fraction in share:
            verdicts[fraction] = same(HALF, fraction)

    shares = [list(fractions)[i::4] for i in range(4)]
    threads = [threading.Thread(target=ask, args=(share,)) for share in shares]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == fractions


def test_a_reply_that_is_no_verdict_ends_the_worker(monkeypatch):
    """Something printed into the pipe: from then on every question would get the reply to the one
    before."""
    chatty = f"print('hm', flush=True)\n{grading._MATH_VERIFY.program}"
    with monkeypatch.context() as patch:
        patch.setattr(grading, "_MATH_VERIFY", judge.Judge("math-verify", chatty))
        assert not same(HALF, r"\frac{2x}{4}")
    assert not same(HALF, r"\frac{2x}{6}") and same(HALF, r"\frac{3x}{6}")


def test_a_broken_math_verify_is_told(monkeypatch):
    with monkeypatch.context() as patch:
        broken = judge.Judge("math-verify", "import no_such_package")
        patch.setattr(grading, "_MATH_VERIFY", broken)
        with pytest.raises(RuntimeError, match="math-verify is installed, but fails"):
            same(HALF, r"\frac{2x}{4}")
    assert same(HALF, r"\frac{2x}{4}")


# ---------------------------------------------------------------------------- forks, and ends


def grade_in_a_child(pipe):
    pipe.send((same(HALF, r"\frac{6x}{12}"), this_worker().pid))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_daemonic_fork_gets_a_worker_of_its_own_that_ends_with_it():
    assert same(HALF, r"\frac{2x}{4}")
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    child = context.Process(target=grade_in_a_child, args=(theirs,), daemon=True)
    child.start()
    assert ours.poll(60)
    right, pid = ours.recv()
    child.join(20)
    assert right and child.exitcode == 0 and pid != this_worker().pid
    assert ends(pid) and same(HALF, r"\frac{8x}{16}")


def ends(pid, seconds=10):
    """Does the process end?"""
    for _ in range(10 * seconds):
        try:
            if is_zombie(pid):
                return True
            os.kill(pid, 0)
        except OSError:
            return True
        time.sleep(0.1)
    return False


def is_zombie(pid):
    """It has ended, and only its parent does not know yet."""
    _, _, fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")
    return fields.split()[0] == "Z"


KILLED = "os.kill(os.getpid(), 9)"
ENDS = {
    "ordinary": "pass",
    "killed while the worker waits": KILLED,
    "killed while it computes": (
        "threading.Thread(target=same, args=('16', TOWER), daemon=True).start();"
        f"time.sleep(1); {KILLED}"
    ),
}


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("end", ENDS)
def test_no_worker_outlives_its_parent(end):
    code = "\n".join(
        [
            "import os, threading, time",
            "from tasks import grading",
            "from tasks.grading import same",
            "grading._MATH_VERIFY.deadline = 2.0",
            f"TOWER = {TOWER!r}",
            r"same(r'\frac{x}{2}', r'\frac{2x}{4}')",
            "print(grading._MATH_VERIFY.process.pid, flush=True)",
            ENDS[end],
        ]
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(grading.__file__).parent.parent,
    )
    assert not done.stderr and ends(int(done.stdout))
