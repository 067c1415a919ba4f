"""AdamW with warm-up, decay and gradient clipping."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn

from agents.state.checkpoint import load_optimizer_state, optimizer_state

Tensor = torch.Tensor


class Optimizer:
    """The optimizer of some weights. Its learning rate is a function of how many steps it has taken.

    Whoever leaves out steps that the schedule counts may set `steps` forward.

    Args:
        weights: by name; the order decides what a saved state belongs to.
        learning_rate: the highest.
        total_steps: after which the decay has ended.
        warmup: steps until the learning rate is at its highest.
        decay: how it goes on from there.
        weight_decay: AdamW's.
        betas: AdamW's.
        max_gradient_norm: longer gradients are shortened to this.

    Attributes:
        steps: where the schedule is; the next step is of this number, the first of 0.

    Examples:
        >>> optimizer = Optimizer({"w": nn.Parameter(torch.ones(2))}, 0.1, total_steps=10, warmup=2, decay="linear")
        >>> [round(optimizer.rate_at(step), 3) for step in (0, 1, 2, 6, 10)]
        [0.05, 0.1, 0.1, 0.05, 0.0]
    """

    def __init__(
        self,
        weights: Mapping[str, nn.Parameter],
        learning_rate: float,
        *,
        total_steps: int,
        warmup: int = 0,
        decay: Literal["constant", "linear", "cosine"] = "constant",
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        max_gradient_norm: float = 1.0,
    ) -> None:
        self.weights = list(weights.values())
        self.learning_rate = learning_rate
        self.total_steps = total_steps
        self.warmup = warmup
        self.decay = decay
        self.max_gradient_norm = max_gradient_norm
        self.steps = 0
        # Norms and biases are not decayed: they do not make a function simpler.
        decayed = [weight for weight in self.weights if weight.ndim > 1]
        others = [weight for weight in self.weights if weight.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.adam = torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=learning_rate, betas=betas, fused=True
        )

    def rate_at(self, step: int) -> float:
        """The learning rate of step number `step`, the first being 0."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        if self.decay == "constant":
            return self.learning_rate
        progress = min(1.0, (step - self.warmup) / max(1, self.total_steps - self.warmup))
        factor = 1 - progress if self.decay == "linear" else (1 + math.cos(math.pi * progress)) / 2
        return self.learning_rate * factor

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self.adam.zero_grad(set_to_none=True)

    def clip(self) -> Tensor:
        """Shorten the gradient if need be; returns how long it was."""
        return nn.utils.clip_grad_norm_(self.weights, self.max_gradient_norm)

    def step(self) -> None:
        """Follow the gradient."""
        for group in self.adam.param_groups:
            group["lr"] = self.rate_at(self.steps)
        self.adam.step()
        self.steps += 1

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON from which `load_state` goes on."""
        tensors, rest = optimizer_state(self.adam)
        return tensors, {"adam": rest, "steps": self.steps}

    def load_state(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Go on where another optimizer of the same weights was."""
        load_optimizer_state(self.adam, tensors, state["adam"])
        self.steps = state["steps"]
