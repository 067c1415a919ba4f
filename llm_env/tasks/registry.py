"""Tasks by name: `register_task` makes one known to the library and to Gymnasium."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, TypeVar

import gymnasium

from llm_env.tasks.base import Task

TaskType = TypeVar("TaskType", bound=type[Task])

_TASKS: dict[str, type[Task]] = {}


def register_task(task: TaskType) -> TaskType:
    """Register a task class under its name, and as the Gymnasium id `llm_env/<name>-v0`. Use it as a decorator.

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
    known = _TASKS.get(task.name)
    if known is not None and (known.__module__, known.__qualname__) != (task.__module__, task.__qualname__):
        raise ValueError(
            f"a task named {task.name!r} is already registered ({known.__module__}.{known.__qualname__}): "
            f"give yours another name (a class attribute `name`)"
        )
    _TASKS[task.name] = task
    env_id = f"llm_env/{task.name}-v0"
    gymnasium.registry.pop(env_id, None)  # registering again, as a notebook does, is not worth Gymnasium's warning
    gymnasium.register(
        id=env_id,
        entry_point="llm_env.envs.single:TokenEnv",
        vector_entry_point="llm_env.envs.vector:TokenVectorEnv",
        kwargs={"task": task.name},
    )
    return task


def task_names() -> list[str]:
    """The names of all registered tasks."""
    return sorted(_TASKS)


def make_task(task: str | Task | type[Task], task_kwargs: Mapping[str, Any] | None = None) -> Task:
    """A task from its name (or class) and its arguments; a task that is one already is returned as it is.

    Examples:
        >>> make_task("Reverse", {"length": 3}).max_new_tokens
        4
        >>> make_task("Revers")
        Traceback (most recent call last):
        ValueError: unknown task 'Revers'; did you mean 'Reverse'? Known: Addition, ...
    """
    if isinstance(task, Task):
        if task_kwargs:
            raise ValueError(f"task_kwargs go with a task's name; {task.name} is made already, got {dict(task_kwargs)}")
        return task
    if isinstance(task, str):
        if task not in _TASKS:
            near = difflib.get_close_matches(task, _TASKS, n=3, cutoff=0.4)
            hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
            raise ValueError(f"unknown task {task!r}; {hint}Known: {', '.join(task_names())}")
        task = _TASKS[task]
    if not (isinstance(task, type) and issubclass(task, Task)):
        raise TypeError(f"a task is a registered name ({', '.join(task_names())}), a Task, or a subclass; got {task!r}")
    try:
        return task(**(task_kwargs or {}))
    except TypeError as error:
        raise TypeError(f"cannot make the task {task.name} with {dict(task_kwargs or {})}: {error}") from error
