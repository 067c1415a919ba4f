"""A task whose prompts become harder as it is learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np

from llm_env.tasks.base import Task
from llm_env.tasks.mixture import PART, Mixture
from llm_env.tasks.registry import make_task, register_task
from llm_env.tokens.arrays import FloatArray, IntArray
from rewards import Rollout, Score

By = Literal["success", "progress", "schedule"]
_FAST, _SLOW = 0.1, 0.02  # how much a batch counts in the running means of success


@register_task
class Curriculum(Mixture):
    """Levels of one task, or several tasks from easy to hard; which are trained on depends on how it goes.

    - "success": one level after the other. The next is begun when the mean score of the present one has reached
      `target`; a share of the prompts (`review`) remains with those before.
    - "progress": each as often as its mean score has lately changed, up or down.
    - "schedule": the next level is begun every `every` episodes, however it goes.

    Held-out prompts are of all levels alike. A run logs the score of each level, and the mean "level" of what it
    trains on; where it stands is in the checkpoints.

    Args:
        tasks: the levels: names with commas between them, or a list of names and tasks. Or the name of one task, whose
            argument `vary` takes the values of `levels`.
        vary: the name of that argument.
        levels: its values, from easy to hard: a list, or with commas between them.
        by: what decides.
        target: the mean score at which a level is done.
        every: how many episodes there are of each level, by "schedule".
        review: the share of prompts of the levels before, or, by "progress", of all levels alike.
        seed: decides which prompts are dealt.
        **arguments: of the one task.

    Examples:
        >>> task = Curriculum("Reverse", vary="length", levels="2, 3, 5")
        >>> task.weights_now()
        {'length=2': 1.0, 'length=3': 0.0, 'length=5': 0.0}
        >>> task.learned(np.zeros(20, int), np.ones(20))
        >>> task.weights_now()
        {'length=2': 0.2, 'length=3': 0.8, 'length=5': 0.0}
    """

    def __init__(
        self,
        tasks: str | Sequence[str | Task],
        *,
        vary: str | None = None,
        levels: str | Sequence[Any] | None = None,
        by: By = "success",
        target: float = 0.8,
        every: int = 4096,
        review: float = 0.2,
        seed: int = 0,
        **arguments: Any,
    ) -> None:
        if by not in get_args(By) or not 0 <= review < 1 or every < 1:
            raise ValueError(
                f"expected by to be one of {', '.join(get_args(By))}, review from 0 to below 1 and every at least 1; "
                f"got by={by!r}, review={review!r}, every={every!r}"
            )
        if (vary is None) != (levels is None) or (vary is None and arguments):
            raise ValueError(
                f"levels of one task need vary, the name of an argument of it, and levels, its values; got "
                f"vary={vary!r}, levels={levels!r} and the arguments {sorted(arguments)}"
            )
        names = None
        if vary is not None:
            values = _values(levels)
            names = [f"{vary}={value}" for value in values]
            tasks = [make_task(tasks, {**arguments, vary: value}) for value in values]  # type: ignore[arg-type]
        super().__init__(tasks, names=names, seed=seed)
        self.by, self.target, self.every, self.review = by, target, every, review
        self._stand = _Stand(len(self.tasks))  # shared by the copies that `bind` makes

    def weights_now(self) -> dict[str, float]:
        """How large a share of the prompts is of each level."""
        return dict(zip(self.tasks, self._weights().round(6).tolist(), strict=True))

    def deal(self, indices: IntArray, groups: IntArray) -> IntArray:
        """Prompts of the levels that are being trained on, in place of those dealt; alike within a group."""
        levels = self._prompts_of_levels
        bounds = np.cumsum(self._weights())
        dealt = indices.copy()
        for place, (index, group) in enumerate(zip(indices.tolist(), groups.tolist(), strict=True)):
            drawn = np.random.default_rng([self.seed, abs(group), int(group < 0)]).random()
            pool = levels[min(int(np.searchsorted(bounds, drawn, side="right")), len(levels) - 1)]
            dealt[place] = pool[index % len(pool)]
        return dealt

    def finished(self, rollouts: Sequence[Rollout], scores: Sequence[Score]) -> None:
        """Take note of how training goes."""
        levels = np.array([self._names.index(rollout.metadata[PART]) for rollout in rollouts], dtype=np.int64)
        self.learned(levels, np.array([score.total for score in scores]))

    def learned(self, levels: IntArray, scores: FloatArray) -> None:
        """Take note of texts of these levels with these scores."""
        stand = self._stand
        stand.episodes += len(levels)
        for level in np.unique(levels).tolist():
            count = int((levels == level).sum())
            mean = float(scores[levels == level].mean())
            for means, weight in ((stand.fast, _FAST), (stand.slow, _SLOW)):
                kept = (1 - weight) ** (count / 8) if stand.seen[level] else 0.0  # as if eight texts were a batch
                means[level] = kept * means[level] + (1 - kept) * mean
            stand.seen[level] += count
        done = bool(stand.seen[stand.level]) and stand.fast[stand.level] >= self.target
        if self.by == "schedule":
            stand.level = min(stand.episodes // self.every, len(self.tasks) - 1)
        elif self.by == "success" and done and stand.level < len(self.tasks) - 1:
            stand.level += 1

    def score(self, rollout: Rollout) -> Score:
        """What the prompt's own task gives; the level is a part."""
        score = super().score(rollout)
        level = float(self._names.index(rollout.metadata[PART]))
        return Score(score.value, {**score.parts, "level": level}, score.per_token)

    def state_dict(self) -> dict[str, Any]:
        """Where it stands."""
        stand = self._stand
        means = {"fast": stand.fast.tolist(), "slow": stand.slow.tolist(), "seen": stand.seen.tolist()}
        return {"levels": self._names, "level": stand.level, "episodes": stand.episodes, **means}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another one stood."""
        if list(state["levels"]) != self._names:
            raise ValueError(f"the saved curriculum has the levels {state['levels']}, this one {self._names}")
        stand = self._stand
        stand.level, stand.episodes = state["level"], state["episodes"]
        stand.fast[:], stand.slow[:], stand.seen[:] = state["fast"], state["slow"], state["seen"]

    @property
    def _names(self) -> list[str]:
        return list(self.tasks)

    @cached_property
    def _prompts_of_levels(self) -> list[IntArray]:
        names = self._names
        whose = np.array([names.index(prompt.metadata[PART]) for prompt in self.prompts("train")], dtype=np.int64)
        return [np.flatnonzero(whose == level) for level in range(len(names))]

    def _weights(self) -> FloatArray:
        stand, count = self._stand, len(self.tasks)
        if self.by == "progress":
            change = np.abs(stand.fast - stand.slow)
            lively = change / change.sum() if change.sum() > 0 else np.full(count, 1 / count)
            mixed: FloatArray = (1 - self.review) * lively + self.review / count
            return mixed
        weights = np.zeros(count)
        weights[stand.level] = 1.0
        if stand.level:
            weights[: stand.level] = self.review / stand.level
            weights[stand.level] -= self.review
        return weights


class _Stand:
    """Where a curriculum stands."""

    def __init__(self, levels: int) -> None:
        self.level = 0
        self.episodes = 0
        self.fast, self.slow = np.zeros(levels), np.zeros(levels)
        self.seen: IntArray = np.zeros(levels, dtype=np.int64)


def _values(levels: str | Sequence[Any] | None) -> list[Any]:
    values: list[Any] = [each.strip() for each in levels.split(",")] if isinstance(levels, str) else list(levels or ())
    return [int(each) if isinstance(each, str) and each.lstrip("-").isdigit() else each for each in values]
