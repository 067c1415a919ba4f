"""Texts without end: learn from those that end first, while the others go on with the weights that come of it."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from llm_env.engines import Job, Sampling
from llm_env.engines.base import EngineBase
from llm_env.engines.writing import ChangedTextError, Part
from llm_env.mdp.core import TokenMDP
from llm_env.tokens.episode import Episode

logger = logging.getLogger("agents")


class Stream:
    """An engine writes one text after the other in each of its rows. What has ended is handed out, and scored.

    Between two calls of `take` the engine is free for others, and its weights may change: it then reads again what it
    has written, and goes on with the weights that it has. So no row ever waits for the longest text of a batch, and a
    long text is by several policies, each of whose tokens has the log-prob that it was drawn with.

    A text is handed out once, in the batch after its end; and if it belongs to a group, with all of them.

    Args:
        mdp: the task and its prompts.
        engine: in this process.
        rows: how many texts are written side by side.
        sampling: temperature and seed.
    """

    def __init__(self, mdp: TokenMDP, engine: EngineBase, rows: int, sampling: Sampling) -> None:
        self.mdp = mdp
        self.size = mdp.sampler.completions_per_prompt
        self._next = 0
        self._dealt: deque[Job] = deque()
        self._written: dict[int, list[tuple[Part, Episode]]] = {}
        self._whole: deque[int] = deque()  # groups of which all texts have ended
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

    def take(self, count: int, version: int) -> list[Episode]:
        """The next `count` texts, with their scores.

        Args:
            count: a multiple of the texts of a group.
            version: what to call the weights that the engine has now.
        """
        self._chooser.go_on(version)
        try:
            return self.mdp.score_written(self._ended(count))
        finally:
            self._chooser.pause()

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on from here, as JSON can hold it."""
        parts = [part for group in self._written.values() for part, _ in group]
        return {
            "next": self._next,
            "dealt": [list(job) for job in self._dealt],
            "whole": list(self._whole),
            "parts": [[list(part.job), *part[1:]] for part in (*parts, *self._writing.unfinished())],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another one was: what it had written is written again, by the same tokens."""
        self._next = state["next"]
        self._dealt = deque(Job(*job) for job in state["dealt"])
        self._whole = deque(state["whole"])
        self._written = {}
        for job, *rest in state["parts"]:
            part = Part(Job(*job), *rest)
            try:
                episode = self._writing.go_on_with(part)
            except ChangedTextError as error:
                logger.warning("a text is begun anew: %s", error)
                self._dealt.appendleft(part.job)
                continue
            if episode is not None:
                self._written.setdefault(part.job.group, []).append((part, episode))

    def _ended(self, count: int) -> Iterator[tuple[int, Episode]]:
        """So many texts that have ended, each with the number of its place."""
        place = 0
        while place < count:
            while not self._whole:
                for part, episode in self._writing.step() or ():
                    group = self._written.setdefault(part.job.group, [])
                    group.append((part, episode))
                    if len(group) == self.size:
                        self._whole.append(part.job.group)
            texts = self._written.pop(self._whole.popleft())
            for _, episode in sorted(texts, key=lambda each: each[0].job.request):
                yield place, episode
                place += 1

    def _jobs(self) -> Iterator[Job]:
        while True:
            if not self._dealt:
                indices, groups = self.mdp.deal(self.size)
                for index, group in zip(indices.tolist(), groups.tolist(), strict=True):
                    self._dealt.append(Job(index, group, self._next))
                    self._next += 1
            yield self._dealt.popleft()


def stream_seed(seed: int) -> int:
    """Of all texts of a run."""
    return int(np.random.SeedSequence([seed]).generate_state(1, np.uint64)[0])
