"""What every loss over texts does the same way: leave padding out, run the backbone once, weigh the tokens."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase

from agents.losses.ops import kl_estimate, masked_mean, masked_variance, token_weights, zero_padding
from agents.networks.network import Network

Tensor = torch.Tensor

# Whatever padding holds in these would reach the gradient as 0 * NaN.
PER_STEP = ("action_log_prob", "ref_log_prob", "importance_weight", "advantage", "value_target", "state_value")


class TokenLoss:
    """Comes before a TorchRL loss among the bases, and feeds it.

    A loss is the sum over tokens of what TorchRL computes for each, times `weight` `[B, T]` of the input (by default
    the mean over all real tokens). Weights are made once for an optimizer step, so the losses of its micro-batches add
    up.

    All metrics are means over real steps, and can be averaged over micro-batches with their numbers of tokens.
    """

    network: Network
    critic_weight: float  # 0: there is no critic
    value_clip: float | None = None
    loss_critic: Any  # TorchRL's

    def prepare(
        self, data: TensorDictBase, *, actor: bool = True, critic: bool = True, encoded: bool = False
    ) -> TensorDictBase:
        """A shallow copy whose padding is clean, with weights and the hidden states that the heads need.

        Args:
            data: the batch.
            actor: whether the actor's are needed.
            critic: whether the critic's are needed.
            encoded: they are there already, with their graph, from the weights as they are now.
        """
        data = data.clone(False)
        mask = data["mask"]
        for key in PER_STEP:
            if (values := data.get(key, None)) is not None:
                data.set(key, zero_padding(values, mask[..., None] if values.ndim == 3 else mask))
        if "weight" not in data:
            data.set("weight", token_weights(mask, "token"))
        if "importance_weight" in data:
            data.set("advantage", data["advantage"] * data["importance_weight"][..., None])
        return data if encoded else self.network.encode(data, actor=actor, critic=critic)

    def forward(
        self, data: TensorDictBase, *, actor: bool = True, critic: bool = True, encoded: bool = False
    ) -> TensorDict:
        """The losses of a batch, or of one of the two parts; `encoded`: see `prepare`."""
        critic = critic and self.critic_weight > 0
        data = self.prepare(data, actor=actor, critic=critic, encoded=encoded)
        out = TensorDict()
        if actor:
            out.update(self.actor_losses(data))
        if critic:
            per_token = self.loss_critic(data.copy())[0][..., 0]  # it writes the new values in place of the old
            out["loss_critic"] = weighted_sum(per_token, data) * self.critic_weight
            out.update(value_metrics(data, self.network.value_of(data), self.value_clip))
        return out

    def actor_losses(self, data: TensorDictBase) -> TensorDict:
        """The losses of the policy, and its metrics."""
        raise NotImplementedError


def weighted_sum(per_token: Tensor, data: TensorDictBase) -> Tensor:
    """`[B, T]` to a scalar, by the weights of the tokens."""
    weight: Tensor = data["weight"]
    return (zero_padding(per_token, data["mask"]) * weight).sum()


@torch.no_grad()
def policy_metrics(data: TensorDictBase, log_ratio: Tensor, entropy: Tensor, clipped: Tensor | None) -> TensorDict:
    """Of `[B, T]` log-ratios to the old policy, entropies, and whether the clip acted."""
    mask = data["mask"]
    ratio = log_ratio.exp()
    real = ratio[mask] if mask.any() else torch.ones(1, device=ratio.device)
    metrics = {
        "entropy": masked_mean(entropy, mask),
        "kl_approx": masked_mean(-log_ratio, mask),
        "kl_old": masked_mean(kl_estimate(torch.zeros_like(log_ratio), log_ratio, "k3"), mask),
        "mean_ratio": masked_mean(ratio, mask),
        "mean_squared_ratio": masked_mean(ratio**2, mask),
        "max_ratio": real.max(),
        "min_ratio": real.min(),
    }
    if clipped is not None:
        metrics["clip_fraction"] = masked_mean(clipped.float(), mask)
    return TensorDict(metrics)


@torch.no_grad()
def value_metrics(data: TensorDictBase, value: Tensor, value_clip: float | None) -> TensorDict:
    """Of `[B, T, 1]` new values. Variances as moments, so that those of micro-batches can be put together."""
    mask, target = data["mask"], data["value_target"][..., 0]
    residual = target - value[..., 0]
    metrics = {
        "value_mean": masked_mean(value[..., 0], mask),
        "residual_mean": masked_mean(residual, mask),
        "residual_square": masked_mean(residual**2, mask),
        "target_mean": masked_mean(target, mask),
        "target_square": masked_mean(target**2, mask),
        "explained_variance": 1 - masked_variance(residual, mask) / masked_variance(target, mask).clamp_min(1e-8),
    }
    if value_clip is not None:
        moved = (value - data["state_value"])[..., 0].abs()
        metrics["value_clip_fraction"] = masked_mean((moved > value_clip).float(), mask)
    return TensorDict(metrics)
