"""The ways to run PPO: the KL to a reference, engines that round otherwise, networks, objectives, advantages."""

from __future__ import annotations

import pytest
import torch

from agents.algorithms.registry import algorithm_class
from agents.networks.network import Network
from tests.agents.runs import (
    Config,
    learn,
    moved,
    running,
    same,
    wake_up,
    weights_of,
)

# The KL to the reference.


@pytest.mark.parametrize("target", [0.05, 100.0])
def test_an_adaptive_beta_moves(config: Config, target: float) -> None:
    _, rows = learn(config(iterations=5, kl__beta=0.1, kl__target=target, kl__horizon=64, loss__target_kl=None))
    beta = 0.1
    for row in rows:
        assert row["kl/beta"] == pytest.approx(beta)  # what this iteration was computed with
        error = row["kl/sequence"] / target - 1
        beta *= 1 + min(max(error, -0.2), 0.2) * 16 / 64
    assert (beta > 0.095) == (target < 1)


@pytest.mark.parametrize("where", ["reward", "loss"])
def test_a_penalty_holds_the_policy_back(config: Config, where: str) -> None:
    far, near = [], []
    for beta, found in ((1e-6, far), (1.0, near)):
        made = config(
            iterations=15,
            kl__beta=beta,
            rollout__batch_size=64,
            actor__learning_rate=1e-3,
            loss__target_kl=None,
            evaluation__prompts=1,
            kl__where=where,
        )
        found += [row["kl/sequence"] for row in learn(made)[1][-5:]]
    assert min(far) > 0.2
    assert abs(sum(near)) < sum(far) / 2


def test_promise_five_holds_in_a_run(config: Config) -> None:
    with running(config(kl__beta=0.3)) as run:
        wake_up(run)
        row = run.algorithm.step()
        assert abs(row["kl/sequence"]) > 0.05
        assert row["return/mean"] == pytest.approx(row["reward/mean"] - 0.3 * row["kl/sequence"], abs=1e-5)


def test_the_reference_follows_if_asked(config: Config) -> None:
    _, rows = learn(config(iterations=5, kl__beta=0.01, model__refresh_reference=2))
    kl = [row["kl/reference"] for row in rows]
    assert kl[0] == pytest.approx(0, abs=1e-5)
    assert abs(kl[1]) > 1e-4
    assert kl[2] == pytest.approx(0, abs=1e-5)  # refreshed after the second iteration
    assert abs(kl[3]) > 1e-4
    assert kl[4] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("lora", [0, 2])
def test_the_reference_is_there_where_it_is_used(config: Config, lora: int) -> None:
    """Without a penalty there is no copy; asked for, it says how far the policy has moved, and changes nothing else."""
    plain = config(model__lora__rank=lora)
    with running(plain) as run:
        assert not run.network.has_reference
        assert run.network._reference is None
        expected = run.algorithm.step(), weights_of(run)
    assert not {name for name in expected[0] if name.startswith("kl/")} & {"kl/reference", "kl/sequence"}
    with running(plain.replace(model__reference="always")) as run:
        assert (run.network._reference is None) == (lora > 0)  # with LoRA it is the model without its adapters
        row = run.algorithm.step()
        same(expected[1], weights_of(run))
        assert row["kl/reference"] == pytest.approx(0, abs=1e-6)
        assert abs(run.algorithm.step()["kl/reference"]) > 1e-5
        assert row["return/mean"] == row["reward/mean"]
    _, rows = learn(plain.replace(iterations=1, kl__beta=0.1))
    assert "kl/reference" in rows[0]


def test_a_penalty_needs_a_reference(config: Config) -> None:
    made = config(kl__beta=0.1)
    with running(made) as run:
        bare = Network(run.network.model, made.model)
        with pytest.raises(ValueError, match=r"kl.beta=0.1 needs a reference"):
            algorithm_class("ppo")(made, bare, run.algorithm.collector)


# Engines that are not the trainer.


def test_an_engine_with_a_copy_of_the_weights_agrees_with_the_trainer(config: Config) -> None:
    """From the first batch on, for any seed, and after every update."""
    with running(config(model__name="tiny", seed=1, rollout__engine_dtype="float32")) as run:
        assert not run.algorithm.trusted
        for _ in range(3):
            row = run.algorithm.step()
            assert row["kl/mismatch"] < 1e-4
            assert row["ratio/is_weight"] == pytest.approx(1, abs=1e-4)
            run.update_engine()


def test_an_engine_that_strays_is_measured_and_corrected(config: Config) -> None:
    cap = 1.1
    with running(config(rollout__engine_dtype="float32", loss__importance_cap=cap, actor__micro_batch_size=3)) as run:
        weights = run.algorithm.network.engine_weights()
        torch.manual_seed(0)
        run.engine.load_weights({name: w + 0.05 * torch.randn_like(w) for name, w in weights.items()}, version=1)
        batch = run.algorithm.collector.collect()
        data = run.algorithm.score(batch)
        mask = data["mask"]
        difference = (data["action_log_prob"] - data["behaviour_log_prob"])[mask]
        assert difference.abs().mean() > 0.05
        torch.testing.assert_close(data["importance_weight"][mask], difference.exp().clamp_max(cap))
        assert data["importance_weight"].max() == pytest.approx(cap)
        with torch.no_grad():
            ours = run.algorithm.network.actor.get_dist(data.clone(False)).log_prob(data["action"])
        torch.testing.assert_close(data["action_log_prob"][mask], ours[mask], atol=1e-5, rtol=1e-5)
        row = run.algorithm.step()
        assert row["kl/mismatch"] > 0.05
        assert 0.5 < row["ratio/is_weight"] < cap
        assert row["ratio/mean"] == pytest.approx(1, abs=0.3)


@pytest.mark.parametrize("critic", ["shared", "separate"])
@pytest.mark.parametrize("cap", [None, 2.0])
def test_the_old_policy_is_the_trained_model_whatever_the_critic_and_the_cap(
    config: Config, critic: str, cap: float | None
) -> None:
    """Not the engine, whose other rounding would look as if the policy had moved before it has learned anything."""
    with running(config(model__critic=critic, rollout__engine_dtype="float32", loss__importance_cap=cap)) as run:
        weights = run.algorithm.network.engine_weights()
        torch.manual_seed(0)
        run.engine.load_weights({name: w + 0.05 * torch.randn_like(w) for name, w in weights.items()}, version=1)
        data = run.algorithm.score(run.algorithm.collector.collect())
        mask = data["mask"]
        with torch.no_grad():
            ours = run.algorithm.network.actor.get_dist(data.clone(False)).log_prob(data["action"])
        assert (data["action_log_prob"] - data["behaviour_log_prob"])[mask].abs().mean() > 0.05
        torch.testing.assert_close(data["action_log_prob"][mask], ours[mask], atol=1e-5, rtol=1e-5)
        assert ("importance_weight" in data) == (cap is not None)
        assert "kl/mismatch" in run.algorithm.step()


@pytest.mark.parametrize("changes", [{"model__dtype": "bfloat16"}, {"model__autocast": "on"}])
def test_shared_weights_are_not_trusted_where_the_engine_rounds_otherwise(
    config: Config, changes: dict[str, object]
) -> None:
    with running(config()) as run:
        assert run.algorithm.trusted
    with running(config(**changes, actor__epochs=1, actor__minibatches=1, actor__micro_batch_size=3)) as run:
        row = run.algorithm.step()
        assert 1e-4 < row["kl/mismatch"] < 0.05  # in float32 it is less than 1e-6
        assert row["ratio/max"] == pytest.approx(1, abs=row["kl/mismatch"])  # the ratio begins at 1 all the same


def test_without_the_correction_nothing_is_weighted(config: Config) -> None:
    _, rows = learn(config(rollout__engine_dtype="bfloat16", loss__importance_cap=None, iterations=1))
    assert 1e-5 < rows[0]["kl/mismatch"] < 0.1
    assert "ratio/is_weight" not in rows[0]


# Ways to compute, objectives, advantages: each runs, learns something finite, and is really used.

VARIANTS: dict[str, dict[str, object]] = {
    "separate critic": {"model__critic": "separate"},
    "fitted critic": {"model__critic": "fitted"},
    "fitted critic, one step": {"model__critic": "fitted", "actor__minibatches": 1, "actor__epochs": 1},
    "LoRA": {"model__lora__rank": 4, "kl__beta": 0.01},
    "LoRA with dropout": {"model__lora__rank": 4, "model__lora__dropout": 0.1, "actor__minibatches": 1},
    "LoRA, separate critic": {"model__lora__rank": 4, "model__critic": "separate", "kl__beta": 0.01},
    "autocast": {"model__autocast": "on", "model__reference_dtype": "bfloat16", "kl__beta": 0.01},
    "bfloat16": {"model__dtype": "bfloat16"},
    "gradient checkpointing": {"model__gradient_checkpointing": True},
    "penalty": {"loss__kind": "penalty"},
    "dual clip": {"loss__dual_clip": 3.0},
    "value clip": {"loss__value_clip": 0.2},
    "no value loss": {"loss__value": 0.0},
    "entropy": {"loss__entropy": 0.01},
    "fixed": {"loss__aggregate": "fixed"},
    "sequence": {"loss__aggregate": "sequence"},
    "adaptive lambda": {"advantage__length_adaptive": 0.5},
    "monte carlo": {"advantage__kind": "monte_carlo"},
    "sequence advantage": {"advantage__kind": "sequence"},
    "no baseline": {"advantage__baseline": "none", "advantage__normalize": False},
    "two lambdas": {"advantage__actor_lambda": 0.9, "advantage__critic_lambda": 1.0, "advantage__gamma": 0.99},
    "rewards": {"reward__whiten": True, "reward__scale": 0.5, "reward__clip": 2.0, "reward__no_eos_penalty": 0.1},
    "groups": {"rollout__completions_per_prompt": 4, "rollout__drop_uniform_groups": True},
    "cool": {"rollout__temperature": 0.7},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_variants_learn(config: Config, changes: dict[str, object]) -> None:
    made = config(iterations=2, **changes)
    with running(made) as run:
        before = weights_of(run)
        rows = [run.algorithm.step() for _ in range(2)]
        assert "actor" in moved(run, before)
        assert run.algorithm.step_check.skipped == 0
        if "loss__value" not in changes:
            assert "head" in moved(run, before)
    for row in rows:
        assert row["policy/gradient_norm"] > 0
        finite = {k: v for k, v in row.items() if k != "value/explained_variance"}
        assert all(torch.tensor(value).isfinite() for value in finite.values()), row


def test_the_penalty_adapts_its_weight(config: Config) -> None:
    made = config(loss__kind="penalty", loss__penalty_target=10.0)
    with running(made) as run:
        run.algorithm.step()
        assert run.algorithm.loss.state()["beta"] == 0.5
        run.algorithm.step()
        tensors, state = run.algorithm.state()
        assert run.algorithm.loss.state()["beta"] == 0.25
    with running(made) as other:
        other.algorithm.load_state(tensors, state)
        assert other.algorithm.loss.state()["beta"] == 0.25
