"""Which steps are refused, what is kept of them, and when a run is ended."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensordict import NonTensorData, TensorDict
from torch import Tensor

from agents.algorithms.steps import StepCheck, TrainingDiverged
from agents.config import TrainConfig
from agents.config.checks import flag, flatten
from rewards import RewardError

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
        (GOOD, {}, True),
        (GOOD, {"actor": 1.0, "critic": torch.tensor(2.0)}, True),
        (torch.tensor([0.5, 0.25]), {"actor": torch.tensor(1.0, dtype=torch.bfloat16)}, True),
        (torch.tensor(3e38), {"actor": 1e300}, True),
        (torch.tensor(0.5, requires_grad=True), {"actor": 1.0}, True),
        (BAD, {"actor": 1.0}, False),
        (torch.tensor(-INF), {"actor": 1.0}, False),
        (torch.tensor([0.5, NAN]), {"actor": 1.0}, False),
        (GOOD, {"actor": INF}, False),
        (GOOD, {"actor": torch.tensor(NAN)}, False),
    ],
)
def test_which_steps_may_be_taken(tmp_path: Path, loss: Tensor, norms: dict[str, Tensor | float], fine: bool) -> None:
    check = StepCheck(tmp_path, max_skipped=3)
    assert check.allows(loss, norms, batch(), 1) is fine
    assert (check.skipped, check.in_a_row) == ((0, {}) if fine else (1, {"actor": 1}))
    assert (tmp_path / "skipped").exists() is not fine


def test_the_offending_batch_is_kept_with_its_reason(tmp_path: Path) -> None:
    check = StepCheck(tmp_path, max_skipped=5)
    original = batch()
    check.allows(BAD, {"actor": 1.5, "critic": INF}, original, 12)
    check.allows(GOOD, {"critic": INF}, original, 12)
    check.allows(BAD, {"actor": 1.0}, original, 13)
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
        "where": "actor and critic",
        "why": "the loss is nan and the gradient norm is 1.5, inf",
        "not_finite": {"reward": 2},
    }
    reason = json.loads((tmp_path / "skipped" / "iteration-000012-2.json").read_text())
    assert reason["why"] == "the gradient norm is inf"


def test_too_many_in_a_row_end_the_run(tmp_path: Path) -> None:
    check = StepCheck(tmp_path, max_skipped=3)
    for loss, row in ((BAD, 1), (BAD, 2), (GOOD, 0), (BAD, 1), (BAD, 2)):
        check.allows(loss, {"actor": 1.0}, batch(), 4)
        assert check.in_a_row.get("actor", 0) == row
    with pytest.raises(TrainingDiverged) as error:
        check.allows(BAD, {"actor": 1.0}, batch(), 4)
    assert check.skipped == 5
    message = str(error.value)
    assert message.startswith("3 steps of the actor in a row were not finite; the last (iteration 4): the loss is nan")
    for hint in ("--actor.learning-rate", "--actor.max-gradient-norm", "float32", "--reward.scale"):
        assert hint in message
    # The first of this row, not of the run.
    (path,) = re.findall(r"load_file\('(.*)'\)", message)
    assert path == str(tmp_path / "skipped" / "iteration-000004-3.safetensors")
    assert Path(path).exists()
    assert path.replace(".safetensors", ".json") in message
    with pytest.raises(ValueError, match="max_skipped must be at least 1"):
        StepCheck(tmp_path, max_skipped=0)


def test_each_optimizer_has_a_row_of_its_own(tmp_path: Path) -> None:
    """The critic's good steps say nothing about the actor's bad ones."""
    check = StepCheck(tmp_path, max_skipped=4)
    for _ in range(3):
        check.allows(GOOD, {"actor": NAN}, batch(), 1)
        check.allows(GOOD, {"critic": 1.0}, batch(), 1)
        check.reward_is_fine()
    assert check.in_a_row == {"actor": 3}
    check.allows(GOOD, {"critic": INF}, batch(), 1)
    check.reward_failed(ValueError("nan"), 2)
    assert check.in_a_row == {"actor": 3, "critic": 1, "reward": 1}
    with pytest.raises(TrainingDiverged, match="4 steps of the actor in a row"):
        check.allows(GOOD, {"actor": NAN}, batch(), 2)


def test_whose_failure_a_common_step_is(tmp_path: Path) -> None:
    """Of optimizers that step together, those whose gradients are not finite; where all are, each of them."""
    check = StepCheck(tmp_path, max_skipped=9)
    check.allows(BAD, {"actor": NAN, "critic": 1.0}, batch(), 1)
    assert check.in_a_row == {"actor": 1}
    check.allows(BAD, {"actor": 1.0, "critic": 1.0}, batch(), 1)
    assert check.in_a_row == {"actor": 2, "critic": 1}
    check.allows(GOOD, {"actor": 1.0, "critic": 1.0}, batch(), 1)
    assert check.in_a_row == {}


def test_rewards_that_are_not_finite_get_advice_of_their_own(tmp_path: Path) -> None:
    check = StepCheck(tmp_path, max_skipped=2)
    error = RewardError("Length returned nan for the rollout with text 'abc'")
    check.reward_failed(error, 7)
    with pytest.raises(TrainingDiverged, match="finite number for any text") as raised:
        check.reward_failed(error, 8)
    message = str(raised.value)
    assert message.startswith("the rewards of 2 batches in a row were not numbers; the last (iteration 8): Length")
    for of_another_cause in ("learning-rate", "gradient", "float32", "load_file"):
        assert of_another_cause not in message
    assert (check.skipped, check.unscored) == (0, 2)
    assert saved(tmp_path) == ["iteration-000007-1.json", "iteration-000008-1.json"]
    assert str(tmp_path / "skipped" / "iteration-000007-1.json") in message
    reason = json.loads((tmp_path / "skipped" / "iteration-000007-1.json").read_text())
    assert reason == {"iteration": 7, "where": "reward", "why": str(error)}


def test_a_batch_with_rewards_ends_the_row_of_those_without(tmp_path: Path) -> None:
    check = StepCheck(tmp_path, max_skipped=2)
    for iteration in range(5):
        check.reward_failed(ValueError("nan"), iteration)
        check.reward_is_fine()
    assert (check.unscored, check.in_a_row) == (5, {})


def test_ten_batches_are_kept(tmp_path: Path) -> None:
    check = StepCheck(tmp_path, max_skipped=100)
    for iteration in range(8, 20):
        check.allows(BAD, {"actor": 1.0}, batch(), iteration)
        check.allows(GOOD, {"actor": 1.0}, batch(), iteration)
    # The newest ten, in the order of their numbers.
    assert saved(tmp_path) == [f"iteration-{i:06d}-1{end}" for i in range(10, 20) for end in (".json", ".safetensors")]
    for _ in range(15):
        check.allows(BAD, {"actor": 1.0}, batch(), 20)
    # Of one row the first ten, for the trouble began there.
    assert [name for name in saved(tmp_path) if name.endswith(".json")] == sorted(
        f"iteration-000020-{number}.json" for number in range(1, 11)
    )


def test_a_resumed_check_counts_on(tmp_path: Path) -> None:
    check = StepCheck(tmp_path, max_skipped=3)
    check.allows(BAD, {"actor": 1.0}, batch(), 1)
    check.allows(BAD, {"actor": 1.0}, batch(), 1)
    check.reward_failed(ValueError("nan"), 2)
    resumed = StepCheck(tmp_path, max_skipped=3)
    resumed.load_state_dict(json.loads(json.dumps(check.state_dict())))
    assert (resumed.unscored, resumed.in_a_row) == (1, {"actor": 2, "reward": 1})
    with pytest.raises(TrainingDiverged, match=r"iteration-000001-1\.safetensors"):
        resumed.allows(BAD, {"actor": 1.0}, batch(), 2)
    assert resumed.skipped == 3


def test_every_flag_that_is_named_exists(tmp_path: Path) -> None:
    known = {flag(name) for name, _ in flatten(TrainConfig())} | {"--resume"}
    fails = [
        lambda check: check.allows(BAD, {"actor": 1.0}, batch(), 1),
        lambda check: check.reward_failed(ValueError("nan"), 1),
    ]
    for fail in fails:
        with pytest.raises(TrainingDiverged) as error:
            fail(StepCheck(tmp_path, max_skipped=1))
        named = set(re.findall(r"--[a-z][a-z.-]*[a-z]", str(error.value)))
        assert named
        assert named <= known
