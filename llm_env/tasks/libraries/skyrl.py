"""The environments of SkyRL-gym, one episode for each row of a data set: as tasks of several turns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llm_env.tasks.registry import register_task
from llm_env.tasks.turns import Play, TurnTask
from llm_env.tokens.prompts import Prompt, read_prompts


@register_task
class SkyRLGym(TurnTask):
    """An environment of the package skyrl-gym, by its name ("gsm8k_multi_turn"), on the rows of a data set of yours.

    A row has a "prompt" (chat messages, or a text) and what the environment takes from it, such as
    `{"reward_spec": {"ground_truth": "42"}}`. Each turn is paid the environment's reward of it; the last turn's is the
    score. The agent is told messages, so the model must have a chat template.

    Args:
        env: its name; a row's own "env_class" comes before it.
        train: rows to train on: a JSONL file by its path, or mappings.
        test: rows held out; without any, the first tenth of `train`.
        config: of the environment, as `skyrl_gym.make` takes it under `env_config`.
        **kwargs: of `TurnTask`.

    Examples:
        >>> row = {"prompt": [{"role": "user", "content": "40+2?"}], "reward_spec": {"ground_truth": "42"}}
        >>> task = SkyRLGym("gsm8k", train=[row], test=[row])
        >>> game = task.session(task.prompts("train")[0])
        >>> game.told("#### 42"), game.score
        (None, 1.0)
    """

    max_new_tokens = 512
    max_prompt_tokens = 1024
    max_reply_tokens = 2048

    def __init__(
        self,
        env: str = "gsm8k",
        *,
        train: str | Path | Iterable[Mapping[str, Any]],
        test: str | Path | Iterable[Mapping[str, Any]] | None = None,
        config: Any = None,
        **kwargs: Any,
    ) -> None:
        try:
            from skyrl_gym.envs.registration import registry
        except ImportError as error:
            raise ImportError("the task SkyRLGym needs skyrl-gym: pip install skyrl-gym") from error
        if env not in registry:
            raise ValueError(f"skyrl-gym has no environment {env!r}; it has {', '.join(sorted(registry))}")
        super().__init__(**kwargs)
        self.env = env
        self.config = config
        rows = read_prompts(train)
        held_out = len(rows) // 10 if test is None else 0
        self._rows = {"test": rows[:held_out] if test is None else read_prompts(test), "train": rows[held_out:]}

    def rows(self) -> Mapping[str, Sequence[Prompt]]:
        """The rows of both splits."""
        return self._rows

    def play_row(self, row: Prompt, rng: np.random.Generator) -> Play:
        """One episode about a row."""
        import skyrl_gym

        extras = dict(row.metadata)
        env = skyrl_gym.make(extras.get("env_class", self.env), env_config=self.config, extras=extras)
        try:
            asked = [{"role": "user", "content": row.text}] if isinstance(row.text, str) else list(row.text)
            messages, _ = env.init(asked)
            reward, over = 0.0, False
            while not over:
                said = yield messages, reward
                step = env.step(said)
                messages, reward, over = step["observations"], float(step["reward"]), bool(step["done"])
            return reward
        finally:
            env.close()
