"""Tasks by name: `register_task` makes one known to the library and to Gymnasium."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import gymnasium
from gymnasium.envs.registration import WrapperSpec

from llm_env.tasks.base import Task
from rewards.registry import Registry, wrong_arguments

TaskType = TypeVar("TaskType", bound=type[Task])

_TASKS: Registry[type[Task]] = Registry("task")

_FOR_MLPS = (
    WrapperSpec("AllowedTokens", "llm_env.wrappers.allowed:AllowedTokens", {"tokens": None}),
    WrapperSpec("OneHotTokens", "llm_env.wrappers.one_hot:OneHotTokens", {"window": 12}),
)


def register_task(task: TaskType) -> TaskType:
    """Register a task class under its name, and as the Gymnasium id `llm_env/<name>-v0`. Use it as a decorator.

    `llm_env/<name>-onehot-v0` is the same task for algorithms that know arrays of floats and numbered actions only: its
    observations are those of the wrapper `OneHotTokens`, its actions those of `AllowedTokens`.

    Examples:
        >>> from llm_env.tasks import Task, register_task
        >>> from llm_env.tokens.prompts import Prompt
        >>> @register_task
        ... class Greet(Task):
        ...     max_new_tokens = 8
        ...     def splits(self):
        ...         return {"train": [Prompt("Say hello: ")]}
        ...     def score(self, rollout):
        ...         return float("hello" in rollout.text)
        >>> import gymnasium
        >>> gymnasium.make("llm_env/Greet-v0").unwrapped
        TokenEnv(Greet, model='tiny', context=200)
    """
    if not (isinstance(task, type) and issubclass(task, Task)):
        raise TypeError(f"register_task takes a subclass of Task, got {task!r}")
    _TASKS.add(task.name, task)
    _register(
        f"llm_env/{task.name}-v0",
        vector_entry_point="llm_env.envs.vector:TokenVectorEnv",
        kwargs={"task": task.name},
    )
    _register(f"llm_env/{task.name}-onehot-v0", additional_wrappers=_FOR_MLPS, kwargs={"task": task.name})
    return task


def _register(env_id: str, **spec: Any) -> None:
    gymnasium.registry.pop(env_id, None)  # registering again, as a notebook does, is not worth Gymnasium's warning
    gymnasium.register(id=env_id, entry_point="llm_env.envs.single:TokenEnv", **spec)


def task_names() -> list[str]:
    """The names of all registered tasks.

    Examples:
        >>> "Reverse" in task_names()
        True
    """
    return _TASKS.names()


def task_class(name: str) -> type[Task]:
    """The class of the task registered under a name.

    Examples:
        >>> task_class("Reverse").__name__
        'Reverse'
    """
    return _TASKS[name]


def make_task(task: str | Task | type[Task], task_kwargs: Mapping[str, Any] | None = None) -> Task:
    """A task from its name (or class) and its arguments; a task that is one already is returned as it is.

    Examples:
        >>> make_task("Reverse", {"length": 3}).max_new_tokens
        4
        >>> make_task("Revers")
        Traceback (most recent call last):
        rewards.registry.UnknownNameError: unknown task 'Revers'; did you mean 'Reverse'...? Known: Addition, ...
    """
    if isinstance(task, Task):
        if task_kwargs:
            raise ValueError(f"task_kwargs go with a task's name; {task.name} is made already, got {dict(task_kwargs)}")
        return task
    if isinstance(task, str):
        task = task_class(task)
    if not (isinstance(task, type) and issubclass(task, Task)):
        raise TypeError(f"a task is a registered name ({', '.join(task_names())}), a Task, or a subclass; got {task!r}")
    try:
        return task(**(task_kwargs or {}))
    except TypeError as error:
        arguments = dict(task_kwargs or {})
        why = wrong_arguments(task, arguments) or error
        raise TypeError(f"cannot make the task {task.name} with {arguments}: {why}") from error
