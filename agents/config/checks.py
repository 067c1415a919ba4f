"""What a configuration must be like: the range of every number, and the combinations that make no sense."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

from agents.config import TrainConfig

# What each number may be. Fields of the optimizers go by "optimizer"; None is always allowed where the type allows it.
AT_LEAST_ONE = [
    "task.max_new_tokens",
    "task.context",
    "rollout.batch_size",
    "rollout.completions_per_prompt",
    "rollout.slots",
    "rollout.over_sample",
    "kl.horizon",
    "optimizer.epochs",
    "optimizer.minibatches",
    "optimizer.micro_batch_size",
    "evaluation.prompts",
    "checkpoint.keep",
    "guard.max_skipped",
    "sft.batch_size",
]
ABOVE_ZERO = [
    "task.reward_timeout",
    "model.lora.alpha",
    "rollout.temperature",
    "reward.clip",
    "advantage.length_adaptive",
    "loss.clip_low",
    "loss.clip_high",
    "loss.penalty_target",
    "loss.value_clip",
    "loss.importance_cap",
    "loss.target_kl",
    "kl.target",
    "optimizer.max_gradient_norm",
    "guard.kl_warning",
]
NOT_NEGATIVE = [
    "seed",
    "iterations",
    "critic_warmup",
    "model.lora.rank",
    "model.refresh_reference",
    "reward.no_eos_penalty",
    "loss.entropy",
    "loss.value",
    "kl.beta",
    "optimizer.learning_rate",
    "optimizer.warmup",
    "optimizer.weight_decay",
    "evaluation.every",
    "log.samples_every",
    "checkpoint.every",
    "guard.entropy_warning",
    "sft.steps",
    "sft.learning_rate",
    "sft.warmup",
    "sft.weight_decay",
]
FROM_ZERO_TO_ONE = ["advantage.gamma", "advantage.actor_lambda", "advantage.critic_lambda"]
BELOW_ONE = ["model.lora.dropout"]
ABOVE_ONE = ["loss.dual_clip"]
FINITE = ["reward.scale", "evaluation.stop_at"]


def problems(config: TrainConfig) -> Iterator[str]:
    """What is wrong with a configuration, a line each: the flag, its value, what was expected, what to do."""
    yield from _out_of_range(config)
    yield from _contradictions(config)
    yield from _no_such_device(config.device)


def _out_of_range(config: TrainConfig) -> Iterator[str]:
    rules: dict[str, tuple[list[str], Callable[[float], bool]]] = {
        "at least 1": (AT_LEAST_ONE, lambda x: x >= 1),
        "a number above 0": (ABOVE_ZERO, lambda x: x > 0),
        "0 or more": (NOT_NEGATIVE, lambda x: x >= 0),
        "a number from 0 to 1": (FROM_ZERO_TO_ONE, lambda x: 0 <= x <= 1),
        "a number from 0 to below 1": (BELOW_ONE, lambda x: 0 <= x < 1),
        "a number above 1 (3 is usual)": (ABOVE_ONE, lambda x: x > 1),
        "a finite number": (FINITE, lambda x: True),
    }
    values = dict(flatten(config))
    for expected, (names, fits) in rules.items():
        for name in names:
            for part in ("actor", "critic") if name.startswith("optimizer.") else (None,):
                field = name if part is None else name.replace("optimizer", part, 1)
                value = values[field]
                if value is not None and not (math.isfinite(value) and fits(value)):
                    yield f"{flag(field)} is {value}, expected {expected}"
    for name in ("actor.betas", "critic.betas"):
        if not all(0 <= beta < 1 for beta in values[name]):
            yield f"{flag(name)} is {values[name]}, expected two numbers from 0 to below 1, such as 0.9 0.95"


def _no_such_device(name: str) -> Iterator[str]:
    import torch  # takes seconds, and all else here does without

    try:
        device = torch.device(name)
    except RuntimeError:
        yield f"--device is {name}, expected cpu, cuda, cuda:0, ..."
        return
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        yield f"--device is {name}, but torch finds {torch.cuda.device_count()} CUDA devices here: use --device cpu"


def _contradictions(c: TrainConfig) -> Iterator[str]:
    size, group = c.rollout.batch_size, c.rollout.completions_per_prompt
    if c.loss.clip_low > 1:
        yield f"--loss.clip-low is {c.loss.clip_low}, expected at most 1: a probability ratio is never below 0"
    if c.model.reference == "none":
        if c.kl.beta > 0:
            yield (
                f"--kl.beta is {c.kl.beta}, but there is no model to compare with (--model.reference none): "
                f"use --model.reference initial, or --kl.beta 0"
            )
        if c.model.refresh_reference:
            yield (
                f"--model.refresh-reference is {c.model.refresh_reference}, but there is no reference to replace "
                f"(--model.reference none): use --model.reference initial, or --model.refresh-reference 0"
            )
    if c.kl.target is not None and c.kl.beta == 0:
        yield f"--kl.target is {c.kl.target}, but an adapted --kl.beta grows from where it begins: make it more than 0"
    if c.kl.estimator != "k1" and c.kl.where == "reward":
        yield (
            f"--kl.estimator is {c.kl.estimator}, but a penalty in the reward is always k1: "
            f"use --kl.where loss, or leave the estimator out"
        )
    if c.model.lora.rank and c.model.reference_dtype is not None:
        yield (
            f"--model.reference-dtype is {c.model.reference_dtype}, but with LoRA the reference is the model itself, "
            f"without its adapters: leave it out, or use --model.lora.rank 0"
        )
    if group >= 1 and size % group:
        yield (
            f"--rollout.batch-size is {size}, expected a multiple of --rollout.completions-per-prompt, {group}: "
            f"use {max(1, round(size / group)) * group}"
        )
    if c.rollout.drop_uniform_groups and group < 2:
        yield (
            f"--rollout.drop-uniform-groups needs groups of texts, and --rollout.completions-per-prompt is {group}: "
            f"use at least 2"
        )
    for name, optimizer in (("actor", c.actor), ("critic", c.critic)):
        if optimizer.minibatches > size:
            yield (
                f"--{name}.minibatches is {optimizer.minibatches}, more than there are texts in a batch "
                f"(--rollout.batch-size {size}): use fewer"
            )
    if 0 < c.iterations <= c.critic_warmup:
        yield (
            f"--critic-warmup is {c.critic_warmup} of --iterations {c.iterations}: the policy would never learn. "
            f"Use fewer, or more iterations"
        )


def flatten(config: object, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All fields by their dotted names.

    Examples:
        >>> dict(flatten(TrainConfig()))["actor.learning_rate"]
        0.0001
    """
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from flatten(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value


def flag(name: str) -> str:
    """A field's flag.

    Examples:
        >>> flag("actor.learning_rate")
        '--actor.learning-rate'
    """
    return "--" + name.replace("_", "-")
