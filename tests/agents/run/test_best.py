"""The best model is that of the best evaluation, which need not be the last, nor of the process that ends the run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from agents.config import TrainConfig
from agents.run.evaluate import Evaluation, Evaluator
from agents.run.training import train
from tests.agents.runs import train_until_it_breaks

Config = Callable[..., TrainConfig]


def judge(monkeypatch: pytest.MonkeyPatch, scores: Sequence[float], **others: Sequence[float]) -> None:
    """The evaluations of a run, resumed or not, find these mean rewards, one after the other."""
    left = [{"eval/sampled": score, "eval/failed": 0.0} for score in scores]
    for name, values in others.items():
        for metrics, value in zip(left, values, strict=True):
            metrics[f"eval/{name}"] = value
    monkeypatch.setattr(Evaluator, "evaluate", lambda self: Evaluation(left.pop(0), []))


def of_iteration(config: Config, number: int) -> Path:
    """The model after so many iterations: that of a shorter run."""
    made = config(iterations=number, evaluation__every=0)
    made = made.replace(out=made.out.with_name(f"after {number}"))
    train(made)
    return made.out / "model"


def same(one: Path, other: Path) -> bool:
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert ours.keys() == theirs.keys()
    return all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


@pytest.fixture
def made(config: Config) -> TrainConfig:
    return config(iterations=4, evaluation__every=1)


@pytest.mark.parametrize("best", ["sampled", "greedy"])
def test_it_is_kept_when_later_ones_are_worse(
    config: Config, made: TrainConfig, monkeypatch: pytest.MonkeyPatch, best: str
) -> None:
    second = of_iteration(config, 2)
    rising, peaked = [0.1, 0.2, 0.3, 0.4, 0.5], [0.1, 0.2, 0.9, 0.3, 0.9]
    if best == "sampled":
        judge(monkeypatch, peaked, greedy=rising)
    else:
        judge(monkeypatch, rising, greedy=peaked)
    train(made.replace(evaluation__best=best))
    assert same(made.out / "best", second), "the first of the best two"
    assert not same(made.out / "model", second)


@pytest.mark.parametrize(("later", "place"), [([0.8, 0.7], 1), ([0.95, 0.7], 3)])
def test_a_resumed_run_knows_the_best_so_far(
    config: Config, made: TrainConfig, monkeypatch: pytest.MonkeyPatch, later: list[float], place: int
) -> None:
    """A worse model of the second process does not replace a better one of the first; a better one does."""
    expected = of_iteration(config, place)
    judge(monkeypatch, [0.1, 0.9, 0.3, *later])
    train_until_it_breaks(made, monkeypatch, iteration=2)
    assert train(made, resume=True).after["eval/sampled"] == later[-1]
    assert same(made.out / "best", expected)
