"""What is set or adapted reaches the place where it acts: each of these was once, or could be, lost on the way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict

from agents.algorithms.base import Algorithm
from tests.agents.runs import Config, running, wake_up

STILL: dict[str, object] = {"actor__learning_rate": 0.0, "actor__epochs": 1, "actor__minibatches": 1}


def always_the_same(algorithm: Algorithm, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first batch again and again; with a policy that stands still, only what is adapted makes a difference."""
    batch = algorithm.collector.collect()
    monkeypatch.setattr(algorithm.collector, "collect", lambda: batch)


@pytest.mark.parametrize("where", ["reward", "loss"])
def test_the_adapted_beta_is_the_one_that_acts(config: Config, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    how: dict[str, object] = {"kl__beta": 0.1, "kl__target": 1e6, "kl__horizon": 16, "kl__where": where}
    with running(config(iterations=3, **STILL, **how)) as run:
        wake_up(run)
        always_the_same(run.algorithm, monkeypatch)
        rows = list(run.algorithm)
    betas = [0.1, 0.08, 0.064]  # far below its target, the KL makes it less by a fifth each time
    assert [row["kl/beta"] for row in rows] == pytest.approx(betas)
    if where == "loss":
        costs = [row["policy/kl_loss"] for row in rows]
    else:
        costs = [(row["reward/mean"] - row["return/mean"]) / row["kl/sequence"] for row in rows]
    assert abs(costs[0]) > 0.005
    assert costs == pytest.approx([costs[0] * beta / 0.1 for beta in betas], rel=1e-3)


def test_beta_follows_the_kl_of_whole_texts(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    how: dict[str, object] = {"kl__beta": 0.1, "kl__target": 1.0, "kl__horizon": 16}
    with running(config(iterations=1, **STILL, **how)) as run:
        wake_up(run)
        always_the_same(run.algorithm, monkeypatch)
        algorithm = run.algorithm
        data = algorithm.score(algorithm.collector.collect())
        log_ratio = torch.where(data["mask"], data["action_log_prob"] - data["ref_log_prob"], 0)
        of_texts = float(log_ratio.sum()) / 16
        assert abs(of_texts) > 1.5 * abs(float(log_ratio.sum() / data["mask"].sum()))
        algorithm.kl.target = of_texts / 1.1  # a tenth too far
        algorithm.step()
        assert algorithm.kl.beta == pytest.approx(0.1 * 1.1, rel=1e-4)


@pytest.mark.parametrize("algo", ["ppo", "grpo"])
def test_each_side_is_clipped_where_it_was_told(config: Config, algo: str) -> None:
    group = 4 if algo == "grpo" else 1
    made = config(algo=algo, rollout__completions_per_prompt=group, loss__clip_low=0.1, loss__clip_high=0.4)
    with running(made) as run:
        ratio = torch.tensor([[0.85, 0.95, 1.3, 1.5, 0.85, 1.5]])
        advantage = torch.tensor([[-1.0, -1.0, 1.0, 1.0, 1.0, -1.0]])
        gain, metrics = run.algorithm.loss.gain(ratio.log(), torch.zeros(1, 6), advantage)
    assert gain[0].tolist() == pytest.approx([-0.9, -0.95, 1.3, 1.4, 0.85, -1.5])
    assert metrics["policy/clip_fraction"][0].tolist() == [1, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_every_step_begins_without_gradients(config: Config, monkeypatch: pytest.MonkeyPatch, critic: str) -> None:
    """Those of the part that does not step now are no one's either: a shared backbone gets gradients from both."""
    made = config(model__critic=critic, critic_warmup=1, actor__epochs=2, critic__epochs=3, iterations=2)
    with running(made) as run:
        weights = list(run.network.named_parameters())
        forward = type(run.algorithm.loss).forward
        steps: list[tuple[bool, bool]] = []

        def spy(self: Any, data: TensorDict, *, actor: bool, critic: bool, **options: Any) -> TensorDict:
            assert [name for name, weight in weights if weight.grad is not None] == []
            steps.append((actor, critic))
            return forward(self, data, actor=actor, critic=critic, **options)

        monkeypatch.setattr(type(run.algorithm.loss), "forward", spy)
        run.algorithm.step()
        run.algorithm.step()
    assert {(False, True), (True, critic == "shared")} == set(steps)
