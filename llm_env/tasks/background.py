"""Replies that are made in the background, each in a thread of its own, while other texts go on."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llm_env.tokens.arrays import BoolArray, IntArray
from rewards import Rollout


@dataclass(slots=True, eq=False)
class Asked:
    """What a task was asked, and what came of it.

    Attributes:
        rollout: the episode, whose turn has ended.
        row: it is in.
        reply: what the task has answered.
        error: what it raised instead.
        since: when it was asked.
    """

    rollout: Rollout
    row: int
    reply: Any = None
    error: Exception | None = None
    since: float = field(default_factory=time.monotonic)

    def answered_by(self, reply: Callable[[Rollout], Any]) -> Asked:
        """Ask, and keep the answer or the error."""
        try:
            self.reply = reply(self.rollout)
        except Exception as error:
            self.error = error
        return self


class Background:
    """The replies that are being made for some rows.

    A thread that hangs is left to itself: it keeps nothing from ending, and what it still says is not heard.

    Args:
        num_rows: how many rows there are.

    Attributes:
        waiting: `[num_rows]` which of them wait for a reply.
    """

    def __init__(self, num_rows: int) -> None:
        self.waiting: BoolArray = np.zeros(num_rows, dtype=np.bool_)
        self._open: dict[int, Asked] = {}
        self._done: queue.SimpleQueue[Asked] = queue.SimpleQueue()

    def __reduce__(self) -> tuple[Any, ...]:
        return Background, (len(self.waiting),)  # nothing of what is being made goes along with a copy

    @property
    def num_open(self) -> int:
        """How many replies are being made."""
        return len(self._open)

    def ask(self, row: int, rollout: Rollout, reply: Callable[[Rollout], Any]) -> None:
        """Begin to make a reply."""
        asked = Asked(rollout, row)
        self._open[row] = asked
        self.waiting[row] = True
        done = self._done
        threading.Thread(target=lambda: done.put(asked.answered_by(reply)), daemon=True).start()

    def forget(self, rows: IntArray) -> None:
        """Hear no more of those of these rows that wait."""
        for row in rows[self.waiting[rows]].tolist():
            self._close(row)

    def collect(self, timeout: float | None, *, block: bool) -> list[tuple[int, Asked]]:
        """Replies that have come, or take longer than `timeout`, in the order of rows; with `block`, at least one."""
        came: dict[int, Asked] = {}
        while self._open:
            try:
                asked = self._done.get(block and not came, self._patience(timeout))
                if self._open.get(asked.row) is asked:
                    came[asked.row] = asked
                    self._close(asked.row)
            except queue.Empty:
                late = [] if timeout is None else [each for each in self._open.values() if _age(each) >= timeout]
                for asked in late:
                    failed = Asked(asked.rollout, asked.row, error=TimeoutError(f"no reply within {timeout:g} seconds"))
                    came[asked.row] = failed
                    self._close(asked.row)
                if came or not block:
                    break
        return sorted(came.items())

    def _patience(self, timeout: float | None) -> float | None:
        return None if timeout is None else max(0.0, timeout - max(map(_age, self._open.values())))

    def _close(self, row: int) -> None:
        del self._open[row]
        self.waiting[row] = False


def _age(asked: Asked) -> float:
    return time.monotonic() - asked.since
