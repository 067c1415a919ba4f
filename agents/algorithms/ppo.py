"""Proximal policy optimisation."""

from __future__ import annotations

from agents.algorithms.base import Algorithm
from agents.algorithms.registry import register_algorithm


@register_algorithm("ppo")
class PPO(Algorithm):
    """Several epochs over each batch, held near the policy that wrote it by the loss: clipped, or with a penalty.

    Loss and advantages are those of `loss.kind` and `advantage.kind`.
    """
