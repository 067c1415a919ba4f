"""The Gymnasium environment for one episode at a time: a batch of one."""

from __future__ import annotations

from typing import Any, Unpack

import gymnasium
import numpy as np

from llm_env.envs.infos import row_info
from llm_env.envs.render import render_row
from llm_env.envs.spaces import action_space, observation_space
from llm_env.mdp.core import Arrays, SavedMDP, TokenMDP
from llm_env.mdp.options import MDPOptions
from llm_env.tasks.base import Task
from llm_env.tokens.arrays import BoolArray


class TokenEnv(gymnasium.Env[Arrays, np.int64]):
    """One episode of a language task; an action is the next token's id.

    For speed, use `TokenVectorEnv`: a step of 64 episodes costs little more than a step of one. What `info` holds is
    listed in `llm_env.envs.infos`; why an episode is over is `END_OF_CODE[info["end_code"]]`.

    Args:
        task: a registered name, a `Task`, or a subclass of it.
        render_mode: "ansi", to see the text with `render()`.
        **options: see `llm_env.mdp.core.TokenMDP`.

    Examples:
        >>> env = TokenEnv("Reverse", task_kwargs={"length": 3}, render_mode="ansi")
        >>> observation, info = env.reset(seed=0, options={"prompt_index": 0})
        >>> print(env.render().splitlines()[-1])
        [Reverse] token 0/4, return 0, running
        >>> observation, reward, terminated, truncated, info = env.step(env.mdp.vocabulary.encode("x")[0])
        >>> reward, terminated, truncated
        (0.0, False, False)
    """

    metadata: dict[str, Any] = {"render_modes": ["ansi"], "render_fps": 4}  # noqa: RUF012

    def __init__(
        self,
        task: str | Task | type[Task],
        *,
        render_mode: str | None = None,
        **options: Unpack[MDPOptions],
    ) -> None:
        if render_mode not in (None, "ansi"):
            # A TypeError, because that is what libraries which try "rgb_array" first are ready for.
            raise TypeError(f"render_mode must be None or 'ansi', got {render_mode!r}")
        self.render_mode = render_mode
        self.mdp = TokenMDP(task, 1, **options)
        self.observation_space = observation_space(self.mdp)  # type: ignore[assignment]
        self.action_space = action_space(self.mdp)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Arrays, dict[str, Any]]:
        """Begin a new episode; `options={"prompt_index": i}` begins it with prompt i of the split."""
        seed = None if seed is None else int(seed)
        super().reset(seed=seed)
        options = options or {}
        if unknown := set(options) - {"prompt_index"}:
            raise ValueError(f"unknown reset options {sorted(unknown)}; known is 'prompt_index'")
        index = options.get("prompt_index")
        self.mdp.reset(seed=seed, prompt_indices=None if index is None else [index])
        return self._observation(), self._with_mask(row_info(self.mdp, 0, {}))

    def step(self, action: np.int64 | int) -> tuple[Arrays, float, bool, bool, dict[str, Any]]:
        """Append one token."""
        state = self.mdp.state
        reward = self.mdp.step(np.reshape(action, -1))
        return (
            self._observation(),
            float(reward[0]),
            bool(state.terminated[0]),
            bool(state.truncated[0]),
            self._with_mask(row_info(self.mdp, 0, self.mdp.finished)),
        )

    def render(self) -> str | None:
        """The prompt, the text so far, and the return."""
        return render_row(self.mdp, 0) if self.render_mode == "ansi" else None

    def action_masks(self) -> BoolArray:
        """`[vocab_size]` the tokens that the task allows next, by the name that sb3-contrib's MaskablePPO looks for."""
        mask = self.mdp.action_mask()
        return np.ones(self.mdp.vocabulary.size, np.bool_) if mask is None else mask[0].astype(np.bool_)

    def save(self) -> SavedMDP:
        """Copy the episode out; see `restore`."""
        return self.mdp.save([0])

    def restore(self, saved: SavedMDP) -> Arrays:
        """Go back to a saved episode, as often as wanted; returns its observation."""
        self.mdp.restore([0], saved)
        return self._observation()

    def close(self) -> None:
        """Free what the environment holds."""
        self.mdp.close()

    def __repr__(self) -> str:
        return f"TokenEnv({self.mdp.task.name}, model={self.mdp.model!r}, context={self.mdp.context})"

    __str__ = __repr__

    def _observation(self) -> Arrays:
        return {name: array[0].copy() for name, array in self.mdp.observation(copy=False).items()}

    def _with_mask(self, info: dict[str, Any]) -> dict[str, Any]:
        mask = self.mdp.action_mask()
        return info if mask is None else {**info, "action_mask": mask[0]}
