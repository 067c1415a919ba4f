"""What the environments report beside observations and rewards: numbers, each under a key of its own.

Buffers stack infos, and converters make tensors of them. A text is no tensor (Gymnasium's `NumpyToTorch` fails on one),
nested dictionaries are more than TorchRL reads, and a key that is there at some steps only leaves holes, which
Tianshou's buffer refuses unless a number can fill them. So these keys are there always:

- `prompt_index`: which prompt of the split the episode answers;
- `group`: which episodes it is to be compared with;
- `end_code`: why it is over, 0 while it is not; `llm_env.END_OF_CODE[code]` is the `End`;
- `score`: what the reward gave it, 0 while it is not over;

and these in the step that ends it:

- `score/NAME`: each part of the score;
- `token_scores`, if the reward scores tokens, too: `[max_new_tokens]`, one for each choice of the agent.

The texts themselves are in `env.mdp` and in the wrapper `EpisodeStatistics`.

The batched form is that of Gymnasium's vector environments: an array for each key, and under `_key` a mask of the rows
that it speaks of. It is built as arrays: Gymnasium's own helper, row by row, would cost more than the step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from llm_env.mdp.core import TokenMDP
from llm_env.tokens.arrays import BoolArray, FloatArray
from llm_env.tokens.episode import Episode


def row_info(mdp: TokenMDP, row: int, finished: Mapping[int, Episode]) -> dict[str, Any]:
    """The info of one episode as it stands.

    Args:
        mdp: the episodes.
        row: which one.
        finished: those that the step has ended, by row; none after a reset.
    """
    info: dict[str, Any] = {
        "prompt_index": int(mdp.prompt_index[row]),
        "group": int(mdp.group[row]),
        "end_code": int(mdp.state.end[row]),
        "score": 0.0,
    }
    return {**info, **dict(_scores(mdp, finished[row]))} if row in finished else info


def batch_info(mdp: TokenMDP, finished: Mapping[int, Episode], rows: BoolArray | None = None) -> dict[str, Any]:
    """The infos of all episodes.

    Args:
        mdp: the episodes.
        finished: those that the step has ended, by row; none after a reset.
        rows: `[num_envs]` the rows to tell of; by default all of them.
    """
    told = np.ones(mdp.num_envs, dtype=np.bool_) if rows is None else rows
    info: dict[str, Any] = {
        "prompt_index": mdp.prompt_index.copy(),
        "group": mdp.group.copy(),
        "end_code": mdp.state.end.copy(),
        "score": np.zeros(mdp.num_envs),
    }
    info.update({f"_{key}": told for key in info})
    for row, episode in finished.items():
        for key, value in _scores(mdp, episode):
            if key not in info:
                info[key] = np.zeros((mdp.num_envs, *np.shape(value)))
                info[f"_{key}"] = np.zeros(mdp.num_envs, dtype=np.bool_)
            info[key][row] = value
            info[f"_{key}"][row] = True
    return info


def _scores(mdp: TokenMDP, finished: Episode) -> Iterator[tuple[str, float | FloatArray]]:
    score = finished.score
    yield "score", score.total
    for name, part in score.parts.items():
        yield f"score/{name}", part
    if score.per_token is not None:
        padded = np.zeros(mdp.max_new_tokens)
        padded[: len(score.per_token)] = score.per_token
        yield "token_scores", padded
