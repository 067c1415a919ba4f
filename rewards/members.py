"""Several reward models in memory: what they have in common is there once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ADAPTER = "adapter"
"""The folder in that of a reward model which holds its low-rank adapters, as peft saves them."""
BASE = "base"
"""Where the configuration of a reward model with adapters says which weights they were trained on."""


def fingerprint(model: Any) -> str:
    """The same for models with the same weights.

    Examples:
        >>> import torch
        >>> one, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
        >>> fingerprint(one) == fingerprint(one), fingerprint(one) == fingerprint(other)
        (True, False)
    """
    found = hashlib.sha256()
    for name, weight in model.named_parameters():
        numbers = weight.detach().double()
        found.update(f"{name} {float(numbers.sum())!r} {float(numbers.square().sum())!r}".encode())
    return found.hexdigest()[:16]


def have_one_base(folders: Sequence[str]) -> bool:
    """Whether models are several sets of adapters over the same weights."""
    found = set()
    for folder in map(Path, folders):
        if not (folder / ADAPTER).is_dir():
            return False
        found.add(json.loads((folder / "config.json").read_text()).get(BASE))
    return len(folders) > 1 and len(found) == 1 and None not in found


def over_one_base(model: Any, folders: Sequence[str]) -> Any:
    """A model that can be any of those in folders, by the names of their places ("0", "1", ...), see `set_adapter`.

    Args:
        model: the first of them, in float32, with its adapters in its weights. It is taken apart.
        folders: see `have_one_base`.
    """
    import peft
    import torch
    from peft.tuners.lora import LoraLayer

    together = peft.PeftModel.from_pretrained(model, f"{folders[0]}/{ADAPTER}", adapter_name="0")
    adapted: list[Any] = [layer for layer in together.modules() if isinstance(layer, LoraLayer)]
    with torch.no_grad():
        for layer in adapted:
            layer.get_base_layer().weight -= layer.get_delta_weight("0")
    for number, folder in enumerate(folders[1:], start=1):
        together.load_adapter(f"{folder}/{ADAPTER}", adapter_name=str(number))
    return together


def share_equal_weights(model: Any, first: Any) -> None:
    """Let a model use the weights of another where its own are the same, as below a last layer that was trained alone.

    Examples:
        >>> import copy, torch
        >>> first = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
        >>> model = copy.deepcopy(first)
        >>> _ = torch.nn.init.zeros_(model[1].weight)
        >>> share_equal_weights(model, first)
        >>> model[0].weight is first[0].weight, model[1].weight is first[1].weight
        (True, False)
    """
    import torch

    theirs = dict(first.named_parameters())
    for path, part in model.named_modules():
        for name, weight in part.named_parameters(recurse=False):
            other = theirs.get(f"{path}.{name}" if path else name)
            if other is not None and torch.equal(weight, other):
                setattr(part, name, other)
