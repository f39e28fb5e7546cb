"""A process of its own that judges answers, because nothing but a process can be stopped for sure.

Some answers would keep a grader busy for ever. Its own limit would not do where that is an alarm:
an alarm works in the main thread only, and stops no long multiplication.
"""

import json
import os
import subprocess
import sys
import threading
from multiprocessing.connection import wait

START_DEADLINE = 120  # seconds that a package may take to be imported

# Around every program: a line of JSON comes in, a line with the verdict, a number, goes out.
_LOOP = r"""
import json, signal, sys
deadline = float(sys.argv[1])
print("ready", flush=True)
for line in sys.stdin:
    signal.setitimer(signal.ITIMER_REAL, 2 * deadline)  # kills it, should the parent be gone
    try:
        print(float(judge(*json.loads(line))), flush=True)
    except Exception:
        print(0.0, flush=True)
    signal.setitimer(signal.ITIMER_REAL, 0)
"""

# Threads take turns at a judge. A fork waits for its turn, too: else the child could begin with a
# lock that is held by a thread which it does not have.
_LOCK = threading.Lock()
os.register_at_fork(
    before=_LOCK.acquire, after_in_parent=_LOCK.release, after_in_child=_LOCK.release
)


class Judge:
    """A program that judges, run in a process that is started when it is first asked.

    package    what the program imports, for the message if that fails
    program    Python source that defines `judge(*message) -> number`; an exception counts as 0
    deadline   seconds that it may take for one answer
    """

    def __init__(self, package, program, deadline=5.0):
        self.package, self.program, self.deadline = package, program, deadline
        self.process, self._owner = None, None

    def __call__(self, *message):
        """The verdict on a message (JSON values), or 0.0 after the deadline; then the process is
        killed, and the next message gets a new one. RuntimeError if it does not start."""
        with _LOCK:
            # Killed, by us or by something else; or it is that of the process we were forked from.
            if self._owner != os.getpid() or self.process.poll() is not None:
                self._start()
            verdict = None
            try:
                self.process.stdin.write(json.dumps(message).encode() + b"\n")
                if wait([self.process.stdout], self.deadline):
                    verdict = _number(self.process.stdout.readline())
            finally:  # also after Ctrl-C: the next message must not get this one's verdict
                if verdict is None:
                    self._kill()
        return verdict or 0.0

    def close(self):
        """End the process, if there is one."""
        with _LOCK:
            if self._owner == os.getpid():
                self._kill()

    def _kill(self):
        with self.process:  # closes the pipes and waits
            self.process.kill()

    def _start(self):
        """It hangs on bare pipes: `multiprocessing` would run the caller's __main__ again, and
        refuses to work in a daemonic process. It ends when its pipe does. Its session is its own,
        so that Ctrl-C does not reach it."""
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.program + _LOOP, str(self.deadline)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,
        )
        self._owner = os.getpid()
        is_ready = wait([self.process.stdout], START_DEADLINE) and self.process.stdout.readline()
        if not is_ready:
            self._kill()
            module = self.package.replace("-", "_")
            raise RuntimeError(
                f"{self.package} is installed, but fails: try python -c 'import {module}'"
            )


def _number(line):
    """The number on a line, or None where there is none."""
    try:
        return float(line)
    except ValueError:
        return None
