"""How a wrapper is written once, for batches, and applied to single and to vector environments alike.

A `Layer` is the rule. `TokenWrapper` applies it to a `TokenEnv`, a batch of one, and `TokenVectorWrapper` to a
`TokenVectorEnv`; the public wrappers are subclasses of these two that only name their layer and its arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np
import numpy.typing as npt
from gymnasium import spaces
from gymnasium.utils import RecordConstructorArgs
from gymnasium.vector import VectorEnv, VectorWrapper
from gymnasium.vector.utils import batch_space

from llm_env.mdp.core import TokenMDP
from llm_env.tokens.arrays import BoolArray, FloatArray, IntArray

if TYPE_CHECKING:
    _VectorWrapper = VectorWrapper[Any, Any, Any, Any, Any]
else:
    _VectorWrapper = VectorWrapper  # before Gymnasium 1.4 it had no parameters


class Layer:
    """What a wrapper does to a batch: every method may be overridden, and does nothing unless it is."""

    def __init__(self, mdp: TokenMDP) -> None:
        self.mdp = mdp

    def save(self, rows: IntArray) -> Any:
        """What this layer keeps for some rows."""

    def restore(self, rows: IntArray, saved: Any) -> None:
        """Episodes were copied into some rows; `saved` is what `save` gave for them, or None."""

    def action_space(self, inside: spaces.Space[Any]) -> spaces.Space[Any]:
        """The action space of one environment, given that of the environment inside."""
        return inside

    def observation_space(self, inside: spaces.Space[Any]) -> spaces.Space[Any]:
        """The observation space of one environment, given that of the environment inside."""
        return inside

    def inner(self, action: Any) -> Any:
        """The action of the environment inside, from one of ours."""
        return action

    def before(self, action: Any, tokens: Callable[[], IntArray], acting: BoolArray) -> None:
        """A step is about to be taken; `tokens` works out what will be written, in the rows that act."""

    def after(self, acting: BoolArray, begun: BoolArray, reward: FloatArray) -> tuple[FloatArray, dict[str, Any]]:
        """A step was taken; some rows may have begun anew. Gives rewards, and `key: (values, mask)` for the infos."""
        return reward, {}

    def begin(self, begun: BoolArray) -> None:
        """A reset has begun these rows."""

    def mask(self, action_mask: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Our action mask, from that of the environment inside, batched."""
        return action_mask

    def observe(self, observation: Any) -> Any:
        """Our observation, from that of the environment inside; batched or of one row."""
        return observation

    def close(self) -> None:
        """Free what this layer made; more than once does no harm."""


class AppliedLayer(RecordConstructorArgs):
    """What the two base wrappers share: the layer, a record of its arguments, and the tokens of an action."""

    layer: Layer
    env: Any

    def _make_layer(self, layer: Callable[..., Layer], mdp: TokenMDP, arguments: dict[str, Any]) -> None:
        # Gymnasium would copy the arguments, but a reference engine among them must stay the one that was given.
        RecordConstructorArgs.__init__(self, _disable_deepcopy=True, **arguments)
        self.layer = layer(mdp, **arguments)

    def tokens(self, action: Any) -> IntArray:
        """`[num_envs]` token ids, from a batch of our actions."""
        env: Any = self
        while isinstance(env, gymnasium.Wrapper | VectorWrapper):
            if isinstance(env, AppliedLayer):
                action = env.layer.inner(action)
            env = env.env
        return np.asarray(action)

    def __str__(self) -> str:
        return f"{type(self).__name__}({self.env})"

    __repr__ = __str__


class TokenWrapper(AppliedLayer, gymnasium.Wrapper[Any, Any, Any, Any]):
    """A layer around a `TokenEnv`, wrapped or not.

    Args:
        env: the environment.
        layer: makes the layer from the environment's `TokenMDP` and the arguments.
        **arguments: of the layer. They are what `env.spec` records, so a subclass must take them by the same names.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], layer: Callable[..., Layer], **arguments: Any) -> None:
        self._make_layer(layer, _mdp_of_single(env, type(self).__name__), arguments)
        gymnasium.Wrapper.__init__(self, env)
        self.action_space = self.layer.action_space(env.action_space)
        self.observation_space = self.layer.observation_space(env.observation_space)
        self.layer.mdp.followers.append(self.layer)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin a new episode."""
        observation, info = self.env.reset(seed=seed, options=options)
        self.layer.begin(np.ones(1, dtype=np.bool_))
        return self.layer.observe(observation), self._with_mask(info)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Take an action of this wrapper's action space."""
        batch = _batch_of_one(action)
        acting = self.layer.mdp.state.running
        self.layer.before(batch, lambda: self.tokens(batch), acting)
        observation, reward, terminated, truncated, info = self.env.step(_only_row(self.layer.inner(batch)))
        rewards, more = self.layer.after(acting, np.zeros(1, dtype=np.bool_), np.array([float(reward)]))
        info = {**info, **{key: values[0] for key, (values, mask) in more.items()}}
        return self.layer.observe(observation), float(rewards[0]), terminated, truncated, self._with_mask(info)

    def action_masks(self) -> BoolArray:
        """Which actions are allowed next, `[n]` bool, by the name that sb3-contrib's MaskablePPO looks for."""
        inside: BoolArray = self.env.get_wrapper_attr("action_masks")()
        ours: BoolArray = self.layer.mask(inside[None])[0]
        return ours

    def close(self) -> None:
        """Free what the layer and the environment hold."""
        self.layer.close()
        self.env.close()

    def _with_mask(self, info: dict[str, Any]) -> dict[str, Any]:
        if "action_mask" in info:
            info["action_mask"] = self.layer.mask(info["action_mask"][None])[0]
        return info


class TokenVectorWrapper(AppliedLayer, _VectorWrapper):
    """A layer around a `TokenVectorEnv`, wrapped or not.

    Args:
        env: the environment.
        layer: makes the layer from the environment's `TokenMDP` and the arguments.
        **arguments: of the layer.
    """

    def __init__(self, env: VectorEnv[Any, Any, Any], layer: Callable[..., Layer], **arguments: Any) -> None:
        self._make_layer(layer, _mdp_of_batch(env, type(self).__name__), arguments)
        VectorWrapper.__init__(self, env)
        self.single_action_space = self.layer.action_space(env.single_action_space)
        self.single_observation_space = self.layer.observation_space(env.single_observation_space)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.layer.mdp.followers.append(self.layer)

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin new episodes, in all rows or in those of `options["reset_mask"]`."""
        observation, info = self.env.reset(seed=seed, options=options)
        self.layer.begin(self.layer.mdp.begun)
        return self.layer.observe(observation), self._with_mask(info)

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Take an action of this wrapper's action space in every row."""
        acting = self.layer.mdp.state.running
        self.layer.before(actions, lambda: self.tokens(actions), acting)
        observation, reward, terminated, truncated, info = self.env.step(self.layer.inner(actions))
        reward, more = self.layer.after(acting, self.layer.mdp.begun, reward)
        for key, (values, mask) in more.items():
            info[key], info[f"_{key}"] = values, mask
        if "final_obs" in info:
            for row in np.flatnonzero(info["_final_obs"]):
                info["final_obs"][row] = self.layer.observe(info["final_obs"][row])
        return self.layer.observe(observation), reward, terminated, truncated, self._with_mask(info)

    def action_masks(self) -> BoolArray:
        """Which actions are allowed next, `[num_envs, n]` bool, by the name that masking algorithms look for."""
        env: Any = self.env
        while not hasattr(env, "action_masks"):
            env = env.env
        inside: BoolArray = env.action_masks()
        return self.layer.mask(inside)

    def close(self, **kwargs: Any) -> None:
        """Free what the layer and the environment hold."""
        self.layer.close()
        self.env.close(**kwargs)

    def _with_mask(self, info: dict[str, Any]) -> dict[str, Any]:
        if "action_mask" in info:
            info["action_mask"] = self.layer.mask(info["action_mask"])
        return info


def _mdp_of_single(env: Any, wrapper: str) -> TokenMDP:
    if isinstance(env, VectorEnv):
        raise TypeError(f"{wrapper} is for a single environment; for a batch use llm_env.wrappers.vector.{wrapper}")
    return _mdp_of(env)


def _mdp_of_batch(env: Any, wrapper: str) -> TokenMDP:
    if isinstance(env, gymnasium.Env):
        raise TypeError(f"vector.{wrapper} is for a batch; for a single environment use llm_env.wrappers.{wrapper}")
    return _mdp_of(env)


def _mdp_of(env: Any) -> TokenMDP:
    """The episodes inside an environment, wrapped or not."""
    mdp = getattr(env.unwrapped, "mdp", None) if isinstance(env, gymnasium.Env | VectorEnv) else None
    if not isinstance(mdp, TokenMDP):
        raise TypeError(f"these wrappers are for TokenEnv and TokenVectorEnv, got {env}")
    return mdp


def _batch_of_one(action: Any) -> Any:
    if isinstance(action, dict):
        return {key: np.asarray(value)[None] for key, value in action.items()}
    return np.asarray(action)[None]


def _only_row(batch: Any) -> Any:
    if isinstance(batch, dict):
        return {key: values[0] for key, values in batch.items()}
    return batch[0]
