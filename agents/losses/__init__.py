"""Objectives: TorchRL's own losses, for batches of texts."""

from agents.losses.a2c import TokenA2CLoss
from agents.losses.penalty import TokenKLPenaltyLoss
from agents.losses.ppo import TokenPPOLoss
from agents.losses.reinforce import TokenReinforceLoss

__all__ = ["TokenA2CLoss", "TokenKLPenaltyLoss", "TokenPPOLoss", "TokenReinforceLoss"]
