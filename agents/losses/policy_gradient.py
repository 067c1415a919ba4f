"""The plain policy gradient, of REINFORCE and of A2C."""

from __future__ import annotations

import torch

from agents.losses.base import TokenLoss
from agents.losses.registry import register_loss

Tensor = torch.Tensor


@register_loss("policy_gradient")
class PolicyGradientLoss(TokenLoss):
    """Log-prob times advantage: the objective of TorchRL's ReinforceLoss and A2CLoss, which differ in nothing else."""

    def gain(self, log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Log-prob times advantage."""
        return log_prob * advantage, {}
