"""How the replies of a task went: those that failed, and those that found no room."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from rewards.failures import GIVE_UP_AFTER, FailureLog

logger = logging.getLogger("llm_env")

_ADVICE = "To go on would teach nothing about the tool: mend `reply` (the error is the cause of this one)."


class Replies(FailureLog):
    """Counts what a task replies and reports it when that fails; see `rewards.failures.FailureLog`.

    Args:
        task: the task's name.

    Attributes:
        num_calls: how many replies were asked for.
        num_failures: how many of them failed.
        num_left_out: how many found no room in the context, and so ended their episode.
    """

    def __init__(self, task: str) -> None:
        super().__init__(f"`reply` of the task {task}", logger, _ADVICE, GIVE_UP_AFTER)
        self.num_left_out = 0

    def left_out(self, length: int, before: int, context: int) -> None:
        """A reply found no room: count it, and say so the first time.

        Args:
            length: how many tokens it has.
            before: how many there are before it.
            context: how many there may be.
        """
        self.num_left_out += 1
        if self.num_left_out == 1:
            self.logger.warning(
                "a reply of %d tokens from %s found no room: %d tokens come before it, and the context of %d must hold "
                "the agent's next one as well. The episode ended there, cut off by the context. Allow for longer "
                "replies (the task's max_reply_tokens, all replies of an episode together, is part of the default "
                "context) or give a context of at least %d. This is said once; `task.replies.num_left_out` counts them",
                length,
                self.what,
                before,
                context,
                before + length + 1,
            )

    def count_elsewhere(self, calls: int, failures: int, left_out: int = 0) -> None:
        """Count what was counted and reported in another process."""
        super().count_elsewhere(calls, failures)
        self.num_left_out += left_out

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to count on from here, as JSON can hold it."""
        return {**super().state_dict(), "left_out": self.num_left_out}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Count on where another one was."""
        super().load_state_dict(state)
        self.num_left_out = state["left_out"]
