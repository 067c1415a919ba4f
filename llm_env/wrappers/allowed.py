"""Actions that are numbers into a few tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt

from llm_env.mdp.core import TokenMDP
from llm_env.tokens.arrays import IntArray
from llm_env.wrappers.indices import IndicesLayer
from llm_env.wrappers.layers import TokenWrapper


class AllowedTokensLayer(IndicesLayer):
    """An action is an index into `tokens`."""

    def __init__(self, mdp: TokenMDP, tokens: str | Sequence[int] | None = None) -> None:
        self.tokens = _chosen(mdp, tokens)
        super().__init__(mdp, len(self.tokens), "AllowedTokens")

    def mask(self, action_mask: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """`[num_envs, n]` of the mask of all tokens."""
        return action_mask[..., self.tokens]

    def observed_mask(self, observation: dict[str, Any]) -> Any:
        """That of our tokens."""
        return observation["action_mask"][..., self.tokens]

    def inner(self, action: Any) -> Any:
        """`[num_envs]` the tokens at these indices."""
        index = np.asarray(action)
        if index.dtype.kind not in "iu" or ((index < 0) | (index >= self.count)).any():
            raise ValueError(f"an action must be an index from 0 to {self.count - 1} into the tokens, got {action!r}")
        return self.tokens[index]


class AllowedTokens(TokenWrapper):
    """Choose among a few tokens: an action is a number from 0, as algorithms without action masks need it.

    Args:
        env: a `TokenEnv`, wrapped or not. For a batch there is `llm_env.wrappers.vector.AllowedTokens`.
        tokens: their ids, or a text: its tokens, and those that end a text. By default those that the task allows at
            the beginning of an episode, which must not change then.

    Examples:
        >>> env = AllowedTokens(gymnasium.make("llm_env/Copy-v0", task_kwargs={"alphabet": "abc"}))
        >>> env.action_space, env.unwrapped.mdp.vocabulary.decode(env.layer.tokens)
        (Discrete(4), 'abc')
    """

    def __init__(self, env: gymnasium.Env[Any, Any], tokens: str | Sequence[int] | None = None) -> None:
        super().__init__(env, AllowedTokensLayer, tokens=tokens)


def _chosen(mdp: TokenMDP, tokens: str | Sequence[int] | None) -> IntArray:
    vocabulary = mdp.vocabulary
    if tokens is None:
        mdp.reset()
        mask = mdp.action_mask()
        return np.arange(vocabulary.size) if mask is None else np.flatnonzero(mask.any(axis=0))
    if isinstance(tokens, str):
        return np.unique([*vocabulary.encode(tokens, add_special_tokens=False), *vocabulary.eos_tokens])
    chosen = np.asarray(tokens)
    if chosen.ndim != 1 or chosen.dtype.kind not in "iu" or not len(chosen):
        raise ValueError(f"tokens must be a text or a list of token ids, got {tokens!r}")
    if (wrong := chosen[(chosen < 0) | (chosen >= vocabulary.size)]).size:
        raise ValueError(f"token ids are from 0 to {vocabulary.size - 1}, got {wrong.tolist()}")
    return chosen.astype(np.int64)
