"""Jobs side by side, in processes of one thread each."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

from ppo_shared import say

from agents.run.summary import rough_time
from learning.jobs import Job, Start, one_thread

Jobs = Sequence[Start | Job]
Done = tuple[Start | Job, str | None]


class Progress:
    """Says what was done, and how much is left."""

    def __init__(self, jobs: Jobs) -> None:
        self.number, self.total = 0, len(jobs)
        self.done, self.all = 0.0, sum(job.weight for job in jobs)
        self.begun = time.perf_counter()

    def tell(self, job: Start | Job, remark: str) -> None:
        self.number += 1
        self.done += job.weight
        left = (time.perf_counter() - self.begun) / self.done * (self.all - self.done)
        after = f"; about {rough_time(left)} left of these" if self.number < self.total else ""
        say(f"  [{self.number}/{self.total}] {job.name}: {remark}{after}")


def do_all(jobs: Jobs, out: Path, processes: int) -> list[str]:
    """Do these jobs, in any order; gives what went wrong, a sentence each. The others are done all the same."""
    progress, failed = Progress(jobs), []
    alone = processes == 1 or len(jobs) == 1
    for job, remark, error in _in_turn(jobs, out, processes) if alone else _side_by_side(jobs, out, processes):
        progress.tell(job, error or remark)
        if error:
            failed.append(f"{job.name}: {error}")
    return failed


def _in_turn(jobs: Jobs, out: Path, processes: int) -> Iterator[tuple[Start | Job, str, str]]:
    one_thread()
    for job in jobs:
        yield job, *_do(job, out, processes)


def _side_by_side(jobs: Jobs, out: Path, processes: int) -> Iterator[tuple[Start | Job, str, str]]:
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), initializer=_begin)
    waiting: dict[Future[Any], Start | Job] = {pool.submit(_do, job, out, processes): job for job in jobs}
    try:
        while waiting:
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                yield waiting.pop(future), *future.result()
    finally:
        pool.shutdown(wait=not waiting, cancel_futures=True)


def _begin() -> None:
    """What a process does first: it is to end with the one that has started it, however that ends."""
    one_thread()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent
    parent.join()
    os._exit(1)


def _do(job: Start | Job, out: Path, processes: int) -> tuple[str, str]:
    """A remark on how it went, and what went wrong."""
    try:
        return job.run(out, processes), ""
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        return "", f"failed: {type(error).__name__}: {error}"
