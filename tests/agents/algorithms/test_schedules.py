"""The learning rates of a run, by hand: they fall to 0 at its last iteration, whatever is learned in how many steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from agents.algorithms.base import Algorithm
from agents.config import TrainConfig
from agents.config.files import ConfigError, refuse_changes
from agents.report.log import read_metrics
from agents.run.training import train
from rewards import RewardError
from tests.agents.runs import learn, running

Config = Callable[..., TrainConfig]

CONSTANT = {"actor__decay": "constant", "critic__decay": "constant"}


def falling(config: Config, actor: float, critic: float, **changes: object) -> TrainConfig:
    """Both rates fall as a line from these, in three iterations of 2 passes of 2 steps; the critic makes 3 passes."""
    own: dict[str, object] = {"iterations": 3, "actor__decay": "linear", "critic__decay": "linear"}
    own |= {"actor__learning_rate": actor, "critic__learning_rate": critic}
    own |= {"actor__epochs": 2, "actor__minibatches": 2, "critic__epochs": 3, "critic__minibatches": 4}
    own |= {"loss__target_kl": None}  # the rates are those that were configured
    return config(**own | changes)


def rates(config: TrainConfig) -> tuple[list[float], list[float]]:
    """Of the last step in each iteration: the actor's and the critic's."""
    _, history = learn(config)
    return [row["policy/learning_rate"] for row in history], [row["value/learning_rate"] for row in history]


def test_a_shared_critic(config: Config) -> None:
    """It learns beside the actor in 2 passes of 2 steps, and by itself in one more of 4."""
    actor, critic = rates(falling(config, 0.012, 0.024))
    assert actor == pytest.approx([0.009, 0.005, 0.001])  # steps 3, 7 and 11 of 12
    assert critic == pytest.approx([0.017, 0.009, 0.001])  # steps 7, 15 and 23 of 24


def test_a_separate_critic(config: Config) -> None:
    """Its passes and steps are its own."""
    actor, critic = rates(falling(config, 0.012, 0.009, model__critic="separate", critic__minibatches=1))
    assert actor == pytest.approx([0.009, 0.005, 0.001])
    assert critic == pytest.approx([0.007, 0.004, 0.001])  # steps 2, 5 and 8 of 9


def test_the_critics_own_iterations_are_none_of_the_actors(config: Config) -> None:
    """In the first one the critic makes 3 passes of 4 steps; the actor begins at its highest rate after that."""
    actor, critic = rates(falling(config, 0.008, 0.028, critic_warmup=1))
    assert actor[1:] == pytest.approx([0.005, 0.001])  # steps 3 and 7 of 8
    assert critic == pytest.approx([0.017, 0.009, 0.001])  # steps 11, 19 and 27 of 28
    own: dict[str, object] = {"model__critic": "separate", "critic__minibatches": 1}
    actor, critic = rates(falling(config, 0.008, 0.009, critic_warmup=1, **own))
    assert actor[1:] == pytest.approx([0.005, 0.001])
    assert critic == pytest.approx([0.007, 0.004, 0.001])


def test_after_a_warm_up_along_a_cosine(config: Config) -> None:
    made = falling(config, 0.01, 0.01, actor__warmup=4, actor__decay="cosine", actor__minibatches=4, actor__epochs=1)
    actor, _ = rates(made)
    # Steps 3, 7 and 11 of 12: the last of the warm-up, then 3/8 and 7/8 of half a turn.
    assert actor == pytest.approx([0.01, 0.005 * (1 + 0.38268343), 0.005 * (1 - 0.92387953)])


def test_steps_that_are_left_out_count(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """With target_kl hardly any of 16 steps is taken, and yet the rate has fallen when the last iteration begins."""
    made = falling(config, 0.048, 0.003, loss__target_kl=1e-9, actor__epochs=4, actor__minibatches=4)
    actor, _ = rates(made)
    for iteration, rate in enumerate(actor):
        scale = 0.1 / 2**iteration  # a tenth at first, and half of it after a batch that moved the policy too far
        assert 0.048 - 0.016 * iteration - 0.008 < rate / scale <= 0.048 - 0.016 * iteration + 1e-9

    # A batch that could not be rewarded is left out as a whole.
    with running(falling(config, 0.012, 0.024)) as run:
        honest = run.algorithm.collector.collect
        monkeypatch.setattr(run.algorithm.collector, "collect", lambda: raise_(RewardError("no number")))
        run.algorithm.step()
        monkeypatch.setattr(run.algorithm.collector, "collect", honest)
        rows = [run.algorithm.step(), run.algorithm.step()]
    assert [row["policy/learning_rate"] for row in rows] == pytest.approx([0.005, 0.001])


def test_the_entropy_bonus_falls_too(config: Config) -> None:
    """What it costs is minus its weight times the entropy: 0.3, 0.2 and 0.1 in the three iterations."""
    made = falling(config, 0.001, 0.001, loss__entropy=0.3, loss__entropy_decay="linear", actor__minibatches=1)
    _, history = learn(made)
    weights = [-row["policy/entropy_loss"] / row["policy/entropy"] for row in history]
    assert weights == pytest.approx([0.3, 0.2, 0.1], rel=1e-4)
    with pytest.raises(ConfigError, match=r"iterations is 6, was 3, but --loss\.entropy-decay is linear"):
        refuse_changes(made.replace(**CONSTANT), made.replace(**CONSTANT, iterations=6))


def raise_(error: Exception) -> Any:
    raise error


def test_a_run_with_a_falling_rate_keeps_its_iterations(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """With another number, the rate would jump where the run goes on."""
    made = falling(config, 0.012, 0.024)
    stop_before(monkeypatch, 2)
    with pytest.raises(RuntimeError, match="power"):
        train(made)
    kept = (made.out / "config.yaml").read_text()
    longer = made.replace(iterations=6)
    with pytest.raises(ConfigError, match=r"iterations is 6, was 3, but --actor\.decay is linear and --critic\.decay"):
        train(longer, resume=True)
    with pytest.raises(ConfigError, match=r"actor\.decay is constant, was linear"):
        train(longer.replace(actor__decay="constant"), resume=True)
    assert (made.out / "config.yaml").read_text() == kept, "a refused change is not remembered"
    monkeypatch.undo()
    assert train(made, resume=True).finished
    rows = read_metrics(made.out)[1:]
    assert [row["policy/learning_rate"] for row in rows] == pytest.approx([0.009, 0.005, 0.001])
    assert [row["value/learning_rate"] for row in rows] == pytest.approx([0.017, 0.009, 0.001])


def test_with_a_constant_rate_a_run_may_become_longer(config: Config) -> None:
    made = falling(config, 0.01, 0.02, actor__decay="constant", critic__decay="constant", iterations=1, actor__warmup=6)
    train(made)
    assert train(made.replace(iterations=3), resume=True).finished
    assert [row["policy/learning_rate"] for row in read_metrics(made.out)[1:]] == pytest.approx([0.04 / 6, 0.01, 0.01])


def stop_before(monkeypatch: pytest.MonkeyPatch, iteration: int) -> None:
    """An error once so many iterations are done."""
    honest = Algorithm.step

    def step(self: Algorithm) -> dict[str, float]:
        if self.iteration == iteration:
            raise RuntimeError("the power is gone")
        return honest(self)

    monkeypatch.setattr(Algorithm, "step", step)
