"""Terms that are added to any policy loss, each a cost per token: an entropy bonus, a KL, and whatever you register."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from tensordict import TensorDictBase

from agents.losses.ops import Estimator, kl_estimate
from agents.networks.distribution import TokenDistribution
from rewards.registry import Registry

Tensor = torch.Tensor

Term: TypeAlias = Callable[[Tensor, TokenDistribution, TensorDictBase], Tensor]
"""From log-probs of the actions `[B, T]`, the distribution and the batch to costs `[B, T]`."""

_TERMS: Registry[Term] = Registry("loss term", room="agents.losses")

# What the outputs of a loss are called already.
TAKEN = ("objective", "critic", "entropy", "kl")


def register_term(name: str) -> Callable[[Term], Term]:
    """Decorate a function to make it a loss term, which `--loss.terms NAME WEIGHT` adds to the policy's loss.

    The function is given the log-probs of the actions `[B, T]`, the distribution they come from and the batch, and
    returns the cost of each token, `[B, T]`; what it gives for padding does not count. The weighted term is logged as
    `policy/NAME_loss`.

    Examples:
        >>> @register_term("surprise")
        ... def surprise(log_prob, distribution, data):
        ...     return -log_prob
        >>> "surprise" in term_names()
        True
    """
    if name in TAKEN:
        raise ValueError(
            f"a loss term cannot be named {name!r}, for every loss has a part of that name: give yours another name"
        )
    return _TERMS.register(name)


def loss_term(name: str) -> Term:
    """The registered term of that name.

    Examples:
        >>> loss_term("no_such_term")
        Traceback (most recent call last):
        rewards.registry.UnknownNameError: unknown loss term 'no_such_term'; ...
    """
    return _TERMS[name]


def term_names() -> list[str]:
    """The names of all registered terms.

    Examples:
        >>> _ = register_term("length")(lambda log_prob, distribution, data: data["mask"].float())
        >>> "length" in term_names()
        True
    """
    return _TERMS.names()


def negative_entropy(log_prob: Tensor, distribution: TokenDistribution, data: TensorDictBase) -> Tensor:
    """`[B, T]` minus the entropy: as a cost, it keeps the policy trying several things."""
    return -distribution.entropy()


def kl_to_reference(estimator: Estimator) -> Term:
    """The KL of the policy to the reference, whose log-probs the batch holds as `ref_log_prob`."""

    def cost(log_prob: Tensor, distribution: TokenDistribution, data: TensorDictBase) -> Tensor:
        return kl_estimate(log_prob, data["ref_log_prob"], estimator)

    return cost
