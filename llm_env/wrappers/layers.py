"""How a wrapper is written once for batches and applied to single and to vector environments alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import gymnasium
import numpy as np
import numpy.typing as npt
from gymnasium import spaces
from gymnasium.vector import VectorEnv, VectorWrapper
from gymnasium.vector.utils import batch_space

from llm_env.mdp.core import TokenMDP
from llm_env.tasks.running import FloatArray
from llm_env.tokens.state import BoolArray
from llm_env.tokens.stopping import IntArray

AnyEnv = TypeVar("AnyEnv", gymnasium.Env[Any, Any], VectorEnv[Any, Any, Any])


class Layer:
    """What a wrapper does to a batch. The two shells below apply it to a vector environment, or to a batch of one."""

    name = ""

    def __init__(self, mdp: TokenMDP) -> None:
        self.mdp = mdp

    def save(self, rows: IntArray) -> Any:
        """What this layer keeps for some rows."""

    def restore(self, rows: IntArray, saved: Any) -> None:
        """Episodes were copied into some rows; `saved` is what `save` gave for them, or None."""

    def action_space(self, inside: spaces.Space[Any]) -> spaces.Space[Any]:
        """Of one environment, given that of the environment inside."""
        return inside

    def observation_space(self, inside: spaces.Space[Any]) -> spaces.Space[Any]:
        """Of one environment, given that of the environment inside."""
        return inside

    def inner(self, action: Any) -> Any:
        """The action of the environment inside, from one of ours."""
        return action

    def before(self, action: Any, tokens: Callable[[], IntArray], acting: BoolArray) -> None:
        """A step is about to be taken; `tokens` works out what will be written, in the rows that act."""

    def after(self, acting: BoolArray, begun: BoolArray, reward: FloatArray) -> tuple[FloatArray, dict[str, Any]]:
        """They were; some rows may have begun anew. Returns the reward, and `key: (values, mask)` for the infos."""
        return reward, {}

    def begin(self, begun: BoolArray) -> None:
        """A reset has begun these rows."""

    def mask(self, action_mask: npt.NDArray[np.int8]) -> npt.NDArray[np.int8]:
        """Our action mask, from that of the environment inside, batched."""
        return action_mask

    def observe(self, observation: Any) -> Any:
        """Our observation, from that of the environment inside; batched or of one row."""
        return observation

    def close(self) -> None:
        """Free what this layer made; more than once does no harm."""


class _Shell:
    """What the two shells share: the layer, and the tokens that an action comes down to."""

    layer: Layer
    env: Any

    def tokens(self, action: Any) -> IntArray:
        """`[num_envs]` token ids."""
        env: Any = self
        while isinstance(env, gymnasium.Wrapper | VectorWrapper):
            if isinstance(env, _Shell):
                action = env.layer.inner(action)
            env = env.env
        return np.asarray(action)

    def __str__(self) -> str:
        return f"{self.layer.name}({self.env})"

    __repr__ = __str__

    def close(self, **kwargs: Any) -> None:
        self.layer.close()
        self.env.close(**kwargs)


class _SingleShell(_Shell, gymnasium.Wrapper[Any, Any, Any, Any]):
    def __init__(self, env: gymnasium.Env[Any, Any], layer: Layer) -> None:
        gymnasium.Wrapper.__init__(self, env)
        self.layer = layer
        self.action_space = layer.action_space(env.action_space)
        self.observation_space = layer.observation_space(env.observation_space)

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        observation, info = self.env.reset(**kwargs)
        self.layer.begin(np.ones(1, dtype=np.bool_))
        return self.layer.observe(observation), self._with_mask(info)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        batch = (
            {k: np.asarray(v)[None] for k, v in action.items()}
            if isinstance(action, dict)
            else np.asarray(action)[None]
        )
        acting = self.layer.mdp.state.running
        self.layer.before(batch, lambda: self.tokens(batch), acting)
        observation, reward, terminated, truncated, info = self.env.step(self.layer.inner(batch)[0])
        rewards, more = self.layer.after(acting, np.zeros(1, dtype=np.bool_), np.array([float(reward)]))
        info = {**info, **{key: values[0] for key, (values, mask) in more.items()}}
        return self.layer.observe(observation), float(rewards[0]), terminated, truncated, self._with_mask(info)

    def _with_mask(self, info: dict[str, Any]) -> dict[str, Any]:
        if "action_mask" in info:
            info["action_mask"] = self.layer.mask(info["action_mask"][None])[0]
        return info


class _VectorShell(_Shell, VectorWrapper[Any, Any, Any, Any, Any]):
    def __init__(self, env: VectorEnv[Any, Any, Any], layer: Layer) -> None:
        VectorWrapper.__init__(self, env)
        self.layer = layer
        self.single_action_space = layer.action_space(env.single_action_space)
        self.single_observation_space = layer.observation_space(env.single_observation_space)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        observation, info = self.env.reset(seed=seed, options=options)
        self.layer.begin(self.layer.mdp.begun)
        return self.layer.observe(observation), self._with_mask(info)

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
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

    def _with_mask(self, info: dict[str, Any]) -> dict[str, Any]:
        if "action_mask" in info:
            info["action_mask"] = self.layer.mask(info["action_mask"])
        return info


def mdp_of(env: Any) -> TokenMDP:
    """The episodes inside an environment, wrapped or not."""
    mdp = getattr(env.unwrapped, "mdp", None)
    if not isinstance(mdp, TokenMDP):
        raise TypeError(f"these wrappers are for TokenEnv and TokenVectorEnv, got {env}")
    return mdp


def wrap(env: AnyEnv, layer: Layer) -> AnyEnv:
    """Apply a layer to an environment of either kind."""
    shell: Any = _VectorShell(env, layer) if isinstance(env, VectorEnv) else _SingleShell(env, layer)
    layer.mdp.followers.append(layer)
    return cast(AnyEnv, shell)
