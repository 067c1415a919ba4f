"""The batched Gymnasium environment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

import numpy as np
import numpy.typing as npt
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from llm_env.envs.infos import batch_info
from llm_env.envs.render import render_row
from llm_env.envs.spaces import action_space, observation_space
from llm_env.mdp.core import Arrays, SavedMDP, TokenMDP
from llm_env.mdp.options import MDPOptions
from llm_env.tasks.base import Task
from llm_env.tokens.arrays import BoolArray, FloatArray, IntArray
from llm_env.tokens.state import RUNNING

Step = tuple[Arrays, FloatArray, BoolArray, BoolArray, dict[str, Any]]


class TokenVectorEnv(VectorEnv[Arrays, IntArray, npt.NDArray[Any]]):
    """A batch of episodes of one language task; an action is the next token of each.

    Args:
        task: a registered name, a `Task`, or a subclass of it.
        num_envs: how many episodes live side by side.
        autoreset_mode: what happens to an episode that has ended. "NextStep": the next step ignores its action and
            begins a new one. "SameStep": a new one begins at once, and the end is in `info["final_obs"]` and
            `info["final_info"]`. "Disabled": it waits for `reset(options={"reset_mask": ...})`.
        render_mode: "ansi", to see the texts with `render()`.
        copy: observations are copies; False hands out the environment's own arrays, which the next step changes.
        **options: see `llm_env.mdp.core.TokenMDP`.

    What `info` holds is listed in `llm_env.envs.infos`: numbers only, so that Gymnasium's converters (`NumpyToTorch`)
    take it. With "SameStep" it has `final_obs`, too: an array of objects, as Gymnasium wants it, which they refuse.

    `reset` takes these options: `reset_mask` (`[num_envs]` bool, which rows begin anew) and `prompt_indices` (which
    prompts they begin with).

    Examples:
        >>> envs = TokenVectorEnv("Reverse", num_envs=2, task_kwargs={"length": 3})
        >>> observation, info = envs.reset(seed=0)
        >>> observation["tokens"].shape, observation["length"].shape
        ((2, 17), (2, 1))
        >>> observation, reward, terminated, truncated, info = envs.step(envs.mdp.vocabulary.encode("xy"))
        >>> from llm_env import END_OF_CODE
        >>> reward.shape, [END_OF_CODE[code].value for code in info["end_code"]]
        ((2,), ['running', 'running'])
    """

    metadata: dict[str, Any] = {"render_modes": ["ansi"], "render_fps": 4, "autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012

    def __init__(
        self,
        task: str | Task | type[Task],
        num_envs: int = 1,
        *,
        autoreset_mode: str | AutoresetMode = AutoresetMode.NEXT_STEP,
        render_mode: str | None = None,
        copy: bool = True,
        **options: Unpack[MDPOptions],
    ) -> None:
        if render_mode not in (None, "ansi"):
            # A TypeError, because that is what libraries which try "rgb_array" first are ready for.
            raise TypeError(f"render_mode must be None or 'ansi', got {render_mode!r}")
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        self._resets_next_step = self.autoreset_mode is AutoresetMode.NEXT_STEP
        self._resets_same_step = self.autoreset_mode is AutoresetMode.SAME_STEP
        self.metadata = {**type(self).metadata, "autoreset_mode": self.autoreset_mode}
        self.render_mode = render_mode
        self.mdp = TokenMDP(task, num_envs, **options)
        self.num_envs = num_envs
        self.single_observation_space = observation_space(self.mdp)
        self.single_action_space = action_space(self.mdp)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._copy = copy

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Arrays, dict[str, Any]]:
        """Begin new episodes, in all rows or in those of `options["reset_mask"]`.

        Args:
            seed: of the order of prompts, which all rows share: one number.
            options: see the class.
        """
        if seed is not None and not isinstance(seed, int | np.integer):
            raise TypeError(f"the rows draw from one shuffled list of prompts: seed must be one int, got {seed!r}")
        seed = None if seed is None else int(seed)
        super().reset(seed=seed)
        rows, prompt_indices = self._reset_options(options or {})
        self.mdp.reset(rows, seed=seed, prompt_indices=prompt_indices)
        return self.mdp.observation(self._copy), self._with_mask(batch_info(self.mdp, {}))

    def step(self, actions: IntArray) -> Step:
        """Append one token to every episode."""
        mdp, state = self.mdp, self.mdp.state
        if self._resets_next_step and len(ended := np.flatnonzero(state.end > RUNNING)):
            actions = np.asarray(actions)
            if actions.shape != (self.num_envs,):
                raise ValueError(
                    f"expected actions of shape ({self.num_envs},), one per row; got shape {actions.shape}"
                )
            acting = np.flatnonzero(state.end <= RUNNING)
            reward = mdp.step(actions[acting], acting)
            mdp.reset(ended)
        else:
            reward = mdp.step(actions)
        terminated, truncated = state.terminated, state.truncated
        if self._resets_same_step and mdp.finished:
            final = self._final()
            mdp.reset(list(mdp.finished))
            info = {**batch_info(mdp, {}), **final}
        else:
            info = batch_info(mdp, mdp.finished)
        return mdp.observation(self._copy), reward, terminated, truncated, self._with_mask(info)

    def render(self) -> tuple[str, ...] | None:
        """Each row's prompt, text and return."""
        if self.render_mode is None:
            return None
        return tuple(render_row(self.mdp, row) for row in range(self.num_envs))

    def action_masks(self) -> BoolArray:
        """`[num_envs, vocab_size]` the tokens that the task allows, by the name that masking algorithms look for."""
        mask = self.mdp.action_mask()
        return np.ones((self.num_envs, self.mdp.vocabulary.size), np.bool_) if mask is None else mask.astype(np.bool_)

    def save_rows(self, rows: Sequence[int]) -> SavedMDP:
        """Copy episodes out; see `restore_rows`."""
        return self.mdp.save(rows)

    def restore_rows(self, rows: Sequence[int], saved: SavedMDP) -> Arrays:
        """Put saved episodes back, into the same rows or others, or one into many; returns the observation."""
        self.mdp.restore(rows, saved)
        return self.mdp.observation(self._copy)

    def __repr__(self) -> str:
        mdp = self.mdp
        return f"TokenVectorEnv({mdp.task.name}, num_envs={self.num_envs}, model={mdp.model!r}, context={mdp.context})"

    def close_extras(self, **kwargs: Any) -> None:
        """Free what the environment holds."""
        self.mdp.close()

    def _with_mask(self, info: dict[str, Any]) -> dict[str, Any]:
        if (mask := self.mdp.action_mask()) is not None:
            info["action_mask"], info["_action_mask"] = mask, np.ones(self.num_envs, dtype=np.bool_)
        return info

    def _final(self) -> dict[str, Any]:
        """The last observations and infos of episodes that are about to give way to new ones."""
        observation, finished = self.mdp.observation(copy=False), self.mdp.finished
        mask = np.zeros(self.num_envs, dtype=np.bool_)
        mask[list(finished)] = True
        last = np.full(self.num_envs, None, dtype=object)
        for row in finished:
            last[row] = {name: array[row].copy() for name, array in observation.items()}
        final_info = batch_info(self.mdp, finished, mask)
        return {"final_obs": last, "_final_obs": mask, "final_info": final_info, "_final_info": mask.copy()}

    def _reset_options(self, options: dict[str, Any]) -> tuple[IntArray | None, Any]:
        if unknown := set(options) - {"reset_mask", "prompt_indices"}:
            raise ValueError(f"unknown reset options {sorted(unknown)}; known are 'reset_mask' and 'prompt_indices'")
        mask = options.get("reset_mask")
        if mask is None:
            return None, options.get("prompt_indices")
        if not (isinstance(mask, np.ndarray) and mask.dtype == np.bool_ and mask.shape == (self.num_envs,)):
            raise ValueError(f"reset_mask must be a bool array of shape ({self.num_envs},), got {mask!r}")
        return np.flatnonzero(mask), options.get("prompt_indices")
