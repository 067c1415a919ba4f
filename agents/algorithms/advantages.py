"""From rewards and values to advantages and value targets, by registered estimators."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from tensordict import TensorDict

from agents.algorithms.baselines import fitted_baseline, trusted_lambda
from agents.config import AdvantageConfig
from agents.losses.ops import ROUNDING, gae, length_adaptive_lambda, masked_mean, zero_padding
from rewards.registry import Registry

Tensor = torch.Tensor

Estimate: TypeAlias = Callable[[TensorDict, Tensor, AdvantageConfig], tuple[Tensor, Tensor | None]]
"""From a batch, its rewards `[B, T]` and the settings to advantages `[B, T]`, and value targets `[B, T]` or None."""


class AdvantageEstimator:
    """A registered estimator: call it as its function.

    Attributes:
        settings: what it reads, by dotted names.
        critic: whether it reads values, and gives value targets.
    """

    def __init__(self, function: Estimate, settings: tuple[str, ...], critic: bool) -> None:
        functools.update_wrapper(self, function)
        self._function = function
        self.settings = settings
        self.critic = critic

    def __call__(self, data: TensorDict, reward: Tensor, config: AdvantageConfig) -> tuple[Tensor, Tensor | None]:
        """Advantages, and value targets if it needs a critic."""
        return self._function(data, reward, config)


_ESTIMATORS: Registry[AdvantageEstimator] = Registry("advantage estimator", room="agents.algorithms")


def register_advantage(
    name: str, *, settings: tuple[str, ...] = (), critic: bool = False
) -> Callable[[Estimate], Estimate]:
    """Decorate a function to make it known by a name, for `--advantage.kind`.

    It is given a batch, its rewards `[B, T]` (0 on padding) and the settings, and returns advantages `[B, T]` and value
    targets `[B, T]`, or None if no critic is to learn from them.

    Args:
        name: its name.
        settings: what it reads, by dotted names, such as "advantage.gamma"; anything else is refused.
        critic: whether it needs values: the batch then holds `state_value` `[B, T, 1]`, and `last_value` `[B]`.

    Examples:
        >>> @register_advantage("plain_return")
        ... def plain_return(data, reward, config):
        ...     return reward.sum(1, keepdim=True) * data["mask"], None
        >>> advantage_estimator("plain_return").critic
        False
    """

    def register(function: Estimate) -> Estimate:
        _ESTIMATORS.add(name, AdvantageEstimator(function, settings, critic))
        return function

    return register


def advantage_estimator(name: str) -> AdvantageEstimator:
    """The estimator of that name."""
    return _ESTIMATORS[name]


def advantage_names() -> list[str]:
    """The names of all estimators."""
    return _ESTIMATORS.names()


# Those that compare with a critic's values. The data holds `mask`, `action_log_prob`, `state_value` `[B, T, 1]`,
# `last_value` `[B]` and `("next", "truncated")`.

COMMON = ("advantage.gamma", "advantage.baseline", "advantage.normalize")
LAMBDAS = ("advantage.actor_lambda", "advantage.critic_lambda", "advantage.length_adaptive")


@register_advantage("gae", settings=(*COMMON, *LAMBDAS), critic=True)
def gae_advantages(data: TensorDict, reward: Tensor, config: AdvantageConfig) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates; actor and critic have lambdas of their own."""
    actor_lambda: float | Tensor | None = config.actor_lambda
    plain, value, mask = returns_to_go(data, reward, config.gamma), _values(data), data["mask"]
    if config.length_adaptive is not None:
        actor_lambda = length_adaptive_lambda(mask.sum(1), config.length_adaptive)
    elif actor_lambda is None:
        actor_lambda = trusted_lambda(value, plain, mask)
    returns = returns_to_go(data, reward, config.gamma, actor_lambda)
    target = plain if config.critic_lambda == 1 else returns_to_go(data, reward, config.gamma, config.critic_lambda)
    return _compared(data, returns, value, config), target


@register_advantage("monte_carlo", settings=COMMON, critic=True)
def monte_carlo_advantages(data: TensorDict, reward: Tensor, config: AdvantageConfig) -> tuple[Tensor, Tensor]:
    """The discounted return from each step on, compared with the value."""
    returns = returns_to_go(data, reward, config.gamma)
    return _compared(data, returns, _values(data), config), returns


@register_advantage("sequence", settings=COMMON, critic=True)
def sequence_advantages(data: TensorDict, reward: Tensor, config: AdvantageConfig) -> tuple[Tensor, Tensor]:
    """The whole text's return compared with the value of its prompt, the same for all its tokens."""
    returns, mask = returns_to_go(data, reward, config.gamma), data["mask"]
    of_text, of_prompt = (for_all_tokens(first[:, 0], mask) for first in (returns, _values(data)))
    return _compared(data, of_text, of_prompt, config), returns


def returns_to_go(data: TensorDict, reward: Tensor, gamma: float, lmbda: float | Tensor = 1.0) -> Tensor:
    """`[B, T]` what is still to come at each step, by GAE's lambda: 1 goes by the rewards alone, 0 by the next value.

    With a lambda of 1 the critic has no part in it, but where a text was cut off unscored.
    """
    mask = data["mask"]
    truncated = (data["next", "truncated"][..., 0] & mask).any(1)
    # Adding the values again would leave their rounding behind, which is no return.
    plain = not isinstance(lmbda, Tensor) and lmbda == 1
    value = torch.zeros_like(reward) if plain else _values(data)
    return gae(reward, value, data["last_value"], mask, truncated, gamma, lmbda) + value


@dataclass(frozen=True, eq=False)
class Grouped:
    """The returns of texts as a table, a row for each group: what is compared within a row is compared in a group.

    Attributes:
        returns: `[G, K]`, with 0 where a group is smaller than the largest.
        mask: `[G, K]` true where there is a text.
        places: the row and the column of each text, both `[B]`: `table[places]` has the order of the texts again.
    """

    returns: Tensor
    mask: Tensor
    places: tuple[Tensor, Tensor]


def in_groups(returns: Tensor, groups: Tensor) -> Grouped:
    """The returns `[B]` of texts by their groups: `[B]`, equal numbers belong together.

    Examples:
        >>> grouped = in_groups(torch.tensor([1.0, 2.0, 5.0]), torch.tensor([7, 9, 7]))
        >>> grouped.returns.tolist(), grouped.returns[grouped.places].tolist()
        ([[1.0, 5.0], [2.0, 0.0]], [1.0, 2.0, 5.0])
    """
    _, row = torch.unique(groups, return_inverse=True)
    order, sizes = row.argsort(stable=True), row.bincount()
    column = torch.empty_like(row)
    column[order] = torch.arange(len(row), device=row.device) - (sizes.cumsum(0) - sizes)[row[order]]
    mask = torch.arange(int(sizes.max()), device=row.device) < sizes[:, None]
    table = returns.new_zeros(mask.shape)
    table[row, column] = returns
    return Grouped(table, mask, (row, column))


def for_all_tokens(advantage: Tensor, mask: Tensor) -> Tensor:
    """`[B, T]` each text's own number at all its tokens, from `[B]`."""
    return zero_padding(advantage[:, None].expand_as(mask), mask)


def _values(data: TensorDict) -> Tensor:
    return zero_padding(data["state_value"][..., 0], data["mask"])


def _compared(data: TensorDict, returns: Tensor, value: Tensor, config: AdvantageConfig) -> Tensor:
    """The returns minus what they are compared with; of a common size, if so asked."""
    mask = data["mask"]
    if config.baseline == "fitted":
        value = fitted_baseline(value, returns, zero_padding(data["action_log_prob"], mask), mask)
    advantage = returns if config.baseline == "none" else returns - value
    # What is only rounding, beside the returns, is no advantage; divided by itself it would be one of 1.
    rounding = ROUNDING * torch.finfo(returns.dtype).eps * returns.abs().max()
    advantage = torch.where(advantage.abs() > rounding, advantage, 0)
    if config.normalize:
        advantage = advantage / masked_mean(advantage**2, mask).sqrt().clamp_min(torch.finfo(returns.dtype).tiny)
    return zero_padding(advantage, mask)
