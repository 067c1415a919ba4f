"""Which warnings come, when, and how often."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from typing import Any

import pytest
import torch

from agents.config import GuardConfig, TrainConfig
from agents.report.warnings import Warnings

NAN = math.nan
HEALTHY = {
    "reward/mean": 0.5,
    "reward/std": 0.3,
    "reward/failures": 0.0,
    "kl/reference": 0.1,
    "kl/old": 0.01,
    "kl/mismatch": 0.01,
    "policy/entropy": 1.0,
    "value/explained_variance": 0.5,
    "text/length": 20.0,
    "text/cut": 0.1,
    "guard/skipped": 0.0,
    "guard/unscored": 0.0,
}
Course = list[dict[str, float]]


def said(course: Course, warnings: Warnings | None = None, first: int = 1) -> dict[int, list[str]]:
    """What is said in which iteration of a run that is healthy but for what `course` says of each."""
    warnings = warnings or Warnings(GuardConfig())
    heard = {
        first + place: warnings.look({"iteration": first + place, **HEALTHY, **row}) for place, row in enumerate(course)
    }
    return {iteration: sentences for iteration, sentences in heard.items() if sentences}


@pytest.mark.parametrize(
    ("course", "iteration", "words"),
    [
        ([{"reward/std": 0.0, "reward/mean": 0.0}] * 4, 3, r"In each of the last 3 iterations .* reward \(now 0\)"),
        ([{"reward/std": 1e-9, "reward/mean": 0.1}] * 4, 3, r"same reward \(now 0.1\)"),
        ([{}, {"kl/reference": 1.5}], 2, "1.5 nats per token away from the reference"),
        ([{}, {"kl/old": 1.5}], 2, "One iteration moved the policy by 1.5 nats"),
        ([{}, {"policy/entropy": 0.005}], 2, "The entropy has fallen to 0.005 nats"),
        ([{}] * 6 + [{"text/length": 31.0}], 7, "have grown to 31 tokens, from 20"),
        ([{}] * 6 + [{"text/cut": 0.6}], 7, "60% of the texts are cut off before they end, 10%"),
        ([{"value/explained_variance": -0.01}] * 10, 10, "explained variance was not above 0 for 10 iterations"),
        ([{}, {"kl/mismatch": 0.2}], 2, "disagree by 0.2 nats per token"),
        ([{}, {"kl/mismatch": 0.2, "rollout/behind": 1.0}], 2, "try a smaller --rollout.ahead"),
        ([{}, {"reward/failures": 2.0}, {"reward/failures": 2.0}], 2, r"The reward failed .* \(2 times\)"),
        ([{}, {"reply/failures": 2.0}, {"reply/failures": 2.0}], 2, r"The task's reply failed .* \(2 times\)"),
        ([{}, {"reply/left_out": 2.0}, {"reply/left_out": 2.0}], 2, r"found no room in this iteration \(2 times\)"),
        ([{}, {"guard/skipped": 3.0}, {"guard/skipped": 3.0}], 2, r"were left out \(3 times\)"),
        ([{}, {"guard/unscored": 1.0}, {"guard/unscored": 1.0}], 2, "The reward of a text was not a finite number"),
    ],
)
def test_what_is_warned_about(course: Course, iteration: int, words: str) -> None:
    heard = said(course)
    assert list(heard) == [iteration]
    (sentence,) = heard[iteration]
    assert re.search(words, sentence)


@pytest.mark.parametrize(
    "course",
    [
        [{}] * 30,
        [{"reward/std": 0.0}, {"reward/std": 0.0}, {}] * 10,
        [{"reward/std": 1e-9, "reward/mean": 1e-9}, {}] * 10,
        [{"kl/reference": 1.0, "kl/old": 1.0, "kl/mismatch": 0.1, "policy/entropy": 0.01}] * 5,
        [{"kl/reference": -3.0}] * 5,
        [{"value/explained_variance": -0.6}] * 9 + [{}] + [{"value/explained_variance": -0.6}] * 9,
        # Texts that were always cut off: nothing changes.
        [{"text/cut": 1.0}] * 30,
        [{"text/length": 20.0 + place / 2} for place in range(30)],  # slow growth
        # Too early to know what is usual.
        [{}, {"text/length": 100.0, "text/cut": 0.9}],
        [dict.fromkeys(HEALTHY, NAN)] * 12,
    ],
)
def test_what_is_not_warned_about(course: Course) -> None:
    assert said(course) == {}


def held_out(reward: float, alarm: float) -> Course:
    """Both change by so much in each of 20 iterations, after five in which both grow."""
    grown = [{"reward/mean": 0.1 * place, "reward/held_out": 0.1 * place} for place in range(5)]
    then = [{"reward/mean": 0.4 + reward * place, "reward/held_out": 0.4 + alarm * place} for place in range(1, 21)]
    return grown + then


@pytest.mark.parametrize(
    ("reward", "alarm", "heard"),
    [(0.1, -0.1, True), (0.1, 0.1, False), (-0.1, -0.1, False), (0.0, 0.0, False), (0.1, -0.001, False)],
)
def test_a_held_out_reward_model_that_disagrees(reward: float, alarm: float, heard: bool) -> None:
    found = [sentence for sentences in said(held_out(reward, alarm)).values() for sentence in sentences]
    warnings = Warnings(GuardConfig())
    said(held_out(reward, alarm), warnings)
    assert warnings.hacking == heard
    assert [("held out sees the texts grow worse" in sentence) for sentence in found] == [True] * heard


def test_missing_metrics_break_nothing() -> None:
    warnings = Warnings(GuardConfig())
    assert [warnings.look({"iteration": iteration}) for iteration in range(30)] == [[]] * 30


def test_the_bounds_are_those_of_the_config() -> None:
    warnings = Warnings(GuardConfig(kl_warning=0.05, entropy_warning=2.0))
    (heard,) = said([{}], warnings).values()
    assert len(heard) == 2
    assert "--guard.kl-warning 0.05" in heard[0]
    assert "--guard.entropy-warning 2" in heard[1]


def test_texts_far_from_their_budget_may_grow() -> None:
    course: Course = [{}] * 6 + [{"text/length": 31.0}]
    assert said(course, Warnings(GuardConfig(), max_new_tokens=100)) == {}
    assert list(said(course, Warnings(GuardConfig(), max_new_tokens=32))) == [7]


def test_a_warning_comes_now_and_then() -> None:
    assert list(said([{"kl/reference": 2.0}] * 50)) == [1, 21, 41]
    assert list(said([{"kl/reference": 2.0}] * 50, Warnings(GuardConfig(), every=30))) == [1, 31]
    # Each for itself.
    assert list(said([{"kl/reference": 2.0}, {"kl/reference": 2.0, "kl/mismatch": 1.0}])) == [1, 2]


def troubled() -> Course:
    generator = torch.Generator().manual_seed(0)
    spice: list[dict[str, float]] = [
        {"reward/std": 0.0},
        {"text/length": 60.0},
        {"text/cut": 0.8},
        {"kl/reference": 3.0},
        {},
    ]
    course: Course = []
    for place in range(90):
        extra = spice[int(torch.randint(len(spice), (), generator=generator))]
        row: dict[str, float] = {"value/explained_variance": -1.0, "guard/skipped": float(place // 17), **extra}
        course += [{**row, "reward/std": 0.0} if place % 30 > 20 else row]
    return course


@pytest.mark.parametrize("stop", [1, 4, 9, 20, 23, 47])
def test_a_resumed_run_says_the_same(stop: int) -> None:
    course = troubled()
    whole = said(course)
    assert sum(map(len, whole.values())) > 15
    before, after = Warnings(GuardConfig()), Warnings(GuardConfig())
    heard: dict[int, Any] = said(course[:stop], before)
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert heard | said(course[stop:], after, first=stop + 1) == whole


def test_every_flag_that_is_named_exists() -> None:
    sentences = [
        sentence
        for course in (
            [{"reward/std": 0.0, "value/explained_variance": -9.0, "kl/mismatch": 9.0, "reward/failures": 1.0}] * 12,
            [{"value/explained_variance": -9.0, "kl/reference": 9.0, "kl/old": 9.0, "policy/entropy": 0.0}] * 12,
            [{}] * 6
            + [
                {
                    "text/length": 99.0,
                    "guard/skipped": 1.0,
                    "guard/unscored": 1.0,
                    "reply/failures": 1.0,
                    "reply/left_out": 1.0,
                }
            ],
        )
        for heard in said(course).values()
        for sentence in heard
    ]
    assert len(sentences) == 12
    for sentence in sentences:
        flags = re.findall(r"--([a-z][a-z.-]*[a-z])", sentence)
        assert flags or "skipped/" in sentence or "mend `reply`" in sentence
        for flag in flags:
            value: Any = TrainConfig()
            for part in flag.replace("-", "_").split("."):
                assert part in {field.name for field in dataclasses.fields(value)}, flag
                value = getattr(value, part)
