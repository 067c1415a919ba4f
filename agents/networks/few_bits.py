"""Weights that do not learn, in few bits."""

from __future__ import annotations

import logging
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

LARGEST = 127


def keep_in_few_bits(model: nn.Module, bits: Literal[8, 4], *, but: nn.Module) -> None:
    """Let all linear layers whose weights do not learn keep them in few bits.

    Args:
        model: changed in place.
        bits: for each weight.
        but: a layer to be left as it is.

    Examples:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2)).requires_grad_(False)
        >>> keep_in_few_bits(model, 8, but=model[1])
        >>> model[0].kept.dtype, model[1].weight.dtype
        (torch.int8, torch.float32)
    """
    layers = [
        (name, layer)
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and layer is not but and not layer.weight.requires_grad
    ]
    for name, layer in layers:
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, FewBits(layer, bits))


class FewBits(nn.Module):
    """A linear layer that keeps its weights in few bits, and computes with what these stand for.

    Nothing but the weights is rounded, so what a token comes to does not depend on what is read beside it. In 8 bits
    there is a scale for each row; in 4 bits one for each 64 weights, of sixteen values that are near each other where
    weights mostly are ("nf4" of bitsandbytes).

    Args:
        layer: with the weights.
        bits: for each weight.
    """

    kept: Tensor
    scale: Tensor

    def __init__(self, layer: nn.Linear, bits: Literal[8, 4]) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.bias = layer.bias
        self.dtype = layer.weight.dtype
        self.state: Any = None
        weight = layer.weight.detach()
        if bits == 8:
            scale = (weight.float().abs().amax(1, keepdim=True) / LARGEST).clamp_min(1e-12).to(self.dtype)
            kept = (weight.float() / scale.float()).round().clamp(-LARGEST, LARGEST).to(torch.int8)
            self.register_buffer("scale", scale)
        else:
            kept, self.state = _bitsandbytes().functional.quantize_4bit(weight, quant_type="nf4")
        self.register_buffer("kept", kept)

    def in_full(self) -> Tensor:
        """`[out, in]` the weights that the bits stand for."""
        if self.state is None:
            return self.kept.to(self.dtype).mul_(self.scale)
        full: Tensor = _bitsandbytes().functional.dequantize_4bit(self.kept, self.state)
        return full

    def forward(self, given: Tensor) -> Tensor:
        """As `nn.Linear`; the weights in full are there for a moment only, and in the backward pass once more."""
        found: Tensor = _Linear.apply(given, self)  # type: ignore[no-untyped-call]
        return found if self.bias is None else found + self.bias.to(found.dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, given: Tensor, layer: FewBits) -> Tensor:
        ctx.layer = layer
        return linear(given, layer.in_full())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.layer.in_full().to(gradient.dtype), None


def _bitsandbytes() -> Any:
    return need_bitsandbytes("weights in 4 bits")


def need_bitsandbytes(what: str) -> Any:
    """The package, or an error that says what needs it."""
    hush_bitsandbytes()
    try:
        import bitsandbytes
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{what} need bitsandbytes: pip install 'llm-env[bits]'", name="bitsandbytes"
        ) from error
    return bitsandbytes


def hush_bitsandbytes() -> None:
    """Let it not say what faster ways there would be."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
