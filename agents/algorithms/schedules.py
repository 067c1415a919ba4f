"""How what is large at the beginning of a run falls to 0 at its end."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

Decay: TypeAlias = Literal["constant", "linear", "cosine"]


def share_left(decay: Decay, progress: float) -> float:
    """What share of a beginning value is left when a run has come so far, from 0 to 1.

    Examples:
        >>> [share_left("constant", 0.25), share_left("linear", 0.25), round(share_left("cosine", 0.25), 3)]
        [1.0, 0.75, 0.854]
    """
    if decay == "constant":
        return 1.0
    progress = min(1.0, max(0.0, progress))
    return 1 - progress if decay == "linear" else (1 + math.cos(math.pi * progress)) / 2
