"""Rewards scaled and clipped."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np

from llm_env.mdp.core import TokenMDP
from llm_env.tokens.arrays import BoolArray, FloatArray
from llm_env.wrappers.layers import Layer, TokenWrapper


class ScaleRewardLayer(Layer):
    """The reward of every step times `scale`, from `low` to `high`."""

    def __init__(self, mdp: TokenMDP, scale: float, low: float, high: float) -> None:
        super().__init__(mdp)
        if not low <= high:
            raise ValueError(f"low must not be above high, got low={low}, high={high}")
        self.scale, self.low, self.high = scale, low, high

    def after(self, acting: BoolArray, begun: BoolArray, reward: FloatArray) -> tuple[FloatArray, dict[str, Any]]:
        """The scaled and clipped rewards."""
        return np.clip(reward * self.scale, self.low, self.high), {}


class ScaleReward(TokenWrapper):
    """Multiply the reward of every step by `scale`, then clip it to `low` and `high`.

    Gymnasium's `TransformReward` does the same with a function; but a spec that holds one cannot be written to JSON.

    Args:
        env: a `TokenEnv`, wrapped or not. For a batch there is `llm_env.wrappers.vector.ScaleReward`.
        scale: the factor.
        low: the least reward of a step.
        high: the greatest.

    Examples:
        >>> env = gymnasium.make("llm_env/Copy-v0", task_kwargs={"length": 3}, max_new_tokens=3)
        >>> env = ScaleReward(env, scale=10.0, high=5.0)
        >>> observation, info = env.reset(seed=0)
        >>> answer = env.unwrapped.mdp.prompt(0).metadata["answer"]
        >>> [env.step(token)[1] for token in env.unwrapped.mdp.vocabulary.encode(answer)]
        [0.0, 0.0, 5.0]
    """

    def __init__(
        self, env: gymnasium.Env[Any, Any], scale: float = 1.0, low: float = -np.inf, high: float = np.inf
    ) -> None:
        super().__init__(env, ScaleRewardLayer, scale=scale, low=low, high=high)
