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
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch
from ppo_shared import say
from transformers.utils.logging import disable_progress_bar

from agents.run.memory import keep_freed_memory
from agents.run.summary import rough_time
from learning.jobs import Job, Start

Jobs = Sequence[Start | Job]
Done = tuple[Start | Job, str, str]  # a remark, and what went wrong


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


class Workers:
    """The processes, which are started when they are first needed. Alone, jobs are done in this process.

    Args:
        out: the folder of all results.
        processes: how many.
    """

    def __init__(self, out: Path, processes: int) -> None:
        self.out, self.processes = out, processes
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stop(wait=kind is None)

    def do_all(self, jobs: Jobs) -> dict[str, str]:
        """Do these, in any order; gives what went wrong, by the names of jobs. The others are done all the same."""
        progress, failed = Progress(jobs), {}
        for job, remark, error in self._in_turn(jobs) if self.processes == 1 else self._side_by_side(jobs):
            progress.tell(job, error or remark)
            if error:
                failed[job.name] = error
        return failed

    def _in_turn(self, jobs: Jobs) -> Iterator[Done]:
        _quiet_and_alone()
        for job in jobs:
            yield job, *_do(job, self.out, 1)

    def _side_by_side(self, jobs: Jobs) -> Iterator[Done]:
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                self.processes, multiprocessing.get_context("spawn"), initializer=_begin_process
            )
        waiting = {self._pool.submit(_do, job, self.out, self.processes): job for job in jobs}
        while waiting:
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                job = waiting.pop(future)
                try:
                    yield job, *future.result()
                except BrokenProcessPool:
                    self._pool = None  # of a pool that has lost a process nothing is left
                    yield job, "", "failed: a process was killed (out of memory?)"

    def _stop(self, wait: bool) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=wait, cancel_futures=True)


def _quiet_and_alone() -> None:
    """One thread: jobs side by side do not wait for each other, and no number depends on how many cores there are."""
    torch.set_num_threads(1)
    keep_freed_memory()
    disable_progress_bar()  # transformers would draw bars for loading and saving between the lines of progress


def _begin_process() -> None:
    """What a process does first: it is to end with the one that has started it, however that ends."""
    _quiet_and_alone()
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
