"""REINFORCE with a learned baseline: one gradient step per batch is its theory; more are allowed, and on you."""

from __future__ import annotations

from typing import Any

from agents.algorithms.ppo import PPO
from agents.losses import TokenReinforceLoss


class Reinforce(PPO):
    """The policy gradient of TorchRL's ReinforceLoss; everything around it is as in PPO."""

    def make_loss(self) -> Any:
        """The objective."""
        return TokenReinforceLoss(self.network, value=self.config.loss.value)
