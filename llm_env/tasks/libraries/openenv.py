"""Environments written for OpenEnv, in this process or behind a server: as tasks of several turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from llm_env.tasks.registry import register_task
from llm_env.tasks.turns import Play, TurnTask


def fields_of(observation: Any) -> str:
    """What an observation shows: its fields by name, or the value alone where there is one."""
    shown = {
        name: value
        for name, value in observation.model_dump().items()
        if name not in ("done", "reward", "metadata") and value not in (None, "")
    }
    if len(shown) == 1:
        return str(next(iter(shown.values())))
    return "\n".join(f"{name}: {value}" for name, value in shown.items())


@register_task
class OpenEnv(TurnTask):
    """An environment written for OpenEnv: an `Environment` in this process, or its synchronous client.

    Each turn is paid the observation's reward; the last turn's is the score. An environment that offers tasks
    (`list_splits`, `num_tasks`) has one episode for each of them, the split "test" (or else the last one) held out;
    any other has one for each seed. Set `slow_replies` where it answers over a network.

    Args:
        make: makes an environment; one for each running episode.
        action: from what the agent wrote to the environment's action. An error that it raises ends the episode, and is
            counted; better is an action that says that nothing could be read.
        shown: from an observation to what the agent is told.
        **kwargs: of `TurnTask`.

    Examples:
        >>> from types import SimpleNamespace
        >>> class Parrot:  # an `Environment` of OpenEnv has these three methods, and so has its client
        ...     def reset(self, seed=None):
        ...         return SimpleNamespace(line="Say: polly", reward=None, done=False)
        ...     def step(self, action):
        ...         return SimpleNamespace(line="", reward=float(action["line"] == "polly"), done=True)
        ...     def close(self):
        ...         pass
        >>> task = OpenEnv(Parrot, lambda text: {"line": text}, shown=lambda seen: seen.line, num_train=1, num_test=1)
        >>> game = task.session(task.prompts("train")[0])
        >>> game.first, game.told("polly"), game.score
        ('Say: polly\\n', None, 1.0)
    """

    max_new_tokens = 128
    max_prompt_tokens = 512
    max_reply_tokens = 1024

    def __init__(
        self,
        make: Callable[[], Any],
        action: Callable[[str], Any],
        *,
        shown: Callable[[Any], str] = fields_of,
        **kwargs: Any,
    ) -> None:
        for name, given in (("make", make), ("action", action), ("shown", shown)):
            if not callable(given):
                raise TypeError(f"{name} of OpenEnv must be a function, got {given!r}")
        super().__init__(**kwargs)
        self.make, self.action, self.shown = make, action, shown

    def rows(self) -> Mapping[str, Sequence[Any]]:
        """The environment's own tasks, where it offers any."""
        env = self.make()
        try:
            if not hasattr(env, "list_splits"):
                return super().rows()
            names = [split if isinstance(split, str) else _name(split) for split in env.list_splits()]
            tasks = {name: [{"split": name, "index": index} for index in range(env.num_tasks(name))] for name in names}
        finally:
            env.close()
        held_out = "test" if "test" in tasks else names[-1]
        return {"test": tasks.pop(held_out), "train": [task for split in tasks.values() for task in split]}

    def play_row(self, row: Any, rng: np.random.Generator) -> Play:
        """One episode."""
        env = self.make()
        try:
            result = env.reset(seed=int(rng.integers(2**31)), **(row or {}))
            while not result.done:
                # A client's result holds the observation; an environment's is the observation.
                told = self.shown(getattr(result, "observation", result))
                said = yield told.strip() + "\n", float(result.reward or 0.0)
                result = env.step(self.action(said))
            return float(result.reward or 0.0)
        finally:
            env.close()


def _name(split: Any) -> str:
    return str(split["name"] if isinstance(split, Mapping) else split.name)
