"""What a reward gives back, `Score`, and the checks that every score passes through."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rewards.rollout import Rollout, shown

__all__ = ["PartNames", "RewardError", "Score", "checked_score", "weighted_per_token"]


class RewardError(ValueError):
    """A reward gave back something that is no score: NaN, infinity, a wrong length or shape.

    An exception may be due to one odd text, but this is a bug in the reward, so `rewards.Guard` lets it through.

    Example:
        >>> from rewards import Rollout, reward
        >>> @reward
        ... def broken(rollout):
        ...     return float("nan")
        >>> broken([Rollout.of("text")])
        Traceback (most recent call last):
        rewards.score.RewardError: ...
    """


@dataclass(frozen=True, slots=True, eq=False)
class Score:
    """What a rollout is worth: `value` at its end, and optionally some more at every token.

    Args:
        value: Paid at the end of the rollout.
        parts: Each component's value by name, for logging; it does not change what is paid.
        per_token: Float `[rollout.num_actions]`: paid at each token the agent chose, in addition to
            `value`.

    Example:
        >>> Score(1.0, per_token=np.array([-0.25, -0.25])).total
        0.5
    """

    value: float
    parts: dict[str, float] = field(default_factory=dict)
    per_token: NDArray[np.float64] | None = None

    @property
    def total(self) -> float:
        """All that is paid: `value` plus the sum of `per_token`."""
        return self.value if self.per_token is None else self.value + float(self.per_token.sum())

    def __eq__(self, other: object) -> bool:
        # A dataclass would compare the arrays with ==, which gives an array and not one truth value.
        if not isinstance(other, Score):
            return NotImplemented
        if self.per_token is None or other.per_token is None:
            same_tokens = self.per_token is other.per_token
        else:
            same_tokens = np.array_equal(self.per_token, other.per_token)
        return self.value == other.value and self.parts == other.parts and same_tokens


def checked_score(score: float | Score, rollout: Rollout, name: str) -> Score:
    """Make a `Score` of what a reward gave for a rollout, and check it.

    Args:
        score: What the reward gave.
        rollout: What it was given.
        name: The reward's name.

    Returns:
        The score with floats throughout, and with its own value among its parts, under `name`.

    Raises:
        RewardError: If a number is not finite, or `per_token` is not one number per token the agent chose.

    Example:
        >>> checked_score(1, Rollout.of("yes"), "polite")
        Score(value=1.0, parts={'polite': 1.0}, per_token=None)
    """
    if type(score) is float and math.isfinite(score):  # nearly every score, on a hot path
        return Score(score, {name: score})
    if not isinstance(score, Score):
        score = Score(score)
    value = _checked_number(score.value, rollout, name)
    parts = {part: _checked_number(number, rollout, name, part) for part, number in score.parts.items()}
    per_token = None if score.per_token is None else _checked_per_token(score.per_token, rollout, name)
    return Score(value, {**parts, name: value}, per_token)


def weighted_per_token(scores: Sequence[Score], weights: Sequence[float]) -> NDArray[np.float64] | None:
    """Add up the per-token scores, each times its weight; None if no score has any.

    Example:
        >>> one, other = np.array([1.0, 2.0]), np.array([4.0, 0.0])
        >>> weighted_per_token([Score(0.0, per_token=one), Score(0.0), Score(0.0, per_token=other)], [1.0, 1.0, 0.5])
        array([3., 2.])
    """
    weighted = [
        weight * score.per_token for weight, score in zip(weights, scores, strict=True) if score.per_token is not None
    ]
    return np.sum(weighted, axis=0) if weighted else None


class PartNames:
    """Gives the parts of several rewards' scores names of their own: "exact_match", "exact_match_2".

    A reward may leave a part out of some of its scores, as a guarded one does when it fails. So names are remembered:
    numbering them anew for each score would log one reward's part under another's name.

    Example:
        >>> names = PartNames()
        >>> names.gather([Score(1.0, {"short": 1.0}), Score(0.0, {"short": 0.0})], total="sum")
        {'short': 1.0, 'short_2': 0.0}
        >>> names.gather([Score(1.0), Score(0.0, {"short": 0.0})], total="sum")
        {'short_2': 0.0}
    """

    def __init__(self) -> None:
        self._names: dict[tuple[int, str], str] = {}

    def gather(self, scores: Sequence[Score], total: str) -> dict[str, float]:
        """The parts of all scores in one dictionary; the name `total` is kept free."""
        return {
            self._name(index, name, total): part
            for index, score in enumerate(scores)
            for name, part in score.parts.items()
        }

    def _name(self, index: int, name: str, total: str) -> str:
        unique = self._names.get((index, name))
        if unique is None:
            taken = {total, *self._names.values()}
            unique, count = name, 2
            while unique in taken:
                unique, count = f"{name}_{count}", count + 1
            self._names[index, name] = unique
        return unique


def _checked_number(value: Any, rollout: Rollout, name: str, part: str | None = None) -> float:
    try:
        # float("nan") and float("3") are numbers to Python; here a text is not a number.
        number = None if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = None
    if number is None or not math.isfinite(number):
        raise RewardError(
            f"reward {name!r} returned {'' if part is None else f'part {part!r} = '}{value!r} for the rollout with "
            f"text {shown(rollout)}; expected a finite number. Look for a missing return, a "
            "division by zero or a logarithm of zero, and return a finite number for every text."
        )
    return number


def _checked_per_token(value: Any, rollout: Rollout, name: str) -> NDArray[np.float64]:
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        problem = f"is {value!r}, which numpy cannot read as numbers ({error})"
    else:
        if array.shape == (rollout.num_actions,):
            if np.isfinite(array).all():
                return array
            index = int(np.flatnonzero(~np.isfinite(array))[0])
            problem = f"has {array[index]} at index {index}"
        else:
            problem = f"has shape {array.shape}"
    raise RewardError(
        f"reward {name!r} returned a per_token which {problem} for the rollout with text "
        f"{shown(rollout)}; expected finite numbers of shape ({rollout.num_actions},), one per "
        "token the agent chose (rollout.num_actions)."
    )
