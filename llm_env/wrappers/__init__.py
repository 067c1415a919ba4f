"""Wrappers for `TokenEnv` and `TokenVectorEnv`. Each function takes either and gives back the same kind.

Gymnasium's own wrappers work as well; for a reward that is only scaled or clipped, `scale_reward` picks the right one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt
from gymnasium import spaces
from gymnasium.vector import VectorEnv

from llm_env.mdp.core import TokenMDP
from llm_env.tasks.running import FloatArray
from llm_env.tokens.episode import Episode
from llm_env.tokens.state import BoolArray
from llm_env.tokens.stopping import IntArray
from llm_env.wrappers.layers import AnyEnv, Layer, mdp_of, wrap
from llm_env.wrappers.penalty import KLPenalty


def flat_tokens(env: AnyEnv) -> AnyEnv:
    """Observe the tokens alone, as one array; the places not yet written hold -1.

    Examples:
        >>> env = flat_tokens(gymnasium.make("llm_env/Addition-v0"))
        >>> observation, info = env.reset(seed=0)
        >>> env.observation_space.shape, int(observation.min())
        ((10,), -1)
    """
    return wrap(env, _FlatTokens(mdp_of(env)))


def top_k_actions(env: AnyEnv) -> AnyEnv:
    """Choose among the language model's k likeliest tokens: an action is an index into `observation["top_ids"]`.

    The environment must be made with an engine and `observe="top_k"`. An action mask is that of those tokens.

    Examples:
        >>> env = gymnasium.make("llm_env/Copy-v0", engine="transformers", observe="top_k", top_k=5)
        >>> top_k_actions(env).action_space
        Discrete(5)
    """
    return wrap(env, _TopKActions(mdp_of(env)))


def kl_reward(env: AnyEnv, beta: float, reference: Any = None, model: Any = None) -> AnyEnv:
    """Take `beta * (log pi(token) - log ref(token))` off the reward of every token.

    The environment cannot know how likely the agent was to choose a token, so an action becomes
    `{"token": ..., "log_prob": ...}`. The log-ratios are in `info["log_ratio"]`.

    Args:
        env: the environment.
        beta: the weight of the penalty.
        reference: the reference model: an engine or the name of one; None: the model that the environment observes.
        model: which model a named engine serves; by default the environment's.

    Examples:
        >>> env = kl_reward(gymnasium.make("llm_env/Copy-v0"), beta=0.1, reference="transformers")
        >>> observation, info = env.reset(seed=0)
        >>> observation, reward, *_, info = env.step({"token": 5, "log_prob": -1.0})
        >>> bool(np.isclose(reward, -0.1 * info["log_ratio"]))
        True
    """
    return wrap(env, _KLReward(mdp_of(env), KLPenalty(mdp_of(env), beta, reference, model)))


def episode_statistics(env: AnyEnv) -> AnyEnv:
    """Report finished episodes in `info["rollout"]`: prompt, text, why it ended, return `r` and length `l`.

    The return is what the environment paid, wrappers inside this one included. `prompt_index` and `group` are those
    that `reset` reported when the episode began. (The first n episodes to end are the short ones: to evaluate on n
    prompts, wait for the first n groups instead, as `examples/rollout.py` does.)

    Examples:
        >>> env = episode_statistics(gymnasium.make("llm_env/Copy-v0", max_new_tokens=1))
        >>> observation, info = env.reset(seed=0)
        >>> observation, *_, info = env.step(int(env.unwrapped.mdp.vocabulary.encode("x")[0]))
        >>> info["rollout"]["text"], info["rollout"]["end"], info["rollout"]["l"]
        ('x', 'budget', 1)
    """
    return wrap(env, _EpisodeStatistics(mdp_of(env)))


def scale_reward(env: AnyEnv, scale: float = 1.0, low: float = -np.inf, high: float = np.inf) -> AnyEnv:
    """Multiply the reward of every step by `scale`, then clip it to `low` and `high`.

    Examples:
        >>> env = scale_reward(gymnasium.make("llm_env/Copy-v0"), scale=10.0, high=5.0)
    """
    if not low <= high:
        raise ValueError(f"low must not be above high, got low={low}, high={high}")

    def transform(reward: Any) -> Any:
        return np.clip(reward * scale, low, high)

    if isinstance(env, VectorEnv):
        return gymnasium.wrappers.vector.TransformReward(env, transform)
    return gymnasium.wrappers.TransformReward(env, transform)


class _FlatTokens(Layer):
    name = "flat_tokens"

    def observation_space(self, inside: spaces.Space[Any]) -> spaces.Space[Any]:
        return spaces.Box(-1, self.mdp.vocabulary.size - 1, (self.mdp.context,), np.int64)

    def observe(self, observation: Any) -> Any:
        written = np.arange(self.mdp.context) < observation["length"]
        return np.where(written, observation["tokens"], -1)


class _TopKActions(Layer):
    name = "top_k_actions"

    def __init__(self, mdp: TokenMDP) -> None:
        super().__init__(mdp)
        if "top_ids" not in mdp.observer.arrays:
            raise ValueError("top-k actions need an environment made with engine='transformers', observe='top_k'")
        self.k = mdp.observer.arrays["top_ids"].shape[1]

    def mask(self, action_mask: npt.NDArray[np.int8]) -> npt.NDArray[np.int8]:
        return np.take_along_axis(action_mask, self.mdp.observer.arrays["top_ids"], axis=1)

    def action_space(self, inside: spaces.Space[Any]) -> spaces.Space[Any]:
        if not isinstance(inside, spaces.Discrete):
            raise TypeError(f"top_k_actions needs actions that are tokens, got {inside}: apply it before kl_reward")
        return spaces.Discrete(self.k)

    def inner(self, action: Any) -> Any:
        index = np.asarray(action)
        if index.shape != (self.mdp.num_envs,):
            raise ValueError(f"expected {self.mdp.num_envs} actions, one per row; got shape {index.shape}")
        if index.dtype.kind not in "iu" or ((index < 0) | (index >= self.k)).any():
            raise ValueError(f"an action must be an index from 0 to {self.k - 1} into the top {self.k}, got {action!r}")
        return self.mdp.observer.arrays["top_ids"][np.arange(self.mdp.num_envs), index]


class _KLReward(Layer):
    name = "kl_reward"

    def __init__(self, mdp: TokenMDP, penalty: KLPenalty) -> None:
        super().__init__(mdp)
        self.penalty = penalty
        self.log_ratio = np.zeros(mdp.num_envs)

    def action_space(self, inside: spaces.Space[Any]) -> spaces.Space[Any]:
        return spaces.Dict({"token": inside, "log_prob": spaces.Box(-np.inf, 0.0, (), np.float32)})

    def inner(self, action: Any) -> Any:
        if not (isinstance(action, dict) and set(action) == {"token", "log_prob"}):
            raise TypeError(f"an action must be {{'token': ..., 'log_prob': ...}}, got {action!r}")
        return action["token"]

    def before(self, action: Any, tokens: Callable[[], IntArray], acting: BoolArray) -> None:
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
        rows, places, tokens = self.expected
        if (changed := (self.mdp.state.tokens[rows, places] != tokens) & ~begun[rows]).any():
            raise RuntimeError(
                f"row {rows[changed][0]} was to write token {tokens[changed][0]}, but an action wrapper inside made it "
                "another: apply kl_reward before that wrapper"
            )
        self.penalty.advance(np.flatnonzero(acting & ~begun))
        self.penalty.begin(np.flatnonzero(begun))
        return reward - self.penalty.beta * self.log_ratio, {"log_ratio": (self.log_ratio, acting)}

    def begin(self, begun: BoolArray) -> None:
        self.penalty.begin(np.flatnonzero(begun))

    def close(self) -> None:
        self.penalty.close()


class _EpisodeStatistics(Layer):
    name = "episode_statistics"

    def __init__(self, mdp: TokenMDP) -> None:
        super().__init__(mdp)
        self.returns = np.zeros(mdp.num_envs)

    def begin(self, begun: BoolArray) -> None:
        self.returns[begun] = 0.0

    def save(self, rows: IntArray) -> FloatArray:
        return self.returns[rows]

    def restore(self, rows: IntArray, saved: FloatArray | None) -> None:
        # An episode saved before this wrapper was there is known only by what the environment itself paid.
        self.returns[rows] = self.mdp.episode_return[rows] if saved is None else saved

    def after(self, acting: BoolArray, begun: BoolArray, reward: FloatArray) -> tuple[FloatArray, dict[str, Any]]:
        self.returns += reward
        episodes = np.full(self.mdp.num_envs, None, dtype=object)
        mask = np.zeros(self.mdp.num_envs, dtype=np.bool_)
        for row, finished in self.mdp.finished.items():
            mask[row] = True
            episodes[row] = _statistics(finished, float(self.returns[row]))
            self.returns[row] = 0.0
        return reward, {"rollout": (episodes, mask)} if mask.any() else {}


def _statistics(finished: Episode, episode_return: float) -> dict[str, Any]:
    rollout = finished.rollout
    return {
        "r": episode_return,
        "l": rollout.num_actions,
        "prompt": rollout.prompt,
        "text": rollout.text,
        "end": rollout.end,
        "prompt_index": finished.prompt_index,
        "group": finished.group,
    }
