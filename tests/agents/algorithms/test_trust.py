"""How far a batch may move the policy, and the learning rate that follows."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from agents.algorithms.optimizer import Optimizer
from agents.algorithms.trust import TrustRegion, distance
from tests.agents.runs import Config, learn, running


@pytest.mark.parametrize(
    ("kl", "factor"),
    [
        (0.01, 1.0),
        (0.04, 0.5),  # twice as far as wanted
        (1000.0, 0.5),  # at most halved
        (0.005, math.sqrt(2)),
        (1e-9, 1.5),
        (0.0, 1.5),
        (math.nan, 0.5),
    ],
)
def test_the_rate_follows_the_distance(kl: float, factor: float) -> None:
    region = TrustRegion(0.01)
    region.moved(kl)
    assert region.scale == pytest.approx(0.1 * factor)


def test_it_never_rises_above_what_was_configured() -> None:
    region = TrustRegion(0.01)
    for _ in range(20):
        region.moved(0.0)
    assert region.scale == 1.0


def test_without_a_target_nothing_is_scaled_or_stopped() -> None:
    region = TrustRegion(None)
    region.moved(5.0)
    assert region.scale == 1.0
    assert region.limit == math.inf


def test_the_distance_is_the_kl_of_the_tokens_written(config: Config) -> None:
    """KL(old | new) by k3: ratio - 1 - log ratio, the ratio being that of the new to the old probability."""
    with running(config()) as run:
        data = run.algorithm.score(run.algorithm.collector.collect())
        network = run.algorithm.network
        assert distance(network, data) == pytest.approx(0, abs=1e-6)
        with torch.no_grad():
            network.head.weight.add_(0.05 * torch.randn(network.head.weight.shape, generator=torch.manual_seed(0)))
            new = network.actor.get_dist(data.clone(False)).log_prob(data["action"])
        ratio = (new - data["action_log_prob"])[data["mask"]].double()
        expected = (ratio.exp() - 1 - ratio).mean()
        assert expected > 1e-3
        assert distance(network, data) == pytest.approx(float(expected), rel=1e-4)


def test_a_rate_that_is_far_too_high_is_brought_down(config: Config) -> None:
    made = config(actor__learning_rate=0.1, loss__target_kl=1e-3, iterations=6)
    _, history = learn(made)
    rates = [row["policy/learning_rate"] for row in history]
    assert rates[0] == pytest.approx(0.01)
    assert rates[-1] < 1e-3
    assert all(later == pytest.approx(earlier / 2) for earlier, later in pairwise(rates[:4]))
    _, free = learn(made.replace(loss__target_kl=None))
    assert {row["policy/learning_rate"] for row in free} == {0.1}
    assert all("kl/moved" not in row for row in free)
    assert max(row["kl/moved"] for row in history[3:]) < free[-1]["kl/old"]


def test_it_is_narrowed_along_with_the_rate(config: Config) -> None:
    """Were it not, the rate would be raised again by as much as it has fallen."""
    made = config(actor__learning_rate=0.1, loss__target_kl=0.004, iterations=4, actor__decay="linear")
    with running(made) as run:
        targets, entropies = [], []
        for _ in range(4):
            metrics = run.algorithm.step()
            targets.append(run.algorithm.learner.trust.target)
            entropies.append(metrics["policy/entropy"])
    assert min(entropies) > 2  # so wide as it can be
    assert targets == pytest.approx([0.004, 0.003, 0.002, 0.001])


def test_it_is_narrow_around_a_policy_that_is_sure(config: Config) -> None:
    with running(config(rollout__temperature=0.15, loss__target_kl=0.1)) as run:
        metrics = run.algorithm.step()
        entropy, target = metrics["policy/entropy"], run.algorithm.learner.trust.target
    assert 0.02 < entropy < 0.9
    assert target == pytest.approx(0.1 * entropy, rel=0.3)  # the texts show it, not exactly


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_led_too_far_is_taken_back(config: Config, dtype: str) -> None:
    """At a rate that would ruin the policy in one batch, none moves it further than the limit."""
    made = config(actor__learning_rate=1.0, loss__target_kl=0.01, iterations=3, model__dtype=dtype)
    _, history = learn(made)
    assert all(0 <= row["kl/moved"] <= 0.015 for row in history)
    assert all(row["policy/step_kept"] < 0.5 for row in history)


def test_weights_that_are_no_numbers_are_taken_back(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(config(actor__epochs=1, actor__minibatches=1)) as run:
        weights = run.algorithm.network.actor_parameters()
        before = {name: weight.clone() for name, weight in weights.items()}
        monkeypatch.setattr(Optimizer, "step", broken_step)
        metrics = run.algorithm.step()
        assert (metrics["kl/moved"], metrics["policy/step_kept"]) == (pytest.approx(0.0, abs=1e-6), 0.0)
        assert weights
        assert all(torch.equal(weight, before[name]) for name, weight in weights.items())


def broken_step(optimizer: Optimizer) -> None:
    optimizer.steps += 1
    for weight in optimizer.weights:
        weight.data.fill_(math.nan)


def test_a_resumed_run_goes_on_at_the_rate_it_had(config: Config) -> None:
    made = config(actor__learning_rate=0.1, loss__target_kl=1e-3)
    with running(made) as run:
        run.algorithm.step()
        tensors, state = run.algorithm.state()
        scale = run.algorithm.learner.trust.scale
    assert scale != 0.1
    with running(made) as other:
        other.algorithm.load_state(tensors, state)
        assert other.algorithm.learner.trust.scale == scale
