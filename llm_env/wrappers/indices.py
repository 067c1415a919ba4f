"""Actions that are numbers into some of the tokens."""

from __future__ import annotations

from typing import Any

from gymnasium import spaces

from llm_env.mdp.core import TokenMDP
from llm_env.wrappers.layers import Layer


class IndicesLayer(Layer):
    """An action is an index below `count`; an observed mask is that of these actions.

    Args:
        mdp: the episodes.
        count: how many tokens there are to choose among.
        name: of the wrapper, for its errors.
    """

    def __init__(self, mdp: TokenMDP, count: int, name: str) -> None:
        super().__init__(mdp)
        self.count = count
        self._name = name

    def observation_space(self, inside: spaces.Space[Any]) -> spaces.Space[Any]:
        """An observed mask is that of our actions."""
        if not (isinstance(inside, spaces.Dict) and "action_mask" in inside.spaces):
            return inside
        return spaces.Dict({**inside.spaces, "action_mask": spaces.MultiBinary(self.count)})

    def observe(self, observation: Any) -> Any:
        """An observed mask, of one row or of all, is that of our actions."""
        if not (isinstance(observation, dict) and "action_mask" in observation):
            return observation
        return {**observation, "action_mask": self.observed_mask(observation)}

    def observed_mask(self, observation: dict[str, Any]) -> Any:
        """The mask of our actions, from what the environment inside shows."""
        raise NotImplementedError

    def action_space(self, inside: spaces.Space[Any]) -> spaces.Space[Any]:
        """An index."""
        if not isinstance(inside, spaces.Discrete):
            raise TypeError(f"{self._name} needs actions that are tokens, got {inside}: apply it before KLReward")
        return spaces.Discrete(self.count)
