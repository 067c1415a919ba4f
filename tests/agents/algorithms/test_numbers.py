"""The numbers of an iteration, by hand: padding is in none of them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from agents.algorithms.numbers import batch_metrics, distinct
from agents.rollouts.packing import pack
from llm_env.tokens.episode import Episode
from rewards import Rollout, Score

NAN = math.nan


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
    "text/cut": 1 / 3,
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


def test_the_numbers_of_a_batch_do_not_depend_on_its_order() -> None:
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
