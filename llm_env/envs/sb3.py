"""A Stable-Baselines3 `VecEnv` over the batched environment."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Unpack

import gymnasium
import numpy as np
import numpy.typing as npt
from gymnasium.vector import AutoresetMode, VectorEnv
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env.base_vec_env import VecEnv, VecEnvIndices

from llm_env.envs.vector import TokenVectorEnv
from llm_env.mdp.options import MDPOptions
from llm_env.tasks.base import Task
from llm_env.tokens.arrays import BoolArray, IntArray

_ENDED = ("final_obs", "final_info")


class SB3TokenVecEnv(VecEnv):
    """A batch of episodes for Stable-Baselines3, which rejects Gymnasium's own vector environments.

    Ended episodes begin anew within the step; their last observation is in `info["terminal_observation"]`, and
    `info["TimeLimit.truncated"]` says whether they were cut off, as Stable-Baselines3 expects. Returns and lengths go
    where its logger looks for them (`info["episode"]`).

    Observations are token ids, which Stable-Baselines3 casts to floats: give its policy a features extractor that
    casts them back and embeds them (`examples/sb3_ppo.py`).

    Args:
        task: a registered name, a `Task`, or a subclass of it; or a vector environment made already, wrapped or not,
            with `autoreset_mode="SameStep"`.
        num_envs: how many episodes live side by side.
        render_mode: "ansi", to see the texts.
        **options: see `llm_env.mdp.core.TokenMDP`.

    Examples:
        >>> envs = SB3TokenVecEnv("Reverse", num_envs=4)
        >>> sorted(envs.reset())
        ['length', 'prompt_length', 'tokens']
        >>> observation, reward, done, info = envs.step(np.zeros(4, dtype=int))
        >>> reward.tolist()
        [0.0, 0.0, 0.0, 0.0]
    """

    def __init__(
        self,
        task: str | Task | type[Task] | VectorEnv[Any, Any, Any],
        num_envs: int = 1,
        *,
        render_mode: str | None = None,
        **options: Unpack[MDPOptions],
    ) -> None:
        if isinstance(task, VectorEnv):
            mode = task.metadata.get("autoreset_mode")
            if options or num_envs not in (1, task.num_envs) or mode is not AutoresetMode.SAME_STEP:
                raise ValueError(
                    "a vector environment made already takes no further options and must have "
                    f"autoreset_mode='SameStep'; got {mode}, num_envs={num_envs} and options {options}"
                )
            self.envs: VectorEnv[Any, Any, Any] = task
        else:
            self.envs = TokenVectorEnv(
                task, num_envs, autoreset_mode=AutoresetMode.SAME_STEP, render_mode=render_mode, **options
            )
        if isinstance(self.envs.single_action_space, gymnasium.spaces.Dict):
            raise TypeError(f"Stable-Baselines3 has no actions such as {self.envs.single_action_space}")
        self.render_mode = self.envs.render_mode
        self._actions: IntArray | None = None
        super().__init__(self.envs.num_envs, self.envs.single_observation_space, self.envs.single_action_space)

    def reset(self) -> Any:
        """Begin new episodes in all rows."""
        seed = self._seeds[0]
        if any(self._options):
            raise ValueError(f"the rows share one stream of prompts and take no options of their own: {self._options}")
        observation, info = self.envs.reset(seed=seed)
        self.reset_infos = _by_rows(info, self.num_envs)
        self._reset_keys = list(self.reset_infos[0])
        self._reset_seeds()
        self._reset_options()
        self._return = np.zeros(self.num_envs)
        self._length = np.zeros(self.num_envs, dtype=np.int64)
        return observation

    def step_async(self, actions: npt.NDArray[Any]) -> None:
        """Remember the actions; `step_wait` takes them."""
        self._actions = np.asarray(actions)

    def step_wait(self) -> tuple[Any, npt.NDArray[np.float32], BoolArray, list[dict[str, Any]]]:
        """Take the actions."""
        if self._actions is None:
            raise ValueError("step_wait was called without step_async: call step(actions)")
        observation, reward, terminated, truncated, info = self.envs.step(self._actions)
        self._actions = None
        done = terminated | truncated
        self._return += reward
        self._length += 1
        infos = _by_rows({key: value for key, value in info.items() if key not in _ENDED}, self.num_envs)
        ended = np.flatnonzero(done).tolist()
        finals = _by_rows(info["final_info"], self.num_envs) if ended else []
        for row in ended:
            self.reset_infos[row] = {key: infos[row][key] for key in self._reset_keys}
            infos[row].update(finals[row])
            infos[row]["terminal_observation"] = info["final_obs"][row]
            infos[row]["TimeLimit.truncated"] = bool(truncated[row] and not terminated[row])
            infos[row]["episode"] = {"r": float(self._return[row]), "l": int(self._length[row])}
        self._return[done] = 0.0
        self._length[done] = 0
        return observation, reward.astype(np.float32), done, infos

    def seed(self, seed: int | None = None) -> Sequence[int | None]:
        """Seed the order of prompts, which all rows share, from the next reset on."""
        if seed is None:
            seed = int(np.random.SeedSequence().generate_state(1)[0])
        self._seeds = [seed] * self.num_envs
        return self._seeds

    def close(self) -> None:
        """Free what the environment holds."""
        self.envs.close()

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """An attribute of the batch, once for each row asked for."""
        value = self.render_mode if attr_name == "render_mode" else getattr(self._owner(attr_name), attr_name)
        return [value for _ in self._rows(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Set an attribute of the batch. It cannot differ between rows."""
        if len(list(self._rows(indices))) != self.num_envs:
            raise ValueError(f"the rows share one environment: {attr_name!r} cannot be set for some of them only")
        setattr(self._owner(attr_name), attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        """Call a method of the batch once; its result stands for each row asked for.

        `action_masks`, which masking algorithms call, gives each row its own.
        """
        result = getattr(self._owner(method_name), method_name)(*method_args, **method_kwargs)
        return [result[row] if method_name == "action_masks" else result for row in self._rows(indices)]

    def env_is_wrapped(
        self, wrapper_class: type[gymnasium.Wrapper[Any, Any, Any, Any]], indices: VecEnvIndices = None
    ) -> list[bool]:
        """Whether a row is wrapped: never by wrappers of single environments, but `Monitor`'s infos are given."""
        return [issubclass(wrapper_class, Monitor) for _ in self._rows(indices)]

    def get_images(self) -> Sequence[None]:
        """Texts have no images; `render` shows them."""
        return [None] * self.num_envs

    def render(self, mode: str | None = None) -> Any:
        """Each row's prompt, text and return."""
        return self.envs.render()

    def _owner(self, name: str) -> Any:
        """The outermost of the wrapped environments that has an attribute of this name."""
        env: Any = self.envs
        while not hasattr(env, name) and env is not env.unwrapped:
            env = env.env
        return env

    def _rows(self, indices: VecEnvIndices) -> Iterable[int]:
        return self._get_indices(indices)


def _by_rows(info: dict[str, Any], num_envs: int) -> list[dict[str, Any]]:
    """The infos of a vector environment as a dictionary for each row."""
    rows: list[dict[str, Any]] = [{} for _ in range(num_envs)]
    for key, value in info.items():
        if key.startswith("_"):
            continue
        values = _by_rows(value, num_envs) if isinstance(value, dict) else value
        if isinstance(values, np.ndarray) and values.ndim == 1:
            values = values.tolist()  # Python's own numbers
        for row in np.flatnonzero(info[f"_{key}"]).tolist():
            rows[row][key] = values[row]
    return rows
