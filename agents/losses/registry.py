"""Policy losses by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from agents.losses.base import TokenLoss
from rewards.registry import Registry

Loss = TypeVar("Loss", bound=type[TokenLoss])

_LOSSES: Registry[type[TokenLoss]] = Registry("loss", room="agents.losses")


def register_loss(name: str) -> Callable[[Loss], Loss]:
    """Decorate a `TokenLoss` to make it known by a name, for `--loss.kind`.

    Examples:
        >>> @register_loss("likelihood")
        ... class Likelihood(TokenLoss):
        ...     def gain(self, log_prob, old_log_prob, advantage):
        ...         return log_prob * (advantage > 0), {}
        >>> loss_class("likelihood").__name__
        'Likelihood'
    """

    def register(loss: Loss) -> Loss:
        _LOSSES.add(name, loss)
        return loss

    return register


def loss_class(name: str) -> type[TokenLoss]:
    """The loss of that name.

    Examples:
        >>> loss_class("clip").__name__
        'ClipLoss'
    """
    return _LOSSES[name]


def loss_names() -> list[str]:
    """The names of all losses.

    Examples:
        >>> {"clip", "penalty", "policy_gradient"} <= set(loss_names())
        True
    """
    return _LOSSES.names()
