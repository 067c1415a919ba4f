"""The environments of GEM, one episode for each seed: as tasks of several turns."""

from __future__ import annotations

import difflib
from typing import Any

import numpy as np

from llm_env.tasks.registry import register_task
from llm_env.tasks.turns import Play, TurnTask


@register_task
class GEM(TurnTask):
    """An environment of the package gem-llm, by its name: "game:Mastermind-v0-easy", "rg:leg_counting" and others.

    The agent is told what the environment shows, and its suffix. Each turn is paid the environment's reward of it; the
    last turn's is the score.

    Args:
        env: its name.
        arguments: of the environment, as `gem.make` takes them.
        **kwargs: of `TurnTask`.

    Examples:
        >>> task = GEM("game:GuessTheNumber-v0-easy", num_train=2, num_test=1)
        >>> "between 1 and 10" in task.prompts("train")[0].text
        True
    """

    max_new_tokens = 128
    max_prompt_tokens = 512
    max_reply_tokens = 1024

    def __init__(
        self, env: str = "game:GuessTheNumber-v0-easy", *, arguments: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        try:
            from gem.envs.registration import ENV_REGISTRY
        except ImportError as error:
            raise ImportError("the task GEM needs gem-llm: pip install --no-deps gem-llm (its pins are old)") from error
        if env not in ENV_REGISTRY:
            similar = difflib.get_close_matches(env, ENV_REGISTRY, cutoff=0.5)
            raise ValueError(f"GEM has no environment {env!r}; it has {', '.join(similar or sorted(ENV_REGISTRY))}")
        super().__init__(**kwargs)
        self.env = env
        self.arguments = arguments or {}

    def play(self, rng: np.random.Generator) -> Play:
        """One episode."""
        import gem

        env = gem.make(self.env, **self.arguments)
        text, info = env.reset(seed=int(rng.integers(2**31)))
        reward, over = 0.0, False
        while not over:
            shown = "\n".join(part for part in (text, info.get("suffix")) if part)
            said = yield shown.strip() + "\n", reward
            text, given, terminated, truncated, info = env.step(said)
            reward, over = float(given), terminated or truncated
        return reward
