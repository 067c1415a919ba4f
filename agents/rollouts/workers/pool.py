"""Texts are written by other processes, each with an engine of its own."""

from __future__ import annotations

import functools
import pickle
import queue
import sys
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import replace

import cloudpickle  # type: ignore[import-untyped]
import torch

from agents.rollouts.workers.crew import Crew
from agents.rollouts.workers.here import Here
from agents.rollouts.workers.link import Links
from agents.rollouts.workers.process import WorkerProcess
from agents.rollouts.workers.shards import Done, Leg, Rest, Shard, Text, split_evenly
from agents.rollouts.workers.shared_weights import SharedWeights, layout
from agents.rollouts.workers.worker import Scribe
from llm_env.engines import Job, Sampling
from llm_env.engines.writing import Part
from llm_env.tasks import Task
from llm_env.tokens.episode import Episode
from llm_env.tokens.prompts import TokenizedPrompts


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
        links: where they come from; by default they are started on this machine.
        patience: seconds in which a process that writes must be heard of.
        copies: how many versions of the weights there is room for.

    Attributes:
        version: of the weights that are written with from now on.
    """

    def __init__(
        self,
        make: Callable[[], Scribe],
        count: int,
        weights: Mapping[str, torch.Tensor],
        *,
        context: int,
        links: Links | None = None,
        patience: float = 600.0,
        copies: int = 1,
    ) -> None:
        if count < 1:
            raise ValueError(f"there must be at least one process to write texts, got {count}")
        self.context = context
        self.version = 0
        self.count = count
        self.patience = patience
        self.links = Here() if links is None else links
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
        shares = self.links.shares_memory
        room = functools.partial(SharedWeights, places, size, copies=copies if shares else 1)
        if shares:
            room = functools.partial(room, handle=self._weights.handle)
        start = cloudpickle.dumps({"path": list(sys.path), "weights": pickle.dumps(room), "make": payload})
        self._numbers = 0
        begin = functools.partial(_begin, self.links, start, self._weights, patience)
        self._crew = Crew(begin, count)
        self._finalizer = weakref.finalize(self, _close, self._crew, self.links)

    @property
    def lost(self) -> int:
        """How many processes had to be replaced."""
        return self._crew.lost

    def load_weights(self, named_tensors: Mapping[str, torch.Tensor], version: int) -> None:
        """Write with these weights from now on; what was begun before goes on with those that it was begun with."""
        if {call.copy for call in self._calls} >= set(range(self._weights.copies)):
            raise RuntimeError(
                f"there is room for {self._weights.copies} versions of the weights, and texts that were begun with "
                "them are not taken yet: take those first, or give more copies"
            )
        self._crew.wait_until(lambda: self._free_copy() is not None)
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
        asked: list[tuple[list[Job], Leg | None]] = [(part, None) for part in split_evenly(jobs, self.count) if part]
        call = self._ask(prompts, asked, sampling.with_fresh_seed(), context, max_new_tokens)
        return self._answers(task, list(jobs), call)

    def go_on(
        self,
        task: Task,
        prompts: TokenizedPrompts,
        legs: Sequence[tuple[list[Job], Leg]],
        sampling: Sampling,
        *,
        context: int,
        max_new_tokens: int | None,
    ) -> Generator[tuple[Part, Episode], None, list[Rest]]:
        """Texts that end in legs, each of which is gone by one process; what each has left is what this returns.

        Args:
            task: see `write`.
            prompts: see there.
            legs: and the jobs that may begin in each.
            sampling: with a seed.
            context: see `write`.
            max_new_tokens: see there.
        """
        call = self._ask(prompts, legs, sampling, context, max_new_tokens)
        job_of = {job.request: job for jobs, leg in legs for job in (*jobs, *(part.job for part in leg.begun))}
        ended: dict[int, list[Text]] = {}
        done: dict[int, Done] = {}
        for answer in call.answered(task):
            if isinstance(answer, Done):
                done[answer.number] = answer
            else:
                ended.setdefault(answer.number, []).append(answer)
        left = []
        for number, (_, leg) in zip(sorted(done), legs, strict=True):  # in their order, whoever was the first
            texts = ended.get(number, [])
            for text in texts:
                assert text.part is not None
                job = job_of[text.request]
                yield text.part._replace(job=job), _here(task, text.episode, job)
            parts, changed = (
                [part._replace(job=job_of[part.job.request]) for part in each]
                for each in (done[number].rest, done[number].changed)
            )
            left.append(Rest(parts, len(texts) + len(parts) + len(changed) - len(leg.begun), changed))
        return left

    def _ask(
        self,
        prompts: TokenizedPrompts,
        asked: Sequence[tuple[list[Job], Leg | None]],
        sampling: Sampling,
        context: int | None,
        max_new_tokens: int | None,
    ) -> _Call:
        """Have parts of a batch written by whoever is free."""
        call = _Call(self._copy, len(asked))
        self._calls.add(call)
        for jobs, leg in asked:
            begun = [] if leg is None else leg.begun
            all_jobs = (*jobs, *(part.job for part in begun))
            places = {index: place for place, index in enumerate(dict.fromkeys(job.prompt_index for job in all_jobs))}
            shard = Shard(
                number=self._numbers,
                version=self.version,
                copy=self._copy,
                jobs=[_in(places, job) for job in jobs],
                prompts=[(prompts.prompts[index], prompts.tokens[index]) for index in places],
                sampling=sampling,
                context=context,
                max_new_tokens=max_new_tokens,
                leg=leg and replace(leg, begun=[part._replace(job=_in(places, part.job)) for part in begun]),
            )
            self._numbers += 1
            self._crew.ask(shard, call.answers)
        return call

    def close(self) -> None:
        """End the processes."""
        self._finalizer()
        self._weights.close()

    def _answers(self, task: Task, jobs: Sequence[Job], call: _Call) -> Iterator[tuple[Job, Episode]]:
        job_of = {job.request: job for job in jobs}
        for answer in call.answered(task):
            if isinstance(answer, Done):
                continue
            job = job_of.pop(answer.request, None)
            if job is not None:  # else it came before its process was lost, and is written again
                yield job, _here(task, answer.episode, job)

    def _free_copy(self) -> int | None:
        used = self._crew.copies_in_use() | {call.copy for call in self._calls}
        return next((copy for copy in range(self._weights.copies) if copy not in used), None)


class _Call:
    """Texts that were asked for, and not all taken; the weights that they are written with stay for as long."""

    def __init__(self, copy: int, parts: int) -> None:
        self.copy = copy
        self.parts = parts
        self.answers: queue.SimpleQueue[Text | Done | Exception] = queue.SimpleQueue()

    def answered(self, task: Task) -> Iterator[Text | Done]:
        """What comes, until all parts are written."""
        while self.parts:
            answer = self.answers.get()
            if isinstance(answer, Exception):
                raise answer
            if isinstance(answer, Done):
                self.parts -= 1
                task.replies.count_elsewhere(**answer.replies)
            yield answer


def _in(places: Mapping[int, int], job: Job) -> Job:
    return job._replace(prompt_index=places[job.prompt_index])


def _here(task: Task, episode: Episode, job: Job) -> Episode:
    """A text from elsewhere, whose tokens are read here when they are asked for."""
    episode.rollout.read_by(task.vocabulary.decode)
    return replace(episode, prompt_index=job.prompt_index)


def _begin(links: Links, start: bytes, weights: SharedWeights, patience: float, place: int) -> WorkerProcess:
    if links.shares_memory:
        return WorkerProcess(links.begin(place, [weights.handle]), start, None, patience)
    return WorkerProcess(links.begin(place, []), start, weights, patience)


def _close(crew: Crew, links: Links) -> None:
    crew.close()
    links.close()
