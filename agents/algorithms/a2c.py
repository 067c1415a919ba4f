"""Advantage actor-critic."""

from __future__ import annotations

from typing import ClassVar

from agents.algorithms.base import Algorithm
from agents.algorithms.registry import register_algorithm


@register_algorithm("a2c")
class A2C(Algorithm):
    """The plain policy gradient with a critic's advantages; usually one epoch, and an entropy bonus."""

    loss_kind: ClassVar[str] = "policy_gradient"
