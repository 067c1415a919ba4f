"""Several tasks learned at once."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np

from llm_env.tasks.base import Episodes, Splits, Task
from llm_env.tasks.registry import make_task, register_task
from llm_env.tokens.arrays import BoolArray, FloatArray, IntArray
from llm_env.tokens.chat import Message
from llm_env.tokens.prompts import Prompt
from llm_env.tokens.vocabulary import Vocabulary
from rewards import Reward, Rollout, Score

PART = "part"
"""Where a prompt's metadata says which of the tasks it belongs to."""

Answer = TypeVar("Answer", bound=np.ndarray)
_AboutRows: TypeAlias = Literal["over", "token_reward", "action_mask"]
_ALIKE = ("stop", "when_cut", "chat", "on_reply_error", "slow_replies", "reply_timeout")


@register_task
class Mixture(Task):
    """Several tasks in one: each prompt is that of one of them, which replies to the agent and scores it.

    Parts of the score are that of the task, under its name, and its own as "NAME/part": a run logs how each goes.
    How long a text may be is what the longest of them needs; where texts stop must be the same
    for all.

    Args:
        tasks: their names, with commas between them, or a list of names and tasks.
        weights: how many of each hundred prompts, say, are whose: numbers in the order of the tasks, as a list or with
            commas between them. By default all are equally frequent.
        names: what the tasks are called, where two of them would have the same name.
        seed: decides the order of the prompts.

    Examples:
        >>> task = Mixture("Copy, Reverse", weights="1, 3")
        >>> Counter(prompt.metadata["part"] for prompt in task.prompts("train"))
        Counter({'Reverse': 4096, 'Copy': 1365})
        >>> prompt = task.prompts("test")[0]
        >>> prompt.text, prompt.metadata["part"]
        ('reverse sekuvh: ', 'Reverse')
    """

    def __init__(
        self,
        tasks: str | Sequence[str | Task],
        *,
        weights: str | float | Sequence[float] | None = None,
        names: Sequence[str] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(seed=seed)
        given = [name.strip() for name in tasks.split(",")] if isinstance(tasks, str) else list(tasks)
        made = [make_task(task) for task in given]
        called = [task.name for task in made] if names is None else list(names)
        twice = [name for name, count in Counter(called).items() if count > 1]
        if len(made) < 2 or twice:
            raise ValueError(f"a {self.name} is of two tasks or more, of different names; got {called}")
        self.tasks: dict[str, Task] = dict(zip(called, made, strict=True))
        self.weights = dict(zip(self.tasks, _numbers(weights, len(made)), strict=True))
        first, *others = made
        for other in others:
            for name in _ALIKE:
                if (one := getattr(first, name)) != (another := getattr(other, name)):
                    raise ValueError(
                        f"the tasks of a Mixture must agree in `{name}`, but that of {first.name} is {one!r}, and that "
                        f"of {other.name} {another!r}"
                    )
        self.stop, self.chat = first.stop, first.chat
        self.when_cut, self.on_reply_error = first.when_cut, first.on_reply_error
        self.slow_replies, self.reply_timeout = first.slow_replies, first.reply_timeout
        self.hint_names = tuple(f"{name}/{hint}" for name, task in self.tasks.items() for hint in task.hint_names)
        self._measure()

    def setup(self, vocabulary: Vocabulary) -> None:
        """Set all of them up for the same tokens."""
        self.tasks = {name: task.bind(vocabulary) for name, task in self.tasks.items()}
        self._measure()

    def overrides(self, method: str) -> bool:
        """Whether any of them writes one of the optional methods."""
        if method not in _OPTIONAL:
            return super().overrides(method)
        return any(task.overrides(method) for task in self.tasks.values())

    def splits(self) -> Splits:
        """The prompts of all, as frequent as their weights say, in a random order."""
        return {split: self._mixed(split) for split in ("train", "test")}

    def as_reward(self) -> Reward:
        """That of each text's own task, or the reward that is set here."""
        for task in self.tasks.values():
            task.as_reward()  # or it says that it has none
        return super().as_reward()

    def score(self, rollout: Rollout) -> Score:
        """What the prompt's own task gives."""
        name = rollout.metadata[PART]
        [score] = self.tasks[name].as_reward()([rollout])
        parts = {f"{name}/{part}": value for part, value in score.parts.items()}
        return Score(score.value, {name: score.total, **parts}, score.per_token)

    def session(self, prompt: Prompt) -> Any:
        """What the prompt's own task keeps for an episode."""
        task = self.tasks[prompt.metadata[PART]]
        return task.session(prompt) if task.overrides("session") else None

    def reply(self, rollout: Rollout) -> str | Sequence[int] | Sequence[Message] | None:
        """What the prompt's own task replies; one that does not reply ends its episodes there."""
        task = self.tasks[rollout.metadata[PART]]
        return task.reply(rollout) if task.overrides("reply") else None

    def hints(self, rollout: Rollout) -> list[float]:
        """What the prompt's own task hints at, in its places, and 0 in those of others."""
        whose = rollout.metadata[PART]
        return [
            number
            for name, task in self.tasks.items()
            if task.hint_names
            for number in (task.hints(rollout) if name == whose else [0.0] * len(task.hint_names))
        ]

    def over(self, episodes: Episodes, rows: IntArray) -> BoolArray:
        """Which episodes their own tasks end."""
        return self._asked("over", episodes, rows, np.zeros(len(rows), dtype=np.bool_))

    def token_reward(self, episodes: Episodes, rows: IntArray) -> FloatArray:
        """What their own tasks pay for their last steps."""
        return self._asked("token_reward", episodes, rows, np.zeros(len(rows)))

    def action_mask(self, episodes: Episodes, rows: IntArray) -> BoolArray:
        """What their own tasks allow."""
        return self._asked("action_mask", episodes, rows, np.ones((len(rows), self.vocabulary.size), dtype=np.bool_))

    def _asked(self, method: _AboutRows, episodes: Episodes, rows: IntArray, answer: Answer) -> Answer:
        """Each task's answer about its own rows; where it has none, what is given."""
        whose = np.array([episodes.prompt(row).metadata[PART] for row in rows.tolist()])
        for name, task in self.tasks.items():
            mine = whose == name
            if mine.any() and task.overrides(method):
                answer[mine] = getattr(task, method)(episodes, rows[mine])
        return answer

    def _measure(self) -> None:
        tasks = self.tasks.values()
        self.max_new_tokens = max(task.max_new_tokens for task in tasks)
        self.max_prompt_tokens = max(task.max_prompt_tokens for task in tasks)
        self.max_reply_tokens = max(task.max_reply_tokens for task in tasks)

    def _mixed(self, split: str) -> list[Prompt]:
        prompts = {name: rows for name, task in self.tasks.items() if (rows := _prompts(task, split))}
        if not prompts:
            return []
        most = min(len(rows) / self.weights[name] for name, rows in prompts.items())  # of which none has too few
        chosen = [
            replace(row, metadata={**row.metadata, PART: name})
            for name, rows in prompts.items()
            for row in rows[: max(1, math.floor(most * self.weights[name] + 1e-9))]
        ]
        return [chosen[index] for index in np.random.default_rng(self.seed).permutation(len(chosen)).tolist()]


_OPTIONAL = ("session", "over", "reply", "token_reward", "action_mask", "hints")


def _prompts(task: Task, split: str) -> Sequence[Prompt]:
    """Those of a split that the task may lack."""
    try:
        return task.prompts(split)
    except ValueError:
        return []


def _numbers(weights: str | float | Sequence[float] | None, count: int) -> list[float]:
    if weights is None:
        return [1.0] * count
    given = weights.split(",") if isinstance(weights, str) else weights
    try:
        numbers = [float(number) for number in given]  # type: ignore[union-attr]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) != count or not all(math.isfinite(number) and number > 0 for number in numbers):
        raise ValueError(f"weights are {weights!r}; expected {count} numbers above 0, one for each task")
    return numbers
