"""Heads that predict what is still to come, from hidden states."""

from __future__ import annotations

import functools

import torch
from torch import nn

Tensor = torch.Tensor

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Of the ridge, from which the one is taken that has predicted best so far."""
MEMORY = 0.9
"""How much a batch still counts when the next one comes."""


class ValueHead(nn.Module):
    """A linear value of hidden states, in float32. It begins as zero: a random value would only be noise.

    Args:
        width: of the hidden states.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """`[..., 1]` from `[..., H]`."""
        value: Tensor = self.linear(hidden.float())
        return value


class FittedValueHead(ValueHead):
    """The same over a model that does not learn along: its best weights are computed, not approached step by step.

    They solve a ridge regression over all batches so far, of which older ones count less, as the model changes. There
    is no learning rate to choose, and the first batch already teaches it as much as a linear head can know; a gradient
    needs hundreds of steps for that. How strong the ridge is to be, which keeps a head of many weights from learning a
    few texts by heart, each new batch decides: the strength whose weights have predicted the batches before they were
    fitted to them best.

    Args:
        width: of the hidden states.

    Examples:
        >>> head = FittedValueHead(2)
        >>> hidden = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
        >>> head.fit(hidden, torch.tensor([3.0, 5.0, 7.0, 1.0]))  # 1 + 2 times the first + 4 times the second
        >>> head.fit(hidden, torch.tensor([3.0, 5.0, 7.0, 1.0]))
        >>> head(torch.tensor([2.0, 2.0])).round(decimals=1).tolist()
        [13.0]
    """

    products: Tensor
    moments: Tensor
    solutions: Tensor
    errors: Tensor

    def __init__(self, width: int) -> None:
        super().__init__(width)
        size = width + 1  # and the constant
        self.requires_grad_(False)
        # Sums over what was seen: of products of features, and of features with targets; then the weights by strength,
        # and the squared errors of each on batches that it had not seen.
        empty = functools.partial(torch.zeros, dtype=torch.float64)
        self.register_buffer("products", empty(size, size))
        self.register_buffer("moments", empty(size))
        self.register_buffer("solutions", empty(len(STRENGTHS), size))
        self.register_buffer("errors", empty(len(STRENGTHS)))

    def forward(self, hidden: Tensor) -> Tensor:
        """`[..., 1]` from `[..., H]`; no gradient goes through it."""
        return super().forward(hidden.detach())

    @torch.no_grad()
    def fit(self, hidden: Tensor, target: Tensor) -> None:
        """Learn from `[N, H]` hidden states and what came after them, `[N]`; from nothing that is not finite."""
        features = torch.cat([hidden.double(), torch.ones_like(hidden[:, :1], dtype=torch.float64)], 1)
        wanted = target.double()
        if not (features.isfinite().all() and wanted.isfinite().all()):
            return  # it would stay in the sums for ever
        errors = ((features @ self.solutions.T - wanted[:, None]) ** 2).mean(0)
        self.errors.mul_(MEMORY).add_(errors)
        self.products.mul_(MEMORY).add_(features.T @ features)
        self.moments.mul_(MEMORY).add_(features.T @ wanted)
        ridge = self.products.diagonal().clone()  # in the unit of each feature
        ridge[-1] = 0  # the constant is free
        for place, strength in enumerate(STRENGTHS):
            system = self.products + torch.diag(strength * ridge + 1e-12 * ridge.max().clamp_min(1e-12))
            self.solutions[place] = torch.linalg.solve(system, self.moments)
        best = self.solutions[int(self.errors.argmin())]
        self.linear.weight.copy_(best[None, :-1])
        self.linear.bias.copy_(best[-1:])
