"""Where no text is better than another there is nothing to learn: exactly nothing, however means are rounded."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tensordict import TensorDict

from agents.algorithms.advantages import advantage_estimator
from agents.algorithms.grpo import compare_with_group
from agents.algorithms.rloo import compare_with_others
from agents.algorithms.shaping import shape_rewards
from agents.config import AdvantageConfig, RewardConfig
from agents.losses.ops import centred, deviation, explained_variance, whiten

NAN = math.nan
any_float32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
counts = st.lists(st.integers(1, 40), min_size=1, max_size=6)
limited = settings(max_examples=60, deadline=None)


def padded(rows: list[list[float]], padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`[B, T]` with NaN on padding, and its mask."""
    width = max(map(len, rows)) + padding
    mask = torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]
    values = torch.tensor([row + [NAN] * (width - len(row)) for row in rows], dtype=torch.float32)
    return values, mask


def batch(rows: list[list[float]], padding: int = 0) -> TensorDict:
    """Texts with these rewards, of tokens that were all but certain or not, and a critic that knows nothing."""
    reward, mask = padded(rows, padding)
    last = mask & ~torch.nn.functional.pad(mask, (0, 1))[:, 1:]
    return TensorDict(
        {
            "mask": mask,
            "action_log_prob": torch.where(mask, -torch.arange(mask.shape[1]).float() / 3, NAN),
            "cut": torch.zeros(len(rows), dtype=torch.bool),
            "group": torch.zeros(len(rows), dtype=torch.int64),
            "state_value": torch.zeros_like(reward)[..., None],
            "last_value": torch.zeros(len(rows)),
            "next": TensorDict(
                {
                    "reward": reward[..., None],
                    "done": last[..., None],
                    "truncated": torch.zeros_like(last)[..., None],
                },
                batch_size=[len(rows)],
            ),
        },
        batch_size=[len(rows)],
    )


@limited
@given(any_float32, counts, st.integers(0, 3))
@example(0.1, [9], 0)
@example(100.1, [8], 0)
@example(-3.4e38, [7, 7], 1)
@example(1e-45, [3], 1)
def test_equal_values_are_centred_and_whitened_to_zero(value: float, lengths: list[int], padding: int) -> None:
    values, mask = padded([[value] * length for length in lengths], padding)
    assert not centred(values, mask).any()
    assert not whiten(values, mask).any()
    assert deviation(values, mask).item() == 0
    for each in (centred(values, mask, dim=1), whiten(values, mask, dim=1)):
        assert not each.any()
    assert explained_variance(torch.zeros_like(values), values, mask).isnan()


@limited
@given(any_float32, counts, st.integers(0, 10**6))
@example(100.1, [8], 0)
def test_equal_returns_of_a_group_are_zero_beside_any_other(value: float, sizes: list[int], seed: int) -> None:
    """Each group has a number of its own; in any order."""
    groups = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    returns = torch.tensor(value) / (1 + groups)
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed))
    groups, returns = groups[order], returns[order]
    for compare in (
        lambda: compare_with_group(returns, groups),
        lambda: compare_with_group(returns, groups, whiten=False),
        lambda: compare_with_others(returns, groups),
    ):
        assert not compare().any()


@limited
@given(any_float32, counts, st.integers(0, 3))
@example(0.1, [1] * 6, 0)
def test_equal_totals_are_whitened_to_zero(value: float, lengths: list[int], padding: int) -> None:
    data = batch([[0.0] * (length - 1) + [value] for length in lengths], padding)
    assert not shape_rewards(data, RewardConfig(whiten=True)).any()


def test_equal_totals_that_come_token_by_token_are_whitened_to_zero() -> None:
    """Divided by next to nothing, the rewards of tokens would be hundreds of millions."""
    data = batch([[0.5, 0.5], [1.0], [0.25, 0.25, 0.5]], padding=1)
    assert not shape_rewards(data, RewardConfig(whiten=True)).any()
    dense = batch([[0.1] * 10, [1.0], [0.2] * 5])  # ten times 0.1 is not quite 1
    assert not shape_rewards(dense, RewardConfig(whiten=True)).any()


@pytest.mark.parametrize("kind", ["gae", "monte_carlo", "sequence", "group", "leave_one_out"])
@pytest.mark.parametrize("score", [0.1, 0.7, 100.1, -1e6])
def test_texts_of_one_score_have_no_advantages(kind: str, score: float) -> None:
    data = batch([[0.0] * (length - 1) + [score] for length in (3, 5, 5, 1, 4, 2, 6)], padding=2)
    reward = shape_rewards(data, RewardConfig())
    advantage, _ = advantage_estimator(kind)(data, reward, AdvantageConfig())
    assert not advantage.any()


def ulps_away(value: float, steps: int) -> float:
    """The float32 that lies so many numbers further on."""
    found = np.float32(value)
    for _ in range(steps):
        found = np.nextafter(found, np.float32(np.inf))
    return float(found)


Whitened = Callable[[torch.Tensor], torch.Tensor]
WAYS: dict[str, Whitened] = {
    "whiten": lambda values: whiten(values, torch.ones_like(values, dtype=torch.bool)),
    "group": lambda values: compare_with_group(values, torch.zeros_like(values)),
    "reward": lambda values: shape_rewards(batch(values[:, None].tolist()), RewardConfig(whiten=True)),
}


@pytest.mark.parametrize("way", WAYS)
@limited
@given(st.lists(st.integers(0, 4), min_size=1, max_size=20), st.floats(-(2.0**100), 2.0**100, width=32))
@example([0, 1], 0.1)
@example([0, 4], 1e-45)
def test_rounding_is_not_blown_up(way: str, steps: list[int], value: float) -> None:
    """Numbers a few units in the last place apart count as equal."""
    values = torch.tensor([ulps_away(value, step) for step in steps], dtype=torch.float32)
    assert not WAYS[way](values).any()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [1e-30, 1e-5, 1.0, 1e5, 1e30])
def test_small_differences_are_not_lost(way: str, size: float) -> None:
    """Half of the texts are better by a ten-thousandth; in which unit does not matter."""
    values = size * torch.tensor([1.0, 1.0001, 1.0001, 1.0])
    assert WAYS[way](values).flatten().tolist() == pytest.approx([-1, 1, 1, -1], rel=2e-3)
    other = size * torch.tensor([0.0, 4.0, 1.0, 3.0])
    expected = [each / math.sqrt(2.5) for each in (-2, 2, -1, 1)]
    assert WAYS[way](other).flatten().tolist() == pytest.approx(expected)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bad", [NAN, math.inf])
def test_what_is_no_number_is_not_hidden(way: str, bad: float) -> None:
    """The guard of the optimizer must see it."""
    assert not WAYS[way](torch.tensor([1.0, bad, 1.0])).isfinite().all()


def test_explained_variance_has_no_unit() -> None:
    """Rewards of a hundred-thousandth are explained as well as others."""
    target = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    mask = torch.ones(1, 4, dtype=torch.bool)
    for size in (1e-12, 1.0, 1e12):
        assert explained_variance(size * target / 2, size * target, mask).item() == pytest.approx(0.75)


def test_the_logged_deviation_of_equal_rewards_is_zero() -> None:
    from agents.algorithms.numbers import batch_metrics

    data = batch([[0.1]] * 9)
    data["action"], data["value_target"] = torch.zeros(9, 1, dtype=torch.int64), data["state_value"]
    assert batch_metrics(data, [])["reward/std"] == 0
