"""Heads that predict what is still to come, from hidden states."""

from __future__ import annotations

import functools

import torch
from torch import nn

Tensor = torch.Tensor

STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
"""Of the ridge, from which the one is taken that has predicted best so far."""
ON_HINTS = 1e-6
"""Of the ridge, the share that hints bear: a task gives few of them, and they are worth knowing."""
MEMORY = 0.7
"""How much a batch still counts when the next one comes."""
FOLDS = 4
"""Into how many parts a batch is split, each of which is predicted from the others."""


class ValueHead(nn.Module):
    """A linear value of hidden states and hints, in float32. It begins as zero: a random value would only be noise.

    Args:
        width: of the hidden states.
        hints: how many numbers a task tells about each state (`Task.hints`).
    """

    def __init__(self, width: int, hints: int = 0) -> None:
        super().__init__()
        self.num_hints = hints
        self.linear = nn.Linear(hints + width, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor, hints: Tensor | None = None) -> Tensor:
        """`[..., 1]` from `[..., H]`, and `[..., K]` if there are hints."""
        value: Tensor = self.linear(features(hidden, hints))
        return value


def features(hidden: Tensor, hints: Tensor | None = None) -> Tensor:
    """`[..., K + H]` what a head reads: hints first."""
    return hidden.float() if hints is None else torch.cat([hints.float(), hidden.float()], -1)


class FittedValueHead(ValueHead):
    """The same over a model that does not learn along: its best weights are computed, not approached step by step.

    They solve a ridge regression over all batches so far, of which older ones count less, as the model changes. There
    is no learning rate to choose, and the first batch already teaches it as much as a linear head can know; a gradient
    needs hundreds of steps for that.

    The batch that is about to be learned from is among those it is fitted to, or its values would be those of the
    policy before. Yet no text may be predicted from itself, for then its advantages would vanish: the batch is split
    into folds, and each is predicted by weights that were fitted to the others. How strong the ridge is to be, which
    keeps a head of many weights from learning a few texts by heart, these predictions decide: the strength that has
    predicted best. Hints bear next to none of it.

    Args:
        width: of the hidden states.
        hints: how many numbers a task tells about each state.

    Examples:
        >>> head = FittedValueHead(2)
        >>> hidden = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]] * 2)
        >>> target = 1 + hidden @ torch.tensor([2.0, 4.0])
        >>> head.fit(hidden, target, fold=torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])).round(decimals=1).tolist()
        [[2.0, 4.0, 1.0], [2.0, 4.0, 1.0]]
        >>> head(torch.tensor([2.0, 2.0])).round(decimals=1).tolist()
        [13.0]
    """

    products: Tensor
    moments: Tensor
    errors: Tensor

    def __init__(self, width: int, hints: int = 0) -> None:
        super().__init__(width, hints)
        size = hints + width + 1  # and the constant
        self.requires_grad_(False)
        # Sums over what was seen: of products of features, and of features with targets; and the squared errors of each
        # strength, on texts that it had not seen.
        empty = functools.partial(torch.zeros, dtype=torch.float64)
        self.register_buffer("products", empty(size, size))
        self.register_buffer("moments", empty(size))
        self.register_buffer("errors", empty(len(STRENGTHS)))

    def forward(self, hidden: Tensor, hints: Tensor | None = None) -> Tensor:
        """`[..., 1]` from `[..., H]` and `[..., K]`; no gradient goes through it."""
        return super().forward(hidden.detach(), hints)

    @torch.no_grad()
    def fit(self, read: Tensor, target: Tensor, fold: Tensor) -> Tensor:
        """Learn from a batch; from nothing that is not finite.

        Args:
            read: `[N, K + H]` the `features` of its states.
            target: `[N]` what came after them.
            fold: `[N]` which part of the batch each belongs to, from 0 on.

        Returns:
            `[folds, K + H + 1]` weights for each part that have not seen it; the constant comes last.
        """
        x, y = torch.cat([read, torch.ones_like(read[:, :1])], 1).double(), target.double()
        if not (x.isfinite().all() and y.isfinite().all()):  # it would stay in the sums for ever
            return torch.cat([self.linear.weight[0], self.linear.bias]).expand(int(fold.max()) + 1, -1)
        parts = [fold == number for number in range(int(fold.max()) + 1)]
        products, moments = [x[part].T @ x[part] for part in parts], [x[part].T @ y[part] for part in parts]
        self.products.mul_(MEMORY).add_(sum(products))
        self.moments.mul_(MEMORY).add_(sum(moments))
        unseen = [
            _solutions(self.products - product, self.moments - moment, self.num_hints)
            for product, moment in zip(products, moments, strict=True)
        ]
        errors = sum(((y[part, None] - x[part] @ each.T) ** 2).sum(0) for part, each in zip(parts, unseen, strict=True))
        self.errors.mul_(MEMORY).add_(errors / len(y))
        best = int(self.errors.argmin())
        weights = _solutions(self.products, self.moments, self.num_hints)[best]
        self.linear.weight.copy_(weights[None, :-1])
        self.linear.bias.copy_(weights[-1:])
        return torch.stack([each[best] for each in unseen]).to(read.dtype)


def _solutions(products: Tensor, moments: Tensor, hints: int) -> Tensor:
    """`[S, F]` the weights of a ridge regression, for each strength."""
    ridge = products.diagonal().clone()  # in the unit of each feature
    ridge[:hints] *= ON_HINTS
    ridge[-1] = 0  # the constant is free
    least = 1e-9 * products.diagonal().max().clamp_min(1e-9)  # of what is always 0, or follows from the others
    strengths = torch.tensor(STRENGTHS, dtype=products.dtype, device=products.device)[:, None]
    # By Cholesky: the LU of several matrices at once came out half done beside vLLM on two threads.
    lower = torch.linalg.cholesky(products + torch.diag_embed(strengths * ridge + least))
    weights: Tensor = torch.cholesky_solve(moments[None, :, None].expand(len(strengths), -1, -1), lower)[..., 0]
    return weights
