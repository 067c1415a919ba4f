"""Penalties to add to a reward: each is itself a reward, of at most zero.

>>> from rewards import ExactMatch
>>> total = ExactMatch() + LengthPenalty(free=256) + MissingEosPenalty(penalty=0.5)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from rewards.base import Reward
from rewards.named import register_reward
from rewards.rollout import Rollout


@register_reward("length_penalty")
@dataclass(eq=False)
class LengthPenalty(Reward):
    """A cost for every token the agent chose beyond a free allowance, down to a floor.

    With `cost=1 / n` it falls from 0 to -1 over `n` tokens: the soft overlong punishment of DAPO (Yu et
    al. 2025, arXiv:2503.14476, equation 13).

    Args:
        free: How many tokens cost nothing.
        cost: What each token beyond them costs.
        floor: The lowest it gets.

    Example:
        >>> penalty = LengthPenalty(free=2, cost=0.25, floor=-1.0)
        >>> [score.value for score in penalty([Rollout.of("12"), Rollout.of("1234"), Rollout.of("1" * 99)])]
        [0.0, -0.5, -1.0]
    """

    alongside = None

    free: int
    cost: float = 0.01
    floor: float = -1.0

    def __post_init__(self) -> None:
        if self.free < 0:
            raise ValueError(f"LengthPenalty: free is {self.free}; expected a number of tokens >= 0.")
        _check_size("LengthPenalty", "cost", self.cost)
        if not self.floor <= 0:
            raise ValueError(f"LengthPenalty: floor is {self.floor}; expected a number <= 0.")

    def score(self, rollout: Rollout) -> float:
        """Score one rollout."""
        beyond = max(0, rollout.num_actions - self.free)
        return max(self.floor, -self.cost * beyond) if beyond else 0.0


@register_reward("missing_eos_penalty")
@dataclass(eq=False)
class MissingEosPenalty(Reward):
    """A penalty for a rollout that was cut off: out of budget or context before it came to its end.

    Args:
        penalty: How much is subtracted.

    Example:
        >>> penalty = MissingEosPenalty(penalty=0.5)
        >>> [score.value for score in penalty([Rollout.of("done"), Rollout.of("and so", end="budget")])]
        [0.0, -0.5]
    """

    alongside = None

    penalty: float = 1.0

    def __post_init__(self) -> None:
        _check_size("MissingEosPenalty", "penalty", self.penalty)

    def score(self, rollout: Rollout) -> float:
        """Score one rollout."""
        return 0.0 if rollout.terminated else -self.penalty


@register_reward("repetition_penalty")
@dataclass(eq=False)
class RepetitionPenalty(Reward):
    """A penalty for repeating oneself: the share of n-grams that occurred before, times `penalty`.

    Counted are the n-grams within each of the agent's turns; one that occurred in an earlier turn is a repetition, too.
    What the task replied is no part of it, so that to quote a tool costs nothing. A text without any n-gram is not
    penalized.

    Args:
        ngram: How many tokens make an n-gram.
        penalty: How much is subtracted if every n-gram is a repetition.

    Example:
        >>> penalty = RepetitionPenalty(ngram=2)  # ab, ba, ab, bc: one in four occurred before
        >>> penalty([Rollout.of("ababc")])[0].value
        -0.25
    """

    alongside = None

    ngram: int = 3
    penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.ngram < 1:
            raise ValueError(f"RepetitionPenalty: ngram is {self.ngram}; expected a number of tokens >= 1.")
        _check_size("RepetitionPenalty", "penalty", self.penalty)

    def score(self, rollout: Rollout) -> float:
        """Score one rollout."""
        # A set of tuples is several times faster here than np.unique over rows.
        seen: set[tuple[int, ...]] = set()
        counted = repeated = 0
        for turn in rollout.turns:
            if turn.who == "agent":
                tokens = turn.tokens.tolist()
                for ngram in zip(*(tokens[start:] for start in range(self.ngram)), strict=False):
                    counted += 1
                    repeated += ngram in seen
                    seen.add(ngram)
        return -self.penalty * repeated / counted if repeated else 0.0


def _check_size(owner: str, option: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(
            f"{owner}: {option} is {value}; expected a finite number >= 0; it is subtracted from the reward."
        )
