"""What writes the texts of a `Stream`: an engine in this process, or workers."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, Protocol

from agents.rollouts.workers import Workers
from agents.rollouts.workers.legs import until_whole
from agents.rollouts.workers.shards import Leg, Rest
from llm_env.engines import Job, Sampling
from llm_env.engines.base import EngineBase
from llm_env.engines.writing import Part
from llm_env.mdp.core import TokenMDP
from llm_env.tasks import Task
from llm_env.tokens.episode import Episode

logger = logging.getLogger("agents")

Deal = Callable[[], list[Job]]
"""Gives the texts of another group."""
Ended = Iterator[tuple[Part, Episode]]


class Pen(Protocol):
    """Writes texts, and keeps those that have not ended."""

    def write_on(self, groups: int, lacking: Mapping[int, int], version: int) -> Ended:
        """The texts that end until so many groups are whole.

        Args:
            groups: how many.
            lacking: how many texts still lack to groups of which some have ended.
            version: what to call the weights that there are now.
        """

    def write_again(self, parts: Sequence[Part]) -> Ended:
        """Texts that have ended elsewhere, by the same tokens; before `load_state_dict`.

        One to which the task now replies otherwise is begun anew.
        """

    def give_up(self) -> None:
        """Forget all that has not ended, and what was to begin: something about it has failed."""

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs, as JSON can hold it."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with what another has begun."""


class OwnPen:
    """An engine in this process, which others may use in between.

    Args:
        mdp: the task and its prompts.
        engine: writes.
        rows: how many texts are written side by side.
        sampling: temperature and seed.
        deal: gives texts to begin.
    """

    def __init__(self, mdp: TokenMDP, engine: EngineBase, rows: int, sampling: Sampling, deal: Deal) -> None:
        self._task = mdp.task
        self._size = mdp.sampler.completions_per_prompt
        self._deal = deal
        self._dealt: deque[Job] = deque()
        self._writing, self._chooser = engine.begin(
            mdp.task,
            mdp.prompts,
            self._jobs(),
            sampling,
            rows=rows,
            context=mdp.context,
            max_new_tokens=mdp.max_new_tokens,
        )
        self._chooser.pause()

    def write_on(self, groups: int, lacking: Mapping[int, int], version: int) -> Ended:
        """See `Pen`."""
        self._chooser.go_on(version)
        try:
            yield from until_whole(self._writing, groups, self._size, lacking)
        finally:
            self._chooser.pause()

    def write_again(self, parts: Sequence[Part]) -> Ended:
        """See `Pen`."""
        ended, changed = self._writing.go_on_with(parts)
        begin_anew(changed, self._dealt, self._task)
        yield from ended

    def give_up(self) -> None:
        """See `Pen`."""
        self._writing.close()
        self._dealt.clear()

    def state_dict(self) -> dict[str, Any]:
        """See `Pen`."""
        return {"dealt": list(self._dealt), "parts": self._writing.unfinished()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Pen`."""
        self._dealt.extend(Job(*job) for job in state["dealt"])
        _, changed = self._writing.go_on_with([part_of(each) for each in state["parts"]])
        begin_anew(changed, self._dealt, self._task)

    def _jobs(self) -> Iterator[Job]:
        while True:
            if not self._dealt:
                self._dealt.extend(self._deal())
            yield self._dealt.popleft()


class WorkersPen:
    """Workers, each of which writes in some of the rows. They keep nothing: what has not ended is here, and is sent.

    A group is written in the rows of one, and each is asked for as many whole groups. So what a batch is depends on how
    many they are, but not on who they are, or how fast.

    Args:
        mdp: the task and its prompts.
        workers: write.
        rows: how many texts are written side by side, by all of them.
        sampling: temperature and seed.
        deal: gives texts to begin.
    """

    def __init__(self, mdp: TokenMDP, workers: Workers, rows: int, sampling: Sampling, deal: Deal) -> None:
        self._mdp = mdp
        self._workers = workers
        self._rows = math.ceil(rows / workers.count)
        self._sampling = sampling
        self._size = mdp.sampler.completions_per_prompt
        self._deal = deal
        self._turn = 0  # whose turn it is to be asked for one more than others, where they do not divide evenly
        self._dealt: list[deque[Job]] = [deque() for _ in range(workers.count)]
        self._begun: list[list[Part]] = [[] for _ in range(workers.count)]

    def write_on(self, groups: int, lacking: Mapping[int, int], version: int) -> Ended:
        """See `Pen`."""
        count = self._workers.count
        each, more = divmod(groups, count)
        asked = {lane: share for lane in range(count) if (share := each + ((lane - self._turn) % count < more))}
        for lane, share in asked.items():
            # Of each text that runs, all others of its group may have ended.
            while len(self._dealt[lane]) < (self._rows + share) * self._size:
                self._dealt[lane].extend(self._deal())
        legs = [
            (list(self._dealt[lane]), Leg(self._rows, share, self._size, lacking, self._begun[lane], version))
            for lane, share in asked.items()
        ]
        left = yield from self._go_on(legs)
        self._turn = (self._turn + more) % count
        for lane, rest in zip(asked, left, strict=True):
            self._begun[lane] = rest.parts
            for _ in range(rest.begun):
                self._dealt[lane].popleft()
            begin_anew(rest.changed, self._dealt[lane], self._mdp.task)

    def write_again(self, parts: Sequence[Part]) -> Ended:
        """See `Pen`."""
        if parts:
            [rest] = yield from self._go_on([([], Leg(self._rows, 0, self._size, {}, parts, called=0))])
            begin_anew(rest.changed, self._dealt[0], self._mdp.task)

    def give_up(self) -> None:
        """See `Pen`."""
        for dealt, begun in zip(self._dealt, self._begun, strict=True):
            dealt.clear()
            begun.clear()

    def state_dict(self) -> dict[str, Any]:
        """See `Pen`."""
        return {"turn": self._turn, "dealt": [list(jobs) for jobs in self._dealt], "parts": self._begun}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Pen`."""
        self._turn = state["turn"]
        for lane, jobs in zip(self._dealt, state["dealt"], strict=True):
            lane.extend(Job(*job) for job in jobs)
        self._begun = [[part_of(each) for each in parts] for parts in state["parts"]]

    def _go_on(self, legs: Sequence[tuple[list[Job], Leg]]) -> Generator[tuple[Part, Episode], None, list[Rest]]:
        mdp = self._mdp
        return self._workers.go_on(
            mdp.task, mdp.prompts, legs, self._sampling, context=mdp.context, max_new_tokens=mdp.max_new_tokens
        )


def begin_anew(changed: Sequence[Part], dealt: deque[Job], task: Task) -> None:
    """Let texts be begun again that could not be gone on with."""
    for _ in changed:
        logger.warning("a text is begun anew: the task %s did not go the same way with the same tokens", task.name)
    dealt.extendleft(part.job for part in reversed(changed))


def part_of(kept: Sequence[Any]) -> Part:
    """A part that was kept as JSON."""
    job, *rest = kept
    return Part(Job(*job), *rest)
