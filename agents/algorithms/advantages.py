"""From rewards and values to advantages and value targets."""

from __future__ import annotations

import torch
from tensordict import TensorDict

from agents.config import AdvantageConfig, RewardConfig
from agents.losses.ops import EPSILON, gae, length_adaptive_lambda, whiten, zero_padding

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
        total = reward.sum(1)
        deviation = total.std(correction=0) + EPSILON
        reward = (reward - last * total.mean()) / deviation  # so that each text's sum is whitened
    reward = reward * config.scale
    if config.clip is not None:
        reward = reward.clamp(-config.clip, config.clip)
    if beta:
        reward = reward - beta * zero_padding(data["action_log_prob"] - data["ref_log_prob"], mask)
    return reward


def estimate_advantages(data: TensorDict, reward: Tensor, config: AdvantageConfig) -> tuple[Tensor, Tensor]:
    """`[B, T]` advantages and `[B, T]` value targets.

    Args:
        data: holds `mask`, `state_value` `[B, T, 1]`, `last_value` `[B]` and `("next", "truncated")`.
        reward: `[B, T]`.
        config: how.
    """
    mask, value = data["mask"], zero_padding(data["state_value"][..., 0], data["mask"])
    truncated = (data["next", "truncated"][..., 0] & mask).any(1)

    def estimate(lmbda: float | Tensor) -> Tensor:
        return gae(reward, value, data["last_value"], mask, truncated, config.gamma, lmbda)

    if config.kind == "gae":
        actor_lambda: float | Tensor = config.actor_lambda
        if config.length_adaptive is not None:
            actor_lambda = length_adaptive_lambda(mask.sum(1), config.length_adaptive)
        advantage = estimate(actor_lambda)
        same = config.length_adaptive is None and config.actor_lambda == config.critic_lambda
        target = (advantage if same else estimate(config.critic_lambda)) + value
    else:
        advantage = estimate(1.0)  # the return minus the value
        target = advantage + value
        if config.kind == "sequence":
            advantage = zero_padding(advantage[:, :1].expand_as(advantage), mask)
    if not config.baseline:
        compared_with = value[:, :1] if config.kind == "sequence" else value
        advantage = zero_padding(advantage + compared_with, mask)
    if config.whiten:
        advantage = whiten(advantage, mask)
    return advantage, zero_padding(target, mask)
