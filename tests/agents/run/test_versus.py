"""Win rates and variety: by hand, and what length has to do with winning."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from agents.run.versus import at_zero, self_bleu, win_rate


def rows(scores: list[list[float]], lengths: list[list[int]] | None = None) -> list[dict[str, Any]]:
    """`[prompts][samples]` as rows, and a greedy text for each prompt that must not count."""
    made: list[dict[str, Any]] = []
    for index, group in enumerate(scores):
        for place, score in enumerate(group):
            length = lengths[index][place] if lengths else 3
            common = {"prompt_index": index, "prompt": f"p{index}", "text": "x" * length}
            made.append({**common, "sample": place, "score": score})
        made.append({"prompt_index": index, "prompt": f"p{index}", "sample": None, "text": "", "score": 99.0})
    return made


def test_each_with_each() -> None:
    """Of the first prompt 3 of 4 are won and one is a tie; of the second all of 2 are lost."""
    found = win_rate(rows([[2, 3], [0]]), rows([[1, 2], [1, 1]]))
    assert found["wins"]["mean"] == pytest.approx((3.5 / 4 + 0) / 2)
    assert found["prompts"] == 2


def test_what_the_other_has_not_is_left_out() -> None:
    assert win_rate(rows([[2], [0], [5]]), rows([[1]]))["prompts"] == 1
    with pytest.raises(ValueError, match="no prompt in common"):
        win_rate(rows([[1]]), [])


def test_a_judge_who_likes_length_only() -> None:
    """Scores are lengths: ours wins most, being longer, and at equal length nobody does."""
    rng = np.random.default_rng(0)
    ours, theirs = rng.integers(20, 60, size=(100, 2)), rng.integers(10, 50, size=(100, 2))
    found = win_rate(
        rows(ours.astype(float).tolist(), ours.tolist()), rows(theirs.astype(float).tolist(), theirs.tolist())
    )
    assert found["wins"]["mean"] > 0.65
    assert found["wins_at_equal_length"] == pytest.approx(0.5, abs=0.03)


def test_the_regression_finds_what_made_the_wins() -> None:
    rng = np.random.default_rng(0)
    difference = rng.normal(3, 4, size=20000)
    wins = (rng.random(20000) < 1 / (1 + np.exp(-(-0.4 + 0.5 * difference)))).astype(float)
    assert at_zero(wins, difference) == pytest.approx(1 / (1 + math.exp(0.4)), abs=0.02)
    assert at_zero(np.array([1.0, 0.0, 1.0, 1.0]), np.zeros(4)) == pytest.approx(0.75, abs=1e-4)


def test_self_bleu_by_hand() -> None:
    """abcd and abce: 3 of 4 letters, 2 of 3 pairs, 1 of 2 triples, none of the fours."""
    both = [[1, 2, 3, 4], [1, 2, 3, 5]]
    assert self_bleu([both], longest=3) == pytest.approx((3 / 4 * 2 / 3 * 1 / 2) ** (1 / 3))
    assert self_bleu([both]) == 0.0
    # A short text within a long one: all n-grams match, and the penalty is exp(1 - 6 / 3); the long one has 1/2 * 2/5 *
    short = self_bleu([[[1, 2, 3], [1, 2, 3, 4, 5, 6]]], longest=2)
    assert short == pytest.approx((math.exp(1 - 6 / 3) + math.sqrt(3 / 6 * 2 / 5)) / 2)
    assert self_bleu([[[1, 2]]]) == self_bleu([]) == 0.0
