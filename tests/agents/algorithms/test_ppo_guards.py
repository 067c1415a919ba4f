"""What PPO does when losses, gradients or rewards are not finite."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensordict import TensorDict

from agents.algorithms.base import Algorithm
from agents.algorithms.steps import TrainingDiverged
from llm_env.tasks import register_task
from rewards import Rollout
from tests.agents.runs import (
    Config,
    VowelShare,
    moved,
    running,
    weights_of,
)


@register_task
class Broken(VowelShare):
    """Its reward is not a number for some texts: those of which `bad` says so."""

    bad: Any = staticmethod(lambda rollout: False)

    def score(self, rollout: Rollout) -> float:
        return float("nan") if self.bad(rollout) else 1.0


def spoil(algorithm: Algorithm, monkeypatch: pytest.MonkeyPatch, when: Callable[[int], bool], what: str) -> list[int]:
    """Makes some losses, or their gradients, NaN; returns the counter of optimizer steps."""
    calls = [0]
    forward = type(algorithm.loss).forward

    def broken(self: Any, data: TensorDict, **options: Any) -> TensorDict:
        out = forward(self, data, **options)
        if when(calls[0]):
            if what == "loss":
                out["loss_objective"] = out["loss_objective"] * float("nan")
            else:  # the loss is a number, and its gradient is not: the root's slope at 0
                weight = algorithm.network.head.weight.flatten()[0]
                out["loss_objective"] = out["loss_objective"] + ((weight - weight.detach()) ** 2).sqrt()
        calls[0] += 1
        return out

    monkeypatch.setattr(type(algorithm.loss), "forward", broken)
    return calls


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_left_out(config: Config, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    with running(config(guard__max_skipped=4)) as run:
        algorithm = run.algorithm
        spoil(algorithm, monkeypatch, lambda call: call in (0, 1, 2), what)
        before = weights_of(run)
        row = algorithm.step()  # four optimizer steps, of which three are left out
        assert row["guard/skipped"] == algorithm.step_check.skipped == 3
        assert algorithm.learner.actor_optimizer.steps == 1
        assert moved(run, before) == {"actor", "head"}
        assert all(weight.isfinite().all() for weight in weights_of(run).values())
        assert all(torch.tensor(row[name]).isfinite() for name in ("policy/loss", "policy/gradient_norm", "kl/old"))
        kept = sorted((algorithm.config.out / "skipped").glob("*.safetensors"))
        assert len(kept) == 3
        batch = load_file(kept[0])
        assert len(batch["tokens"]) == 8
        assert {"action", "advantage", "mask"} <= batch.keys()
        assert "hidden" not in batch
        assert algorithm.step()["guard/skipped"] == 3


def test_too_many_in_a_row_end_the_run(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(config(guard__max_skipped=6)) as run:
        spoil(run.algorithm, monkeypatch, lambda call: True, "loss")
        before = weights_of(run)
        run.algorithm.step()
        with pytest.raises(TrainingDiverged, match=r"6 steps of the actor.*iteration 2.*(?s:.*)--actor.learning-rate"):
            run.algorithm.step()
        assert moved(run, before) == set()


def test_good_steps_of_the_critic_hide_no_bad_ones_of_the_actor(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A critic with a model of its own learns on while every loss of the actor is not a number."""
    with running(config(model__critic="separate", guard__max_skipped=6)) as run:
        forward = type(run.algorithm.loss).forward

        def broken(self: Any, data: TensorDict, *, actor: bool = True, **options: Any) -> TensorDict:
            out = forward(self, data, actor=actor, **options)
            return out.update({"loss_objective": out["loss_objective"] * float("nan")}) if actor else out

        monkeypatch.setattr(type(run.algorithm.loss), "forward", broken)
        before = weights_of(run)
        assert run.algorithm.step()["guard/skipped"] == 4
        with pytest.raises(TrainingDiverged, match="6 steps of the actor in a row"):
            run.algorithm.step()
        assert moved(run, before) == {"critic", "head"}


def test_a_batch_without_a_single_good_step_still_has_metrics(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(config()) as run:
        spoil(run.algorithm, monkeypatch, lambda call: call < 4, "loss")
        row = run.algorithm.step()
        assert row["guard/skipped"] == 4
        assert row["reward/mean"] > 0
        assert "policy/loss" not in row
        assert run.algorithm.step()["policy/gradient_norm"] > 0


def test_a_reward_that_is_not_a_number_costs_its_batch(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    made = config(task__name="Broken", iterations=4, guard__max_skipped=2)
    with running(made) as run:
        before = weights_of(run)
        monkeypatch.setattr(Broken, "bad", staticmethod(lambda rollout: True))
        row = run.algorithm.step()
        assert (row["guard/unscored"], row["iteration"], run.algorithm.iteration) == (1, 1, 1)
        assert row["guard/skipped"] == 0  # no optimizer step has failed: advice about them would mislead
        assert moved(run, before) == set()
        reasons = list((made.out / "skipped").glob("*.json"))
        assert len(reasons) == 1
        assert "reward" in json.loads(reasons[0].read_text())["where"]
        monkeypatch.setattr(Broken, "bad", staticmethod(lambda rollout: False))
        row = run.algorithm.step()
        assert (row["guard/unscored"], row["iteration"]) == (1, 2)
        assert "actor" in moved(run, before)
        monkeypatch.setattr(Broken, "bad", staticmethod(lambda rollout: True))
        run.algorithm.step()
        with pytest.raises(TrainingDiverged, match=r"(?s)a finite number for any text"):
            run.algorithm.step()


def test_a_batch_that_was_left_out_is_left_out_after_a_stop_too(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prompts of that batch are not dealt again, nor its random numbers used."""
    made = config(task__name="Broken", iterations=3)
    texts = []
    for stops in (False, True):
        with running(made) as run:
            monkeypatch.setattr(Broken, "bad", staticmethod(lambda rollout: True))
            run.algorithm.step()
            monkeypatch.setattr(Broken, "bad", staticmethod(lambda rollout: False))
            state = run.algorithm.state()
            if not stops:
                run.algorithm.step()
                texts.append([episode.rollout.text for episode in run.algorithm.batch.episodes])
                continue
        with running(made) as other:
            other.algorithm.load_state(state[0], json.loads(json.dumps(state[1])))
            other.algorithm.step()
            texts.append([episode.rollout.text for episode in other.algorithm.batch.episodes])
    assert texts[0] == texts[1]
