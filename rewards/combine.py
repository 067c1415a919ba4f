"""Rewards made of rewards: `WeightedSum`, `Product`, `Clip` and `Ensemble`.

They agree on one rule: a combination's `Score.total` is the weighted sum, product, ... of its members'
totals. What a member pays per token stays per token wherever that is possible; each class says how.

A combination's `Score.parts` hold the members' parts, as the members gave them (unweighted, unclipped),
and its own value. A name that is taken gets a number: "exact_match", "exact_match_2".
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from rewards.base import Reward, RewardError, RewardLike, as_reward
from rewards.rollout import Rollout, Score, shown


class _Combination(Reward):
    """What the combinations share: their members, and members' parts under unique names."""

    def __init__(self, rewards: Iterable[RewardLike]) -> None:
        self.rewards = tuple(as_reward(reward) for reward in rewards)
        if not self.rewards:
            raise ValueError(f"{type(self).__name__} got no rewards; expected at least one.")
        # A member may leave a part out of some scores (a guarded reward that failed does), so a name once
        # given is remembered: counting afresh would log another member's part under it.
        self._names: dict[tuple[int, str], str] = {}

    def score_batch(self, rollouts: Sequence[Rollout]) -> list[Score]:
        by_reward = [reward(rollouts) for reward in self.rewards]
        results = []
        for rollout, *scores in zip(rollouts, *by_reward, strict=True):
            value, per_token = self._combine(scores, rollout)
            results.append(Score(value, self._parts(scores), per_token))
        return results

    def _combine(
        self, scores: list[Score], rollout: Rollout
    ) -> tuple[float, NDArray[np.float64] | None]:  # pragma: no cover
        raise NotImplementedError

    def close(self) -> None:
        """Close every member."""
        for reward in self.rewards:
            reward.close()

    def _parts(self, scores: list[Score]) -> dict[str, float]:
        return {
            self._unique(index, name): part for index, score in enumerate(scores) for name, part in score.parts.items()
        }

    def _unique(self, index: int, name: str) -> str:
        unique = self._names.get((index, name))
        if unique is None:
            taken = {self.name, *self._names.values()}
            unique, count = name, 2
            while unique in taken:
                unique, count = f"{name}_{count}", count + 1
            self._names[index, name] = unique
        return unique


class WeightedSum(_Combination):
    """The sum of rewards, each times its weight. `0.5 * a + b` makes one.

    Per token: the members' per-token scores, each times its weight, added up.

    Args:
        parts: Pairs of a reward and its weight, or a mapping from rewards to weights. A sum made by `+`
            and `*` is taken apart into its members; one that was given a `name` of its own stays whole.

    Example:
        >>> from rewards import ExactMatch, LengthPenalty, Rollout
        >>> total = ExactMatch() + 0.5 * LengthPenalty(free=0, cost=0.1)
        >>> total([Rollout.of("42", metadata={"answer": "42"})])[0].parts
        {'exact_match': 1.0, 'length_penalty': -0.2, 'weighted_sum': 0.9}
    """

    weights: tuple[float, ...]

    def __init__(self, parts: Mapping[RewardLike, float] | Iterable[tuple[RewardLike, float]]) -> None:
        pairs: list[tuple[Reward, float]] = []
        for part, weight in parts.items() if isinstance(parts, Mapping) else parts:
            if not math.isfinite(weight):
                raise ValueError(f"WeightedSum: the weight of {part!r} is {weight}; expected a finite number.")
            reward = as_reward(part)
            if isinstance(reward, WeightedSum) and reward.name == WeightedSum.name:
                members = zip(reward.rewards, reward.weights, strict=True)
                pairs += [(inner, weight * inner_weight) for inner, inner_weight in members]
            else:
                pairs.append((reward, float(weight)))
        super().__init__(reward for reward, _ in pairs)
        self.weights = tuple(weight for _, weight in pairs)

    def _combine(self, scores: list[Score], rollout: Rollout) -> tuple[float, NDArray[np.float64] | None]:
        return (
            sum(weight * score.value for weight, score in zip(self.weights, scores, strict=True)),
            _weighted_per_token(scores, self.weights),
        )

    def __repr__(self) -> str:
        members = zip(self.rewards, self.weights, strict=True)
        return f"WeightedSum([{', '.join(f'({reward!r}, {weight})' for reward, weight in members)}])"


class Product(_Combination):
    """The product of rewards: with a reward of 0 or 1 as a factor, a gate. `a * b` makes one.

    Per token: one factor may score tokens; what it pays for them is multiplied by the other factors.
    Two such factors are a `RewardError`, since no split of their product over the tokens is the right one.

    Args:
        *rewards: The factors. A product made by `*` is taken apart into its own factors.

    Example:
        >>> from rewards import ExactMatch, Format, Rollout
        >>> gated = Format(r"^answer: ") * (lambda rollout: len(rollout.text) / 10)
        >>> [score.value for score in gated([Rollout.of("answer: yes"), Rollout.of("yes")])]
        [1.1, 0.0]
    """

    def __init__(self, *rewards: RewardLike) -> None:
        factors: list[Reward] = []
        for reward in map(as_reward, rewards):
            plain = isinstance(reward, Product) and reward.name == Product.name
            factors += reward.rewards if isinstance(reward, Product) and plain else [reward]
        super().__init__(factors)

    def _combine(self, scores: list[Score], rollout: Rollout) -> tuple[float, NDArray[np.float64] | None]:
        value = math.prod(score.value for score in scores)
        dense = [index for index, score in enumerate(scores) if score.per_token is not None]
        if not dense:
            return value, None
        if len(dense) > 1:
            names = ", ".join(repr(self.rewards[index].name) for index in dense)
            raise RewardError(
                f"reward {self.name!r} got per_token scores from {names} for the rollout with text "
                f"{shown(rollout)}; expected them from at most one factor. Add such rewards, or "
                "let all but one pay at the end only."
            )
        per_token = scores[dense[0]].per_token
        assert per_token is not None
        others = math.prod(score.value for index, score in enumerate(scores) if index != dense[0])
        return value, others * per_token


class Clip(_Combination):
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

    def _combine(self, scores: list[Score], rollout: Rollout) -> tuple[float, NDArray[np.float64] | None]:
        (score,) = scores
        clipped = min(max(score.total, self.low), self.high)
        if clipped == score.total:
            return score.value, score.per_token  # exactly, without rounding
        return clipped - (score.total - score.value), score.per_token


class Ensemble(_Combination):
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

    def _combine(self, scores: list[Score], rollout: Rollout) -> tuple[float, NDArray[np.float64] | None]:
        if self.how == "min":
            worst = min(scores, key=lambda score: score.total)
            return worst.value, worst.per_token
        value = sum(score.value for score in scores) / len(scores)
        if self.how == "mean-std":
            value -= self.k * float(np.std([score.total for score in scores]))
        return value, _weighted_per_token(scores, [1 / len(scores)] * len(scores))


def _weighted_per_token(scores: list[Score], weights: Sequence[float]) -> NDArray[np.float64] | None:
    """Add up the per-token scores times their weights; None if no score has any."""
    dense = [
        weight * score.per_token for weight, score in zip(weights, scores, strict=True) if score.per_token is not None
    ]
    return np.sum(dense, axis=0) if dense else None
