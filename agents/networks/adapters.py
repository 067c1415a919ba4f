"""LoRA: several sets of small weights over one frozen model, one of them in use at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from agents.config import LoraConfig
from agents.networks.few_bits import hush_bitsandbytes

ACTOR, CRITIC, REFERENCE = "actor", "critic", "reference"


def add_adapters(model: Any, config: LoraConfig, names: list[str]) -> Any:
    """The model with an adapter of each name; its own weights are frozen. All adapters begin as no change at all."""
    hush_bitsandbytes()  # which peft imports if it is there
    try:
        import peft
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("LoRA needs peft: pip install 'llm-env[train]'") from error
    # Not the output layer: the loss reads its weights, not its result.
    output = model.get_output_embeddings()
    linear = [name for name, part in model.named_modules() if isinstance(part, nn.Linear) and part is not output]
    targets = [name for name in linear if config.targets == "all" or "att" in name]
    if not targets:
        where = "" if config.targets == "all" else " whose name says that it belongs to the attention"
        raise ValueError(f"LoRA adapts linear layers (nn.Linear), but {type(model).__name__} has none{where}")
    settings = peft.LoraConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=targets, bias="none"
    )
    adapted = peft.get_peft_model(model, settings, adapter_name=names[0])
    for name in names[1:]:
        adapted.add_adapter(name, settings)
    restore_gradients(adapted)
    return adapted


def is_adapted(model: Any) -> bool:
    """Whether the model has adapters."""
    return hasattr(model, "peft_config")


def adapter_parameters(model: Any, adapter: str) -> dict[str, nn.Parameter]:
    """The weights of one adapter, by name."""
    return {name: weight for name, weight in model.named_parameters() if f".{adapter}." in name and "lora_" in name}


def copy_adapter(model: Any, source: str, target: str) -> None:
    """Make `target` (added if need be) equal to `source`."""
    if target not in model.peft_config:
        model.add_adapter(target, model.peft_config[source])
    of_source, of_target = adapter_parameters(model, source), adapter_parameters(model, target)
    with torch.no_grad():
        for name, weight in of_source.items():
            of_target[name.replace(f".{source}.", f".{target}.")].copy_(weight)
    restore_gradients(model)


@contextlib.contextmanager
def using(model: Any, adapter: str | None) -> Iterator[None]:
    """Inside, the model computes with this adapter, or with none. A model without adapters is left alone."""
    if not is_adapted(model) or model.active_adapter == adapter:
        yield
        return
    previous = model.active_adapter
    with contextlib.ExitStack() as stack:
        if adapter is None:
            stack.enter_context(model.disable_adapter())
        else:
            model.set_adapter(adapter)
        restore_gradients(model)
        try:
            yield
        finally:
            stack.close()
            model.set_adapter(previous)
            restore_gradients(model)


def adapted_layers(model: Any) -> list[Any]:
    """The layers that have adapters."""
    return [part for part in model.modules() if hasattr(part, "lora_A")]


def adapted_as_now(layers: Sequence[Any]) -> AbstractContextManager[None]:
    """Later, let layers compute with the adapters that they compute with now.

    Which weights learn is left alone: peft's own `set_adapter` freezes the others, and takes long.
    """
    return _adapted(layers, [layer._active_adapter for layer in layers])


@contextlib.contextmanager
def _adapted(layers: Sequence[Any], adapters: Sequence[Any]) -> Iterator[None]:
    before = [layer._active_adapter for layer in layers]
    for layer, adapter in zip(layers, adapters, strict=True):
        layer._active_adapter = adapter
    try:
        yield
    finally:
        for layer, adapter in zip(layers, before, strict=True):
            layer._active_adapter = adapter


def restore_gradients(model: Any) -> None:
    """Let all adapters but the reference learn: peft freezes those that are not in use, and in a step several are."""
    for name, weight in model.named_parameters():
        weight.requires_grad_("lora_" in name and f".{REFERENCE}." not in name)
