"""REINFORCE with a learned baseline: one gradient step per batch is its theory; more are allowed, and on you."""

from __future__ import annotations

from typing import ClassVar

from agents.algorithms.base import Algorithm
from agents.algorithms.registry import register_algorithm


@register_algorithm("reinforce")
class Reinforce(Algorithm):
    """The plain policy gradient.

    Here A2C is the same algorithm under the same settings; the two differ in those that they are usually given. The
    textbook's REINFORCE is `advantage.kind` "monte_carlo" without `advantage.whiten`, one epoch and one mini-batch.
    """

    loss_kind: ClassVar[str] = "policy_gradient"
