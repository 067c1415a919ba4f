"""Advantage actor-critic."""

from __future__ import annotations

from typing import ClassVar

from agents.algorithms.base import Algorithm
from agents.algorithms.registry import register_algorithm


@register_algorithm("a2c")
class A2C(Algorithm):
    """The plain policy gradient with a critic's advantages; usually one epoch, and an entropy bonus.

    Examples:
        >>> from agents import TrainConfig
        >>> from agents.algorithms.registry import check_algorithm
        >>> check_algorithm(TrainConfig(algo="a2c").replace(loss__clip_low=0.1))  # nothing is clipped
        Traceback (most recent call last):
        agents.config.files.ConfigError: --loss.clip-low is 0.1, but --algo a2c does not read it: leave it out
    """

    loss_kind: ClassVar[str] = "policy_gradient"
