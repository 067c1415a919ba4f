"""A setting without effect is refused, and so is what does not fit together; and the message says what to do."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from agents.algorithms.base import Algorithm
from agents.algorithms.registry import (
    algorithm_class,
    algorithm_names,
    check_algorithm,
    register_algorithm,
    unread_settings,
)
from agents.config import TrainConfig
from agents.config.files import ConfigError
from agents.config.presets import PRESETS
from agents.run.parts import build

GROUPS = {"rollout__completions_per_prompt": 8}
GRPO: dict[str, Any] = {"algo": "grpo", **GROUPS}
RLOO: dict[str, Any] = {"algo": "rloo", **GROUPS}


@register_algorithm("test_arguments")
class WithArguments(Algorithm):
    """Has settings of its own."""

    def __init__(self, *parts: Any, strength: float, sharp: bool = False, **more: Any) -> None:
        self.strength, self.sharp = strength, sharp
        super().__init__(*parts, **more)


@register_algorithm("test_own_way")
class OwnWay(Algorithm):
    """Makes its loss and its advantages itself."""

    settings = ("loss.entropy",)

    def make_loss(self) -> Any:
        """None here."""
        raise NotImplementedError

    def advantages(self, data: Any, reward: Any) -> Any:
        """None here."""
        raise NotImplementedError


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({**GRPO, "advantage__gamma": 0.9}, "--advantage.gamma is 0.9, but --algo grpo does not read it: leave it out"),
        ({**GRPO, "advantage__baseline": "none"}, "--advantage.baseline is none, but --algo grpo does not read it"),
        ({**GRPO, "advantage__kind": "sequence"}, "--advantage.kind is sequence, but --algo grpo does not read it"),
        ({**GRPO, "critic_warmup": 1}, "--critic-warmup is 1, but --algo grpo has no critic: leave it out"),
        ({**GRPO, "critic__epochs": 9}, "--critic.epochs is 9, but --algo grpo has no critic: leave it out"),
        ({**GRPO, "model__critic": "separate"}, "--model.critic is separate, but --algo grpo has no critic"),
        ({**GRPO, "model__critic": "shared"}, "--model.critic is shared, but --algo grpo has no critic"),
        ({**GRPO, "loss__value": 0.1}, "--loss.value is 0.1, but --algo grpo has no critic"),
        ({**GRPO, "loss__value_clip": 0.2}, "--loss.value-clip is 0.2, but --algo grpo has no critic"),
        ({**RLOO, "advantage__normalize": False}, "--advantage.normalize is False, but --algo rloo does not read it"),
        (
            {"algo": "grpo"},
            "--rollout.completions-per-prompt is 1, but --algo grpo compares the texts of one prompt: "
            "use at least 2; 8 is usual",
        ),
        ({"algo": "rloo"}, "--rollout.completions-per-prompt is 1, but --algo rloo compares"),
        ({"algo": "reinforce", "loss__clip_low": 0.1}, "--loss.clip-low is 0.1, but --algo reinforce does not read it"),
        ({"algo": "a2c", "loss__dual_clip": 3.0}, "--loss.dual-clip is 3.0, but --algo a2c does not read it"),
        ({"algo": "a2c", "loss__kind": "penalty"}, "--loss.kind is penalty, but --algo a2c does not read it"),
        ({"algo": "reinforce", "loss__penalty_target": 0.1}, "--loss.penalty-target is 0.1, but --algo reinforce"),
        (
            {"loss__kind": "penalty", "loss__dual_clip": 3},
            "--loss.dual-clip is 3, but the loss 'penalty' does not read it ('clip' would): leave it out",
        ),
        (
            {"loss__penalty_target": 0.1},
            "--loss.penalty-target is 0.1, but the loss 'clip' does not read it ('penalty' would): leave it out",
        ),
        (
            {"advantage__kind": "monte_carlo", "advantage__actor_lambda": 0.9},
            "--advantage.actor-lambda is 0.9, but the advantage 'monte_carlo' does not read it ('gae' would)",
        ),
        (
            {"advantage__kind": "sequence", "advantage__length_adaptive": 0.1},
            "--advantage.length-adaptive is 0.1, but the advantage 'sequence' does not read it ('gae' would)",
        ),
        (
            {"advantage__kind": "group"},
            "--advantage.kind is group, but --algo ppo has a critic, and these give it nothing to learn: use one",
        ),
        (
            {"rollout__batch_size": 3},
            "--actor.minibatches is 4, more than there are texts in a batch (--rollout.batch-size 3): use fewer",
        ),
        (
            {"rollout__batch_size": 3, "actor__minibatches": 3, "model__critic": "separate"},
            "--critic.minibatches is 4, more than there are texts in a batch (--rollout.batch-size 3): use fewer",
        ),
        ({"algo": "pqo"}, "--algo: unknown algorithm 'pqo'; did you mean 'ppo'"),
        ({"loss__kind": "clop"}, "--loss.kind: unknown loss 'clop'; did you mean 'clip'?"),
        ({"advantage__kind": "gea"}, "--advantage.kind: unknown advantage estimator 'gea'; did you mean 'gae'?"),
        ({"loss__terms": {"none": 1.0}}, "--loss.terms: unknown loss term 'none'"),
        (
            {"algo_args": {"strength": 1}},
            "for --algo ppo: there is no argument 'strength'; it takes none",
        ),
        (
            {"algo": "test_arguments", "algo_args": {"strenght": 1, "strength": 1}},
            "--algo-args, which are for --algo test_arguments: there is no argument 'strenght'; "
            "did you mean 'strength'? it takes strength, sharp",
        ),
        (
            {"algo": "test_arguments"},
            "the argument 'strength' is missing; it takes strength, sharp",
        ),
        ({"algo": "test_own_way", "loss__clip_low": 0.1}, "--loss.clip-low is 0.1, but --algo test_own_way does not"),
        ({"algo": "test_own_way", "advantage__gamma": 0.5}, "--advantage.gamma is 0.5, but --algo test_own_way does"),
        ({"module": "no_such_module"}, "--module is no_such_module, but Python finds no module no_such_module"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], message: str) -> None:
    config = TrainConfig().replace(**changes)
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_algorithm(config)
    with pytest.raises(ConfigError, match=re.escape(message)):
        build(config)


# What nothing reads, whatever it is set to: by algorithm, or by the setting that switches it off.
CLIPS = ("loss__clip_low", "loss__clip_high", "loss__dual_clip")
PLAIN = (*CLIPS, "loss__penalty_target", "loss__value_clip", "loss__kind")
CRITIC = (
    *("critic__learning_rate", "critic__warmup", "critic__decay", "critic__weight_decay", "critic__betas"),
    *("critic__max_gradient_norm", "critic__epochs", "critic__minibatches", "critic__micro_batch_size"),
    *("critic_warmup", "model__critic", "loss__value_clip", "advantage__critic_lambda"),
)
LAMBDAS = ("advantage__actor_lambda", "advantage__critic_lambda", "advantage__length_adaptive")
OF_VALUES = ("advantage__gamma", "advantage__kind", "advantage__baseline", *LAMBDAS)
LORA = ("model__lora__alpha", "model__lora__dropout", "model__lora__targets")
PENALTY: dict[str, Any] = {"loss__kind": "penalty"}
WITHOUT_EFFECT: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"algo": "reinforce"}, PLAIN),
    ({"algo": "a2c"}, PLAIN),
    (GRPO, (*OF_VALUES, *CRITIC, "loss__value")),
    (RLOO, (*OF_VALUES, *CRITIC, *PLAIN, "loss__value", "advantage__normalize")),
    ({}, ("loss__penalty_target", "kl__horizon", "critic__minibatches", "critic__micro_batch_size", *LORA)),
    ({}, ("kl__where", "kl__estimator", "task__reward_args", "model__reference_dtype", "model__refresh_reference")),
    (PENALTY, CLIPS),
    (GRPO | PENALTY, CLIPS),
    ({}, ("critic__learning_rate", "critic__epochs", "loss__value_clip")),
    ({"advantage__kind": "monte_carlo"}, LAMBDAS),
    ({"advantage__kind": "sequence"}, LAMBDAS),
    ({"advantage__length_adaptive": 0.05}, ("advantage__actor_lambda",)),
    ({"loss__value": 0.0}, CRITIC),
    ({"algo": "a2c", "loss__value": 0.0}, CRITIC),
    (
        {"model__critic": "shared", "actor__epochs": 6, "critic__epochs": 5},
        ("critic__minibatches", "critic__micro_batch_size"),
    ),
]
OTHER: dict[str, Any] = {
    "loss__kind": "penalty",
    "advantage__kind": "monte_carlo",
    "loss__value": 0.1,
    "loss__value_clip": 0.3,
    "critic__decay": "linear",
    "critic__betas": (0.5, 0.5),
    "model__critic": "separate",
    "advantage__baseline": "none",
    "advantage__normalize": False,
    "model__lora__targets": "attention",
    "model__reference_dtype": "bfloat16",
    "model__refresh_reference": 5,
    "kl__where": "loss",
    "kl__estimator": "k1",
    "task__reward_args": {"word": "x"},
}


@pytest.mark.parametrize(("base", "settings"), WITHOUT_EFFECT)
def test_what_has_no_effect_is_refused(base: dict[str, Any], settings: tuple[str, ...]) -> None:
    check_algorithm(TrainConfig().replace(**base))
    for name in settings:
        whole = name.endswith(("epochs", "size", "warmup", "minibatches", "horizon", "alpha"))
        value = OTHER.get(name, 5 if whole else 0.5)
        flag = "--" + name.replace("__", ".").replace("_", "-")
        with pytest.raises(ConfigError, match=f"{flag} is {re.escape(str(value))}, but .*: leave it out"):
            check_algorithm(TrainConfig().replace(**base | {name: value}))


def test_all_that_is_wrong_is_named_at_once() -> None:
    config = TrainConfig().replace(algo="grpo", advantage__gamma=0.9, critic_warmup=3)
    with pytest.raises(ConfigError, match=r"(?s)^3 things are wrong:.*completions-per-prompt.*gamma.*critic-warmup"):
        check_algorithm(config)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model__critic": "shared", "loss__kind": "penalty", "loss__penalty_target": 0.1, "loss__value_clip": 0.2},
        {"advantage__length_adaptive": 0.1, "advantage__critic_lambda": 0.9, "critic_warmup": 3},
        {"advantage__kind": "monte_carlo", "advantage__gamma": 0.9, "advantage__baseline": "none"},
        {"model__critic": "separate", "critic__learning_rate": 1.0, "loss__value": 0.1},
        {"algo": "a2c", "loss__entropy": 0.1, "loss__value": 0.1, "advantage__kind": "sequence"},
        {"algo": "reinforce", "kl__beta": 0.1, "kl__where": "loss", "kl__estimator": "k3", "loss__entropy": 0.1},
        {**GRPO, "advantage__normalize": False, "loss__kind": "penalty", "kl__beta": 0.1},
        {**GRPO, "loss__dual_clip": 3.0, "loss__aggregate": "fixed", "loss__target_kl": 0.1},
        {**RLOO, "loss__importance_cap": None, "kl__beta": 0.1, "kl__target": 1.0, "kl__horizon": 5},
        {**GRPO, "rollout__batch_size": 2, "rollout__completions_per_prompt": 2, "actor__minibatches": 2},
        {"rollout__batch_size": 3, "actor__minibatches": 3},
        {"loss__value": 0.0, "advantage__baseline": "none", "advantage__actor_lambda": 0.9},
        {"model__critic": "shared", "critic__epochs": 5, "critic__minibatches": 2, "critic__micro_batch_size": 8},
        {"model__critic": "shared", "critic_warmup": 5, "critic__minibatches": 2, "critic__micro_batch_size": 8},
        {"model__critic": "separate", "critic__minibatches": 2, "critic__micro_batch_size": 8},
        {"loss__importance_cap": 1.5},  # a bound, which holds by itself where the engine shares the trained weights
        {"algo": "test_arguments", "algo_args": {"strength": 2}},
        {"algo": "test_own_way", "loss__entropy": 0.1},
    ],
)
def test_what_is_read_is_not_refused(changes: dict[str, Any]) -> None:
    check_algorithm(TrainConfig().replace(**changes))


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_fine(preset: str) -> None:
    check_algorithm(PRESETS[preset].config)


def test_unread_settings_come_with_their_defaults() -> None:
    config = TrainConfig().replace(algo="a2c", loss__kind="penalty", loss__clip_low=0.3, actor__epochs=9)
    assert unread_settings(config) == {"loss.kind": "clip", "loss.clip_low": 0.2}
    assert unread_settings(config.replace(algo="unknown")) == {}


def test_every_algorithm_has_a_file_and_a_name() -> None:
    ours = {name for name in algorithm_names() if algorithm_class(name).__module__.startswith("agents.algorithms.")}
    assert {"ppo", "a2c", "reinforce", "grpo", "rloo"} <= ours
    for name in ("ppo", "a2c", "reinforce", "grpo", "rloo"):
        assert algorithm_class(name).__bases__ == (Algorithm,)
        assert algorithm_class(name).__module__ == f"agents.algorithms.{name}"


def test_a_module_that_itself_fails_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("fails_on_import.py").write_text("import no_such_library\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_library"):
        check_algorithm(TrainConfig(module="fails_on_import"))
    assert "fails_on_import" not in sys.modules
