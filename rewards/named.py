"""Rewards by name: `register_reward` makes one known, `make_reward` makes one."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from rewards.base import FunctionReward, Reward, as_reward
from rewards.registry import Registry, wrong_arguments

__all__ = ["make_reward", "register_reward", "registered_reward", "reward_names"]

T = TypeVar("T", bound=Callable[..., Any])

_REWARDS: Registry[Callable[..., Any]] = Registry("reward")


def register_reward(name: str) -> Callable[[T], T]:
    """Register a class of rewards, or a function from a rollout to its score, under a name. A decorator.

    A function may have further arguments, which `make_reward` is given. It may be decorated with `reward` as well.

    Examples:
        >>> from rewards import Rollout, make_reward, register_reward
        >>> @register_reward("mentions")
        ... def mentions(rollout, word="please"):
        ...     return float(word in rollout.text)
        >>> make_reward("mentions", {"word": "thanks"})([Rollout.of("Many thanks")])[0].value
        1.0
    """

    def register(thing: T) -> T:
        made_of = thing.function if isinstance(thing, FunctionReward) else thing
        if isinstance(made_of, Reward) or not callable(made_of):
            raise TypeError(
                f"register_reward({name!r}) got {thing!r}; expected a subclass of Reward, or a function that takes a "
                "Rollout. To register a combination of rewards, make it in the score_batch of such a class."
            )
        if isinstance(made_of, type) and not issubclass(made_of, Reward):
            raise TypeError(
                f"register_reward({name!r}) got the class {made_of.__name__}; expected a subclass of Reward."
            )
        _REWARDS.add(name, made_of)
        return thing

    return register


def reward_names() -> list[str]:
    """The names of all registered rewards.

    Examples:
        >>> "exact_match" in reward_names()
        True
    """
    return _REWARDS.names()


def registered_reward(name: str) -> Callable[..., Any]:
    """The class or function that was registered under a name.

    Examples:
        >>> registered_reward("exact_match").__name__
        'ExactMatch'
    """
    return _REWARDS[name]


def make_reward(name: str, args: Mapping[str, Any] | None = None) -> Reward:
    """Make a reward from its registered name and its arguments.

    Args:
        name: One of `reward_names()`.
        args: Keyword arguments of the class or function.

    Returns:
        The reward. One that is made of a function is called by its registered name in a score's parts.

    Raises:
        ValueError: If there is no reward of that name.
        TypeError: If it does not take these arguments.

    Examples:
        >>> make_reward("length_penalty", {"free": 20})
        LengthPenalty(free=20, cost=0.01, floor=-1.0)
        >>> make_reward("length_penality")
        Traceback (most recent call last):
        rewards.registry.UnknownNameError: unknown reward 'length_penality'; did you mean 'length_penalty' or ...
    """
    known = _REWARDS[name]
    arguments = dict(args or {})
    try:
        if isinstance(known, type):
            made: Reward = known(**arguments)
            return made
        if arguments:
            inspect.signature(known).bind(None, **arguments)
        made = as_reward(functools.partial(known, **arguments) if arguments else known)
    except TypeError as error:
        why = wrong_arguments(known, arguments) or error
        raise TypeError(f"cannot make the reward {name!r} with {arguments}: {why}") from error
    made.name = name
    return made
