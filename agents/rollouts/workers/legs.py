"""Texts that go on: what a process is asked to do with those that have begun, and how far."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llm_env.engines import Job
from llm_env.engines.base import EngineBase
from llm_env.engines.writing import Part, Writing
from llm_env.tasks import Task
from llm_env.tokens.episode import Episode
from llm_env.tokens.prompts import TokenizedPrompts

if TYPE_CHECKING:
    from agents.rollouts.workers.shards import Shard


@dataclass(frozen=True, slots=True)
class Leg:
    """How a process is to write on: in rows of which each begins another text when one has ended.

    It keeps nothing for the next leg: what has not ended goes back, and comes again, to whoever it may be.

    Attributes:
        rows: how many texts are written side by side.
        groups: it stops when so many groups are whole.
        size: how many texts a group has.
        lacking: how many texts still lack to groups of which some have ended.
        begun: what has been written of texts that have not ended; or of such that have, to be made into episodes.
        called: what the weights that it writes with are called.
    """

    rows: int
    groups: int
    size: int
    lacking: Mapping[int, int]
    begun: Sequence[Part]
    called: int

    def allows(self, jobs: Sequence[Job], ended: Sequence[int], rest: Sequence[Part]) -> bool:
        """Whether this can be what has become of its texts, and of those jobs that have begun: each is there once."""
        back = [*ended, *(part.job.request for part in rest)]
        before = {part.job.request for part in self.begun}
        new = set(back) - before
        return len(back) == len(set(back)) and before <= set(back) and new == {job.request for job in jobs[: len(new)]}


@dataclass(frozen=True, slots=True)
class Rest:
    """What a leg has left.

    Attributes:
        parts: what has been written of texts that have not ended.
        begun: how many of its jobs have begun, the first ones.
    """

    parts: list[Part]
    begun: int


def until_whole(writing: Writing, groups: int, size: int, lacking: Mapping[int, int]) -> Iterator[tuple[Part, Episode]]:
    """Write until so many groups are whole; see `Leg`."""
    left = dict(lacking)
    while groups > 0:
        ended = writing.step()
        if ended is None:
            raise RuntimeError(f"all texts have ended, but {groups} more groups were to be whole")
        for part, episode in ended:
            group = part.job.group
            left[group] = left.get(group, size) - 1
            groups -= left[group] == 0
            yield part, episode


def written_on(
    shard: Shard, leg: Leg, engine: EngineBase, task: Task, prompts: TokenizedPrompts, rest: list[Part]
) -> Iterator[tuple[Part, Episode]]:
    """The texts that end in a leg; `rest` is filled with what has been written of the others."""
    writing, chooser = engine.begin(
        task,
        prompts,
        shard.jobs,
        shard.sampling,
        rows=leg.rows,
        context=engine.context if shard.context is None else shard.context,
        max_new_tokens=shard.max_new_tokens,
    )
    try:
        chooser.version = leg.called
        for part in leg.begun:
            episode = writing.go_on_with(part)
            if episode is not None:
                yield part, episode
        yield from until_whole(writing, leg.groups, leg.size, leg.lacking)
        rest += writing.unfinished()
    finally:
        writing.close()
        chooser.pause()
