"""GRPO: completions of one prompt are compared with each other, and no critic is needed."""

from __future__ import annotations

from typing import ClassVar

import torch
from tensordict import TensorDict

from agents.algorithms.ppo import PPO
from agents.losses.ops import zero_padding

Tensor = torch.Tensor


class GRPO(PPO):
    """PPO's clipped objective, with the group's mean return as baseline in place of a critic.

    `advantage.whiten` divides by the group's standard deviation, as GRPO does; without it (Dr. GRPO) questions that are
    nearly always, or hardly ever, solved do not weigh more. The usual company: a KL in the loss (`kl.where="loss"`,
    `kl.estimator="k3"`), `loss.aggregate` "sequence", or "fixed".
    """

    has_critic: ClassVar[bool] = False

    def advantages(self, data: TensorDict, reward: Tensor) -> tuple[Tensor, Tensor]:
        """The return of each text compared with its group's, the same for all its tokens; no value targets."""
        advantage = group_advantages(reward.sum(1), data["group"], self.config.advantage.whiten)
        mask = data["mask"]
        return zero_padding(advantage[:, None].expand_as(mask), mask), torch.zeros_like(reward)


def group_advantages(returns: Tensor, groups: Tensor, whiten: bool = True) -> Tensor:
    """`[B]` returns minus the mean of their group, divided by its standard deviation if asked.

    Args:
        returns: `[B]`.
        groups: `[B]` equal numbers belong together.
        whiten: divide. A group whose returns are all the same has advantages of 0.

    Examples:
        >>> group_advantages(torch.tensor([1.0, 0.0, 1.0, 1.0]), torch.tensor([7, 7, 9, 9])).tolist()
        [1.0, -1.0, 0.0, 0.0]
    """
    _, of = torch.unique(groups, return_inverse=True)
    sums = torch.zeros(int(of.max()) + 1, device=returns.device)
    count = sums.index_add(0, of, torch.ones_like(returns))
    centred = returns - (sums.index_add(0, of, returns) / count)[of]
    if not whiten:
        return centred
    deviation = (sums.index_add(0, of, centred**2) / count).sqrt()[of]
    return torch.where(deviation > 1e-6, centred / deviation.clamp_min(1e-6), 0.0)
