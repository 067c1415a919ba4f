"""Clipped PPO over texts."""

from __future__ import annotations

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.objectives import ClipPPOLoss

from agents.losses.base import TokenLoss, policy_metrics, weighted_sum
from agents.losses.ops import Estimator, kl_estimate
from agents.networks.network import Network

Tensor = torch.Tensor


class TokenPPOLoss(TokenLoss, ClipPPOLoss):  # type: ignore[misc]
    """TorchRL's ClipPPOLoss for batches of texts of different lengths.

    On batches without padding it is TorchRL's loss (with `loss_critic_type="l2"`); padding changes no loss, gradient or
    metric; actor and critic that share a backbone cost one pass of it. The input holds

        tokens, state_position, mask, action, action_log_prob, advantage [B, T, 1]; with a critic value_target and
        state_value [B, T, 1]; with a KL term ref_log_prob; optionally weight and importance_weight [B, T]

    and the output the scalars `loss_objective`, `loss_critic`, `loss_entropy`, `loss_kl` (what was asked for), to be
    summed, and metrics.

    Args:
        network: actor and critic.
        clip: how far the probability ratio may go below and above 1.
        dual_clip: for negative advantages, bound the loss of a token at this times the advantage.
        entropy: the weight of the entropy bonus.
        value: the weight of the value loss; None: there is no critic.
        value_clip: how far new values may go from old ones before they stop to count.
        kl: the weight of the KL to the reference in the loss. An attribute: it may be changed while training.
        kl_estimator: see `agents.losses.ops.kl_estimate`.
    """

    def __init__(
        self,
        network: Network,
        *,
        clip: tuple[float, float] = (0.2, 0.2),
        dual_clip: float | None = None,
        entropy: float = 0.0,
        value: float | None = 0.5,
        value_clip: float | None = None,
        kl: float = 0.0,
        kl_estimator: Estimator = "k2",
    ) -> None:
        super().__init__(
            network.actor_head,
            None if value is None else network.critic_head,
            clip_epsilon=clip,
            entropy_bonus=entropy != 0,
            entropy_coeff=entropy,
            critic_coeff=None if value is None else 1.0,
            loss_critic_type="l2",
            clip_value=value_clip,
            log_explained_variance=False,
            functional=False,
            device=network.head.weight.device,
        )
        if dual_clip is not None and dual_clip <= 1:
            raise ValueError(f"dual_clip must be more than 1 (3 is usual), got {dual_clip}")
        self.network = network
        self.critic_weight = value or 0.0
        self.dual_clip = dual_clip
        self.value_clip = value_clip
        self.kl = kl
        self.kl_estimator = kl_estimator

    def actor_losses(self, data: TensorDictBase) -> TensorDict:
        """The clipped objective, the entropy bonus and the KL term."""
        advantage = data["advantage"][..., 0]
        log_ratio, distribution, _, _ = self._log_weight(data, adv_shape=advantage.shape)
        log_ratio = log_ratio[..., 0]
        gain, clipped = self.gain(log_ratio, advantage)
        out = TensorDict({"loss_objective": -weighted_sum(gain, data)})
        entropy = distribution.entropy()
        if self.entropy_bonus:
            out["loss_entropy"] = -self.entropy_coeff * weighted_sum(entropy, data)
        if self.kl:
            log_prob = log_ratio + data["action_log_prob"]
            estimate = kl_estimate(log_prob, data["ref_log_prob"], self.kl_estimator)
            out["loss_kl"] = self.kl * weighted_sum(estimate, data)
        return out.update(policy_metrics(data, log_ratio, entropy, clipped))

    def gain(self, log_ratio: Tensor, advantage: Tensor) -> tuple[Tensor, Tensor | None]:
        """`[B, T]` what is to be made large, and where clipping acted."""
        low, high = self._clip_bounds
        gain = torch.minimum(log_ratio.exp() * advantage, log_ratio.clamp(low, high).exp() * advantage)
        if self.dual_clip is not None:
            gain = torch.where(advantage < 0, torch.maximum(gain, self.dual_clip * advantage), gain)
        return gain, (log_ratio < low) | (log_ratio > high)
