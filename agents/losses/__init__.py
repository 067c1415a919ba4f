"""Objectives: TorchRL's own losses, for batches of texts. Each file has one, and registers it under a name."""

from agents.losses.base import TokenLoss
from agents.losses.registry import loss_class, loss_names, register_loss
from agents.losses.terms import loss_term, register_term, term_names

__all__ = ["TokenLoss", "loss_class", "loss_names", "loss_term", "register_loss", "register_term", "term_names"]
