"""The wrappers of `llm_env.wrappers` for `TokenVectorEnv`, under the same names.

Gymnasium keeps no record of the wrappers of a batch. So the `spec` of a wrapped vector environment is that of the
environment inside, and `gymnasium.make_vec(spec)` gives it without its wrappers: apply them again. Nor can the wrappers
recorded in the spec of a single environment be applied to a batch: `make_vec` refuses such a spec, except with
`vectorization_mode="sync"` or `"async"`, where it puts single environments side by side, each with its wrappers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium.vector import VectorEnv

from llm_env.wrappers.allowed import AllowedTokensLayer
from llm_env.wrappers.flat import FlatTokensLayer
from llm_env.wrappers.kl import KLRewardLayer
from llm_env.wrappers.layers import TokenVectorWrapper
from llm_env.wrappers.one_hot import OneHotTokensLayer
from llm_env.wrappers.scale import ScaleRewardLayer
from llm_env.wrappers.statistics import EpisodeStatisticsLayer
from llm_env.wrappers.top_k import TopKActionsLayer

__all__ = [
    "AllowedTokens",
    "EpisodeStatistics",
    "FlatTokens",
    "KLReward",
    "OneHotTokens",
    "ScaleReward",
    "TopKActions",
]


class AllowedTokens(TokenVectorWrapper):
    """Choose among a few tokens: an action is a number from 0, as algorithms without action masks need it.

    Args:
        env: a `TokenVectorEnv`, wrapped or not.
        tokens: their ids, or a text: its tokens, and those that end a text. By default those that the task allows at
            the beginning of an episode; what it allows then must not change.

    Examples:
        >>> import gymnasium
        >>> envs = gymnasium.make_vec("llm_env/Copy-v0", num_envs=2, task_kwargs={"alphabet": "abc"})
        >>> AllowedTokens(envs).action_space
        MultiDiscrete([4 4])
    """

    def __init__(self, env: VectorEnv[Any, Any, Any], tokens: str | Sequence[int] | None = None) -> None:
        super().__init__(env, AllowedTokensLayer, tokens=tokens)


class EpisodeStatistics(TokenVectorWrapper):
    """Report finished episodes in `info["rollout"]`: prompt, text, why it ended, return `r` and length `l`.

    The return is what the environment paid, wrappers inside this one included. `prompt_index` and `group` are those
    that `reset` reported when the episode began. (The first n episodes to end are the short ones: to evaluate on n
    prompts, wait for the first n groups instead, as `examples/rollout.py` does.) These are texts, in the step that ends
    an episode: wherever infos are stacked or made into tensors, leave this wrapper out.

    Args:
        env: a `TokenVectorEnv`, wrapped or not.

    Examples:
        >>> import gymnasium
        >>> envs = EpisodeStatistics(gymnasium.make_vec("llm_env/Copy-v0", num_envs=2, max_new_tokens=1))
        >>> observation, info = envs.reset(seed=0)
        >>> *_, info = envs.step(envs.unwrapped.mdp.vocabulary.encode("xy"))
        >>> [(episode["text"], str(episode["end"]), episode["l"]) for episode in info["rollout"]]
        [('x', 'budget', 1), ('y', 'budget', 1)]
    """

    def __init__(self, env: VectorEnv[Any, Any, Any]) -> None:
        super().__init__(env, EpisodeStatisticsLayer)


class FlatTokens(TokenVectorWrapper):
    """Observe the tokens alone, as one array; the places not yet written hold -1.

    Args:
        env: a `TokenVectorEnv`, wrapped or not.

    Examples:
        >>> import gymnasium
        >>> envs = FlatTokens(gymnasium.make_vec("llm_env/Addition-v0", num_envs=2))
        >>> observation, info = envs.reset(seed=0)
        >>> observation.shape, int(observation.min())
        ((2, 10), -1)
    """

    def __init__(self, env: VectorEnv[Any, Any, Any]) -> None:
        super().__init__(env, FlatTokensLayer)


class KLReward(TokenVectorWrapper):
    """Take `beta * (log pi(token) - log ref(token))` off the reward of every token.

    The environment cannot know how likely the agent was to choose a token, so an action becomes
    `{"token": ..., "log_prob": ...}`, each with a value per row. The log-ratios are in `info["log_ratio"]`.

    Args:
        env: a `TokenVectorEnv`, wrapped or not.
        beta: the weight of the penalty.
        reference: the reference model: an engine or the name of one; None: the model that the environment observes.
        model: which model a named engine serves; by default the environment's.

    Examples:
        >>> import gymnasium
        >>> envs = gymnasium.make_vec("llm_env/Copy-v0", num_envs=2)
        >>> envs = KLReward(envs, beta=0.1, reference="transformers")
        >>> observation, info = envs.reset(seed=0)
        >>> _, reward, *_, info = envs.step({"token": np.array([5, 6]), "log_prob": np.array([-1.0, -2.0])})
        >>> bool(np.allclose(reward, -0.1 * info["log_ratio"]))
        True
    """

    def __init__(
        self, env: VectorEnv[Any, Any, Any], beta: float, reference: Any = None, model: str | None = None
    ) -> None:
        super().__init__(env, KLRewardLayer, beta=beta, reference=reference, model=model)


class OneHotTokens(TokenVectorWrapper):
    """Observe the last few tokens as zeros and ones, for policies that take one array of floats (an MLP).

    Args:
        env: a `TokenVectorEnv`, wrapped or not.
        window: how many tokens; what lies further back is not seen.

    Examples:
        >>> import gymnasium
        >>> envs = OneHotTokens(gymnasium.make_vec("llm_env/Copy-v0", num_envs=2), window=4)
        >>> observation, info = envs.reset(seed=0)
        >>> observation.shape[1] == 4 * envs.unwrapped.mdp.vocabulary.size
        True
    """

    def __init__(self, env: VectorEnv[Any, Any, Any], window: int = 12) -> None:
        super().__init__(env, OneHotTokensLayer, window=window)


class ScaleReward(TokenVectorWrapper):
    """Multiply the reward of every step by `scale`, then clip it to `low` and `high`.

    Args:
        env: a `TokenVectorEnv`, wrapped or not.
        scale: the factor.
        low: the least reward of a step.
        high: the greatest.

    Examples:
        >>> import gymnasium
        >>> envs = gymnasium.make_vec("llm_env/Copy-v0", num_envs=2, task_kwargs={"length": 1}, max_new_tokens=1)
        >>> envs = ScaleReward(envs, scale=10.0, high=5.0)
        >>> observation, info = envs.reset(seed=0)
        >>> mdp = envs.unwrapped.mdp
        >>> answers = [mdp.vocabulary.encode(mdp.prompt(row).metadata["answer"])[0] for row in range(2)]
        >>> envs.step(np.array(answers))[1]
        array([5., 5.])
    """

    def __init__(
        self, env: VectorEnv[Any, Any, Any], scale: float = 1.0, low: float = -np.inf, high: float = np.inf
    ) -> None:
        super().__init__(env, ScaleRewardLayer, scale=scale, low=low, high=high)


class TopKActions(TokenVectorWrapper):
    """Choose among the language model's k likeliest tokens: an action is an index into `observation["top_ids"]`.

    The environment must be made with an engine and `observe="top_k"`. An action mask is that of those tokens.

    Args:
        env: a `TokenVectorEnv`, wrapped or not.

    Examples:
        >>> import gymnasium
        >>> envs = gymnasium.make_vec("llm_env/Copy-v0", num_envs=2, engine="transformers", observe="top_k", top_k=5)
        >>> TopKActions(envs).action_space
        MultiDiscrete([5 5])
    """

    def __init__(self, env: VectorEnv[Any, Any, Any]) -> None:
        super().__init__(env, TopKActionsLayer)
