"""The weights of a model: their number format, and where they are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def cast_weights(model: Any, dtype: torch.dtype) -> Any:
    """Change the number format of a model's weights, and of nothing else: it is returned.

    `model.to(dtype)` also rounds the frequencies of rotary embeddings, by which positions are told apart.

    Examples:
        >>> import torch
        >>> model = torch.nn.BatchNorm1d(2)
        >>> cast_weights(model, torch.bfloat16).weight.dtype, model.running_mean.dtype
        (torch.bfloat16, torch.float32)
    """
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)
    return model


@contextlib.contextmanager
def lent_to(device: str | torch.device, *models: Any) -> Iterator[None]:
    """Have copies of frozen models' weights on a device for a while, in place of those that lie elsewhere.

    Examples:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 2).requires_grad_(False)
        >>> with lent_to("meta", layer):
        ...     print(layer.weight.device)
        meta
        >>> layer.weight.device
        device(type='cpu')
    """
    import torch

    there = torch.empty(0, device=device).device  # "cuda" is "cuda:0"
    tables = {id(table): table for model in models for part in model.modules() for table in _tables(part)}
    homes = [
        (table, name, tensor)
        for table in tables.values()
        for name, tensor in table.items()
        if tensor is not None and tensor.device != there
    ]
    lent: dict[Any, Any] = {}  # layers may share a weight
    try:
        for table, name, tensor in homes:
            if tensor not in lent:
                copy = tensor.detach().to(there, non_blocking=True)
                lent[tensor] = torch.nn.Parameter(copy, False) if isinstance(tensor, torch.nn.Parameter) else copy
            table[name] = lent[tensor]
        yield
    finally:
        for table, name, tensor in homes:
            table[name] = tensor


def _tables(part: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    return part._parameters, part._buffers
