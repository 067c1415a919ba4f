"""Scoring in the background: `Alongside`."""

from __future__ import annotations

import queue
import threading
from types import TracebackType

from rewards.base import Reward
from rewards.rollout import Rollout
from rewards.score import Score


class Alongside:
    """Scores what it is given in a thread of its own, while more of it comes into being.

    The thread scores all that has come since it last looked as one batch; so there are few of them when scoring is
    slow. What a reward raises is raised by `scores`, and nothing more is scored then.

    Args:
        reward: the reward, which must not mind the thread.

    Examples:
        >>> from rewards import ExactMatch
        >>> with Alongside(ExactMatch()) as scorer:
        ...     for text in ("4", "5"):
        ...         scorer.add(Rollout.of(text, metadata={"answer": "4"}))
        ...     [score.value for score in scorer.scores()]
        [1.0, 0.0]
    """

    def __init__(self, reward: Reward) -> None:
        self._reward = reward
        self._given: queue.SimpleQueue[Rollout | None] = queue.SimpleQueue()
        self._scores: list[Score] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name=f"scoring by {reward.name}", daemon=True)

    def __enter__(self) -> Alongside:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._given.put(None)
        if error is None or not isinstance(error, KeyboardInterrupt):
            self._thread.join()

    def add(self, rollout: Rollout) -> None:
        """Have a rollout scored."""
        self._given.put(rollout)

    def scores(self) -> list[Score]:
        """The scores of all rollouts, in their order; waits for the last of them."""
        self._given.put(None)
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._scores

    def _work(self) -> None:
        open_ = True
        while open_:
            batch = [self._given.get()]
            while not self._given.empty():
                batch.append(self._given.get())
            rollouts = [rollout for rollout in batch if rollout is not None]
            open_ = len(rollouts) == len(batch)
            try:
                self._scores += self._reward(rollouts) if rollouts else []
            except BaseException as error:
                self._error = error
                return
