"""Actions that choose among a language model's likeliest tokens."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt

from llm_env.mdp.core import TokenMDP
from llm_env.wrappers.indices import IndicesLayer
from llm_env.wrappers.layers import TokenWrapper


class TopKActionsLayer(IndicesLayer):
    """An action is an index into the tokens that the observer shows."""

    def __init__(self, mdp: TokenMDP) -> None:
        if "top_ids" not in mdp.observer.arrays:
            raise ValueError("top-k actions need an environment made with engine='transformers', observe='top_k'")
        self.k = mdp.observer.arrays["top_ids"].shape[1]
        super().__init__(mdp, self.k, "TopKActions")

    def mask(self, action_mask: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """`[num_envs, k]` of the mask of all tokens."""
        return np.take_along_axis(action_mask, self.mdp.observer.arrays["top_ids"], axis=1)

    def observed_mask(self, observation: dict[str, Any]) -> Any:
        """That of the tokens shown beside it."""
        return np.take_along_axis(observation["action_mask"], observation["top_ids"], axis=-1)

    def inner(self, action: Any) -> Any:
        """`[num_envs]` the tokens at these indices."""
        index = np.asarray(action)
        if index.shape != (self.mdp.num_envs,):
            raise ValueError(f"expected {self.mdp.num_envs} actions, one per row; got shape {index.shape}")
        if index.dtype.kind not in "iu" or ((index < 0) | (index >= self.k)).any():
            raise ValueError(f"an action must be an index from 0 to {self.k - 1} into the top {self.k}, got {action!r}")
        return self.mdp.observer.arrays["top_ids"][np.arange(self.mdp.num_envs), index]


class TopKActions(TokenWrapper):
    """Choose among the language model's k likeliest tokens: an action is an index into `observation["top_ids"]`.

    The environment must be made with an engine and `observe="top_k"`. An action mask is that of those tokens.

    Args:
        env: a `TokenEnv`, wrapped or not. For a batch there is `llm_env.wrappers.vector.TopKActions`.

    Examples:
        >>> env = gymnasium.make("llm_env/Copy-v0", engine="transformers", observe="top_k", top_k=5)
        >>> TopKActions(env).action_space
        Discrete(5)
    """

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        super().__init__(env, TopKActionsLayer)
