"""Statistics of episodes that have ended."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np

from llm_env.mdp.core import TokenMDP
from llm_env.tokens.arrays import BoolArray, FloatArray, IntArray
from llm_env.tokens.episode import Episode
from llm_env.wrappers.layers import Layer, TokenWrapper


def describe(finished: Episode, episode_return: float) -> dict[str, Any]:
    """What is reported of a finished episode, with the return that was counted for it."""
    rollout = finished.rollout
    return {
        "r": episode_return,
        "l": rollout.num_actions,
        "prompt": rollout.prompt,
        "text": rollout.text,
        "transcript": rollout.transcript,
        "end": rollout.end,
        "prompt_index": finished.prompt_index,
        "group": finished.group,
    }


class EpisodeStatisticsLayer(Layer):
    """Adds up the rewards of every row, and reports the episodes that a step has ended."""

    def __init__(self, mdp: TokenMDP) -> None:
        super().__init__(mdp)
        self.returns = np.zeros(mdp.num_envs)

    def begin(self, begun: BoolArray) -> None:
        """Count from zero in these rows."""
        self.returns[begun] = 0.0

    def save(self, rows: IntArray) -> FloatArray:
        """The returns so far."""
        return self.returns[rows]

    def restore(self, rows: IntArray, saved: FloatArray | None) -> None:
        """Count on from the returns that were saved."""
        # An episode saved before this wrapper was there is known only by what the environment itself paid.
        self.returns[rows] = self.mdp.episode_return[rows] if saved is None else saved

    def after(self, acting: BoolArray, begun: BoolArray, reward: FloatArray) -> tuple[FloatArray, dict[str, Any]]:
        """The rewards as they are, and the statistics of the episodes that have ended."""
        self.returns += reward
        episodes = np.full(self.mdp.num_envs, None, dtype=object)
        mask = np.zeros(self.mdp.num_envs, dtype=np.bool_)
        for row, finished in self.mdp.finished.items():
            mask[row] = True
            episodes[row] = describe(finished, float(self.returns[row]))
            self.returns[row] = 0.0
        return reward, {"rollout": (episodes, mask)} if mask.any() else {}


class EpisodeStatistics(TokenWrapper):
    """Report a finished episode in `info["rollout"]`: prompt, text, why it ended, return `r` and length `l`.

    `text` is what the agent wrote, `transcript` has what the task replied as well.
    The return is what the environment paid, wrappers inside this one included. `prompt_index` and `group` are those
    that `reset` reported when the episode began. These are texts, in the step that ends an episode: wherever infos are
    stacked or made into tensors, leave this wrapper out.

    Args:
        env: a `TokenEnv`, wrapped or not. For a batch there is `llm_env.wrappers.vector.EpisodeStatistics`.

    Examples:
        >>> env = EpisodeStatistics(gymnasium.make("llm_env/Copy-v0", max_new_tokens=1))
        >>> observation, info = env.reset(seed=0)
        >>> observation, *_, info = env.step(int(env.unwrapped.mdp.vocabulary.encode("x")[0]))
        >>> info["rollout"]["text"], str(info["rollout"]["end"]), info["rollout"]["l"]
        ('x', 'budget', 1)
    """

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        super().__init__(env, EpisodeStatisticsLayer)
