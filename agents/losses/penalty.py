"""PPO-Penalty: a KL to the old policy, of adaptive weight, in place of clipping."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from agents.config import LossConfig
from agents.losses.base import TokenLoss
from agents.losses.ops import kl_estimate
from agents.losses.registry import register_loss
from agents.networks.network import Network

Tensor = torch.Tensor


@register_loss("penalty")
class PenaltyLoss(TokenLoss):
    """The gain of a token is ratio * advantage - beta * KL(old | new), and beta follows the KL it leads to.

    TorchRL's own KLPENPPOLoss needs the old distribution in full, which for a vocabulary is too much to keep. The KL is
    estimated from the tokens drawn (k3: unbiased, never negative).

    Args:
        network: actor and critic.
        config: `penalty_target`, the KL per token that beta is adapted to, and what all losses read.
        beta: the first weight of the KL.
        **options: see `TokenLoss`.
    """

    settings: ClassVar[tuple[str, ...]] = ("loss.penalty_target", "loss.value_clip")

    def __init__(
        self,
        network: Network,
        config: LossConfig = LossConfig(),  # noqa: B008
        *,
        beta: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(network, config, value_clip=config.value_clip, **options)
        self.target = config.penalty_target
        self.beta = beta
        if self.target <= 0:
            raise ValueError(f"the KL to aim for must be more than 0, got {self.target}")

    def gain(self, log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The ratio times the advantage, minus the KL."""
        log_ratio = log_prob - old_log_prob
        drawn_from_old = kl_estimate(torch.zeros_like(log_ratio), log_ratio, "k3")
        return log_ratio.exp() * advantage - self.beta * drawn_from_old, {}

    def after_batch(self, metrics: Mapping[str, float]) -> None:
        """Halve or double beta where the KL per token was far from the target."""
        kl = metrics.get("kl/old", self.target)
        if kl > 1.5 * self.target:
            self.beta *= 2
        elif kl < self.target / 1.5:
            self.beta /= 2

    def state(self) -> dict[str, Any]:
        """The weight of the KL."""
        return {"beta": self.beta}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on with that weight."""
        self.beta = state["beta"]
