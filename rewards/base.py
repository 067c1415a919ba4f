"""The `Reward` interface: what users override, and the checks every score passes through."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from rewards.rollout import End, Rollout, Score, shown

__all__ = ["End", "Reward", "RewardError", "RewardLike", "Rollout", "Score", "as_reward", "reward"]


_SCALAR = (int, float, np.number)


class RewardError(ValueError):
    """A reward gave back something that is no score: NaN, infinity, a wrong length or shape.

    Unlike an exception on one odd text this is a bug in the reward, so `rewards.Guard` lets it through.
    """


class Reward:
    """Scores finished rollouts. Override `score`, or `score_batch` to score many at once.

    Calling a reward scores a batch and checks the result, so call it rather than `score`:
    `reward(rollouts)` gives one `Score` per rollout, with the reward's own value among its parts.

    Rewards combine: `a + b` and `0.5 * a` (`rewards.WeightedSum`), `a * b` (`rewards.Product`, a gate),
    `a - b` and `-a`. A plain function may stand for one of the two.

    Attributes:
        name: What the score is logged as; the class's name in snake_case unless set.

    Example:
        >>> class Brevity(Reward):
        ...     def score(self, rollout):
        ...         return 1.0 / (1 + rollout.num_actions)
        >>> Brevity()([Rollout.of("abc")])
        [Score(value=0.25, parts={'brevity': 0.25}, per_token=None)]
    """

    name: str = "reward"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in cls.__dict__:
            cls.name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", cls.__name__).lower()

    def score(self, rollout: Rollout) -> float | Score:
        """Score one rollout."""
        if type(self).score_batch is Reward.score_batch:
            raise NotImplementedError(
                f"{type(self).__name__} overrides neither score(self, rollout) nor "
                "score_batch(self, rollouts); a reward needs one of them."
            )
        return self.score_batch([rollout])[0]

    def score_batch(self, rollouts: Sequence[Rollout]) -> Sequence[float | Score]:
        """Score several rollouts; by default one after the other."""
        return [self.score(rollout) for rollout in rollouts]

    def __call__(self, rollouts: Sequence[Rollout]) -> list[Score]:
        """Score a batch and check the result.

        Args:
            rollouts: The rollouts to score.

        Returns:
            One score per rollout, in order, each with `parts[self.name]` set to its value.

        Raises:
            RewardError: If there is not exactly one finite score per rollout, or a score's `per_token`
                does not have one finite number per token the agent chose.
        """
        if isinstance(rollouts, Rollout):
            raise TypeError(f"reward {self.name!r} was called with a Rollout; expected a sequence of them: [rollout].")
        scores = self.score_batch(rollouts)
        if not hasattr(scores, "__len__") or len(scores) != len(rollouts):
            got = f"{len(scores)} scores" if hasattr(scores, "__len__") else repr(scores)
            raise RewardError(
                f"reward {self.name!r} returned {got} for {len(rollouts)} rollouts; "
                "score_batch must return a list with one score per rollout, in their order."
            )
        return [self._checked(score, rollout) for score, rollout in zip(scores, rollouts, strict=True)]

    def close(self) -> None:
        """Release what the reward holds, such as a worker process; by default nothing."""

    def _checked(self, score: float | Score, rollout: Rollout) -> Score:
        if type(score) is float and math.isfinite(score):  # nearly every score, on a hot path
            return Score(score, {self.name: score})
        if not isinstance(score, Score):
            score = Score(score)
        value = self._number(score.value, rollout)
        parts = {name: self._number(part, rollout, f"part {name!r}") for name, part in score.parts.items()}
        per_token = None if score.per_token is None else self._per_token(score.per_token, rollout)
        return Score(value, {**parts, self.name: value}, per_token)

    def _number(self, value: Any, rollout: Rollout, what: str = "") -> float:
        try:
            # float("nan") and float("3") are numbers to Python; a text is none to us.
            number = None if isinstance(value, str | bytes) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = None
        if number is None or not math.isfinite(number):
            raise RewardError(
                f"reward {self.name!r} returned {what + ' = ' if what else ''}{value!r} for the rollout with "
                f"text {shown(rollout)}; expected a finite number. Look for a missing return, a "
                "division by zero or a logarithm of zero, and return a finite number for every text."
            )
        return number

    def _per_token(self, value: Any, rollout: Rollout) -> NDArray[np.float64]:
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
            f"reward {self.name!r} returned a per_token which {problem} for the rollout with text "
            f"{shown(rollout)}; expected finite numbers of shape ({rollout.num_actions},), one per "
            "token the agent chose (rollout.num_actions)."
        )

    def __add__(self, other: RewardLike) -> Reward:
        from rewards.combine import WeightedSum

        return WeightedSum([(self, 1.0), (other, 1.0)])

    def __radd__(self, other: RewardLike) -> Reward:
        return as_reward(other) + self

    def __sub__(self, other: RewardLike) -> Reward:
        return self + -as_reward(other)

    def __rsub__(self, other: RewardLike) -> Reward:
        return as_reward(other) + -self

    def __mul__(self, other: float | RewardLike) -> Reward:
        from rewards.combine import Product, WeightedSum

        return WeightedSum([(self, float(other))]) if isinstance(other, _SCALAR) else Product(self, other)

    def __rmul__(self, other: float | RewardLike) -> Reward:
        return self * other if isinstance(other, _SCALAR) else as_reward(other) * self

    def __neg__(self) -> Reward:
        return -1.0 * self

    def __repr__(self) -> str:
        return f"<{type(self).__name__} reward {self.name!r}>"


RewardLike: TypeAlias = Reward | Callable[[Rollout], float | Score]
"""A reward, or a plain function from a rollout to its score."""


class _FunctionReward(Reward):
    """A plain function as a reward; made by `as_reward`."""

    def __init__(self, function: Callable[[Rollout], float | Score]) -> None:
        self.function = function
        # A functools.partial has no name of its own but its function does.
        named = getattr(function, "func", function)
        self.name = getattr(named, "__name__", type(named).__name__).strip("<>")

    def score(self, rollout: Rollout) -> float | Score:
        return self.function(rollout)


def as_reward(obj: RewardLike) -> Reward:
    """Take a reward as it is and make one of a function `rollout -> float` or `rollout -> Score`.

    Raises:
        TypeError: If `obj` is neither, for instance a class that was not instantiated or a function that
            needs more than the rollout.

    Example:
        >>> as_reward(lambda rollout: len(rollout.text))([Rollout.of("four")])[0].value
        4.0
    """
    if isinstance(obj, Reward):
        return obj
    if isinstance(obj, type):
        raise TypeError(f"{obj.__name__} is a class; expected a reward. Write {obj.__name__}(...).")
    if not callable(obj):
        raise TypeError(
            f"{obj!r} is a {type(obj).__name__}; expected a Reward or a function that takes a Rollout and "
            "returns its score."
        )
    try:
        inspect.signature(obj).bind(None)
    except ValueError:
        pass  # some builtins have no signature to look at
    except TypeError as error:
        raise TypeError(
            f"{obj!r} cannot be called with a rollout alone ({error}); a reward function takes one Rollout "
            "and finds everything else in rollout.metadata."
        ) from None
    return _FunctionReward(obj)


def reward(function: Callable[[Rollout], float | Score]) -> Reward:
    """Turn a function into a reward that can be combined; a decorator.

    Example:
        >>> @reward
        ... def short(rollout):
        ...     return 1.0 if len(rollout.text) < 10 else 0.0
        >>> (0.5 * short)([Rollout.of("brief")])[0].parts
        {'short': 1.0, 'weighted_sum': 0.5}
    """
    return as_reward(function)
