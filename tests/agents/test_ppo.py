"""The loop of PPO: what an iteration computes, what must not matter to it, and what it does when numbers go wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensordict import TensorDict

from agents.build import Run
from agents.config import TrainConfig
from agents.guards import TrainingDiverged
from agents.ppo import PPO, by_length
from llm_env.prompts import Prompt
from llm_env.tasks import Task, register_task
from rewards import Rollout
from tests.agents.runs import learn, running, save_small_model, small_config, weights_of

Config = Callable[..., TrainConfig]
TIMES = ("time", "speed")


@register_task
class Vowels(Task):
    """Every text has another score; some meet a consonant, the others are cut off, and valued where they were."""

    stop = tuple("bcdfghjklmnpqrstvwxz")
    max_new_tokens = 5
    max_prompt_tokens = 12
    when_cut = "bootstrap"
    num_train = 40
    num_test = 8

    def sample(self, rng: Any) -> Prompt:
        return Prompt("".join(chr(97 + c) for c in rng.integers(26, size=int(rng.integers(1, 12)))))

    def score(self, rollout: Rollout) -> float:
        return 0.3 * sum(letter in "aeiou" for letter in rollout.text) + 0.1 * rollout.num_actions


@register_task
class Broken(Vowels):
    """Its reward is not a number for some texts: those of which `bad` says so."""

    bad: Any = staticmethod(lambda rollout: False)

    def score(self, rollout: Rollout) -> float:
        return float("nan") if self.bad(rollout) else 1.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return save_small_model(folder, spread=0.2)


@pytest.fixture
def config(folder: Path, tmp_path: Path) -> Config:
    def make(**changes: object) -> TrainConfig:
        own: dict[str, object] = {"task__name": "Vowels", "task__args": {}}
        return small_config(tmp_path / "run", folder, **own | changes)

    return make


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float = 0.0) -> None:
    assert one.keys() == other.keys()
    for name, weight in one.items():
        assert (weight - other[name]).abs().max() <= tolerance, name


def without_times(row: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in row.items() if not name.startswith(TIMES)}


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
        value = network.value_head(hidden if critic is None else critic.body(tokens).last_hidden_state[0])[:, 0]
        start = int(text["prompt_length"])
        for step in range(int(text["mask"].sum())):
            log_probs[row, step] = logits[start + step - 1, tokens[0, start + step]]
            values[row, step] = value[start + step - 1]
        last[row] = value[-1]
    return log_probs, values, last


@torch.no_grad()
def wake_up(run: Run) -> None:
    """Values that are not zero, and a policy that has left its reference."""
    network = run.algorithm.network
    for weight in (network.actor_parameters() | network.critic_parameters()).values():
        weight += 0.05 * torch.randn_like(weight)
    run.update_engine()


@pytest.mark.parametrize("critic", ["shared", "separate"])
@pytest.mark.parametrize("reuse", [False, True])
def test_scores_are_those_of_plain_forward_passes(config: Config, critic: str, reuse: bool) -> None:
    more: dict[str, object] = {"actor__minibatches": 1, "critic__minibatches": 1} if reuse else {}
    made = config(model__critic=critic, kl__beta=0.1, actor__micro_batch_size=None if reuse else 3, **more)
    with running(made) as run:
        wake_up(run)
        algorithm = run.algorithm
        assert algorithm._reuses_forward(16) == reuse
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
        count = mask.sum(1)
        shaped = torch.where(mask, data["next", "reward"][..., 0] - 0.1 * (log_probs - reference), 0)
        torch.testing.assert_close(data["shaped_reward"], shaped, **near)
        for row in range(16):
            rest = float(last[row]) if truncated[row] else 0.0
            returns = [float(shaped[row, step:].sum()) + rest for step in range(int(count[row]))]
            assert data["value_target"][row, : count[row], 0].tolist() == pytest.approx(returns, abs=1e-4)
        assert data["advantage"][..., 0][mask].mean().item() == pytest.approx(0, abs=1e-5)


def test_portions_are_of_similar_length() -> None:
    data = TensorDict({"length": torch.tensor([5, 1, 9, 2, 5])}, batch_size=[5])
    assert [part.tolist() for part in by_length(data, 2)] == [[1, 3], [0, 4], [2]]


# What must not matter.

REUSE: dict[str, object] = {
    "actor__minibatches": 1,
    "critic__minibatches": 1,
    "actor__epochs": 1,
    "critic__epochs": 1,
    "kl__beta": 0.1,
}


@pytest.mark.parametrize("critic", ["shared", "separate"])
@pytest.mark.parametrize("epochs", [1, 2])
def test_reusing_the_forward_pass_changes_nothing(
    config: Config, monkeypatch: pytest.MonkeyPatch, critic: str, epochs: int
) -> None:
    made = config(**REUSE | {"model__critic": critic, "actor__epochs": epochs, "critic__epochs": epochs})
    with running(made) as run:
        wake_up(run)
        first = run.algorithm.step()
        reused = weights_of(run)
    monkeypatch.setattr(PPO, "_reuses_forward", lambda self, rows: False)
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
            critic__micro_batch_size=size,
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
    made = config(kl__beta=0.05, kl__target=1.0, rollout__over_sample=1.5, rollout__drop_truncated=True)
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
        {"kl__beta": 0.1, "kl__target": 1.0, "kl__horizon": 50, "loss__penalty": True},
        {"model__critic": "separate", "critic_warmup": 1, "actor__warmup": 5, "actor__decay": "linear"},
        {"model__lora__rank": 2, "kl__beta": 0.1, "model__refresh_reference": 2},
        {"model__refresh_reference": 1, "kl__beta": 0.1, "rollout__drop_truncated": True},
    ],
    ids=["plain", "adaptive", "separate", "LoRA", "refreshed reference"],
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


def moved(run: Run, before: dict[str, torch.Tensor]) -> set[str]:
    """Which parts of the network have changed."""
    after = weights_of(run)
    return {
        ("head" if "value_head" in name else name.partition(".")[0])
        for name, weight in before.items()
        if not torch.equal(weight, after[name])
    }


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
    made = config(actor__epochs=6, actor__learning_rate=1e-2, critic__epochs=6, loss__target_kl=1e-4, iterations=2)
    _, history = learn(made)
    assert history[0]["policy/epochs"] == 1
    assert history[0]["kl/old"] > 0
    _, free = learn(made.replace(loss__target_kl=None))
    assert free[0]["policy/epochs"] == 6
    assert free[0]["kl/old"] > history[0]["kl/old"]


def test_the_critic_goes_on_where_the_actor_has_stopped(config: Config) -> None:
    steps = {}
    for critic in ("shared", "separate"):
        made = config(
            model__critic=critic, actor__epochs=3, actor__learning_rate=1e-2, critic__epochs=5, loss__target_kl=1e-5
        )
        with running(made) as run:
            run.algorithm.step()
            assert run.algorithm.critic_optimizer is not None
            steps[critic] = (run.algorithm.actor_optimizer.steps, run.algorithm.critic_optimizer.steps)
    # A shared backbone learns from both in one pass, so what the actor leaves out of its three passes is left out.
    assert steps["separate"] == (2, 10)
    assert steps["shared"][0] == 2
    assert steps["shared"][1] >= 2 + 2 * 2


@pytest.mark.parametrize("critic", ["shared", "separate"])
@pytest.mark.parametrize(("actor_epochs", "critic_epochs"), [(1, 3), (3, 1)])
def test_actor_and_critic_have_epochs_of_their_own(
    config: Config, critic: str, actor_epochs: int, critic_epochs: int
) -> None:
    with running(config(model__critic=critic, actor__epochs=actor_epochs, critic__epochs=critic_epochs)) as run:
        row = run.algorithm.step()
        assert row["policy/epochs"] == actor_epochs
        assert run.algorithm.actor_optimizer.steps == 2 * actor_epochs
        assert run.algorithm.critic_optimizer is not None
        assert run.algorithm.critic_optimizer.steps == 2 * critic_epochs


def test_learning_rates_are_reported_and_used(config: Config) -> None:
    made = config(iterations=3, actor__warmup=8, actor__decay="linear", critic__learning_rate=7e-3)
    _, history = learn(made)
    # Four steps an iteration, twelve in all; the rate of the last one is reported.
    rates = [row["policy/learning_rate"] for row in history]
    assert rates == pytest.approx([3e-3 * 4 / 8, 3e-3, 3e-3 * (1 - 3 / 4)])
    assert [row["value/learning_rate"] for row in history] == [7e-3] * 3


# The KL to the reference.


@pytest.mark.parametrize("target", [0.05, 100.0])
def test_an_adaptive_beta_moves(config: Config, target: float) -> None:
    _, rows = learn(config(iterations=5, kl__beta=0.1, kl__target=target, kl__horizon=64))
    beta = 0.1
    for row in rows:
        assert row["kl/beta"] == pytest.approx(beta)  # what this iteration was computed with
        error = row["kl/sequence"] / target - 1
        beta *= 1 + min(max(error, -0.2), 0.2) * 16 / 64
    assert (beta > 0.095) == (target < 1)


@pytest.mark.parametrize("where", ["reward", "loss"])
def test_a_penalty_holds_the_policy_back(config: Config, where: str) -> None:
    how: dict[str, object] = {"kl__where": where, "kl__estimator": "k2" if where == "loss" else "k1"}
    far, near = [], []
    for beta, found in ((1e-6, far), (1.0, near)):
        made = config(
            iterations=15,
            kl__beta=beta,
            rollout__batch_size=64,
            actor__learning_rate=1e-3,
            evaluation__prompts=1,
            **how,
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


def test_a_penalty_needs_a_reference(config: Config) -> None:
    with (
        pytest.raises(ValueError, match=r"kl.beta=0.1 needs a reference model"),
        running(config(kl__beta=0.1, model__reference="none")),
    ):
        pass


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


def test_without_the_correction_nothing_is_weighted(config: Config) -> None:
    _, rows = learn(config(rollout__engine_dtype="bfloat16", loss__importance_cap=None, iterations=1))
    assert 1e-5 < rows[0]["kl/mismatch"] < 0.1
    assert "ratio/is_weight" not in rows[0]


# Ways to compute, objectives, advantages: each runs, learns something finite, and is really used.

VARIANTS: dict[str, dict[str, object]] = {
    "separate critic": {"model__critic": "separate"},
    "detached critic": {"model__critic_gradient": False},
    "LoRA": {"model__lora__rank": 4, "kl__beta": 0.01},
    "LoRA with dropout": {"model__lora__rank": 4, "model__lora__dropout": 0.1, "actor__minibatches": 1},
    "LoRA, separate critic": {"model__lora__rank": 4, "model__critic": "separate", "kl__beta": 0.01},
    "autocast": {"model__autocast": True, "model__reference_dtype": "bfloat16", "kl__beta": 0.01},
    "bfloat16": {"model__dtype": "bfloat16"},
    "gradient checkpointing": {"model__gradient_checkpointing": True},
    "penalty": {"loss__penalty": True},
    "dual clip": {"loss__dual_clip": 3.0},
    "no value clip": {"loss__value_clip": None},
    "no value loss": {"loss__value": 0.0},
    "no value loss, separate critic": {"loss__value": 0.0, "model__critic": "separate"},
    "entropy": {"loss__entropy": 0.01},
    "fixed": {"loss__aggregate": "fixed"},
    "sequence": {"loss__aggregate": "sequence"},
    "adaptive lambda": {"advantage__length_adaptive": 0.5},
    "monte carlo": {"advantage__kind": "monte_carlo"},
    "sequence advantage": {"advantage__kind": "sequence"},
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
        assert run.algorithm.guard.skipped == 0
        if "loss__value" not in changes:
            assert "head" in moved(run, before)
    for row in rows:
        assert row["policy/gradient_norm"] > 0
        finite = {k: v for k, v in row.items() if k != "value/explained_variance"}
        assert all(torch.tensor(value).isfinite() for value in finite.values()), row


def test_the_penalty_adapts_its_weight(config: Config) -> None:
    made = config(loss__penalty=True, loss__penalty_target=10.0)
    with running(made) as run:
        run.algorithm.step()
        assert run.algorithm.loss.beta == 0.5
        run.algorithm.step()
        tensors, state = run.algorithm.state()
        assert run.algorithm.loss.beta == 0.25
    with running(made) as other:
        other.algorithm.load_state(tensors, state)
        assert other.algorithm.loss.beta == 0.25


# When numbers go wrong.


def spoil(algorithm: PPO, monkeypatch: pytest.MonkeyPatch, when: Callable[[int], bool], what: str) -> list[int]:
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
        assert row["guard/skipped"] == algorithm.guard.skipped == 3
        assert algorithm.actor_optimizer.steps == 1
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
        with pytest.raises(TrainingDiverged, match=r"6 steps in a row.*iteration 2.*(?s:.*)--actor.learning-rate"):
            run.algorithm.step()
        assert moved(run, before) == set()


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
        assert (row["guard/skipped"], row["iteration"], run.algorithm.iteration) == (1, 1, 1)
        assert moved(run, before) == set()
        reasons = list((made.out / "skipped").glob("*.json"))
        assert len(reasons) == 1
        assert "reward" in json.loads(reasons[0].read_text())["where"]
        monkeypatch.setattr(Broken, "bad", staticmethod(lambda rollout: False))
        row = run.algorithm.step()
        assert (row["guard/skipped"], row["iteration"]) == (1, 2)
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


def test_a_run_is_a_loop(config: Config) -> None:
    """The library in ten lines."""
    with running(config(iterations=3)) as run:
        rows = []
        for metrics in run.algorithm:
            rows.append(metrics)
            run.update_engine()
    assert [row["iteration"] for row in rows] == [1, 2, 3]
    assert rows[-1]["tokens"] == sum(row["text/length"] * row["episodes"] for row in rows)
