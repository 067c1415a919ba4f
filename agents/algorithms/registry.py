"""Algorithms by name, and what is refused because an algorithm does not read it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from agents.algorithms.advantages import advantage_estimator, advantage_names
from agents.algorithms.base import Algorithm
from agents.config import TrainConfig
from agents.config.checks import flag, flatten
from agents.config.files import complain
from agents.config.modules import import_module_of
from agents.config.switches import critic_follows, critic_steps, matches, switched_off
from agents.losses import TokenLoss, loss_class, loss_names, loss_term
from rewards.registry import Registry, UnknownNameError, wrong_arguments

AlgorithmClass = TypeVar("AlgorithmClass", bound=type[Algorithm])

_ALGORITHMS: Registry[type[Algorithm]] = Registry("algorithm", room="agents.algorithms")

# The settings that are an algorithm's choice: whichever of these it does not read is refused.
CHOICES = ("advantage.*", "loss.*", "kl.*", "critic.*", "critic_warmup", "model.critic")
# Without a critic nobody reads these.
OF_THE_CRITIC = (
    *("critic.*", "critic_warmup", "model.critic"),
    *("loss.value", "loss.value_clip", "advantage.critic_lambda"),
)


def register_algorithm(name: str) -> Callable[[AlgorithmClass], AlgorithmClass]:
    """Decorate an `Algorithm` to make it known by a name, for `--algo`.

    Examples:
        >>> @register_algorithm("sharpen")
        ... class Sharpen(Algorithm):
        ...     loss_kind = "policy_gradient"
        >>> algorithm_class("sharpen").__name__
        'Sharpen'
    """

    def register(algorithm: AlgorithmClass) -> AlgorithmClass:
        _ALGORITHMS.add(name, algorithm)
        return algorithm

    return register


def algorithm_class(name: str) -> type[Algorithm]:
    """The algorithm of that name.

    Examples:
        >>> algorithm_class("ppo").has_critic, algorithm_class("grpo").has_critic
        (True, False)
    """
    return _ALGORITHMS[name]


def algorithm_names() -> list[str]:
    """The names of all algorithms.

    Examples:
        >>> {"a2c", "grpo", "ppo", "reinforce", "rloo"} <= set(algorithm_names())
        True
    """
    return _ALGORITHMS.names()


def needs_groups(config: TrainConfig) -> Iterator[str]:
    """The problem of an algorithm that compares the texts of one prompt, where there is but one."""
    group = config.rollout.completions_per_prompt
    if group < 2:
        yield (
            f"--rollout.completions-per-prompt is {group}, but --algo {config.algo} compares the texts of one prompt: "
            f"use at least 2; 8 is usual"
        )


def check_algorithm(config: TrainConfig) -> None:
    """Raise a `ConfigError` that lists all that the algorithm of a configuration cannot work with, or does not read.

    `config.module` is imported first, for the algorithm may be there.

    Examples:
        >>> check_algorithm(TrainConfig().replace(algo="reinforce", loss__dual_clip=3.0))
        Traceback (most recent call last):
        agents.config.files.ConfigError: --loss.dual-clip is 3.0, but --algo reinforce does not read it: leave it out
    """
    import_module_of(config)
    complain(list(_unknown_names(config)))  # without these there is nothing to ask
    algorithm = algorithm_class(config.algo)
    found = [*algorithm.problems(config), *_wrong_arguments(config), *_critic_mismatch(config)]
    found += _too_small_a_batch(config)
    values = dict(flatten(config))
    complain(found + [_refusal(name, values[name], config) for name in unread_settings(config)])


def unread_settings(config: TrainConfig) -> dict[str, Any]:
    """The settings that differ from their defaults though nothing reads them.

    Neither algorithm nor loss nor estimator does, or another setting has switched off what would.

    Returns:
        Their defaults, by dotted names; nothing if algorithm, loss or estimator are unknown.

    Examples:
        >>> unread_settings(TrainConfig().replace(algo="grpo", advantage__gamma=0.9, advantage__normalize=False))
        {'advantage.gamma': 1.0}
    """
    import_module_of(config)
    if list(_unknown_names(config)):
        return {}
    defaults, off = dict(flatten(TrainConfig())), switched_off(config)
    return {
        name: defaults[name]
        for name, value in flatten(config)
        if name in off or (value != defaults[name] and matches(name, CHOICES) and not _reads(config, name))
    }


def _unknown_names(config: TrainConfig) -> Iterator[str]:
    looked_up: list[tuple[str, Callable[[str], object], str]] = [
        ("algo", algorithm_class, config.algo),
        ("loss.kind", loss_class, config.loss.kind),
        ("advantage.kind", advantage_estimator, config.advantage.kind),
        *(("loss.terms", loss_term, name) for name in config.loss.terms),
    ]
    for setting, look_up, name in looked_up:
        try:
            look_up(name)
        except UnknownNameError as error:
            yield f"{flag(setting)}: {error}"


def _wrong_arguments(config: TrainConfig) -> Iterator[str]:
    """Arguments in `algo_args` that the algorithm's constructor does not take, or that it lacks."""
    of_all = inspect.signature(Algorithm).parameters
    if wrong := wrong_arguments(algorithm_class(config.algo), config.algo_args, besides=of_all):
        yield f"--algo-args, which are for --algo {config.algo}: {wrong}"


def _critic_mismatch(config: TrainConfig) -> Iterator[str]:
    """A critic and advantages that do not go together."""
    algorithm, kind = algorithm_class(config.algo), _advantage(config)
    overridden = algorithm.advantages is not Algorithm.advantages  # which may add what is missing
    if kind is None or overridden or advantage_estimator(kind).critic == algorithm.has_critic:
        return
    usable = [name for name in advantage_names() if advantage_estimator(name).critic == algorithm.has_critic]
    why = "has a critic, and these give it nothing to learn" if algorithm.has_critic else "has no critic to ask"
    yield f"--advantage.kind is {kind}, but --algo {config.algo} {why}: use one of {', '.join(usable)}"


def _too_small_a_batch(config: TrainConfig) -> Iterator[str]:
    """More parts than texts; only asked of passes that are made."""
    size = config.rollout.batch_size
    learns_alone = algorithm_class(config.algo).has_critic and critic_steps(config) and not critic_follows(config)
    for name, optimizer in (("actor", config.actor), ("critic", config.critic)):
        if optimizer.minibatches > size and (name == "actor" or learns_alone):
            yield (
                f"--{name}.minibatches is {optimizer.minibatches}, more than there are texts in a batch "
                f"(--rollout.batch-size {size}): use fewer"
            )


def _loss(config: TrainConfig) -> str | None:
    """The name of the loss in use; None if the algorithm makes one by itself."""
    algorithm = algorithm_class(config.algo)
    by_itself = algorithm.make_loss is not Algorithm.make_loss
    return algorithm.loss_kind or (None if by_itself else config.loss.kind)


def _advantage(config: TrainConfig) -> str | None:
    """The name of the estimator in use; None if the algorithm estimates by itself."""
    algorithm = algorithm_class(config.algo)
    by_itself = algorithm.advantages is not Algorithm.advantages
    return algorithm.advantage_kind or (None if by_itself else config.advantage.kind)


def _reads(config: TrainConfig, name: str) -> bool:
    algorithm, loss, advantage = algorithm_class(config.algo), _loss(config), _advantage(config)
    if not algorithm.has_critic and matches(name, OF_THE_CRITIC):
        return False
    if name == "loss.kind":
        return loss is not None and algorithm.loss_kind is None
    if name == "advantage.kind":
        return advantage is not None and algorithm.advantage_kind is None
    read = set(_settings_of(algorithm))
    if loss is not None:
        read |= _settings_of(loss_class(loss))
    if advantage is not None:
        read |= set(advantage_estimator(advantage).settings)
    return matches(name, read)


def _settings_of(kind: type[Algorithm | TokenLoss]) -> set[str]:
    """What a class and its bases read."""
    return {name for base in kind.__mro__ for name in vars(base).get("settings", ())}


def _refusal(name: str, value: object, config: TrainConfig) -> str:
    algorithm = algorithm_class(config.algo)
    begin = f"{flag(name)} is {value}, but"
    if not algorithm.has_critic and matches(name, OF_THE_CRITIC):
        return f"{begin} --algo {config.algo} has no critic: leave it out"
    if _reads(config, name) or not matches(name, CHOICES):
        return f"{begin} {switched_off(config)[name]}: leave it out"
    # Where the user has chosen the loss or the estimator, another one may be meant.
    if name.startswith("loss.") and _reads(config, "loss.kind"):
        readers = [other for other in loss_names() if matches(name, _settings_of(loss_class(other)))]
        if readers:
            return f"{begin} the loss {config.loss.kind!r} does not read it ({_list(readers)} would): leave it out"
    if name.startswith("advantage.") and _reads(config, "advantage.kind"):
        readers = [other for other in advantage_names() if name in advantage_estimator(other).settings]
        if readers:
            kind = config.advantage.kind
            return f"{begin} the advantage {kind!r} does not read it ({_list(readers)} would): leave it out"
    return f"{begin} --algo {config.algo} does not read it: leave it out"


def _list(names: list[str]) -> str:
    return " and ".join(map(repr, names))
