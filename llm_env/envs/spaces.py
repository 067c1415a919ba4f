"""The Gymnasium spaces of a `TokenMDP`, for one environment; the batched faces batch them."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces

from llm_env.mdp.core import TokenMDP


def action_space(mdp: TokenMDP) -> spaces.Discrete:
    """The next token's id."""
    return spaces.Discrete(mdp.vocabulary.size)


def observation_space(mdp: TokenMDP) -> spaces.Dict[Any]:
    """A Dict of boxes. Counts have shape `(1,)`, not `()`: several libraries flatten each entry and need an axis."""
    boxes: dict[str, spaces.Space[Any]] = {
        "tokens": spaces.Box(0, mdp.vocabulary.size - 1, (mdp.context,), np.int64),
        "length": spaces.Box(0, mdp.context, (1,), np.int64),
        "prompt_length": spaces.Box(0, mdp.context, (1,), np.int64),
    }
    for name, array in mdp.observer.arrays.items():
        if array.dtype == np.int64:
            boxes[name] = spaces.Box(0, mdp.vocabulary.size - 1, array.shape[1:], np.int64)
        else:
            boxes[name] = spaces.Box(-np.inf, np.inf, array.shape[1:], np.float32)
    if mdp.observes_mask:
        boxes["action_mask"] = spaces.MultiBinary(mdp.vocabulary.size)
    return spaces.Dict(boxes)
