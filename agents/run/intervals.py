"""A mean, and how sure it is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

RESAMPLES = 2000


def mean_with_interval(values: Sequence[float] | npt.NDArray[np.float64]) -> dict[str, float]:
    """The mean, and the middle 95% of what a percentile bootstrap over the values gives.

    Examples:
        >>> mean_with_interval([1.0, 1.0, 1.0])
        {'mean': 1.0, 'low': 1.0, 'high': 1.0}
    """
    data = np.asarray(values, dtype=np.float64)
    drawn = np.random.default_rng(0).integers(len(data), size=(RESAMPLES, len(data)))
    low, high = np.percentile(data[drawn].mean(1), [2.5, 97.5])
    return {"mean": float(data.mean()), "low": float(low), "high": float(high)}
