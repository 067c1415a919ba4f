"""Copying weights into a model, all or nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def copy_weights(model: torch.nn.Module, named_tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy tensors into the weights of those names, in place; nothing is copied unless everything fits.

    Tied weights are one tensor with several names: any of them will do.

    Args:
        model: whose weights to replace.
        named_tensors: one tensor for each weight, of any dtype, on any device. Buffers may be left out.

    Examples:
        >>> model = torch.nn.Linear(2, 1)
        >>> copy_weights(model, {"weight": torch.ones(1, 2), "bias": torch.zeros(1)})
        >>> model(torch.ones(2)).item()
        2.0
        >>> copy_weights(model, {"weight": torch.ones(1, 2)})
        Traceback (most recent call last):
        ...
        ValueError: cannot load these weights, nothing was changed: missing: bias
    """
    targets: dict[str, torch.Tensor] = model.state_dict(keep_vars=True)
    check_weights(model, named_tensors)
    with torch.no_grad():
        for name, tensor in named_tensors.items():
            targets[name].copy_(tensor)


def check_weights(model: torch.nn.Module, named_tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Raise unless there is a tensor of the right shape for each weight of the model, which is left as it is.

    Returns:
        For each name given, the first name of the same weight: another one if the weight is tied.
    """
    parameters = dict(model.named_parameters())
    targets: dict[str, torch.Tensor] = model.state_dict(keep_vars=True)  # every name, also those of tied weights
    names_of: dict[int, list[str]] = {}
    for name, target in targets.items():
        names_of.setdefault(id(target), []).append(name)

    problems = []
    unknown = [name for name in named_tensors if name not in targets]
    if unknown:
        problems.append(f"unknown: {_some(unknown)} (this model has names such as {next(iter(targets))})")
    missing = [names[0] for names in names_of.values() if names[0] in parameters and not named_tensors.keys() & names]
    if missing:
        problems.append(f"missing: {_some(missing)}")
    for name in named_tensors.keys() & targets.keys():
        given, expected = tuple(named_tensors[name].shape), tuple(targets[name].shape)
        if given != expected:
            problems.append(f"{name} has shape {given}, expected {expected}")
    if not problems:
        for names in names_of.values():
            given_names = [name for name in names if name in named_tensors]
            one = named_tensors[given_names[0]] if given_names else None
            for other in given_names[1:]:
                if one is not named_tensors[other] and not torch.equal(one, named_tensors[other]):  # type: ignore[arg-type]
                    problems.append(f"{given_names[0]} and {other} are tied in this model, but given as different")
    if problems:
        raise ValueError(f"cannot load these weights, nothing was changed: {'; '.join(problems)}")
    return {name: names_of[id(targets[name])][0] for name in named_tensors}


def merged_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights of a model with LoRA adapters, as they are with the adapters merged, by the base model's names.

    The model is left as it is: merging in place and taking it back would round its weights a little at every update.
    Of layers that keep their weights in fewer bits (they have a method `in_full`), these are what the bits stand for.

    Args:
        model: of peft, or any other (its parameters are returned, then).

    Examples:
        >>> {name: tuple(weight.shape) for name, weight in merged_weights(torch.nn.Linear(2, 1)).items()}
        {'weight': (1, 2), 'bias': (1,)}
    """
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    merged: dict[str, torch.Tensor] = {}
    adapted: list[str] = []
    with torch.no_grad():
        for name, module in base.named_modules():
            if not hasattr(module, "get_delta_weight"):
                continue
            if any(getattr(module, "use_dora", {}).values()):
                raise ValueError(f"{name} uses DoRA, which does not just add to the weight: merge it yourself")
            tensors = {part: tensor.detach() for part, tensor in module.base_layer.named_parameters()}
            if hasattr(module.base_layer, "in_full"):
                tensors["weight"] = module.base_layer.in_full()
            for adapter in [] if module.merged or module.disable_adapters else module.active_adapters:
                if adapter in module.lora_A or adapter in module.lora_embedding_A:
                    tensors["weight"] = tensors["weight"] + module.get_delta_weight(adapter)
            merged |= {f"{name}.{part}": tensor for part, tensor in tensors.items()}
            adapted.append(f"{name}.")
        others = {name: weight.detach() for name, weight in base.named_parameters()}
        others |= {f"{name}.weight": part.in_full() for name, part in base.named_modules() if hasattr(part, "in_full")}
    return merged | {name: weight for name, weight in others.items() if not name.startswith(tuple(adapted))}


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
