"""Texts are written by other processes on this machine, each with an engine of its own."""

from __future__ import annotations

import functools
import logging
import pickle
import queue
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import cloudpickle  # type: ignore[import-untyped]
import torch

from agents.rollouts.shards import Done, Shard, Text, split_evenly
from agents.rollouts.shared_weights import SharedWeights, layout
from agents.rollouts.worker import Scribe
from agents.rollouts.worker_process import WorkerLostError, WorkerProcess
from llm_env.engines import Job, Sampling
from llm_env.tasks import Task
from llm_env.tokens.episode import Episode
from llm_env.tokens.prompts import TokenizedPrompts

logger = logging.getLogger("agents")

MOST_TRIES = 5
"""How many processes may be lost over the same texts."""


class Workers:
    """Processes that write texts: an engine's `write`, divided among them.

    What is to be written is divided into as many parts as there are processes, by a rule that knows nothing of who
    writes them; and a text depends on its random numbers alone. So the batch is the same whoever writes it. Of a
    process that dies, hangs or says what makes no sense, another takes the place, and writes the part again: nothing
    is lost or counted twice.

    What is asked for is begun at once, with the weights as they are: the caller may do something else meanwhile.

    Args:
        make: makes what a process needs, in it; it is pickled.
        count: of processes.
        weights: those of the model, for their names, shapes and number formats.
        context: how many tokens a text may have.
        threads: that each process computes with.
        patience: seconds in which a process that writes must be heard of.
        copies: how many versions of the weights there is room for.

    Attributes:
        version: of the weights that are written with from now on.
        lost: how many processes had to be replaced.
    """

    def __init__(
        self,
        make: Callable[[], Scribe],
        count: int,
        weights: Mapping[str, torch.Tensor],
        *,
        context: int,
        threads: int = 1,
        patience: float = 600.0,
        copies: int = 1,
    ) -> None:
        if count < 1:
            raise ValueError(f"there must be at least one process to write texts, got {count}")
        self.context = context
        self.version = 0
        self.lost = 0
        self.count = count
        self.patience = patience
        self.threads = threads
        places, size = layout(weights)
        self._weights = SharedWeights(places, size, copies=copies)
        self._copy = 0
        self._copies: dict[int, int] = {}
        self._calls: weakref.WeakSet[_Call] = weakref.WeakSet()
        try:
            payload = cloudpickle.dumps(make)
        except Exception as error:
            raise TypeError(
                f"the task cannot be sent to other processes ({type(error).__name__}: {error}): keep locks, "
                "connections and open files out of it (open them where they are needed first), or write texts in this "
                "process (--workers 0)"
            ) from error
        inherited = functools.partial(SharedWeights, places, size, copies=copies, handle=self._weights.handle)
        self._start = cloudpickle.dumps({"path": list(sys.path), "weights": pickle.dumps(inherited), "make": payload})
        self._asked: queue.SimpleQueue[_Asked | None] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._open: dict[int, Shard] = {}
        self._numbers = 0
        self._closing = False
        self._processes: list[WorkerProcess | None] = [self._new_process() for _ in range(count)]
        self._threads = [
            threading.Thread(target=_serve, args=(weakref.ref(self), self._asked, place), daemon=True)
            for place in range(count)
        ]
        for thread in self._threads:
            thread.start()
        weakref.finalize(self, _dismiss, self._asked, count)

    def load_weights(self, named_tensors: Mapping[str, torch.Tensor], version: int) -> None:
        """Write with these weights from now on; what was begun before goes on with those that it was begun with."""
        if {call.copy for call in self._calls} >= set(range(self._weights.copies)):
            raise RuntimeError(
                f"there is room for {self._weights.copies} versions of the weights, and texts that were begun with "
                "them are not taken yet: take those first, or give more copies"
            )
        with self._changed:
            self._changed.wait_for(lambda: self._free_copy() is not None)
            copy = self._free_copy()
        assert copy is not None
        self._weights.store(named_tensors, copy)
        self._copies[version] = self._copy = copy
        self._copies = {each: where for each, where in self._copies.items() if where != copy or each == version}
        self.version = version

    def weights_of(self, version: int) -> dict[str, torch.Tensor]:
        """A copy of weights that texts are being written with."""
        return {name: weight.clone() for name, weight in self._weights.view(self._copies[version]).items()}

    def write(
        self,
        task: Task,
        prompts: TokenizedPrompts,
        jobs: Sequence[Job],
        sampling: Sampling,
        *,
        context: int | None = None,
        max_new_tokens: int | None = None,
    ) -> Iterator[tuple[Job, Episode]]:
        """As an engine's `write`; of a task that keeps sessions, episodes come with their scores.

        Args:
            task: the one that the processes have.
            prompts: of the task.
            jobs: what to write.
            sampling: temperature and seed.
            context: how many tokens prompt and text may have.
            max_new_tokens: how many tokens the model may choose in a text.
        """
        sampling = sampling.with_fresh_seed()
        answers: queue.SimpleQueue[Text | Done | Exception] = queue.SimpleQueue()
        parts = split_evenly(jobs, self.count) if jobs else []
        call = _Call(self._copy)
        self._calls.add(call)
        for part in parts:
            places = {index: place for place, index in enumerate(dict.fromkeys(job.prompt_index for job in part))}
            shard = Shard(
                number=self._numbers,
                version=self.version,
                copy=self._copy,
                jobs=[job._replace(prompt_index=places[job.prompt_index]) for job in part],
                prompts=[(prompts.prompts[index], prompts.tokens[index]) for index in places],
                sampling=sampling,
                context=context,
                max_new_tokens=max_new_tokens,
            )
            self._numbers += 1
            with self._changed:
                self._open[shard.number] = shard
            self._asked.put(_Asked(shard, answers))
        return self._answers(task, list(jobs), answers, len(parts), call)

    def close(self) -> None:
        """End the processes."""
        self._closing = True
        _dismiss(self._asked, self.count)
        for process in self._processes:
            if process is not None:
                process.kill()
        for thread in self._threads:
            thread.join()
        self._weights.close()

    def _answers(
        self,
        task: Task,
        jobs: Sequence[Job],
        answers: queue.SimpleQueue[Text | Done | Exception],
        parts: int,
        call: _Call,  # as long as somebody may ask for the texts
    ) -> Iterator[tuple[Job, Episode]]:
        job_of = {job.request: job for job in jobs}
        while parts:
            answer = answers.get()
            if isinstance(answer, Exception):
                raise answer
            if isinstance(answer, Done):
                parts -= 1
                task.replies.count_elsewhere(**answer.replies)
                continue
            job = job_of.pop(answer.request, None)
            if job is not None:  # else it came before its process was lost, and is written again
                answer.episode.rollout.read_by(task.vocabulary.decode)
                yield job, replace(answer.episode, prompt_index=job.prompt_index)

    def _free_copy(self) -> int | None:
        used = {shard.copy for shard in self._open.values()} | {call.copy for call in self._calls}
        return next((copy for copy in range(self._weights.copies) if copy not in used), None)

    def _new_process(self) -> WorkerProcess:
        return WorkerProcess(self._start, [self._weights.handle], self.threads, self.patience)

    def _see_to(self, asked: _Asked, place: int) -> None:
        """Have a shard written, by as many processes as it takes."""
        reason = ""
        try:
            for _ in range(MOST_TRIES):
                try:
                    process = self._processes[place]
                    if process is None:
                        process = self._processes[place] = self._new_process()
                    done = process.write(asked.shard, asked.answers.put)
                    break
                except WorkerLostError as error:
                    if self._closing:
                        raise
                    reason = self._replace(place, str(error))
            else:
                raise WorkerLostError(
                    f"{MOST_TRIES} processes were lost in turn over the same texts; the last one {reason}. Is there "
                    "memory for --workers? With --workers 0 texts are written in this process"
                )
        except Exception as error:
            self._settle(asked)
            asked.answers.put(error)
        else:
            self._settle(asked)
            asked.answers.put(done)

    def _settle(self, asked: _Asked) -> None:
        with self._changed:
            del self._open[asked.shard.number]
            self._changed.notify_all()

    def _replace(self, place: int, what: str) -> str:
        process = self._processes[place]
        how = "it could not be started" if process is None else process.end()
        self._processes[place] = None
        self.lost += 1
        logger.warning("process %d, which writes texts, %s (%s): another one writes them again", place, what, how)
        return f"{what} ({how})"


class _Call:
    """Texts that were asked for, and not all taken."""

    def __init__(self, copy: int) -> None:
        self.copy = copy


class _Asked:
    """A shard, and where the answers go."""

    def __init__(self, shard: Shard, answers: queue.SimpleQueue[Any]) -> None:
        self.shard = shard
        self.answers = answers


def _dismiss(asked: queue.SimpleQueue[_Asked | None], count: int) -> None:
    for _ in range(count):
        asked.put(None)


def _serve(workers: weakref.ref[Workers], asked: queue.SimpleQueue[_Asked | None], place: int) -> None:
    """Take what is asked for, one after the other, for the process in this place."""
    while (each := asked.get()) is not None:
        pool = workers()
        if pool is None:
            return
        pool._see_to(each, place)
        del pool
