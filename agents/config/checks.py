"""What is wrong with a configuration: numbers out of their ranges, and settings that contradict each other."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from typing import Any, get_type_hints

from agents.config import TrainConfig
from agents.config.address import KEY, Address, new_key
from agents.config.ranges import expected


def problems(config: TrainConfig) -> Iterator[str]:
    """What is wrong with a configuration, a line each: the flag, its value, what was expected, what to do."""
    yield from out_of_range(config)
    yield from _contradictions(config)
    yield from _no_such_device(config.device)
    yield from _too_few_gpus(config)


def out_of_range(part: object, prefix: str = "") -> Iterator[str]:
    """The numbers of a part of a configuration that lie outside of the ranges of their types."""
    for name, kind in get_type_hints(type(part), include_extras=True).items():
        value = getattr(part, name)
        if dataclasses.is_dataclass(value):
            yield from out_of_range(value, f"{prefix}{name}.")
        elif words := expected(kind, value):
            yield f"{flag(prefix + name)} is {value}, expected {words}"


def _no_such_device(name: str) -> Iterator[str]:
    import torch  # takes seconds, and all else here does without

    try:
        device = torch.device(name)
    except RuntimeError:
        yield f"--device is {name}, expected cpu, cuda, cuda:0, ..."
        return
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        yield f"--device is {name}, but torch finds {torch.cuda.device_count()} CUDA devices here: use --device cpu"


def _too_few_gpus(c: TrainConfig) -> Iterator[str]:
    parts = c.rollout.tensor_parallel
    if c.worker_gpus and parts > c.worker_gpus:
        yield (
            f"--rollout.tensor-parallel is {parts}, but each of --workers has {c.worker_gpus} GPUs: "
            f"use --worker-gpus {parts}"
        )
    if not c.worker_gpus or c.ray is not None or c.listen is not None:
        return
    import torch

    if c.device.startswith("cuda:"):
        yield f"--device is {c.device}, but with --worker-gpus the learner has the first GPU: use cuda"
    needed, found = c.workers * c.worker_gpus + c.device.startswith("cuda"), torch.cuda.device_count()
    if found < needed:
        yield (
            f"--worker-gpus is {c.worker_gpus} for each of --workers {c.workers}, which with the learner's makes "
            f"{needed}, but torch finds {found} CUDA devices here: use fewer --workers, or let them share --device "
            f"(--worker-gpus 0)"
        )


def _contradictions(c: TrainConfig) -> Iterator[str]:
    size, group = c.rollout.batch_size, c.rollout.completions_per_prompt
    if c.kl.target is not None and c.kl.beta == 0:
        yield f"--kl.target is {c.kl.target}, but an adapted --kl.beta grows from where it begins: make it more than 0"
    if c.kl.beta and c.kl.estimator in ("k2", "k3") and c.kl.where == "reward":
        yield (
            f"--kl.estimator is {c.kl.estimator}, but a penalty in the reward is always k1: "
            f"use --kl.where loss, or leave the estimator out"
        )
    if c.kl.beta and c.kl.estimator == "k1" and c.kl.where == "loss":
        yield (
            "--kl.estimator is k1, but in the loss it holds the policy to nothing: its gradient does not depend on the "
            "reference, it makes whatever was written rarer. Use k2, whose gradient is that of the KL, or k3"
        )
    if c.model.lora.rank and c.model.reference_dtype is not None:
        yield (
            f"--model.reference-dtype is {c.model.reference_dtype}, but with LoRA the reference is the model itself, "
            f"without its adapters: leave it out, or use --model.lora.rank 0"
        )
    if c.rollout.tensor_parallel > 1 and c.rollout.engine == "transformers":
        yield (
            f"--rollout.tensor-parallel is {c.rollout.tensor_parallel}, but the transformers engine keeps a model in "
            f"one place: use --rollout.engine vllm"
        )
    if c.model.offload_reference:
        yield from _of_offloading(c)
    if c.model.frozen_bits and not (c.model.lora.rank or c.keeps_reference):
        yield (
            f"--model.frozen-bits is {c.model.frozen_bits}, but all weights learn: use --model.lora.rank 16, or leave "
            f"it out"
        )
    if c.model.frozen_bits and c.model.refresh_reference and not c.model.lora.rank:
        yield (
            f"--model.refresh-reference is {c.model.refresh_reference}, but the reference is kept in "
            f"{c.model.frozen_bits} bits, which takes no new weights: leave --model.frozen-bits out, or use LoRA"
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
    yield from _of_workers(c)
    if 0 < c.iterations <= c.critic_warmup:
        yield (
            f"--critic-warmup is {c.critic_warmup} of --iterations {c.iterations}: the policy would never learn. "
            f"Use fewer, or more iterations"
        )


def _of_offloading(c: TrainConfig) -> Iterator[str]:
    if c.model.lora.rank:
        yield (
            "--model.offload-reference is on, but with LoRA the reference is the model itself, without its adapters: "
            "leave it out, or use --model.lora.rank 0"
        )
    elif not c.keeps_reference:
        yield "--model.offload-reference is on, but there is no reference: leave it out, or use a --kl.beta above 0"
    if c.device == "cpu":
        yield "--model.offload-reference is on, but --device is cpu, where the reference lies in any case: leave it out"
    if c.model.frozen_bits == 4:
        yield (
            "--model.offload-reference is on, but --model.frozen-bits is 4, and such weights stay where they were "
            "made: use 8, or leave one of them out"
        )


def _of_workers(c: TrainConfig) -> Iterator[str]:
    if c.rollout.ahead and not c.workers:
        yield (
            f"--rollout.ahead is {c.rollout.ahead}, but texts are written in this process, which cannot learn "
            f"meanwhile: use --workers 1 or more"
        )
    if c.rollout.go_on:
        yield from _of_streams(c)
    asked = {"worker_cpus": c.worker_cpus, "worker_gpus": c.worker_gpus or None, "ray": c.ray, "listen": c.listen}
    for name, value in asked.items():
        if value is not None and not c.workers:
            yield f"{flag(name)} is {value}, but --workers is 0: use --workers 1 or more"
    if c.ray and c.listen:
        yield f"--ray is {c.ray} and --listen {c.listen}, but --workers come from one place: leave one of them out"
    if c.listen:
        try:
            Address.read(c.listen)
        except ValueError as error:
            yield f"--listen is {c.listen}, {error}"
        else:
            if not os.environ.get(KEY):
                yield (
                    f"--listen is {c.listen}, but the environment variable {KEY} is empty: it must hold a secret that "
                    f"only --workers know, as they can do what this program can. Use: export {KEY}={new_key()}"
                )


def _of_streams(c: TrainConfig) -> Iterator[str]:
    if c.rollout.ahead:
        yield (
            f"--rollout.go-on is on, and --rollout.ahead is {c.rollout.ahead}, but texts that go on are written "
            f"with the present weights: leave one of them out"
        )
    chooses = {
        "drop_uniform_groups": c.rollout.drop_uniform_groups,
        "drop_cut": c.rollout.drop_cut,
        "drop_part": c.rollout.drop_part,
        "over_sample": c.rollout.over_sample > 1,
    }
    for name in (name for name, chosen in chooses.items() if chosen):
        yield f"--rollout.go-on is on, which leaves no texts to choose from: leave {flag('rollout.' + name)} out"


def flatten(config: object, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All fields by their dotted names.

    Examples:
        >>> dict(flatten(TrainConfig()))["actor.learning_rate"]
        0.0003
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
