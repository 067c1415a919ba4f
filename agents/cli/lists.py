"""What there is to choose from, with names and a line for each; your own among them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence

from agents.config import TrainConfig
from agents.config.files import ConfigError
from agents.config.modules import import_module_of
from llm_env.tasks import task_class, task_names
from rewards.named import registered_reward, reward_names
from rewards.registry import arguments_of


def list_of_tasks() -> str:
    """The tasks, with what `--task.args` may say."""
    return "\n".join(_entry(name, task_class(name)) for name in task_names())


def list_of_rewards() -> str:
    """The rewards, with what `--task.reward-args` may say."""
    return "\n".join(_entry(name, registered_reward(name)) for name in reward_names())


def list_of_algorithms() -> str:
    """The algorithms."""
    from agents.algorithms.registry import algorithm_class, algorithm_names  # imports torch, which takes seconds

    return "\n".join(_line(name, algorithm_class(name)) for name in algorithm_names())


def import_module_named_in(arguments: Sequence[str], command: str) -> None:
    """Import the module that `--module` names; all that such a command takes."""
    match list(arguments):
        case []:
            return
        case ["--module", name] if not name.startswith("-"):
            pass
        case [one] if one.startswith("--module="):
            name = one.partition("=")[2]
        case _:
            raise ConfigError(
                f"llm-env {command} takes --module and its name, or nothing, got {' '.join(arguments)}: "
                f"for example, llm-env {command} --module my_module"
            )
    import_module_of(TrainConfig(module=name))


def _entry(name: str, thing: Callable[..., object]) -> str:
    return f"{_line(name, thing)}\n  {'':<19}   arguments: {', '.join(arguments_of(thing)) or 'none'}"


def _line(name: str, thing: object) -> str:
    return f"  {name:<19} {(inspect.getdoc(thing) or '').partition(chr(10))[0]}".rstrip()
