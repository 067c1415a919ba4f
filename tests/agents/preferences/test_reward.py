"""A reward model's loss against its formula, its values against reading one text at a time, and what it learns."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from agents.config.preferences import RewardModelConfig
from agents.preferences.pairs import Pair
from agents.preferences.reward import RewardTrainer, judged, pair_loss
from agents.run.reward_model import classifier
from llm_env.models import load_tokenizer

PAIRS = [Pair(f"say {n % 7}: ", "a" * (1 + n % 5), "b" * (1 + n % 3)) for n in range(40)]
CONFIG = RewardModelConfig(Path("none"), batch_size=8, micro_batch_size=8, learning_rate=1e-3, epochs=2)


def trainer(config: RewardModelConfig = CONFIG) -> RewardTrainer:
    tokenizer = load_tokenizer("tiny")
    return RewardTrainer(config, classifier(config, tokenizer), tokenizer, PAIRS[:32], PAIRS[32:])


@pytest.mark.parametrize(
    ("chosen", "rejected", "margin", "center"), [(1.0, 0.0, 0.0, 0.0), (0.5, 2.0, 0.3, 0.1), (-3.0, -3.0, 1.0, 0.01)]
)
def test_the_loss_is_that_of_bradley_and_terry(chosen: float, rejected: float, margin: float, center: float) -> None:
    odds = 1 / (1 + math.exp(-(chosen - rejected - margin)))
    expected = -math.log(odds) + center * (chosen + rejected) ** 2
    given = [torch.tensor([value], requires_grad=True) for value in (chosen, rejected, margin)]
    loss = pair_loss(*given, center)
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert float(given[0].grad) == pytest.approx(odds - 1 + 2 * center * (chosen + rejected), rel=1e-5)
    assert float(given[1].grad) == pytest.approx(1 - odds + 2 * center * (chosen + rejected), rel=1e-5)


def test_what_stands_beside_a_pair_changes_nothing() -> None:
    one = trainer()
    one.model.eval()
    with torch.no_grad():
        together = torch.stack(one._values(one._train[:6]), -1)
        alone = torch.cat([torch.stack(one._values([pair]), -1) for pair in one._train[:6]])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("micro", [3, 8, 100])
def test_the_gradient_does_not_depend_on_micro_batches(micro: int) -> None:
    gradients = []
    for size in (8, micro):
        one = trainer(RewardModelConfig(**{**CONFIG.__dict__, "micro_batch_size": size}))
        one.optimizer.step = lambda: None  # type: ignore[method-assign]
        one.step()
        gradients.append(torch.cat([weight.grad.flatten() for weight in one.model.parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-6)


def test_it_learns() -> None:
    one = trainer()
    before = one.evaluate()["loss"]
    while one.steps < one.total:
        one.step()
    after = one.evaluate()
    assert one.steps == 2 * 32 // 8
    assert after["accuracy"] == 1.0
    assert after["loss"] < 0.1 < before


@pytest.mark.parametrize(
    ("change", "trained"), [({"head_only": True}, {"score.weight"}), ({"lora_rank": 2}, {"score", "lora_A", "lora_B"})]
)
def test_only_some_weights_are_trained(change: dict[str, object], trained: set[str]) -> None:
    one = trainer(RewardModelConfig(**{**CONFIG.__dict__, **change}))
    before = {name: weight.detach().clone() for name, weight in one.model.named_parameters()}
    for _ in range(2):
        one.step()
    changed = {name for name, weight in one.model.named_parameters() if not torch.equal(weight, before[name])}
    assert changed
    assert all(any(part in name for part in trained) for name in changed)


def test_it_goes_on_where_another_was() -> None:
    whole = trainer()
    losses = [whole.step() for _ in range(6)]
    first = trainer()
    for _ in range(3):
        first.step()
    second = trainer(RewardModelConfig(**{**CONFIG.__dict__}))
    second.load_state(*first.state())
    assert [second.step() for _ in range(3)] == losses[3:]


def test_what_is_measured() -> None:
    values = np.array([[2.0, 0.0], [1.0, 3.0], [0.0, 0.0], [5.0, 1.0]])
    lengths = np.array([2.0, 0.0, 1.0, 3.0, 0.0, 0.0, 5.0, 1.0])
    found = judged(values, lengths)
    assert found["accuracy"] == 2.5 / 4
    assert found["length"] == pytest.approx(1.0)
    assert found["mean"] == 1.5
    assert found["deviation"] == pytest.approx(values.std())
    differences = [2.0, -2.0, 0.0, 4.0]
    assert found["loss"] == pytest.approx(np.mean([math.log(1 + math.exp(-each)) for each in differences]))
    # Two are as sure (0.88, one of them right), one is not (0.5, wrong: it is a tie), one is surer (0.98, right).
    sure = [1 / (1 + math.exp(-abs(each))) for each in differences]
    gaps = [abs(sure[0] + sure[1] - 1), sure[2], 1 - sure[3]]
    assert found["calibration"] == pytest.approx(sum(gaps) / 4)
