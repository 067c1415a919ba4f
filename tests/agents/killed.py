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


def attempt(
    arguments: list[str],
    file: str | None = None,
    lines: int = 0,
    checkpoints: str | None = None,
    step: int = 0,
    delay: float = 0.0,
    output: str | None = None,
) -> tuple[int, float]:
    """One process from its beginning to its end.

    Args:
        arguments: of the command line.
        file: kill the process when this file ...
        lines: ... has so many lines,
        checkpoints: or when this folder has a checkpoint ...
        step: ... of this step or of a later one,
        delay: and so many seconds have passed since.
        output: the file that gets what the process prints.
    """
    from agents.cli import main

    start = time.monotonic()
    child = os.fork()
    if child == 0:
        printed = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) if output else 2
        os.dup2(printed, 1)  # standard output is for the answers
        status = main(arguments)
        sys.stdout.flush()
        os._exit(status)
    status = wait(child, file, lines, checkpoints, step, delay)
    return status, time.monotonic() - start


def wait(
    child: int,
    file: str | None = None,
    lines: int = 0,
    checkpoints: str | None = None,
    step: int = 0,
    delay: float = 0.0,
) -> int:
    """The exit status of a child process, which is killed if a file or a folder is given."""
    due, kills = None, file is not None or checkpoints is not None
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        if kills and due is None:
            far = count_lines(Path(file)) >= lines if file else newest_step(Path(checkpoints or "")) >= step
            due = time.monotonic() + delay if far else None
        if due is not None and time.monotonic() >= due:
            os.kill(child, signal.SIGKILL)
            kills, due = False, None
        time.sleep(0.001)


def count_lines(path: Path) -> int:
    """How many lines a file has; none if it is not there."""
    try:
        return path.read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def newest_step(folder: Path) -> int:
    """The step of the newest checkpoint in a folder; -1 if there is none."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return -1
    return max((int(name.removeprefix("step-")) for name in names if name.startswith("step-")), default=-1)


if __name__ == "__main__":
    import agents.cli.options
    import agents.run.training  # noqa: F401

    for line in sys.stdin:
        status, seconds = attempt(**json.loads(line))
        print(json.dumps({"status": status, "seconds": seconds}), flush=True)
