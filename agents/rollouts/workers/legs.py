"""Texts that go on for a while, with others that begin meanwhile."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from agents.rollouts.workers.shards import Leg, Shard
from llm_env.engines.base import EngineBase
from llm_env.engines.writing import Part, Writing
from llm_env.tasks import Task
from llm_env.tokens.episode import Episode
from llm_env.tokens.prompts import TokenizedPrompts


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
    shard: Shard,
    leg: Leg,
    engine: EngineBase,
    task: Task,
    prompts: TokenizedPrompts,
    rest: list[Part],
    changed: list[Part],
) -> Iterator[tuple[Part, Episode]]:
    """The texts that end in a leg; the lists are filled, see `Done`."""
    if not isinstance(engine, EngineBase):
        raise TypeError(
            f"a {type(engine).__name__} is no EngineBase, whose texts can be paused: use --rollout.no-go-on"
        )
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
        ended, others = writing.go_on_with(leg.begun)
        changed += others
        yield from ended
        yield from until_whole(writing, leg.groups, leg.size, leg.lacking)
        rest += writing.unfinished()
    finally:
        writing.close()
        chooser.pause()
