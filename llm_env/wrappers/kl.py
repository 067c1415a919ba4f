"""Rewards with a KL penalty per token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from llm_env.mdp.core import TokenMDP
from llm_env.tokens.arrays import BoolArray, FloatArray, IntArray
from llm_env.wrappers.layers import Layer, TokenWrapper
from llm_env.wrappers.penalty import KLPenalty


class KLRewardLayer(Layer):
    """Asks for the log-prob of every token, and takes the penalty off its reward."""

    def __init__(self, mdp: TokenMDP, beta: float, reference: Any, model: Any) -> None:
        super().__init__(mdp)
        self.penalty = KLPenalty(mdp, beta, reference, model)
        self.log_ratio = np.zeros(mdp.num_envs)

    def action_space(self, inside: spaces.Space[Any]) -> spaces.Space[Any]:
        """The token as it was, and its log-prob."""
        return spaces.Dict({"token": inside, "log_prob": spaces.Box(-np.inf, 0.0, (), np.float32)})

    def inner(self, action: Any) -> Any:
        """The token."""
        if not (isinstance(action, dict) and set(action) == {"token", "log_prob"}):
            raise TypeError(f"an action must be {{'token': ..., 'log_prob': ...}}, got {action!r}")
        return action["token"]

    def before(self, action: Any, tokens: Callable[[], IntArray], acting: BoolArray) -> None:
        """Work out the log-ratios while the reference model still stands before the token."""
        given = tokens()
        log_prob = np.asarray(action["log_prob"])
        if not given.shape == log_prob.shape == (self.mdp.num_envs,):
            raise ValueError(
                f"expected a token and a log_prob for each of {self.mdp.num_envs} rows, "
                f"got shapes {given.shape} and {log_prob.shape}"
            )
        rows = np.flatnonzero(acting)
        checked = self.mdp.state.check_actions(given[rows], rows)
        self.log_ratio = np.zeros(self.mdp.num_envs)
        self.log_ratio[rows] = self.penalty.log_ratio(rows, checked, log_prob[rows])
        self.expected = (rows, self.mdp.state.length[rows], checked)

    def after(self, acting: BoolArray, begun: BoolArray, reward: FloatArray) -> tuple[FloatArray, dict[str, Any]]:
        """The rewards less the penalty, and the log-ratios."""
        rows, places, tokens = self.expected
        if (changed := (self.mdp.state.tokens[rows, places] != tokens) & ~begun[rows]).any():
            raise RuntimeError(
                f"row {rows[changed][0]} was to write token {tokens[changed][0]}, but an action wrapper inside made it "
                "another: apply KLReward before that wrapper"
            )
        self.penalty.advance(np.flatnonzero(acting & ~begun))
        self.penalty.begin(np.flatnonzero(begun))
        return reward - self.penalty.beta * self.log_ratio, {"log_ratio": (self.log_ratio, acting)}

    def begin(self, begun: BoolArray) -> None:
        """The reference model reads the new texts."""
        self.penalty.begin(np.flatnonzero(begun))

    def close(self) -> None:
        """Free the reference engine, if the penalty made it."""
        self.penalty.close()


class KLReward(TokenWrapper):
    """Take `beta * (log pi(token) - log ref(token))` off the reward of every token.

    The environment cannot know how likely the agent was to choose a token, so an action becomes
    `{"token": ..., "log_prob": ...}`. The log-ratio is in `info["log_ratio"]`.

    Args:
        env: a `TokenEnv`, wrapped or not. For a batch there is `llm_env.wrappers.vector.KLReward`.
        beta: the weight of the penalty.
        reference: the reference model: an engine or the name of one; None: the model that the environment observes.
            An environment that is rebuilt from `spec` shares the engine, in slots of its own.
        model: which model a named engine serves; by default the environment's.

    Examples:
        >>> env = KLReward(gymnasium.make("llm_env/Copy-v0"), beta=0.1, reference="transformers")
        >>> observation, info = env.reset(seed=0)
        >>> observation, reward, *_, info = env.step({"token": 5, "log_prob": -1.0})
        >>> bool(np.isclose(reward, -0.1 * info["log_ratio"]))
        True
    """

    def __init__(
        self, env: gymnasium.Env[Any, Any], beta: float, reference: Any = None, model: str | None = None
    ) -> None:
        super().__init__(env, KLRewardLayer, beta=beta, reference=reference, model=model)
