"""RLOO: each text after a prompt is compared with the mean of all the others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from tensordict import TensorDict

from agents.algorithms.advantages import for_all_tokens, in_groups, register_advantage
from agents.algorithms.base import Algorithm
from agents.algorithms.registry import needs_groups, register_algorithm
from agents.config import AdvantageConfig, TrainConfig
from agents.losses.ops import above_least

Tensor = torch.Tensor


@register_algorithm("rloo")
class RLOO(Algorithm):
    """REINFORCE whose baseline is the mean return of the prompt's other texts: unbiased, and without a critic.

    The baseline does not depend on the text that it judges, so unlike GRPO's it leaves the gradient as it is on
    average, for any size of the group.

    Examples:
        >>> list(RLOO.problems(TrainConfig(algo="rloo").replace(rollout__completions_per_prompt=4)))
        []
    """

    loss_kind: ClassVar[str] = "policy_gradient"
    advantage_kind: ClassVar[str] = "leave_one_out"
    has_critic: ClassVar[bool] = False

    @classmethod
    def problems(cls, config: TrainConfig) -> Iterator[str]:
        """It compares texts of one prompt."""
        yield from needs_groups(config)


@register_advantage("leave_one_out")
def leave_one_out_advantages(data: TensorDict, reward: Tensor, config: AdvantageConfig) -> tuple[Tensor, None]:
    """The return of each text minus the mean of the others of its group, the same for all its tokens."""
    return for_all_tokens(compare_with_others(reward.sum(1), data["group"]), data["mask"]), None


def compare_with_others(returns: Tensor, groups: Tensor) -> Tensor:
    """`[B]` returns minus the mean of the others of their group; 0 where there are no others.

    Args:
        returns: `[B]`.
        groups: `[B]` equal numbers belong together.

    Examples:
        >>> compare_with_others(torch.tensor([3.0, 5.0, 1.0, 0.0]), torch.tensor([7, 7, 7, 9])).tolist()
        [0.0, 3.0, -3.0, 0.0]
    """
    table = in_groups(returns, groups)
    above, count = above_least(table.returns, table.mask, dim=1), table.mask.sum(1, keepdim=True)
    others = (above.sum(1, keepdim=True) - above) / (count - 1).clamp_min(1)
    return (above - others)[table.places]
