"""GRPO: the texts after one prompt are compared with each other, and no critic is needed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from tensordict import TensorDict

from agents.algorithms.advantages import for_all_tokens, in_groups, register_advantage
from agents.algorithms.base import Algorithm
from agents.algorithms.registry import needs_groups, register_algorithm
from agents.config import AdvantageConfig, TrainConfig
from agents.losses import ops

Tensor = torch.Tensor


@register_algorithm("grpo")
class GRPO(Algorithm):
    """PPO's objective, with the group's mean return as baseline in place of a critic.

    `advantage.normalize` divides by the group's standard deviation, as GRPO does; without it (Dr. GRPO) questions that
    are nearly always, or hardly ever, solved do not weigh more. The usual company: a KL in the loss (`kl.where="loss"`,
    `kl.estimator="k3"`), `loss.aggregate` "sequence", or "fixed".

    Examples:
        >>> list(GRPO.problems(TrainConfig(algo="grpo")))
        ['--rollout.completions-per-prompt is 1, but --algo grpo compares the texts of one prompt: ...']
    """

    advantage_kind: ClassVar[str] = "group"
    has_critic: ClassVar[bool] = False

    @classmethod
    def problems(cls, config: TrainConfig) -> Iterator[str]:
        """It compares texts of one prompt."""
        yield from needs_groups(config)


@register_advantage("group", settings=("advantage.normalize",))
def group_advantages(data: TensorDict, reward: Tensor, config: AdvantageConfig) -> tuple[Tensor, None]:
    """The return of each text compared with its group's, the same for all its tokens."""
    advantage = compare_with_group(reward.sum(1), data["group"], config.normalize)
    return for_all_tokens(advantage, data["mask"]), None


def compare_with_group(returns: Tensor, groups: Tensor, whiten: bool = True) -> Tensor:
    """`[B]` returns minus the mean of their group, divided by its standard deviation if asked.

    Args:
        returns: `[B]`.
        groups: `[B]` equal numbers belong together.
        whiten: divide. A group whose returns are all the same has advantages of 0.

    Examples:
        >>> compare_with_group(torch.tensor([1.0, 0.0, 1.0, 1.0]), torch.tensor([7, 7, 9, 9])).tolist()
        [1.0, -1.0, 0.0, 0.0]
    """
    table = in_groups(returns, groups)
    compare = ops.whiten if whiten else ops.centred
    return compare(table.returns, table.mask, dim=1)[table.places]
