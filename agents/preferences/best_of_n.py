"""How good the best of n texts is, for every n, from one set of samples."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray


def best_of_n(judged: NDArray[Any], value: NDArray[Any], n: int) -> float:
    """The expected value of the text that is judged the best of n, without bias.

    Of a prompt's samples each set of n is as likely to be drawn as any other; the text with the k-th lowest judgement
    is the best of a set that has it and n - 1 of the k - 1 below it. The KL divergence of such a choice from the policy
    that wrote the texts is at most ln n - (n - 1) / n.

    Args:
        judged: `[prompts, samples]` what chooses, such as a reward model. Of equal ones, any is as likely.
        value: `[prompts, samples]` what is looked at, such as the true reward.
        n: from how many texts one is chosen.

    Examples:
        >>> judged = np.array([[1.0, 2.0, 3.0]])
        >>> [round(best_of_n(judged, judged, n), 3) for n in (1, 2, 3)]
        [2.0, 2.667, 3.0]
        >>> best_of_n(judged, -judged, 3)  # what is wrong with what it likes best
        -3.0
    """
    samples = judged.shape[1]
    if judged.shape != value.shape or not 1 <= n <= samples:
        raise ValueError(
            f"expected two arrays [prompts, samples] of one shape, and n from 1 to the number of samples, got "
            f"{judged.shape}, {value.shape} and n = {n}"
        )
    chance = np.array([math.comb(below, n - 1) / math.comb(samples, n) for below in range(samples)])
    total = 0.0
    for judgements, values in zip(judged, value, strict=True):
        order = np.argsort(judgements, kind="stable")
        _, where, counts = np.unique(judgements[order], return_inverse=True, return_counts=True)
        shared = np.bincount(where, weights=chance) / counts
        total += float(shared[where] @ values[order])
    return total / len(judged)
