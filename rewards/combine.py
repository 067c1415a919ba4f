"""Rewards made of rewards: `Clip` and `Ensemble`. The sum and the product stand beside `Reward` in `rewards.base`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from rewards.base import Combination, RewardLike
from rewards.rollout import Rollout
from rewards.score import Score, weighted_per_token


class Clip(Combination):
    """A reward whose total is kept between two bounds.

    Per token: passed on as it is; what has to be added or taken off to keep the total (`value` plus the
    sum of `per_token`) in bounds is added to or taken off `value`, so it is settled at the end.

    Args:
        reward: The reward to bound.
        low: The least total; `-math.inf` for no lower bound.
        high: The greatest total; `math.inf` for no upper bound.

    Example:
        >>> from rewards import Rollout
        >>> clipped = Clip(lambda rollout: float(rollout.text), low=-1, high=1)
        >>> [score.value for score in clipped([Rollout.of("0.5"), Rollout.of("7")])]
        [0.5, 1.0]
    """

    def __init__(self, reward: RewardLike, low: float, high: float) -> None:
        if not low <= high:
            raise ValueError(f"Clip: low is {low} and high is {high}; expected low <= high.")
        super().__init__([reward])
        self.low = float(low)
        self.high = float(high)

    def combine(self, scores: list[Score], rollout: Rollout) -> tuple[float, NDArray[np.float64] | None]:
        """Bound the total, by changing what is paid at the end."""
        (score,) = scores
        clipped = min(max(score.total, self.low), self.high)
        if clipped == score.total:
            return score.value, score.per_token  # as they are, without the rounding of the line below
        return clipped - (score.total - score.value), score.per_token


class Ensemble(Combination):
    """One score out of several rewards meant to measure the same thing, against reward hacking.

    A policy that fools one reward model seldom fools all of them, so scoring by the worst one or lowering
    the mean where they disagree makes it less worthwhile (Coste et al. 2023, "Reward Model Ensembles Help
    Mitigate Overoptimization", arXiv:2310.02743).

    Per token: the mean of the members' per-token scores (one without any counts as zeros); for "min",
    those of the member with the least total.

    Args:
        rewards: The members.
        how: "mean" of the totals; their "min"; or "mean-std": their mean minus `k` times their population
            standard deviation.
        k: How much disagreement costs with "mean-std"; without effect otherwise.

    Example:
        >>> from rewards import Rollout
        >>> members = [lambda rollout: 1.0, lambda rollout: 0.0]
        >>> [Ensemble(members, how)([Rollout.of("")])[0].value for how in ("mean", "min", "mean-std")]
        [0.5, 0.0, 0.0]
    """

    modes: ClassVar[tuple[str, ...]] = ("mean", "min", "mean-std")

    def __init__(
        self,
        rewards: Iterable[RewardLike],
        how: Literal["mean", "min", "mean-std"] = "mean",
        k: float = 1.0,
    ) -> None:
        if how not in self.modes:
            raise ValueError(f"Ensemble: how is {how!r}; expected one of {', '.join(map(repr, self.modes))}.")
        if not (math.isfinite(k) and k >= 0):
            raise ValueError(f"Ensemble: k is {k}; expected a finite number >= 0.")
        super().__init__(rewards)
        self.how = how
        self.k = float(k)

    def combine(self, scores: list[Score], rollout: Rollout) -> tuple[float, NDArray[np.float64] | None]:
        """The worst score, or the mean one."""
        if self.how == "min":
            worst = min(scores, key=lambda score: score.total)
            return worst.value, worst.per_token
        value = sum(score.value for score in scores) / len(scores)
        if self.how == "mean-std":
            value -= self.k * float(np.std([score.total for score in scores]))
        return value, weighted_per_token(scores, [1 / len(scores)] * len(scores))
