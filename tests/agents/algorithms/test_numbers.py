"""The numbers of an iteration, by hand: padding is in none of them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict

from agents.algorithms.numbers import Average, batch_metrics, distinct, update_metrics
from agents.rollouts.packing import pack
from llm_env.tokens.episode import Episode
from rewards import Rollout, Score

NAN = math.nan


def test_averages_weigh_tokens() -> None:
    average = Average()
    assert len(average) == 0
    assert average.means() == {}
    average.add({"entropy": torch.tensor(1.0), "max_ratio": 1.5, "min_ratio": 0.5}, tokens=30)
    average.add({"entropy": 5.0, "max_ratio": torch.tensor(1.2), "min_ratio": 0.1, "late": 2.0}, tokens=10)
    assert average.means() == {"entropy": 2.0, "late": 2.0, "max_ratio": 1.5, "min_ratio": 0.1}


def test_an_average_can_still_be_not_a_number() -> None:
    average = Average()
    average.add({"loss": math.nan}, 1)
    average.add({"loss": 1.0}, 1)
    assert math.isnan(average.means()["loss"])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=2, max_size=6), st.integers(1, 4), st.integers(0, 10**6))
def test_moments_of_micro_batches_are_those_of_the_whole(lengths: list[int], size: int, seed: int) -> None:
    """What the losses report of values, put together: exactly the explained variance over all tokens."""
    from agents.losses.base import value_metrics

    random = torch.Generator().manual_seed(seed)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    data = TensorDict(
        {"mask": mask, "value_target": torch.randn(*mask.shape, 1, generator=random)}, batch_size=[len(lengths)]
    )
    value = torch.randn(*mask.shape, 1, generator=random)
    average = Average()
    for begin in range(0, len(lengths), size):
        part = data[begin : begin + size]
        average.add(value_metrics(part, value[begin : begin + size], None), float(part["mask"].sum()))
    means = average.means()
    target, residual = data["value_target"][mask], (data["value_target"] - value)[mask]
    assert means["residual_square"] - means["residual_mean"] ** 2 == pytest.approx(
        residual.var(correction=0).item(), abs=1e-5
    )
    assert means["target_square"] - means["target_mean"] ** 2 == pytest.approx(
        target.var(correction=0).item(), abs=1e-5
    )


def test_distinct_n() -> None:
    tokens = torch.tensor([[1, 2, 1, 2], [1, 2, 9, 9]])
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    assert distinct(tokens, mask, 1).item() == pytest.approx(2 / 6)
    assert distinct(tokens, mask, 2).item() == pytest.approx(2 / 4)  # 12, 21, 12; 12. None reaches over texts
    assert distinct(tokens, mask, 4).item() == 1
    assert distinct(tokens, mask, 5).isnan()
    assert distinct(tokens[1:], mask[1:], 3).isnan()
    # The same text again and again: what collapses.
    assert distinct(tokens[:1].repeat(10, 1), mask[:1].repeat(10, 1), 1).item() == pytest.approx(2 / 40)


def test_the_effective_sample_size_and_the_names() -> None:
    named = update_metrics({"mean_ratio": 1.5, "mean_squared_ratio": 2.5, "actor_norm": 3.0, "value_mean": 7.0})
    assert named == {"ratio/mean": 1.5, "policy/gradient_norm": 3.0, "ratio/ess": pytest.approx(0.9)}


def episodes() -> list[Episode]:
    def one(tokens: list[int], end: Any, score: Score) -> Episode:
        rollout = Rollout(np.array([9]), np.array(tokens), end=end)
        log_probs = -np.arange(1, len(tokens) + 1, dtype=np.float32)
        return Episode(rollout, score, log_probs, None, False, 0, 0)

    return [
        one([3, 3, 2], "eos", Score(1.0, {"right": 1.0, "style": 0.5})),
        one([3, 4, 5, 6], "budget", Score(0.0, {"right": 0.0, "style": 0.25})),
        one([2], "eos", Score(-0.5, {"right": 0.0})),
    ]


def scored(pad: int = 0) -> TensorDict:
    """With everything that PPO adds to a batch."""
    data = pack(episodes(), 0)
    mask = torch.nn.functional.pad(data["mask"], (0, pad))
    nothing = torch.full((3, pad), NAN)

    def wide(values: torch.Tensor) -> torch.Tensor:
        return torch.cat([values.float(), nothing], 1)

    steps = torch.arange(4.0).expand(3, 4)
    reward = wide(data["next", "reward"][..., 0])
    return TensorDict(
        {
            "mask": mask,
            "action": torch.nn.functional.pad(data["action"], (0, pad), value=50),
            "cut": data["cut"],
            "action_log_prob": wide(data["action_log_prob"]),
            "ref_log_prob": wide(data["action_log_prob"] - 0.5 * steps),
            "trainer_log_prob": wide(data["action_log_prob"] + 0.1),
            "behaviour_log_prob": wide(data["action_log_prob"]),
            "importance_weight": wide(1 + steps / 4),
            "shaped_reward": torch.where(mask, reward * 2, 0.0),
            "state_value": wide(steps)[..., None],
            "value_target": wide(2 * steps)[..., None],
            "next": TensorDict({"reward": reward[..., None]}, batch_size=[3]),
        },
        batch_size=[3],
    )


EXPECTED = {
    "reward/mean": 0.5 / 3,
    "reward/std": math.sqrt((1 + 0 + 0.25) / 3 - (0.5 / 3) ** 2),
    "reward/right": 1 / 3,
    "reward/style": 0.75 / 2,  # of those that have it
    "return/mean": 1 / 3,
    "text/length": 8 / 3,
    "text/truncated": 1 / 3,
    "text/eos": 2 / 3,
    "text/distinct_1": 5 / 8,  # 3 3 2, 3 4 5 6, 2
    "text/distinct_2": 1.0,  # 33 32, 34 45 56
    "kl/reference": 0.5 * (0 + 1 + 2 + 0 + 1 + 2 + 3 + 0) / 8,
    "kl/sequence": 0.5 * 9 / 3,
    "kl/mismatch": 0.1,
    "ratio/is_weight": 1 + 9 / 8 / 4,
    "value/mean": 9 / 8,
    "value/explained_variance": 0.75,
}


@pytest.mark.parametrize("pad", [0, 1, 3])
def test_the_numbers_of_a_batch_by_hand_whatever_its_padding(pad: int) -> None:
    """Promise 3."""
    assert batch_metrics(scored(pad), episodes()) == pytest.approx(EXPECTED, abs=1e-6)


def test_the_numbers_of_a_batch_do_not_hang_on_its_order() -> None:
    assert batch_metrics(scored()[[2, 0, 1]], episodes()) == pytest.approx(EXPECTED, abs=1e-6)


def test_only_what_is_known_is_reported() -> None:
    names = batch_metrics(pack(episodes(), 0), episodes()).keys()
    assert names == EXPECTED.keys() - {
        "return/mean",
        "kl/reference",
        "kl/sequence",
        "kl/mismatch",
        "ratio/is_weight",
        "value/mean",
        "value/explained_variance",
    }
