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
    """The KL of the policy to the reference, whose log-probs the batch holds as `ref_log_prob`.

    On tokens that the policy has drawn, the gradient of k2 is on average that of KL(policy | reference), and the
    gradient of k3 that of KL(reference | policy): either leads to the reference. That of k1 is the gradient of the
    log-prob, in which the reference does not occur: on average it is 0, and in the steps that follow the first on a
    batch it makes the tokens of that batch rarer still.

    Args:
        estimator: "k2" or "k3".

    Examples:
        >>> kl_to_reference("k1")
        Traceback (most recent call last):
        ValueError: k1 is no estimator for a loss, ...
    """
    if estimator == "k1":
        raise ValueError(
            "k1 is no estimator for a loss, for its gradient does not depend on the reference: "
            "use 'k2', whose gradient is that of the KL, or 'k3'"
        )

    def cost(log_prob: Tensor, distribution: TokenDistribution, data: TensorDictBase) -> Tensor:
        return kl_estimate(log_prob, data["ref_log_prob"], estimator)

    return cost
