"""The pipeline in rounds: that a stop is only a pause, that no reward but the learned one is learned from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from agents import RLHFConfig, TrainConfig, train_rlhf
from agents.cli import main
from agents.config.files import ConfigError
from agents.report.log import read_metrics
from agents.run import rlhf
from tests.agents.runs import save_small_model, small_config

HOW = RLHFConfig(rounds=2, pairs=24, members=3, learning_rate=1e-3, batch_size=8, max_length=24)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("model"), spread=0.1)


def told(out: Path, folder: Path) -> TrainConfig:
    """Two iterations in a round, on a task whose texts mostly have different scores."""
    return small_config(out, folder, iterations=2, task__name="VowelShare", task__args={})


@pytest.fixture
def config(folder: Path, tmp_path: Path) -> Callable[[str], TrainConfig]:
    return lambda name: told(tmp_path / name, folder)


@pytest.fixture(scope="module")
def undisturbed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, list[dict[str, Any]]]:
    """A run of two rounds, and what it gives."""
    whole = told(tmp_path_factory.mktemp("rlhf") / "whole", folder)
    return whole, train_rlhf(whole, HOW)


def weights(config: TrainConfig) -> dict[str, torch.Tensor]:
    return load_file(config.out / "model" / "model.safetensors")


class GoneError(RuntimeError):
    """The power is."""


@pytest.mark.parametrize("stage", ["collect", "train_reward_models", "train", "right_about", "replace_folder"])
def test_a_stop_is_a_pause(
    config: Callable[[str], TrainConfig],
    undisturbed: tuple[TrainConfig, list[dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
) -> None:
    """Whatever it is doing in the second round: what is measured and the last policy are the same."""
    (whole, expected), stopped = undisturbed, config("stopped")
    honest, calls = getattr(rlhf, stage), 0

    def breaks(*given: Any, **how: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == (1 if stage == "replace_folder" else 2):
            raise GoneError
        return honest(*given, **how)

    with monkeypatch.context() as patched:
        patched.setattr(rlhf, stage, breaks)
        with pytest.raises(GoneError):
            train_rlhf(stopped, HOW)
    assert train_rlhf(stopped, HOW, resume=True) == expected
    one, other = weights(whole), weights(stopped)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_what_is_learned_from(undisturbed: tuple[TrainConfig, list[dict[str, Any]]]) -> None:
    """All pairs so far, by the reward models of the round; what is measured is the true reward."""
    made, (start, first, second) = undisturbed
    assert (start["round"], first["round"], second["round"]) == (0, 1, 2)
    assert 0 < start["reward"]["low"] < start["reward"]["high"] < 3
    pairs = [(made.out / f"round-{number}" / "pairs.jsonl").read_text().splitlines() for number in (1, 2)]
    assert (made.out / "round-2" / "all-pairs.jsonl").read_text().splitlines() == pairs[0] + pairs[1]
    assert first["pairs"] == len(pairs[0]) > 8
    assert 0 <= second["accuracy_on_its_texts"] <= 1
    assert [each.name for each in sorted((made.out / "reward-models").iterdir())] == ["round-1", "round-2"]
    rows = [row for row in read_metrics(made.out / "policy") if "reward/mean" in row]
    assert [row["iteration"] for row in rows] == [1, 2, 3, 4]
    assert "reward/held_out" in rows[0]  # the third member is an alarm
    best = json.loads(pairs[0][0])
    assert best["chosen"] != best["rejected"]


def test_more_rounds_and_other_settings(config: Callable[[str], TrainConfig]) -> None:
    made = config("run")
    found = train_rlhf(made, RLHFConfig(**{**HOW.__dict__, "rounds": 1}))
    with pytest.raises(ConfigError, match="holds a run already"):
        train_rlhf(made, HOW)
    with pytest.raises(ConfigError, match="was begun with another noise"):
        train_rlhf(made, RLHFConfig(**{**HOW.__dict__, "noise": 0.2}), resume=True)
    with pytest.raises(ConfigError, match="--seed is 7, was 0"):
        train_rlhf(made.replace(seed=7), HOW, resume=True)
    assert train_rlhf(made, HOW, resume=True)[:2] == found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"actor__decay": "linear"}, "actor.decay is linear, which falls to the last iteration of a run"),
        ({"iterations": 0}, "iterations is 0: expected how many"),
    ],
)
def test_mistakes(config: Callable[[str], TrainConfig], changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train_rlhf(config("run").replace(**changes), HOW)


def test_nothing_to_compare(folder: Path, tmp_path: Path) -> None:
    hopeless = small_config(tmp_path / "run", folder, iterations=1, task__args={"length": 3})
    with pytest.raises(ConfigError, match="of round 1 that could be compared have equal scores"):
        train_rlhf(hopeless, HOW)


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = ["--module", "tests.agents.runs", "--task.name", "VowelShare", "--model.name", str(folder)]
    size = ["--rounds", "1", "--pairs", "24", "--members", "1", "--learning-rate", "1e-3", "--max-length", "24"]
    small = [
        "--iterations",
        "1",
        "--rollout.batch-size",
        "8",
        "--evaluation.prompts",
        "8",
        "--out",
        str(tmp_path / "run"),
    ]
    assert main(["rlhf", *task, *size, *small]) == 0
    said = capsys.readouterr().out
    assert "round   reward of held-out texts   95% interval" in said
    assert "\nstart " in said
    assert "\n1 " in said
    with pytest.raises(SystemExit):
        main(["rlhf", "--pears", "3"])
    assert "--pears" in capsys.readouterr().err
