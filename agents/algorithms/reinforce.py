"""REINFORCE with a learned baseline: one gradient step per batch is its theory; more are allowed, and on you."""

from __future__ import annotations

from typing import ClassVar

from agents.algorithms.base import Algorithm
from agents.algorithms.registry import register_algorithm


@register_algorithm("reinforce")
class Reinforce(Algorithm):
    """The plain policy gradient; `advantage.kind` "monte_carlo" and no `advantage.whiten` are the textbook's."""

    loss_kind: ClassVar[str] = "policy_gradient"
