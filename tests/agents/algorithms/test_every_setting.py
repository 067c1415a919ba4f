"""Promise 8, setting by setting: one that is changed changes what is learned, or is refused, or acts elsewhere."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch

from agents.algorithms.registry import check_algorithm
from agents.config import TrainConfig
from agents.config.checks import flatten
from agents.config.files import ConfigError, check_config
from agents.config.switches import matches
from tests.agents.runs import WITHOUT_CRITIC, running, save_small_model, weights_of

# Not in what a few iterations of learning lead to, and where instead.
ELSEWHERE: dict[str, tuple[str, ...]] = {
    "what is shown, kept, warned of": ("out", "log.*", "checkpoint.*", "evaluation.*", "guard.*"),
    "how long it goes on": ("iterations",),
    "before it begins": ("sft.*",),
    "speed and memory": (
        *("device", "rollout.slots", "model.compile", "model.gradient_checkpointing", "model.reference"),
        *("actor.micro_batch_size", "critic.micro_batch_size", "workers", "rollout.patience"),
        *("worker_cpus", "worker_gpus", "ray", "listen", "rollout.tensor_parallel"),
        *("model.frozen_bits", "model.offload_reference", "actor.state_bits", "critic.state_bits"),
    ),
    "names of what is used, and their arguments": (
        *("algo", "algo_args", "module", "task.name", "task.args", "task.reward", "model.name", "rollout.engine"),
        "loss.terms",
    ),
    "what may happen, and does not here": (
        *("task.drop_long_prompts", "task.reward_timeout", "task.context", "task.chat"),
        *("rollout.drop_uniform_groups", "rollout.drop_part", "rollout.drop_below"),
    ),
    # A bound on a ratio, which is 1 where the engine computes with the trained weights: it holds there by itself.
    "a bound that holds": ("loss.importance_cap",),
    "the reference, which without a penalty is only measured": ("model.reference_dtype", "model.refresh_reference"),
}
BASE = TrainConfig(iterations=2).replace(
    task__name="VowelShare",
    task__args={},
    rollout__batch_size=16,
    rollout__completions_per_prompt=4,
    evaluation__prompts=1,
    actor__learning_rate=3e-2,
    loss__target_kl=None,  # a step of this rate goes too far for any bound
    log__display=False,
)
# A fitted baseline listens to a critic only where that explains something, which a new one may not.
WITH_CRITIC: dict[str, object] = {
    "model__critic": "shared",
    "critic__learning_rate": 3e-2,
    "advantage__baseline": "value",
}
BASES: dict[str, dict[str, object]] = {
    **{algo: {"algo": algo, **WITH_CRITIC} for algo in ("ppo", "a2c", "reinforce")},
    **{algo: {"algo": algo} for algo in WITHOUT_CRITIC},
    "a critic of its own": {**WITH_CRITIC, "model__critic": "separate"},
    "more epochs for the critic": {"critic__epochs": 5, **WITH_CRITIC},
    "critic warm-up": {"critic_warmup": 1, **WITH_CRITIC},
    "no critic loss": {"loss__value": 0.0, "advantage__gamma": 0.9},
    "penalty": {"loss__kind": "penalty", **WITH_CRITIC},
    "KL in the loss": {"algo": "a2c", "kl__beta": 0.1, "kl__where": "loss", **WITH_CRITIC},
    # The first KL is 0, so that a target makes a difference from the third iteration on.
    "adaptive KL": {"kl__beta": 0.1, "kl__target": 1.0, "kl__horizon": 20, "iterations": 3, **WITH_CRITIC},
    "LoRA": {"model__lora__rank": 2, **WITH_CRITIC},
    "length-adaptive": {"advantage__length_adaptive": 0.5, **WITH_CRITIC},
    "monte_carlo": {"advantage__kind": "monte_carlo", **WITH_CRITIC},
    "grpo with a penalty": {"algo": "grpo", "loss__kind": "penalty", "kl__beta": 0.1, "kl__where": "loss"},
}
# Where the next best value would be no change, or would not come into play.
OTHER: dict[str, Any] = {
    "loss.kind": "penalty",
    "loss.dual_clip": 1.01,
    "loss.value_clip": 0.01,
    "loss.target_kl": 1e-6,
    "advantage.actor_lambda": 0.3,
    "loss.penalty_target": 1000.0,
    "advantage.kind": "sequence",
    "advantage.length_adaptive": 0.3,
    "task.max_new_tokens": 3,
    "task.reward_args": {"word": "a"},
    "reward.clip": 0.1,
    "rollout.completions_per_prompt": 8,
    "rollout.engine_dtype": "bfloat16",
    "rollout.over_sample": 1.5,
    "kl.estimator": "k3",
    "kl.target": 1e-3,
    "actor.minibatches": 2,
    "critic.minibatches": 2,
    "critic.micro_batch_size": 2,
    "actor.warmup": 9,
    "critic.warmup": 9,
    "actor.max_gradient_norm": 0.01,
    "critic.max_gradient_norm": 0.001,
    "reward.no_eos_penalty": 0.5,
}


def kinds(part: type, prefix: str = "") -> dict[str, Any]:
    """The type of every setting."""
    found: dict[str, Any] = {}
    for name, kind in get_type_hints(part).items():
        found |= kinds(kind, f"{prefix}{name}.") if dataclasses.is_dataclass(kind) else {prefix + name: kind}
    return found


KINDS = kinds(TrainConfig)


def another(name: str, value: Any) -> Any:
    """Another value than this one."""
    if name in OTHER and OTHER[name] != value:
        return OTHER[name]
    kind = KINDS[name]
    choices = [choice for part in (kind, *get_args(kind)) if get_origin(part) is Literal for choice in get_args(part)]
    if choices:
        return next(choice for choice in choices if choice != value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return 0.3 if value in (0.0, 1.0) else value / 2
    if isinstance(value, tuple):
        return (0.5, 0.6)
    if isinstance(value, str):
        return value + "x"
    raise AssertionError(f"{name} is {value!r}: say in OTHER what else it may be")


def refused(config: TrainConfig) -> bool:
    """Whether it is, before anything heavy is done: for the setting itself, or for one that does not go with it."""
    try:
        check_config(config)
        check_algorithm(config)
    except ConfigError:
        return True
    return False


def learned(config: TrainConfig) -> dict[str, torch.Tensor]:
    """All weights after the last iteration."""
    with running(config) as run:
        for _ in run.algorithm:
            run.update_engine()
        return weights_of(run)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("model"), spread=0.2, width=8)


@pytest.mark.slow
@pytest.mark.parametrize("changes", BASES.values(), ids=BASES)
def test_every_setting_acts_or_is_refused(folder: Path, tmp_path: Path, changes: dict[str, object]) -> None:
    base = BASE.replace(model__name=str(folder), out=tmp_path, **changes)
    plain, again = learned(base), learned(base)
    assert all(torch.equal(weight, again[name]) for name, weight in plain.items())
    elsewhere = [pattern for patterns in ELSEWHERE.values() for pattern in patterns]
    idle = []
    for name, value in flatten(base):
        if matches(name, elsewhere):
            continue
        config = base.replace(**{name.replace(".", "__"): another(name, value)})
        if refused(config):
            continue
        now = learned(config)
        if now.keys() == plain.keys() and all(
            weight.shape == now[name].shape and torch.equal(weight, now[name]) for name, weight in plain.items()
        ):
            idle.append(name)
    assert idle == []
