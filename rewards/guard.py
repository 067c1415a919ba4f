"""Keeping a run alive when a reward fails: `Guard`."""

from __future__ import annotations

import logging
import math
import traceback
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from rewards.base import Reward, RewardLike, as_reward
from rewards.failures import GIVE_UP_AFTER, AlwaysFailsError, Failure, FailureLog, counting, is_power_of_two
from rewards.isolated import Isolated, IsolationError, StartupError
from rewards.rollout import Rollout
from rewards.score import RewardError, Score

logger = logging.getLogger("rewards")

_ADVICE = (
    "To go on would pay the fallback for every text, from which nothing can be learned: mend the reward (the error is "
    "the cause of this one). If these texts are worth a fixed score, let the reward return it instead of raising; to "
    "go on all the same, wrap the reward: Guard(reward, give_up_after=None)."
)


class Guard(Reward):
    """A reward whose failures cost one rollout its score; they neither end the run nor go unnoticed.

    A rollout whose scoring raises or takes too long is given `on_error`. It is counted, kept in `failures`
    and logged (logger "rewards"): the first three in full, then a line at every power of two. Each score
    has a part "reward_failed", 1 for a failure and else 0, so its mean is the share of failures.

    Some exceptions are raised all the same, since going on would not help: a `RewardError` (NaN, infinity: a bug
    in the reward), a `NotImplementedError` (the reward has no `score`), a `rewards.isolated.StartupError` (no worker
    process can load the reward), and those that are not errors, such as KeyboardInterrupt. So is an `AlwaysFailsError`
    when the first twenty rollouts have all failed by the same error, which is a time-out for all that do not return.

    Without a timeout, batches are passed on whole; if one raises, its rollouts are scored again one at a
    time, so that only those which raise fail. With a timeout, rollouts are scored one at a time in a worker
    process, by a copy of the reward which is made now; on time-out that process is killed and a new one
    started. What the reward remembers is then lost, and what the copy changes does not change the reward here. What it
    draws at random follows the seed, or else the program's `random`; see `rewards.isolated.Isolated`.

    Args:
        reward: The reward, or a function.
        on_error: The value of a rollout whose scoring failed.
        timeout: Seconds that scoring a rollout may take; None for no limit and no worker process.
        give_up_after: How many rollouts must have failed by the same error, with no success before, to raise an
            `AlwaysFailsError`; None to go on whatever happens.
        seed: Of what the reward draws at random in the worker process; None follows the program's `random`.

    Example:
        >>> guard = Guard(lambda rollout: 1 / len(rollout.text), on_error=-1.0)
        >>> [score.value for score in guard([Rollout.of("four"), Rollout.of("")])]
        [0.25, -1.0]
        >>> guard.num_failures, guard.failures[0].error
        (1, 'ZeroDivisionError: division by zero')
    """

    def __init__(
        self,
        reward: RewardLike,
        on_error: float = 0.0,
        timeout: float | None = None,
        seed: int | None = None,
        give_up_after: int | None = GIVE_UP_AFTER,
    ) -> None:
        if not math.isfinite(on_error):
            raise ValueError(f"Guard: on_error is {on_error}; expected a finite number.")
        if timeout is None and seed is not None:
            raise ValueError(
                f"Guard: seed is {seed}, but without a timeout the reward draws from the program's own generators: "
                "seed those, or give a timeout."
            )
        self.reward = as_reward(reward)
        self.name = self.reward.name
        self.alongside = self.reward.alongside
        self.on_error = float(on_error)
        self._log = FailureLog(f"reward {self.name!r}", logger, _ADVICE, give_up_after)
        self._num_failed_batches = 0
        self._isolated = None if timeout is None else Isolated(self.reward, timeout, seed)

    @property
    def num_failures(self) -> int:
        """How many rollouts failed."""
        return self._log.num_failures

    @property
    def num_rollouts(self) -> int:
        """How many rollouts there were."""
        return self._log.num_calls

    @property
    def failures(self) -> deque[Failure]:
        """The latest 100 failures, oldest first."""
        return self._log.failures

    @property
    def timeout(self) -> float | None:
        """Seconds that scoring a rollout may take; None for no limit."""
        return None if self._isolated is None else self._isolated.timeout

    def score_batch(self, rollouts: Sequence[Rollout]) -> list[Score]:
        """Score several rollouts; the failure of one does not affect the others."""
        self._log.called(len(rollouts))
        if self._isolated is not None or len(rollouts) == 1:
            return [self._score_one(rollout) for rollout in rollouts]
        try:
            scores = [_succeeded(score) for score in self.reward(rollouts)]
            if rollouts:
                self._log.succeeded()
            return scores
        except (RewardError, NotImplementedError, AlwaysFailsError):
            raise
        except Exception:
            trace = traceback.format_exc()
        scores = [self._score_one(rollout) for rollout in rollouts]
        if not any(score.parts["reward_failed"] for score in scores):
            self._report_batch(len(rollouts), trace)
        return scores

    def count_elsewhere(self, scores: Sequence[Score]) -> None:
        """Count what a guard in another process has scored."""
        self._log.count_elsewhere(len(scores), sum(score.parts.get("reward_failed", 0.0) > 0 for score in scores))

    def reseed(self, seed: int | None) -> None:
        """Begin what the worker process draws at random anew; without a timeout there is none, and nothing happens."""
        if self._isolated is not None:
            self._isolated.reseed(seed)

    def close(self) -> None:
        """End the worker process, if there is one, and close the guarded reward."""
        self.end_worker()
        self.reward.close()

    def end_worker(self) -> None:
        """End the worker process, if there is one, and leave the guarded reward open: others may be using it."""
        if self._isolated is not None:
            self._isolated.close()

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to count on from here, as JSON can hold it."""
        return self._log.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Count on where another guard was."""
        self._log.load_state_dict(state)

    def _score_one(self, rollout: Rollout) -> Score:
        cause: Exception
        try:
            score = self.reward([rollout])[0] if self._isolated is None else self._isolated.score(rollout)
        except (RewardError, StartupError, NotImplementedError, AlwaysFailsError):
            raise
        except IsolationError as error:
            failure, cause = Failure(rollout, str(error), error.trace), error
            error.add_note(error.trace)  # the traceback of the worker, should this error end the program
        except Exception as error:
            failure, cause = Failure.of(rollout, error), error
        else:
            self._log.succeeded()
            return _succeeded(score)
        self._log.failed(failure, f"gave {self.on_error} instead", cause)
        return Score(self.on_error, {self.name: self.on_error, "reward_failed": 1.0})

    def _checked(self, score: float | Score, rollout: Rollout) -> Score:
        assert isinstance(score, Score)  # the guarded reward has checked it; checking again would double the cost
        return score

    def _report_batch(self, size: int, trace: str) -> None:
        with counting:
            self._num_failed_batches += 1
            batches = self._num_failed_batches
        if is_power_of_two(batches):
            logger.warning(
                "reward %r failed on a batch of %d rollouts, though on none of them alone (so far %d times). "
                "They got their scores; look for a combination of rollouts that its score_batch cannot handle.\n%s",
                self.name,
                size,
                batches,
                trace,
            )

    def __repr__(self) -> str:
        return f"Guard({self.reward!r}, on_error={self.on_error}, timeout={self.timeout})"


def _succeeded(score: Score) -> Score:
    # The guarded reward may contain guards, whose parts "reward_failed" win over this one.
    return Score(score.value, {"reward_failed": 0.0, **score.parts}, score.per_token)
