"""The best of n: what is expected of it, beside every set of n texts written out."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from agents import best_of_n


@pytest.mark.parametrize("n", range(1, 7))
def test_it_is_the_mean_over_all_sets(n: int) -> None:
    rng = np.random.default_rng(0)
    judged, value = rng.normal(size=(3, 6)), rng.normal(size=(3, 6))
    means = [
        np.mean(
            [values[max(chosen, key=lambda text: judgements[text])] for chosen in itertools.combinations(range(6), n)]
        )
        for judgements, values in zip(judged, value, strict=True)
    ]
    assert best_of_n(judged, value, n) == pytest.approx(np.mean(means), abs=1e-12)


@pytest.mark.parametrize("n", range(1, 6))
def test_of_equal_ones_any_is_as_likely(n: int) -> None:
    """As if all orders of the equal ones were tried, and the first of the best were taken."""
    judged, value = np.array([1, 0, 1, 0, 1]), np.array([5.0, 1.0, 2.0, -3.0, 0.5])
    means = []
    for order in itertools.permutations(range(5)):
        sets = itertools.combinations(order, n)
        means.append(np.mean([value[max(chosen, key=lambda text: judged[text])] for chosen in sets]))
    assert best_of_n(judged[None], value[None], n) == pytest.approx(np.mean(means), abs=1e-12)


@pytest.mark.parametrize("n", [0, 4])
def test_n_that_cannot_be(n: int) -> None:
    with pytest.raises(ValueError, match=rf"n from 1 to the number of samples, got \(2, 3\), \(2, 3\) and n = {n}"):
        best_of_n(np.zeros((2, 3)), np.zeros((2, 3)), n)
