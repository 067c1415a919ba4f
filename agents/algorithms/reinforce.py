"""REINFORCE with a learned baseline: one gradient step per batch is its theory; more are allowed, and on you."""

from __future__ import annotations

from typing import ClassVar

from agents.algorithms.base import Algorithm
from agents.algorithms.registry import register_algorithm


@register_algorithm("reinforce")
class Reinforce(Algorithm):
    """The plain policy gradient.

    Here A2C is the same algorithm under the same settings; the two differ in those that they are usually given. The
    textbook's REINFORCE is `advantage.kind` "monte_carlo" with `advantage.baseline` "value" and without
    `advantage.normalize`, one epoch and one mini-batch.

    Examples:
        >>> from agents import TrainConfig
        >>> from agents.algorithms.registry import check_algorithm
        >>> check_algorithm(TrainConfig(algo="reinforce").replace(loss__clip_low=0.1))  # nothing is clipped
        Traceback (most recent call last):
        agents.config.files.ConfigError: --loss.clip-low is 0.1, but --algo reinforce does not read it: leave it out
    """

    loss_kind: ClassVar[str] = "policy_gradient"
