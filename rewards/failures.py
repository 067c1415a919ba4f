"""What fails is counted and reported without flooding, and what never works is an error: `FailureLog`."""

from __future__ import annotations

import logging
import threading
import traceback
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rewards.rollout import Rollout, shown

__all__ = ["GIVE_UP_AFTER", "AlwaysFailsError", "Failure", "FailureLog", "counting", "is_power_of_two"]

GIVE_UP_AFTER = 20
"""So many failures by the same error, without a success before or between them, mean that it never works."""

KEPT_FAILURES = 100
FULL_REPORTS = 3

# Protects the counts of all logs. A lock in each would make them, and so guards and tasks, impossible to pickle.
counting = threading.Lock()


class AlwaysFailsError(RuntimeError):
    """A reward, or a task's `reply`, has failed by the same error every time so far: to go on would learn nothing.

    The error itself is the `__cause__`.

    Example:
        >>> from rewards import Guard
        >>> def misspelt(rollout):
        ...     return rollout.txt
        >>> Guard(misspelt)([Rollout.of("a")] * 20)
        Traceback (most recent call last):
        rewards.failures.AlwaysFailsError: reward 'misspelt' has not worked once, and ...
    """


@dataclass(frozen=True, slots=True, eq=False)
class Failure:
    """A rollout whose scoring, or the reply to it, failed.

    Args:
        rollout: The rollout.
        error: What happened, in a line, such as "ZeroDivisionError: division by zero".
        trace: The traceback, where there is one.

    Example:
        >>> from rewards import Guard
        >>> guard = Guard(lambda rollout: 1 / len(rollout.text), on_error=-1.0)
        >>> [score.value for score in guard([Rollout.of("ab"), Rollout.of("")])]
        [0.5, -1.0]
        >>> [failure.error for failure in guard.failures]
        ['ZeroDivisionError: division by zero']
    """

    rollout: Rollout
    error: str
    trace: str = ""

    @classmethod
    def of(cls, rollout: Rollout, error: Exception) -> Failure:
        """The failure that an exception is."""
        summary = "".join(traceback.format_exception_only(error)).strip()
        return cls(rollout, summary, "".join(traceback.format_exception(error)))


class FailureLog:
    """Counts the failures of a thing that is called again and again, and gives up on one that never works.

    The first three failures are logged in full, then a line at every power of two.

    What fails from the beginning `give_up_after` times in a row, always by the same error (its type and its message),
    is not failing because of one odd text: `failed` then raises. Another error begins the count anew, and after the
    first success there is no more counting: that many failures in a row may then well be due to the texts, such as
    the many that answer one odd prompt. A time-out is an error like any other.

    Args:
        what: Who fails, for messages: "reward 'exact_match'".
        logger: Where it is said.
        advice: What to do about something that never works.
        give_up_after: So many failures; None to never give up.

    Attributes:
        num_calls: How many rollouts there were.
        num_failures: How many of them failed.
        failures: The latest 100 of them, oldest first.

    Example:
        >>> log = FailureLog("the tool", logging.getLogger("nobody"), "Mend it.", give_up_after=2)
        >>> log.failed(Failure(Rollout.of("a"), "broken"), "was left out")
        >>> log.failed(Failure(Rollout.of("b"), "broken"), "was left out")
        Traceback (most recent call last):
        rewards.failures.AlwaysFailsError: the tool has not worked once, and has failed on 2 rollouts in a row ...
    """

    def __init__(self, what: str, logger: logging.Logger, advice: str, give_up_after: int | None) -> None:
        if give_up_after is not None and give_up_after < 1:
            raise ValueError(
                f"give_up_after is {give_up_after}; expected a number of failures >= 1, or None to never give up."
            )
        self.what = what
        self.logger = logger
        self.advice = advice
        self.give_up_after = give_up_after
        self.num_calls = 0
        self.num_failures = 0
        self.failures: deque[Failure] = deque(maxlen=KEPT_FAILURES)
        self._has_worked = False
        self._same = 0  # how many failures in a row, from the beginning, were by the latest error

    def called(self, rollouts: int = 1) -> None:
        """Count rollouts, before it is known how they go."""
        with counting:
            self.num_calls += rollouts

    def succeeded(self) -> None:
        """It works, for some rollouts at least."""
        self._has_worked = True

    def count_elsewhere(self, calls: int, failures: int) -> None:
        """Count what was counted and reported in another process."""
        with counting:
            self.num_calls += calls
            self.num_failures += failures
            self._has_worked = self._has_worked or calls > failures

    def failed(self, failure: Failure, consequence: str, cause: Exception | None = None) -> None:
        """Count a failure and report it.

        Args:
            failure: What has failed.
            consequence: What came of it, to go on from "failed and ...".
            cause: The exception.

        Raises:
            AlwaysFailsError: If it is plain by now that it never works; `cause` is its cause.
        """
        with counting:
            self.num_failures += 1
            same = bool(self.failures) and self.failures[-1].error == failure.error
            self._same = self._same + 1 if same else 1
            self.failures.append(failure)
            failures, calls, hopeless = self.num_failures, self.num_calls, self._is_hopeless()
        if failures <= FULL_REPORTS:
            self.logger.warning(
                "%s failed and %s: %s\nprompt: %s\ntranscript: %s\n%s",
                self.what,
                consequence,
                failure.error,
                shown(failure.rollout, "prompt", limit=2000),
                shown(failure.rollout, "transcript", limit=2000),
                failure.trace,
            )
        elif is_power_of_two(failures):
            self.logger.warning(
                "%s failed on %d of %d rollouts; the latest: %s", self.what, failures, calls, failure.error
            )
        if hopeless:
            raise AlwaysFailsError(
                f"{self.what} has not worked once, and has failed on {self._same} rollouts in a row by the same error: "
                f"{failure.error}. {self.advice}"
            ) from cause

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to count on from here, as JSON can hold it."""
        return {"calls": self.num_calls, "failures": self.num_failures, "has_worked": self._has_worked}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Count on where another one was."""
        self.num_calls, self.num_failures = state["calls"], state["failures"]
        self._has_worked = state["has_worked"]

    def _is_hopeless(self) -> bool:
        return self.give_up_after is not None and not self._has_worked and self._same >= self.give_up_after


def is_power_of_two(number: int) -> bool:
    """Whether it is 1, 2, 4, 8, ...; to report what happens often ever more rarely."""
    return number & (number - 1) == 0
