"""What the environments report beside observations and rewards.

The batched forms are those of Gymnasium's vector environments: an array for each key, and under `_key` a mask of the
rows that it speaks of. They are built as arrays: Gymnasium's own helper, row by row, would cost more than the step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from llm_env.mdp.core import TokenMDP
from llm_env.tokens.episode import Episode


def episode_info(mdp: TokenMDP, row: int) -> dict[str, Any]:
    """Of the episode in a row: which prompt of the split it answers, and the group of episodes it belongs to."""
    return {"prompt_index": int(mdp.prompt_index[row]), "group": int(mdp.group[row])}


def finished_info(finished: Episode) -> dict[str, Any]:
    """Of an episode that ends: why, the parts of its score, and its scores per token if the reward gives any."""
    info: dict[str, Any] = {"end": finished.rollout.end, "score": dict(finished.score.parts)}
    if finished.score.per_token is not None:
        info["token_scores"] = finished.score.per_token
    return info


def episode_infos(mdp: TokenMDP) -> dict[str, Any]:
    """`episode_info` of all rows; at every step, since some libraries expect the same keys always."""
    everyone = np.ones(mdp.num_envs, dtype=np.bool_)
    return {
        "prompt_index": mdp.prompt_index.copy(),
        "_prompt_index": everyone,
        "group": mdp.group.copy(),
        "_group": everyone,
    }


def finished_infos(finished: Mapping[int, Episode], num_envs: int) -> dict[str, Any]:
    """`finished_info` of several rows."""
    if not finished:
        return {}
    mask = np.zeros(num_envs, dtype=np.bool_)
    mask[list(finished)] = True
    ends = np.full(num_envs, None, dtype=object)
    score: dict[str, Any] = {}
    info: dict[str, Any] = {"end": ends, "_end": mask, "score": score, "_score": mask.copy()}
    for row, episode in finished.items():
        ends[row] = episode.rollout.end
        for name, value in episode.score.parts.items():
            if name not in score:
                score[name] = np.zeros(num_envs)
                score[f"_{name}"] = np.zeros(num_envs, dtype=np.bool_)
            score[name][row] = value
            score[f"_{name}"][row] = True
        if episode.score.per_token is not None:
            if "token_scores" not in info:
                info["token_scores"] = np.full(num_envs, None, dtype=object)
                info["_token_scores"] = np.zeros(num_envs, dtype=np.bool_)
            info["token_scores"][row] = episode.score.per_token
            info["_token_scores"][row] = True
    return info
