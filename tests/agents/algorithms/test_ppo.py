"""The loop of PPO: what an iteration computes, who learns from it, and what must not matter."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from tensordict import TensorDict

from agents.algorithms.learner import Learner
from agents.algorithms.scoring import by_length
from agents.run.parts import Run
from tests.agents.runs import (
    Config,
    learn,
    moved,
    running,
    same,
    wake_up,
    weights_of,
    without_times,
)

# Scoring.


def by_whole_texts(run: Run, data: TensorDict, model: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probs of the actions, values of the states before them, values of the last states: text by text."""
    network = run.algorithm.network
    log_probs, values = torch.zeros(data["mask"].shape), torch.zeros(data["mask"].shape)
    last = torch.zeros(len(data))
    for row, text in enumerate(data):
        tokens = text["tokens"][None, : text["length"]]
        critic = network.critic_backbone
        hidden = model.base_model(tokens).last_hidden_state[0]
        logits = model.get_output_embeddings()(hidden).log_softmax(-1)
        read = hidden if critic is None else critic.body(tokens).last_hidden_state[0]
        start, count = int(text["prompt_length"]), int(text["mask"].sum())
        for step in range(count):
            log_probs[row, step] = logits[start + step - 1, tokens[0, start + step]]
        letters = run.mdp.vocabulary.decode(tokens[0, start:].numpy())
        for step in range(count + 1):
            vowels = torch.tensor([float(sum(letter in "aeiou" for letter in letters[:step]))])  # what VowelShare hints
            value = network.value_head(read[start + step - 1], vowels)
            if step < count:
                values[row, step] = value
            else:
                last[row] = value
    return log_probs, values, last


@pytest.mark.parametrize("critic", ["shared", "separate"])
@pytest.mark.parametrize("reuse", [False, True])
def test_scores_are_those_of_plain_forward_passes(config: Config, critic: str, reuse: bool) -> None:
    more: dict[str, object] = {"actor__minibatches": 1} if reuse else {}
    if reuse and critic == "separate":
        more["critic__minibatches"] = 1
    more |= {"advantage__baseline": "value", "advantage__actor_lambda": 1.0}
    made = config(model__critic=critic, kl__beta=0.1, actor__micro_batch_size=None if reuse else 3, **more)
    with running(made) as run:
        wake_up(run)
        algorithm = run.algorithm
        assert algorithm.learner.reuses_forward(16, iteration=0) == reuse
        batch = algorithm.collector.collect()
        data = algorithm.score(batch)
        with torch.no_grad():
            log_probs, values, last = by_whole_texts(run, data, algorithm.network.model)
            reference, _, _ = by_whole_texts(run, data, algorithm.network._reference)
        mask, near = data["mask"], {"atol": 1e-5, "rtol": 1e-4}
        torch.testing.assert_close(torch.where(mask, data["action_log_prob"], 0), log_probs, **near)
        torch.testing.assert_close(torch.where(mask, data["ref_log_prob"], 0), reference, **near)
        torch.testing.assert_close(torch.where(mask, data["state_value"][..., 0], 0), values, **near)
        torch.testing.assert_close(data["last_value"], last, **near)
        assert (log_probs - reference).abs().max() > 0.01
        assert values.abs().max() > 0.01
        # Rewards, advantages and targets follow from them; some texts have ended, some were cut off.
        truncated = data["next", "truncated"][..., 0].any(1)
        assert 0 < truncated.sum() < 16
        count, advantages = mask.sum(1), torch.zeros(mask.shape)
        shaped = torch.where(mask, data["next", "reward"][..., 0] - 0.1 * (log_probs - reference), 0)
        torch.testing.assert_close(data["shaped_reward"], shaped, **near)
        for row in range(16):
            rest = float(last[row]) if truncated[row] else 0.0
            returns = [float(shaped[row, step:].sum()) + rest for step in range(int(count[row]))]
            assert data["value_target"][row, : count[row], 0].tolist() == pytest.approx(returns, abs=1e-4)
            advantages[row, : count[row]] = torch.tensor(returns) - values[row, : count[row]]
        size = float((advantages[mask] ** 2).mean().sqrt())
        torch.testing.assert_close(data["advantage"][..., 0], advantages / size, **near)
        assert size > 0.1


@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_value_clip_is_measured_in_the_error_of_the_whole_batch(config: Config, scale: float) -> None:
    with running(config(reward__scale=scale, loss__value_clip=0.2)) as run:
        data = run.algorithm.score(run.algorithm.collector.collect())
    errors = [
        float(data["value_target"][row, step, 0] - data["state_value"][row, step, 0])
        for row, step in data["mask"].nonzero().tolist()
    ]
    expected = (sum(error**2 for error in errors) / len(errors)) ** 0.5
    assert data["value_scale"].tolist() == pytest.approx([expected] * 16)
    assert expected > 0.2 * scale  # a new critic says 0, and the scores do not


def test_portions_are_of_similar_length() -> None:
    data = TensorDict({"length": torch.tensor([5, 1, 9, 2, 5])}, batch_size=[5])
    assert [part.tolist() for part in by_length(data, 2)] == [[1, 3], [0, 4], [2]]


# What must not matter.

REUSE: dict[str, object] = {
    "actor__minibatches": 1,
    "actor__epochs": 1,
    "critic__epochs": 1,
    "kl__beta": 0.1,
}


@pytest.mark.parametrize("critic", ["shared", "separate"])
@pytest.mark.parametrize("epochs", [1, 2])
def test_reusing_the_forward_pass_changes_nothing(
    config: Config, monkeypatch: pytest.MonkeyPatch, critic: str, epochs: int
) -> None:
    portions: dict[str, object] = {"critic__minibatches": 1} if critic == "separate" else {}
    # Packed, the pass that also reads the last state is rounded otherwise, and Adam makes a step of a sign.
    padded = {"model__packing": False, "model__critic": critic}
    made = config(**REUSE | portions | padded | {"actor__epochs": epochs, "critic__epochs": epochs})
    with running(made) as run:
        wake_up(run)
        first = run.algorithm.step()
        reused = weights_of(run)
    monkeypatch.setattr(Learner, "reuses_forward", lambda self, rows, iteration: False)
    torch.manual_seed(0)
    with running(made) as run:
        wake_up(run)
        before = weights_of(run)
        second = run.algorithm.step()
        same(reused, weights_of(run), tolerance=2e-5)
        # Adam's first step is little more than the gradient's sign; its length is here.
        for name in ("policy/gradient_norm", "value/gradient_norm", "policy/loss", "value/loss", "policy/entropy"):
            assert first[name] == pytest.approx(second[name], rel=1e-4, abs=1e-6), name
    assert max((reused[name] - before[name]).abs().max() for name in before) > 1e-3


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_the_size_of_micro_batches_changes_nothing(config: Config, critic: str) -> None:
    """Promise 4, over whole iterations."""
    found = []
    for size in (None, 1, 3, 8):
        made = config(
            model__critic=critic,
            iterations=2,
            actor__micro_batch_size=size,
            **({"critic__micro_batch_size": size} if critic == "separate" else {}),
            kl__beta=0.1,
            kl__where="loss",
            kl__estimator="k2",
            loss__entropy=0.01,
            loss__aggregate="sequence",
        )
        run, history = learn(made)
        found.append((weights_of(run), history))
    for weights, history in found[1:]:
        same(found[0][0], weights, tolerance=2e-4)
        for name in ("policy/loss", "value/loss", "policy/entropy", "kl/old", "ratio/max", "ratio/ess"):
            assert history[-1][name] == pytest.approx(found[0][1][-1][name], rel=1e-2, abs=1e-4), name
        for name in ("policy/gradient_norm", "value/gradient_norm"):
            assert history[0][name] == pytest.approx(found[0][1][0][name], rel=1e-3), name
    assert found[0][1][-1]["policy/gradient_norm"] > 0.01


def test_one_seed_one_run(config: Config) -> None:
    """Bit for bit, and another seed is another run."""
    made = config(kl__beta=0.05, kl__target=1.0, rollout__over_sample=1.5, rollout__drop_cut=True)
    (one, first), (two, second) = learn(made), learn(made)
    same(weights_of(one), weights_of(two))
    for row, other in zip(first, second, strict=True):
        assert without_times(row) == pytest.approx(without_times(other), rel=0, abs=0, nan_ok=True)
    third, _ = learn(made.replace(seed=1))
    assert any(not torch.equal(weight, weights_of(third)[name]) for name, weight in weights_of(one).items())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"kl__beta": 0.1, "kl__target": 1.0, "kl__horizon": 50, "loss__kind": "penalty"},
        {"model__critic": "separate", "critic_warmup": 1, "actor__warmup": 5, "actor__decay": "linear"},
        {"model__lora__rank": 2, "kl__beta": 0.1, "model__refresh_reference": 2},
        {"model__refresh_reference": 1, "kl__beta": 0.1, "rollout__drop_cut": True},
        {"model__dtype": "bfloat16", "model__critic": "separate"},
    ],
    ids=["plain", "adaptive", "separate", "LoRA", "refreshed reference", "bfloat16"],
)
def test_a_run_goes_on_where_another_was(config: Config, changes: dict[str, object]) -> None:
    made = config(iterations=4, **changes)
    whole, history = learn(made)
    with running(made) as early:
        for _ in range(2):
            early.algorithm.step()
        tensors, state = early.algorithm.state()
        tensors = {part: {name: t.clone() for name, t in named.items()} for part, named in tensors.items()}
        state = json.loads(json.dumps(state))
    with running(made) as late:
        torch.manual_seed(99)
        wake_up(late)
        late.algorithm.load_state(tensors, state)
        late.update_engine()
        rows = [late.algorithm.step() for _ in range(2)]
        same(weights_of(whole), weights_of(late))
    for row, other in zip(history[2:], rows, strict=True):
        assert without_times(row) == pytest.approx(without_times(other), rel=0, abs=0, nan_ok=True)


# Who learns, and when.


@pytest.mark.parametrize("critic", ["shared", "separate"])
@pytest.mark.parametrize("minibatches", [1, 2])
def test_critic_warmup_leaves_the_actor_alone(config: Config, critic: str, minibatches: int) -> None:
    made = config(
        model__critic=critic, critic_warmup=2, actor__minibatches=minibatches, critic__minibatches=minibatches
    )
    with running(made) as run:
        before = weights_of(run)
        for _ in range(2):
            row = run.algorithm.step()
            assert row["policy/epochs"] == 0
            assert "policy/loss" not in row
            assert row["value/loss"] > 0
        assert moved(run, before) == ({"head"} if critic == "shared" else {"head", "critic"})
        row = run.algorithm.step()
        assert row["policy/epochs"] == 2
        assert "actor" in moved(run, before)


def test_epochs_stop_where_the_policy_has_gone_far_enough(config: Config) -> None:
    # The first batch is learned from at a tenth of the rate.
    made = config(actor__epochs=6, actor__learning_rate=1e-1, critic__epochs=6, loss__target_kl=1e-4, iterations=2)
    _, history = learn(made)
    assert history[0]["policy/epochs"] == 0.5  # the second of two mini-batches found it too far away
    assert history[0]["kl/old"] > 0
    _, free = learn(made.replace(loss__target_kl=None, actor__learning_rate=1e-2))
    assert free[0]["policy/epochs"] == 6
    assert free[0]["kl/old"] > history[0]["kl/old"]


@pytest.mark.parametrize("size", [None, 3])
def test_the_step_that_begins_too_far_away_is_not_taken(
    config: Config, monkeypatch: pytest.MonkeyPatch, size: int | None
) -> None:
    """The KL is that of the weights as they are before the step; what it was can be seen in the metrics."""
    made = config(
        actor__epochs=3,
        actor__minibatches=4,
        actor__learning_rate=3e-2,  # of which a tenth is taken for the first batch
        actor__micro_batch_size=size,
        loss__target_kl=1e6,  # so far as never to be met
    )
    measured: list[float] = []  # before each step, by the policy's own weights
    honest = Learner._step

    def measuring(self: Learner, minibatch: TensorDict, turn: Any, *rest: Any) -> bool:
        if turn.actor:
            with torch.no_grad():
                log_prob = self.network.actor.get_dist(minibatch.clone(False)).log_prob(minibatch["action"])
            log_ratio = (log_prob - minibatch["action_log_prob"])[minibatch["mask"]]
            measured.append(float((torch.expm1(log_ratio) - log_ratio).mean()))
        return honest(self, minibatch, turn, *rest)

    monkeypatch.setattr(Learner, "_step", measuring)
    with running(made) as run:
        run.algorithm.step()
    assert len(measured) == 12
    assert measured[0] == pytest.approx(0, abs=1e-9)
    limit = sum(sorted(measured)[6:8]) / 2
    first = next(place for place, kl in enumerate(measured) if kl > limit)
    measured.clear()
    with running(made.replace(loss__target_kl=limit / 1.5)) as run:
        row = run.algorithm.step()
        assert run.algorithm.learner.actor_optimizer.steps == first
    assert len(measured) == first + 1
    assert row["policy/epochs"] == first / 4
    assert measured[-1] > limit > max(measured[:-1])
    assert max(measured) > row["kl/old"] > sum(measured[:-1]) / len(measured)  # it counts in what is logged


def test_the_first_step_is_taken_whatever_dropout_makes_of_the_policy(config: Config) -> None:
    """Before it, the policy has not moved: a limit below that noise must not keep it from learning at all."""
    made = config(model__lora__rank=2, model__lora__dropout=0.5, loss__target_kl=1e-9, actor__learning_rate=1e-1)
    with running(made) as run:
        wake_up(run)
        row = run.algorithm.step()
        assert row["kl/old"] > 1e-6
        assert run.algorithm.learner.actor_optimizer.steps == 1


@pytest.mark.parametrize(
    ("critic", "steps", "epochs"),
    [
        ("separate", 2 * 5, 5),
        # It moves the policy's weights: what the actor leaves out of its three passes is left out.
        ("shared", 1 + 2 * 2, 5),
        ("shared", 1, 3),
    ],
)
def test_the_critic_goes_on_where_the_actor_has_stopped(config: Config, critic: str, steps: int, epochs: int) -> None:
    made = config(
        model__critic=critic,
        actor__epochs=3,
        actor__learning_rate=1e-1,
        critic__epochs=epochs,
        loss__target_kl=1e-5,
    )
    with running(made) as run:
        run.algorithm.step()
        learner = run.algorithm.learner
        assert learner.critic_optimizer is not None
        assert (learner.actor_optimizer.steps, learner.critic_optimizer.steps) == (1, steps)


@pytest.mark.parametrize("critic", ["shared", "separate"])
@pytest.mark.parametrize(("actor_epochs", "critic_epochs"), [(1, 3), (3, 1)])
def test_actor_and_critic_have_epochs_of_their_own(
    config: Config, critic: str, actor_epochs: int, critic_epochs: int
) -> None:
    made = config(model__critic=critic, actor__epochs=actor_epochs, critic__epochs=critic_epochs, loss__target_kl=None)
    with running(made) as run:
        row = run.algorithm.step()
        assert row["policy/epochs"] == actor_epochs
        assert run.algorithm.learner.actor_optimizer.steps == 2 * actor_epochs
        assert run.algorithm.learner.critic_optimizer is not None
        assert run.algorithm.learner.critic_optimizer.steps == 2 * critic_epochs


def test_learning_rates_are_reported_and_used(config: Config) -> None:
    made = config(
        iterations=3, actor__warmup=8, actor__decay="linear", critic__learning_rate=7e-3, loss__target_kl=None
    )
    _, history = learn(made)
    # Four steps an iteration, twelve in all; the rate of the last one is reported.
    rates = [row["policy/learning_rate"] for row in history]
    assert rates == pytest.approx([3e-3 * 4 / 8, 3e-3, 3e-3 * (1 - 3 / 4)])
    assert [row["value/learning_rate"] for row in history] == [7e-3] * 3


def test_a_run_is_a_loop(config: Config) -> None:
    """The library in ten lines."""
    with running(config(iterations=3)) as run:
        rows = []
        for metrics in run.algorithm:
            rows.append(metrics)
            run.update_engine()
    assert [row["iteration"] for row in rows] == [1, 2, 3]
    assert rows[-1]["tokens"] == sum(row["text/length"] * row["episodes"] for row in rows)
