"""Texts without end: learn from those that end first, while the others go on with the weights that come of it."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from agents.rollouts.pens import OwnPen, Pen, WorkersPen, part_of
from agents.rollouts.workers import Workers
from llm_env.engines import Job, Sampling
from llm_env.engines.base import EngineBase
from llm_env.engines.writing import Part
from llm_env.mdp.core import TokenMDP
from llm_env.tokens.episode import Episode


class Stream:
    """One text after the other is written in each of several rows. What has ended is handed out, and scored.

    Between two calls of `take` the engine is free for others, and its weights may change: it then reads again what it
    has written, and goes on with the weights that it has. So no row ever waits for the longest text of a batch, and a
    long text is by several policies, each of whose tokens has the log-prob that it was drawn with.

    A text is handed out once, in the batch after its end; and if it belongs to a group, with all of them.

    Args:
        mdp: the task and its prompts.
        engine: in this process, or workers.
        rows: how many texts are written side by side.
        sampling: temperature and seed.
    """

    def __init__(self, mdp: TokenMDP, engine: EngineBase | Workers, rows: int, sampling: Sampling) -> None:
        self.mdp = mdp
        self.size = mdp.sampler.completions_per_prompt
        self._next = 0
        self._written: dict[int, list[tuple[Part, Episode]]] = {}
        self._whole: deque[int] = deque()  # groups of which all texts have ended
        self._pen: Pen
        if isinstance(engine, Workers):
            self._pen = WorkersPen(mdp, engine, rows, sampling, self._deal)
        else:
            self._pen = OwnPen(mdp, engine, rows, sampling, self._deal)

    def take(self, count: int, version: int) -> list[Episode]:
        """The next `count` texts, with their scores.

        Args:
            count: a multiple of the texts of a group.
            version: what to call the weights that the engine has now.

        Should that fail, what has not ended is given up, and other texts are begun the next time.
        """
        try:
            return self.mdp.score_written(self._ended(count // self.size, version))
        except Exception:  # such as a reward that is no number: it would be so again
            self._written = {group: self._written[group] for group in self._whole}
            self._pen.give_up()
            raise

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on from here, as JSON can hold it."""
        return {
            "next": self._next,
            "whole": list(self._whole),
            "written": [part for group in self._written.values() for part, _ in group],
            "pen": self._pen.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another one was: what it had written is written again, by the same tokens."""
        self._next = state["next"]
        self._whole, self._written = deque(), {}
        for each in self._pen.write_again([part_of(kept) for kept in state["written"]]):
            self._add(*each)
        self._whole = deque(sorted(self._whole, key=state["whole"].index))
        self._pen.load_state_dict(state["pen"])

    def _ended(self, groups: int, version: int) -> Iterator[tuple[int, Episode]]:
        """The texts of so many groups that have ended, each with the number of its place."""
        missing, places = groups - len(self._whole), itertools.count()
        lacking = {group: self.size - len(texts) for group, texts in self._written.items() if len(texts) < self.size}
        ended = self._pen.write_on(missing, lacking, version) if missing > 0 else iter(())
        for _ in range(groups):
            while not self._whole:
                self._add(*next(ended))
            texts = self._written.pop(self._whole.popleft())
            for _, episode in sorted(texts, key=lambda each: each[0].job.request):
                yield next(places), episode
        for each in ended:
            self._add(*each)

    def _add(self, part: Part, episode: Episode) -> None:
        texts = self._written.setdefault(part.job.group, [])
        texts.append((part, episode))
        if len(texts) == self.size:
            self._whole.append(part.job.group)

    def _deal(self) -> list[Job]:
        """A text for each completion of the next prompt."""
        indices, groups = self.mdp.deal(self.size)
        first, self._next = self._next, self._next + len(indices)
        return [Job(*each) for each in zip(indices.tolist(), groups.tolist(), range(first, self._next), strict=True)]


def stream_seed(seed: int) -> int:
    """Of all texts of a run."""
    return int(np.random.SeedSequence([seed]).generate_state(1, np.uint64)[0])
