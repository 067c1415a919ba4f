"""Observations that a plain multi-layer perceptron can read."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from llm_env.mdp.core import TokenMDP
from llm_env.wrappers.layers import Layer, TokenWrapper

_LARGEST = 100_000


class OneHotTokensLayer(Layer):
    """The last few tokens, each as a row of zeros with a one; zeros alone before the first token."""

    def __init__(self, mdp: TokenMDP, window: int = 12) -> None:
        super().__init__(mdp)
        if window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        if window * mdp.vocabulary.size > _LARGEST:
            raise ValueError(
                f"{window} tokens of a vocabulary of {mdp.vocabulary.size} are {window * mdp.vocabulary.size} numbers, "
                f"over the {_LARGEST} that OneHotTokens gives: use FlatTokens, and embed them"
            )
        self.window = window

    def observation_space(self, inside: spaces.Space[Any]) -> spaces.Space[Any]:
        """Zeros and ones."""
        return spaces.Box(0, 1, (self.window * self.mdp.vocabulary.size,), np.float32)

    def observe(self, observation: Any) -> Any:
        """`[..., window * vocab_size]`"""
        places = observation["length"] - np.arange(self.window, 0, -1)
        tokens = np.take_along_axis(observation["tokens"], np.maximum(places, 0), axis=-1)
        hot = np.zeros((*tokens.shape, self.mdp.vocabulary.size), np.float32)
        np.put_along_axis(hot, tokens[..., None], (places >= 0)[..., None], axis=-1)
        return hot.reshape(*tokens.shape[:-1], -1)


class OneHotTokens(TokenWrapper):
    """Observe the last few tokens as zeros and ones, for policies that take one array of floats (an MLP).

    Args:
        env: a `TokenEnv`, wrapped or not. For a batch there is `llm_env.wrappers.vector.OneHotTokens`.
        window: how many tokens; what lies further back is not seen.

    Examples:
        >>> env = OneHotTokens(gymnasium.make("llm_env/Copy-v0"), window=4)
        >>> observation, info = env.reset(seed=0)
        >>> observation.shape[0] // env.unwrapped.mdp.vocabulary.size, int(observation.sum())
        (4, 4)
    """

    def __init__(self, env: gymnasium.Env[Any, Any], window: int = 12) -> None:
        super().__init__(env, OneHotTokensLayer, window=window)
