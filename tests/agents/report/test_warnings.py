"""Guard rails: which steps are refused and what is kept of them; which warnings come, when, and how often."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensordict import NonTensorData, TensorDict
from torch import Tensor

from agents.config import GuardConfig, TrainConfig
from agents.report.warnings import StepGuard, TrainingDiverged, Warnings

NAN, INF = math.nan, math.inf
GOOD = torch.tensor(0.5)
BAD = torch.tensor(NAN)


def batch() -> TensorDict:
    shared = torch.arange(6.0).reshape(2, 3)
    return TensorDict(
        {
            "tokens": torch.tensor([[1, 2, 3], [4, 5, 6]]),
            "mask": torch.ones(2, 3, dtype=torch.bool),
            "reward": torch.tensor([[0.0, NAN, 1.0], [INF, 0.0, 1.0]]),
            "transposed": shared.T.contiguous().T,
            "half": shared.bfloat16(),
            "note": NonTensorData("no tensor", batch_size=[2]),
            "next": {"reward": shared, "same": shared},
        },
        batch_size=2,
    )


def saved(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "skipped").glob("*"))


@pytest.mark.parametrize(
    ("loss", "norms", "fine"),
    [
        (GOOD, [], True),
        (GOOD, [1.0, torch.tensor(2.0)], True),
        (torch.tensor([0.5, 0.25]), [torch.tensor(1.0, dtype=torch.bfloat16)], True),
        (torch.tensor(3e38), [1e300], True),
        (torch.tensor(0.5, requires_grad=True), [1.0], True),
        (BAD, [], False),
        (torch.tensor(-INF), [1.0], False),
        (torch.tensor([0.5, NAN]), [1.0], False),
        (GOOD, [1.0, INF], False),
        (GOOD, [torch.tensor(NAN), 1.0], False),
    ],
)
def test_which_steps_may_be_taken(tmp_path: Path, loss: Tensor, norms: list[Tensor | float], fine: bool) -> None:
    guard = StepGuard(tmp_path, max_skipped=3)
    assert guard.check(loss, norms, batch(), 1, "policy") is fine
    assert (guard.skipped, guard.in_a_row) == ((0, 0) if fine else (1, 1))
    assert (tmp_path / "skipped").exists() is not fine


def test_the_offending_batch_is_kept_with_its_reason(tmp_path: Path) -> None:
    guard = StepGuard(tmp_path, max_skipped=5)
    original = batch()
    guard.check(BAD, [1.5, INF], original, 12, "policy")
    guard.check(GOOD, [INF], original, 12, "critic")
    guard.check(BAD, [], original, 13, "policy")
    names = ["iteration-000012-1", "iteration-000012-2", "iteration-000013-1"]
    assert saved(tmp_path) == [name + end for name in names for end in (".json", ".safetensors")]
    tensors = load_file(tmp_path / "skipped" / "iteration-000012-1.safetensors")
    expected: dict[str, Tensor] = {
        key if isinstance(key, str) else ".".join(key): value
        for key, value in original.exclude("note").items(include_nested=True, leaves_only=True)
    }
    assert sorted(expected) == ["half", "mask", "next.reward", "next.same", "reward", "tokens", "transposed"]
    assert sorted(tensors) == sorted(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(tensors[name], tensor, rtol=0, atol=0, equal_nan=True)
    reason = json.loads((tmp_path / "skipped" / "iteration-000012-1.json").read_text())
    assert reason == {
        "iteration": 12,
        "where": "policy",
        "why": "the loss is nan and the gradient norm is 1.5, inf",
        "not_finite": {"reward": 2},
    }
    reason = json.loads((tmp_path / "skipped" / "iteration-000012-2.json").read_text())
    assert reason["why"] == "the gradient norm is inf"


def test_too_many_in_a_row_end_the_run(tmp_path: Path) -> None:
    guard = StepGuard(tmp_path, max_skipped=3)
    for loss, row in ((BAD, 1), (BAD, 2), (GOOD, 0), (BAD, 1), (BAD, 2)):
        guard.check(loss, [], batch(), 4, "policy")
        assert guard.in_a_row == row
    with pytest.raises(TrainingDiverged) as error:
        guard.check(BAD, [], batch(), 4, "policy")
    assert guard.skipped == 5
    message = str(error.value)
    assert message.startswith("3 steps in a row were not finite; the last (policy, iteration 4): the loss is nan")
    for hint in ("--actor.learning-rate", "--actor.max-gradient-norm", "float32", "--reward.scale"):
        assert hint in message
    # The first of this row, not of the run.
    (path,) = re.findall(r"load_file\('(.*)'\)", message)
    assert path == str(tmp_path / "skipped" / "iteration-000004-3.safetensors")
    assert Path(path).exists()
    assert path.replace(".safetensors", ".json") in message
    with pytest.raises(ValueError, match="max_skipped must be at least 1"):
        StepGuard(tmp_path, max_skipped=0)


def test_rewards_that_are_not_finite_get_advice_of_their_own(tmp_path: Path) -> None:
    guard = StepGuard(tmp_path, max_skipped=2)
    assert not guard.check(BAD, [], TensorDict(), 7, "reward: Length gave nan")
    with pytest.raises(TrainingDiverged, match="finite number for any text") as error:
        guard.check(BAD, [], TensorDict(), 8, "reward: Length gave nan")
    assert "learning-rate" not in str(error.value)
    reason = json.loads((tmp_path / "skipped" / "iteration-000007-1.json").read_text())
    assert reason["where"] == "reward: Length gave nan"


def test_ten_batches_are_kept(tmp_path: Path) -> None:
    guard = StepGuard(tmp_path, max_skipped=100)
    for iteration in range(8, 20):
        guard.check(BAD, [], batch(), iteration, "policy")
        guard.check(GOOD, [], batch(), iteration, "policy")
    # The newest ten, in the order of their numbers.
    assert saved(tmp_path) == [f"iteration-{i:06d}-1{end}" for i in range(10, 20) for end in (".json", ".safetensors")]
    for _ in range(15):
        guard.check(BAD, [], batch(), 20, "policy")
    # Of one row the first ten, for the trouble began there.
    assert [name for name in saved(tmp_path) if name.endswith(".json")] == sorted(
        f"iteration-000020-{number}.json" for number in range(1, 11)
    )


def test_a_resumed_guard_counts_on(tmp_path: Path) -> None:
    guard = StepGuard(tmp_path, max_skipped=3)
    guard.check(BAD, [], batch(), 1, "policy")
    guard.check(BAD, [], batch(), 1, "policy")
    resumed = StepGuard(tmp_path, max_skipped=3)
    resumed.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    with pytest.raises(TrainingDiverged, match=r"iteration-000001-1\.safetensors"):
        resumed.check(BAD, [], batch(), 2, "policy")
    assert resumed.skipped == 3


# Warnings.

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
    "text/truncated": 0.1,
    "guard/skipped": 0.0,
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
        ([{}] * 6 + [{"text/truncated": 0.6}], 7, "60% of the texts are cut off before they end, 10%"),
        ([{"value/explained_variance": -0.6}] * 10, 10, "explained variance was far below 0 for 10 iterations"),
        ([{}, {"kl/mismatch": 0.2}], 2, "disagree by 0.2 nats per token"),
        ([{}, {"reward/failures": 2.0}, {"reward/failures": 2.0}], 2, r"The reward failed .* \(2 times\)"),
        ([{}, {"guard/skipped": 3.0}, {"guard/skipped": 3.0}], 2, r"were left out \(3 times\)"),
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
        [{"text/truncated": 1.0}] * 30,
        [{"text/length": 20.0 + place / 2} for place in range(30)],  # slow growth
        # Too early to know what is usual.
        [{}, {"text/length": 100.0, "text/truncated": 0.9}],
        [dict.fromkeys(HEALTHY, NAN)] * 12,
    ],
)
def test_what_is_not_warned_about(course: Course) -> None:
    assert said(course) == {}


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
        {"text/truncated": 0.8},
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


def test_every_flag_that_is_named_exists(tmp_path: Path) -> None:
    sentences = [
        sentence
        for course in (
            [{"reward/std": 0.0, "value/explained_variance": -9.0, "kl/mismatch": 9.0, "reward/failures": 1.0}] * 12,
            [{"value/explained_variance": -9.0, "kl/reference": 9.0, "kl/old": 9.0, "policy/entropy": 0.0}] * 12,
            [{}] * 6 + [{"text/length": 99.0, "guard/skipped": 1.0}],
        )
        for heard in said(course).values()
        for sentence in heard
    ]
    assert len(sentences) == 9
    guard = StepGuard(tmp_path, max_skipped=1)
    with pytest.raises(TrainingDiverged) as error:
        guard.check(BAD, [], batch(), 1, "policy")
    for sentence in [*sentences, str(error.value)]:
        flags = re.findall(r"--([a-z][a-z.-]*[a-z])", sentence)
        assert flags or "skipped/" in sentence
        for flag in flags:
            if flag == "resume":  # of the command, not of the configuration
                continue
            value: Any = TrainConfig()
            for part in flag.replace("-", "_").split("."):
                assert part in {field.name for field in dataclasses.fields(value)}, flag
                value = getattr(value, part)
