"""Means over a few seeds, and how far they can be trusted. Infinity stands for "never"; nothing here drops it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

RESAMPLES = 4000


def iqm(values: npt.ArrayLike) -> Array:
    """The interquartile mean along the last axis: a quarter, rounded down, is left out at each end.

    One seed in five that never gets there is left out as the one that was fastest is; with two, the mean is infinite.
    """
    ordered = np.sort(np.asarray(values, dtype=np.float64), axis=-1)
    if not ordered.shape[-1]:
        raise ValueError("there are no values to take a mean of")
    cut = ordered.shape[-1] // 4
    return np.asarray(ordered[..., cut : ordered.shape[-1] - cut].mean(axis=-1))


def bootstrap(
    statistic: Callable[..., Array], *samples: Sequence[float] | Array, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """The 95% percentile interval of a statistic of one sample or several.

    Each sample is drawn from by itself (stratified), with replacement.

    Args:
        statistic: is given an array `[resamples, n]` for each sample, and gives `[resamples]`.
        *samples: at least one value each.
        seed: of what is drawn.
        resamples: how many.

    Returns:
        Its ends; NaN where the statistic was not defined for some of what was drawn (never over never, say).
    """
    rng = np.random.default_rng(seed)
    drawn = []
    for sample in samples:
        values = np.asarray(sample, dtype=np.float64)
        drawn.append(values[rng.integers(len(values), size=(resamples, len(values)))])
    found = statistic(*drawn)
    if np.isnan(found).any():
        return math.nan, math.nan
    # An order statistic, not between two: half the way from a number to infinity would be infinity, or NaN.
    low, high = np.quantile(found, [0.025, 0.975], method="inverted_cdf")
    return float(low), float(high)


def ratio_of_iqms(over: npt.ArrayLike, under: npt.ArrayLike) -> Array:
    """One interquartile mean over another; NaN for infinity over infinity, and for 0 over 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(iqm(over) / iqm(under))


def reached_at(xs: Sequence[float], scores: Sequence[float], threshold: float) -> float:
    """Where the line through the measured points first reaches a score; infinity if it never does."""
    for i, (x, score) in enumerate(zip(xs, scores, strict=True)):
        if score >= threshold:
            if i == 0:
                return float(x)
            before = scores[i - 1]
            return float(xs[i - 1] + (threshold - before) / (score - before) * (x - xs[i - 1]))
    return math.inf


def area(xs: Sequence[float], scores: Sequence[float], end: float) -> float:
    """The mean height of the line through the points from 0 to `end`; after its last point it stays level."""
    inner = [x for x in xs if 0 < x < end]
    grid = np.array([0.0, *inner, end])
    heights = np.interp(grid, xs, scores)
    return float(np.sum((heights[1:] + heights[:-1]) / 2 * np.diff(grid)) / end)


def summary_of(values: Sequence[float], seed: int = 0) -> dict[str, Any]:
    """The interquartile mean and its interval, by the names the report uses."""
    low, high = bootstrap(iqm, values, seed=seed)
    return {"iqm": float(iqm(values)), "low": low, "high": high}
