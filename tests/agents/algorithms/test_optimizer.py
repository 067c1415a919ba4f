"""Steps of AdamW: how much of each arrives, in which precision, and after a stop."""

from __future__ import annotations

import json
import sys
from typing import Literal

import pytest
import torch
from torch import nn

from agents.algorithms.optimizer import Optimizer

BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32


def weights_in(dtype: torch.dtype, seed: int = 0) -> dict[str, nn.Parameter]:
    """Of a size that weights of language models have; all of them are numbers that bfloat16 knows."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: nn.Parameter((0.05 * torch.randn(*shape, generator=generator)).to(BFLOAT16).to(dtype))
        for name, shape in (("matrix", (16, 8)), ("bias", (16,)))
    }


def gradients(step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(16, 8, generator=generator).to(BFLOAT16), torch.randn(16, generator=generator).to(BFLOAT16)]


def take(optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        for weight, gradient in zip(optimizer.weights, gradients(step), strict=True):
            weight.grad = gradient.to(weight.dtype)
        optimizer.clip()
        optimizer.step()


def make(dtype: torch.dtype, rate: float = 1e-5) -> tuple[dict[str, nn.Parameter], Optimizer]:
    weights = weights_in(dtype)
    return weights, Optimizer(weights, rate, total_steps=100, weight_decay=0.1, max_gradient_norm=1.0)


def test_small_updates_of_bfloat16_weights_add_up() -> None:
    """Fifty steps of 1e-5 in one direction are 5e-4; by itself, hardly a weight of 0.05 would move at all."""
    weights = weights_in(BFLOAT16)
    before = {name: weight.detach().float().clone() for name, weight in weights.items()}
    optimizer = Optimizer(weights, 1e-5, total_steps=50)
    for _ in range(50):
        optimizer.zero_grad()
        for weight in weights.values():
            weight.grad = torch.ones_like(weight)
        optimizer.step()
    moved = torch.cat([(before[name] - weight.float()).flatten() for name, weight in weights.items()])
    assert moved.mean().item() == pytest.approx(5e-4, rel=0.05)  # the rest is rounding, which goes either way


@pytest.mark.parametrize("rate", [1e-5, 1e-2])
def test_bfloat16_weights_are_those_of_float32_rounded(rate: float) -> None:
    """Gradients, clipping, weight decay: the same steps, of which only the result is rounded."""
    exact, exact_optimizer = make(FLOAT32, rate)
    rounded, optimizer = make(BFLOAT16, rate)
    for step in range(20):
        take(exact_optimizer, range(step, step + 1))
        take(optimizer, range(step, step + 1))
        for name, weight in exact.items():
            torch.testing.assert_close(rounded[name].detach(), weight.detach().to(BFLOAT16), rtol=0, atol=0)
    assert all(weight.grad is None for weight in rounded.values())  # they would only take memory


def test_the_length_of_the_gradient_is_that_of_float32() -> None:
    lengths = []
    for dtype in (FLOAT32, BFLOAT16):
        weights, optimizer = make(dtype)
        for weight, gradient in zip(weights.values(), gradients(0), strict=True):
            weight.grad = gradient.to(dtype)
        lengths.append(optimizer.clip())
    assert lengths[0] == lengths[1] > 1
    assert lengths[1].dtype == FLOAT32


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_it_goes_on_where_another_was(dtype: torch.dtype) -> None:
    """What is lost to rounding in the weights is in the saved state."""
    whole, optimizer = make(dtype)
    take(optimizer, range(30))
    _, early = make(dtype)
    take(early, range(15))
    tensors, state = early.state()
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    late, other = make(dtype)
    with torch.no_grad():
        for weight, was in zip(other.weights, early.weights, strict=True):
            weight.copy_(was)  # as a network puts its weights back
    other.load_state(tensors, json.loads(json.dumps(state)))
    take(other, range(15, 30))
    for name, weight in whole.items():
        assert torch.equal(weight, late[name])
    for name, tensor in optimizer.state()[0].items():
        assert torch.equal(tensor, other.state()[0][name]), name


def test_weights_that_somebody_else_has_set_are_what_it_steps_from() -> None:
    weights, optimizer = make(BFLOAT16)
    take(optimizer, range(3))
    with torch.no_grad():
        weights["matrix"][0] = 1.0
    take(optimizer, range(3, 4))
    torch.testing.assert_close(weights["matrix"][0].detach(), torch.ones(8, dtype=BFLOAT16), atol=1e-2, rtol=0)


class TestInEightBits:
    """Averages of bitsandbytes; weights of fewer than 4,096 numbers keep theirs in 32."""

    @staticmethod
    def steps(bits: Literal[8] | None, number: range, optimizer: Optimizer | None = None) -> Optimizer:
        if optimizer is None:
            generator = torch.Generator().manual_seed(0)
            shapes = {"matrix": (80, 64), "bias": (80,)}
            weights = {name: nn.Parameter(torch.randn(*of, generator=generator)) for name, of in shapes.items()}
            optimizer = Optimizer(weights, 1e-3, total_steps=100, state_bits=bits)
        for step in number:
            generator = torch.Generator().manual_seed(step)
            optimizer.zero_grad()
            for weight in optimizer.weights:
                weight.grad = 0.3 + torch.randn(weight.shape, generator=generator)
            optimizer.step()
        return optimizer

    def test_it_goes_nearly_the_same_way(self) -> None:
        pytest.importorskip("bitsandbytes")
        begin, exact, few = (self.steps(bits, range(count)) for bits, count in ((None, 0), (None, 40), (8, 40)))
        way, other = ((each.weights[0] - begin.weights[0]).detach() for each in (exact, few))
        assert 0 < (way - other).norm() < 0.05 * way.norm()
        torch.testing.assert_close(exact.weights[1], few.weights[1], atol=1e-6, rtol=1e-5)
        assert few.adam.state[few.weights[0]]["state1"].dtype == torch.uint8

    def test_it_goes_on_where_another_was(self) -> None:
        pytest.importorskip("bitsandbytes")
        whole, early, late = self.steps(8, range(9)), self.steps(8, range(4)), self.steps(8, range(0))
        tensors, state = early.state()
        with torch.no_grad():
            for weight, was in zip(late.weights, early.weights, strict=True):
                weight.copy_(was)
        late.load_state({name: tensor.clone() for name, tensor in tensors.items()}, json.loads(json.dumps(state)))
        self.steps(8, range(4, 9), late)
        for one, other in zip(whole.weights, late.weights, strict=True):
            assert torch.equal(one, other)

    def test_without_bitsandbytes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "bitsandbytes", None)
        with pytest.raises(ModuleNotFoundError, match=r"averages in 8 bits need bitsandbytes: pip install"):
            self.steps(8, range(0))
