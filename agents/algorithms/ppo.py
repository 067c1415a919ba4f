"""Proximal policy optimisation."""

from __future__ import annotations

from agents.algorithms.base import Algorithm
from agents.algorithms.registry import register_algorithm


@register_algorithm("ppo")
class PPO(Algorithm):
    """Several epochs over each batch, held near the policy that wrote it by the loss: clipped, or with a penalty.

    Loss and advantages are those of `loss.kind` and `advantage.kind`.

    Examples:
        >>> from agents import TrainConfig, build
        >>> config = TrainConfig(algo="ppo", iterations=1).replace(task__args={"length": 2}, rollout__batch_size=8)
        >>> run = build(config)
        >>> [metrics["episodes"] for metrics in run.algorithm]
        [8]
        >>> run.close()
    """
