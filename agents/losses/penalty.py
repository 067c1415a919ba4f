"""PPO-Penalty: a KL to the old policy, of adaptive weight, in place of clipping."""

from __future__ import annotations

from typing import Any

import torch

from agents.losses.ops import kl_estimate
from agents.losses.ppo import TokenPPOLoss
from agents.networks.network import Network

Tensor = torch.Tensor


class TokenKLPenaltyLoss(TokenPPOLoss):
    """The gain of a token is ratio * advantage - beta * KL(old | new), and beta follows the KL it leads to.

    TorchRL's own KLPENPPOLoss needs the old distribution in full, which for a vocabulary is too much to keep. The KL is
    estimated from the tokens drawn (k3: unbiased, never negative).

    Args:
        network: actor and critic.
        target: the KL per token that beta is adapted to.
        beta: the first weight of the KL.
        **options: of `TokenPPOLoss`.
    """

    def __init__(self, network: Network, *, target: float = 0.01, beta: float = 1.0, **options: Any) -> None:
        super().__init__(network, **options)
        if target <= 0:
            raise ValueError(f"the KL to aim for must be more than 0, got {target}")
        self.target = target
        self.beta = beta

    def gain(self, log_ratio: Tensor, advantage: Tensor) -> tuple[Tensor, Tensor | None]:
        """`[B, T]` what is to be made large."""
        drawn_from_old = kl_estimate(torch.zeros_like(log_ratio), log_ratio, "k3")
        return log_ratio.exp() * advantage - self.beta * drawn_from_old, None

    def adapt(self, kl: float) -> None:
        """After a batch: halve or double beta where the KL per token was far from the target."""
        if kl > 1.5 * self.target:
            self.beta *= 2
        elif kl < self.target / 1.5:
            self.beta /= 2
