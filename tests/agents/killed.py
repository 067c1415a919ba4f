"""Runs `llm-env train` in processes that are killed: a program of its own, for tests to start.

It imports what a run needs, once, then forks a process for each attempt: so an attempt takes as long as the training
itself. It reads one JSON line an attempt, the arguments of `attempt`, and answers with one: the exit status (-9:
killed) and the seconds it took.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path


def attempt(arguments: list[str], file: str | None = None, lines: int = 0, delay: float = 0.0) -> tuple[int, float]:
    """One process from its beginning to its end, which is SIGKILL so many seconds after a file has so many lines."""
    from agents.cli import main

    start = time.monotonic()
    child = os.fork()
    if child == 0:
        os.dup2(2, 1)  # standard output is for the answers
        os._exit(main(arguments))
    status = wait(child, file, lines, delay)
    return status, time.monotonic() - start


def wait(child: int, file: str | None, lines: int, delay: float) -> int:
    """The exit status of a child process, which is killed if a file is given."""
    due = None
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        if file is not None and due is None and count_lines(Path(file)) >= lines:
            due = time.monotonic() + delay
        if due is not None and time.monotonic() >= due:
            os.kill(child, signal.SIGKILL)
            file, due = None, None
        time.sleep(0.001)


def count_lines(path: Path) -> int:
    """How many lines a file has; none if it is not there."""
    try:
        return path.read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


if __name__ == "__main__":
    import agents.cli.options
    import agents.run.training  # noqa: F401

    for line in sys.stdin:
        status, seconds = attempt(**json.loads(line))
        print(json.dumps({"status": status, "seconds": seconds}), flush=True)
