"""Observations that are one array."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from llm_env.wrappers.layers import Layer, TokenWrapper


class FlatTokensLayer(Layer):
    """The tokens alone, and -1 where none is written yet."""

    def observation_space(self, inside: spaces.Space[Any]) -> spaces.Space[Any]:
        """Token ids, or -1."""
        return spaces.Box(-1, self.mdp.vocabulary.size - 1, (self.mdp.context,), np.int64)

    def observe(self, observation: Any) -> Any:
        """`[..., context]` tokens."""
        written = np.arange(self.mdp.context) < observation["length"]
        return np.where(written, observation["tokens"], -1)


class FlatTokens(TokenWrapper):
    """Observe the tokens alone, as one array; the places not yet written hold -1.

    Args:
        env: a `TokenEnv`, wrapped or not. For a batch there is `llm_env.wrappers.vector.FlatTokens`.

    Examples:
        >>> env = FlatTokens(gymnasium.make("llm_env/Addition-v0"))
        >>> observation, info = env.reset(seed=0)
        >>> env.observation_space.shape, int(observation.min())
        ((10,), -1)
    """

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        super().__init__(env, FlatTokensLayer)
