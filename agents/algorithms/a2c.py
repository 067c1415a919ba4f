"""Advantage actor-critic."""

from __future__ import annotations

from typing import Any

from agents.algorithms.ppo import PPO
from agents.losses import TokenA2CLoss


class A2C(PPO):
    """The objective of TorchRL's A2CLoss; everything around it is as in PPO."""

    def make_loss(self) -> Any:
        """The objective."""
        return TokenA2CLoss(self.network, entropy=self.config.loss.entropy, value=self.config.loss.value)
