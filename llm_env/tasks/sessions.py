"""Sessions: what a task keeps for each running episode, such as a game's board; begun, copied and closed here."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rewards import Rollout

if TYPE_CHECKING:
    from llm_env.tasks.base import Task
    from llm_env.tokens.prompts import Prompt

logger = logging.getLogger("llm_env")


class SessionError(RuntimeError):
    """A session that could not be begun or copied; where the task's own code failed, its error is the `__cause__`.

    Examples:
        >>> from llm_env import Prompt, Task, TokenMDP
        >>> class Locked(Task):
        ...     def splits(self):
        ...         return {"train": [Prompt("1+1=")]}
        ...     def session(self, prompt):
        ...         raise OSError("no such board")
        ...     def score(self, rollout):
        ...         return 1.0
        >>> try:
        ...     TokenMDP(Locked()).reset()
        ... except SessionError as error:
        ...     print(str(error))
        `session` of the task Locked raised OSError: no such board, for the prompt '1+1='
    """


class ByReplay:
    """In place of a session that cannot be copied: a copy is begun anew, and told the agent's turns again."""


class Sessions:
    """The sessions of the episodes that a task has running, by the number of the episode.

    Each is begun once and closed once, by its `close` if it has one: when its episode has been scored, when another
    begins in its place, or with the environment.

    Args:
        task: its `session` begins them.

    Attributes:
        kept: whether the task keeps any.
    """

    def __init__(self, task: Task) -> None:
        self._task = task
        self._open: dict[int, Any] = {}
        self.kept = task.overrides("session")

    def begin(self, episode: int, prompt: Prompt) -> None:
        """Begin the session of a new episode."""
        self._open[episode] = self._begun(prompt)

    def of(self, episode: int) -> Any:
        """The session of an episode; None if the task keeps none, or it is closed."""
        return self._open.get(episode)

    def copy(self, episode: int) -> Any:
        """A copy of its own; `ByReplay` where it cannot be copied."""
        try:
            return copy.deepcopy(self._open.get(episode))
        except Exception:  # whatever says that it is one of a kind: generators, sockets, locks
            return ByReplay()

    def restore(self, episode: int, saved: Any, rollout: Rollout, prompt: Prompt) -> None:
        """Give a copied episode a session that stands where the saved one stood."""
        if not isinstance(saved, ByReplay):
            self._open[episode] = copy.deepcopy(saved)
            return
        self._open[episode] = session = self._begun(prompt)
        for place, turn in enumerate(rollout.turns[:-1]):
            answered = rollout.turns[place + 1]
            if turn.who == "agent" and answered.who == "task":
                self._repeat(rollout.up_to(place + 1), session, answered.text)

    def close(self, episode: int) -> None:
        """Close the session of an episode that is over; once more does no harm."""
        session = self._open.pop(episode, None)
        end: Callable[[], None] | None = getattr(session, "close", None)
        try:
            if end is not None:
                end()
        except Exception as error:
            logger.warning("closing a session of the task %s failed: %r. The run goes on", self._task.name, error)

    def close_all(self) -> None:
        """Close those that are still open."""
        for episode in list(self._open):
            self.close(episode)

    def _begun(self, prompt: Prompt) -> Any:
        try:
            return self._task.session(prompt)
        except Exception as error:
            raise SessionError(
                f"`session` of the task {self._task.name} raised {type(error).__name__}: {error}, for the prompt "
                f"{str(prompt.text)[:200]!r}"
            ) from error

    def _repeat(self, rollout: Rollout, session: Any, expected: str) -> None:
        rollout.session = session
        said = self._task.reply(rollout)
        if isinstance(said, str) and said != expected:
            raise SessionError(
                f"an episode of the task {self._task.name} cannot be copied: copy.deepcopy fails on its session, and "
                f"told the same turns again, a new one replied {said[:200]!r} where the first had said "
                f"{expected[:200]!r}. Let the session draw its random numbers from what the prompt says, or give it a "
                "method __deepcopy__"
            )
