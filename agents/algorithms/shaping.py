"""From the task's rewards to those that are learned from."""

from __future__ import annotations

import torch
from tensordict import TensorDict

from agents.config import RewardConfig
from agents.losses.ops import centred, deviation, zero_padding

Tensor = torch.Tensor


def shape_rewards(data: TensorDict, config: RewardConfig, beta: float = 0.0) -> Tensor:
    """`[B, T]` the rewards to learn from: the task's, adjusted, minus `beta` times the log-ratio to the reference.

    In this order: the penalty for texts that were cut off, whitening, scale, clip, KL.

    Args:
        data: see `agents.rollouts.packing.pack`; with a beta it must hold `ref_log_prob`.
        config: the adjustments.
        beta: the weight of the KL.
    """
    mask = data["mask"]
    reward = zero_padding(data["next", "reward"][..., 0].clone(), mask)
    last = data["next", "done"][..., 0] & mask
    if config.no_eos_penalty:
        reward -= config.no_eos_penalty * (last & data["cut"][:, None])
    if config.whiten:
        # So that each text's sum is whitened; where all sums are equal, no text is worth more than another: nothing.
        total, texts = reward.sum(1), mask.any(1)
        mean, spread = total - centred(total, texts), deviation(total, texts)
        reward = torch.where(spread == 0, 0, (reward - last * mean[:, None]) / spread)
    reward = reward * config.scale
    if config.clip is not None:
        reward = reward.clamp(-config.clip, config.clip)
    if beta:
        reward = reward - beta * zero_padding(data["action_log_prob"] - data["ref_log_prob"], mask)
    return reward
