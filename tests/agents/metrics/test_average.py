"""Averages by hand: each metric is put together as the table says."""

from __future__ import annotations

import math

import pytest
import torch

from agents.metrics import Average


def test_means_weigh_tokens_and_extremes_do_not() -> None:
    average = Average()
    assert average.means() == {}
    average.add({"policy/entropy": torch.tensor(1.0), "ratio/max": 1.5, "ratio/min": 0.5}, tokens=30)
    average.add({"policy/entropy": 5.0, "ratio/max": torch.tensor(1.2), "ratio/min": 0.1, "late": 2.0}, tokens=10)
    assert average.means() == {"policy/entropy": 2.0, "late": 2.0, "ratio/max": 1.5, "ratio/min": 0.1}


def test_the_name_alone_decides_nothing() -> None:
    average = Average()
    average.add({"max_length": 1.0, "my/max": 1.0}, tokens=1)
    average.add({"max_length": 2.0, "my/max": 2.0}, tokens=1)
    assert average.means() == {"max_length": 1.5, "my/max": 1.5}


def test_extremes_of_negative_numbers() -> None:
    average = Average()
    average.add({"ratio/max": -3.0, "ratio/min": 3.0}, tokens=1)
    average.add({"ratio/max": -2.0, "ratio/min": 4.0}, tokens=1)
    assert average.means() == {"ratio/max": -2.0, "ratio/min": 3.0}


@pytest.mark.parametrize("name", ["policy/loss", "ratio/max", "ratio/min"])
@pytest.mark.parametrize("order", [[math.nan, 1.0], [1.0, math.nan], [1.0, math.nan, 2.0]])
def test_not_a_number_stays_one(name: str, order: list[float]) -> None:
    average = Average()
    for value in order:
        average.add({name: value}, 1)
    assert math.isnan(average.means()[name])
