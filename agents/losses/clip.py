"""The clipped objective of PPO."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torchrl.objectives import ClipPPOLoss

from agents.config import LossConfig
from agents.losses.base import TokenLoss
from agents.losses.registry import register_loss
from agents.networks.network import Network

Tensor = torch.Tensor


@register_loss("clip")
class ClipLoss(TokenLoss, ClipPPOLoss):  # type: ignore[misc]
    """TorchRL's ClipPPOLoss for batches of texts, with another clip on request.

    The probability ratio stops to count below `1 - clip_low` and above `1 + clip_high`; with `dual_clip` the loss of a
    token whose advantage is negative is bounded at so many times the advantage's size.

    Args:
        network: actor and critic.
        config: the clips, and what all losses read.
        **options: see `TokenLoss`.
    """

    settings: ClassVar[tuple[str, ...]] = ("loss.clip_low", "loss.clip_high", "loss.dual_clip", "loss.value_clip")

    def __init__(self, network: Network, config: LossConfig = LossConfig(), **options: Any) -> None:  # noqa: B008
        clip = (config.clip_low, config.clip_high)
        super().__init__(network, config, value_clip=config.value_clip, clip_epsilon=clip, **options)
        self.dual_clip = config.dual_clip
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ValueError(f"dual_clip must be more than 1 (3 is usual), got {self.dual_clip}")

    def gain(self, log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The clipped ratio times the advantage, and where clipping acted."""
        log_ratio = log_prob - old_log_prob
        low, high = self._clip_bounds
        gain = torch.minimum(log_ratio.exp() * advantage, log_ratio.clamp(low, high).exp() * advantage)
        if self.dual_clip is not None:
            gain = torch.where(advantage < 0, torch.maximum(gain, self.dual_clip * advantage), gain)
        return gain, {"policy/clip_fraction": ((log_ratio < low) | (log_ratio > high)).float()}
