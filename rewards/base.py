"""The `Reward` interface, which users override, and the algebra of rewards: their sums and products.

A combination of rewards keeps one rule: its `Score.total` is the weighted sum, product, ... of its members' totals.
What a member pays per token stays per token wherever that is possible; each class says how.

A combination's `Score.parts` hold the members' parts, as the members gave them (neither weighted nor clipped), and its
own value. A name that is taken gets a number: "exact_match", "exact_match_2".
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from rewards.rollout import Rollout, shown
from rewards.score import PartNames, RewardError, Score, checked_score, weighted_per_token

__all__ = ["Combination", "FunctionReward", "Product", "Reward", "RewardLike", "WeightedSum", "as_reward", "reward"]

_SCALAR = (int, float, np.number)


class Reward:
    """Scores finished rollouts. Override `score`, or `score_batch` to score many at once.

    Calling a reward scores a batch and checks the result, so call it rather than `score`:
    `reward(rollouts)` gives one `Score` per rollout, with the reward's own value among its parts.

    Rewards combine: `a + b` and `0.5 * a` (`rewards.WeightedSum`), `a * b` (`rewards.Product`, a gate),
    `a - b` and `-a`. A plain function may stand for one of the two.

    Attributes:
        name: What the score is logged as; the class's name in snake_case unless set.
        alongside: Whether texts are to be scored in a thread of their own, as soon as they have ended, while others are
            still being written: for rewards that wait for something (a sandbox, a server). None: they may be, beside a
            reward that waits, but it is not worth a thread.

    Example:
        >>> class Brevity(Reward):
        ...     def score(self, rollout):
        ...         return 1.0 / (1 + rollout.num_actions)
        >>> Brevity()([Rollout.of("abc")])
        [Score(value=0.25, parts={'brevity': 0.25}, per_token=None)]
    """

    name: str = "reward"
    alongside: bool | None = False

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
        return checked_score(score, rollout, self.name)

    def __add__(self, other: RewardLike) -> Reward:
        return WeightedSum([(self, 1.0), (other, 1.0)])

    def __radd__(self, other: RewardLike) -> Reward:
        return as_reward(other) + self

    def __sub__(self, other: RewardLike) -> Reward:
        return self + -as_reward(other)

    def __rsub__(self, other: RewardLike) -> Reward:
        return as_reward(other) + -self

    def __mul__(self, other: float | RewardLike) -> Reward:
        return WeightedSum([(self, float(other))]) if isinstance(other, _SCALAR) else Product(self, other)

    def __rmul__(self, other: float | RewardLike) -> Reward:
        return self * other if isinstance(other, _SCALAR) else as_reward(other) * self

    def __neg__(self) -> Reward:
        return -1.0 * self

    def __repr__(self) -> str:
        return f"<{type(self).__name__} reward {self.name!r}>"


RewardLike: TypeAlias = Reward | Callable[[Rollout], float | Score]
"""A reward, or a plain function from a rollout to its score."""


class FunctionReward(Reward):
    """A plain function as a reward, named like the function; made by `as_reward`."""

    def __init__(self, function: Callable[[Rollout], float | Score]) -> None:
        self.function = function
        # A functools.partial has no name, but the function in it has one.
        named = getattr(function, "func", function)
        self.name = getattr(named, "__name__", type(named).__name__).strip("<>")

    def score(self, rollout: Rollout) -> float | Score:
        """Call the function."""
        return self.function(rollout)


def as_reward(obj: RewardLike) -> Reward:
    """Give a reward back as it is, and make one of a function `rollout -> float` or `rollout -> Score`.

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
        pass  # some of Python's built-in functions have no signature to check
    except TypeError as error:
        raise TypeError(
            f"{obj!r} cannot be called with a rollout alone ({error}); a reward function takes one Rollout "
            "and finds everything else in rollout.metadata."
        ) from None
    return FunctionReward(obj)


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


class Combination(Reward):
    """A reward made of other rewards: it keeps them, scores by each, and logs their parts under unique names.

    Override `combine`, which makes one score of the members' scores.

    Args:
        rewards: The members: rewards or plain functions.
    """

    def __init__(self, rewards: Iterable[RewardLike]) -> None:
        self.rewards = tuple(as_reward(reward) for reward in rewards)
        if not self.rewards:
            raise ValueError(f"{type(self).__name__} got no rewards; expected at least one.")
        self._names = PartNames()
        wishes = {reward.alongside for reward in self.rewards}
        self.alongside = False if False in wishes else True if True in wishes else None

    def score_batch(self, rollouts: Sequence[Rollout]) -> list[Score]:
        """Score several rollouts by every member, and combine the scores."""
        by_reward = [reward(rollouts) for reward in self.rewards]
        results = []
        for rollout, *scores in zip(rollouts, *by_reward, strict=True):
            value, per_token = self.combine(scores, rollout)
            results.append(Score(value, self._names.gather(scores, self.name), per_token))
        return results

    def combine(self, scores: list[Score], rollout: Rollout) -> tuple[float, NDArray[np.float64] | None]:
        """The value and the per-token scores (or None) that follow from the members' scores for one rollout."""
        raise NotImplementedError(f"{type(self).__name__} does not override combine(self, scores, rollout).")

    def close(self) -> None:
        """Close every member."""
        for reward in self.rewards:
            reward.close()


class WeightedSum(Combination):
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

    def combine(self, scores: list[Score], rollout: Rollout) -> tuple[float, NDArray[np.float64] | None]:
        """Add the members' scores up, each times its weight."""
        return (
            sum(weight * score.value for weight, score in zip(self.weights, scores, strict=True)),
            weighted_per_token(scores, self.weights),
        )

    def __repr__(self) -> str:
        members = zip(self.rewards, self.weights, strict=True)
        return f"WeightedSum([{', '.join(f'({reward!r}, {weight})' for reward, weight in members)}])"


class Product(Combination):
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

    def combine(self, scores: list[Score], rollout: Rollout) -> tuple[float, NDArray[np.float64] | None]:
        """Multiply the factors' scores."""
        value = math.prod(score.value for score in scores)
        paying = [index for index, score in enumerate(scores) if score.per_token is not None]
        if not paying:
            return value, None
        if len(paying) > 1:
            names = ", ".join(repr(self.rewards[index].name) for index in paying)
            raise RewardError(
                f"reward {self.name!r} got per_token scores from {names} for the rollout with text "
                f"{shown(rollout)}; expected them from at most one factor. Add such rewards, or "
                "let all but one pay at the end only."
            )
        per_token = scores[paying[0]].per_token
        assert per_token is not None
        others = math.prod(score.value for index, score in enumerate(scores) if index != paying[0])
        return value, others * per_token
