"""The tasksets of verifiers, one episode for each of their tasks: as tasks of one turn or several."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import numpy as np

from llm_env.tasks.registry import register_task
from llm_env.tasks.turns import Play, Told, TurnTask
from llm_env.tokens.chat import Message
from rewards import Score

Run = Callable[[Any, Any], Awaitable[None]]
"""How a task of a taskset is played: `run(task, agents)`, as the environments of verifiers have it."""


async def ask_once(task: Any, agents: Any) -> None:
    """One turn: the task's own prompt and the answer."""
    async with agents.agent.interaction(task) as interaction:
        await interaction.turn()


@register_task
class Verifiers(TurnTask):
    """A taskset of the package verifiers (its v1 interface), played in this process: no harness, server, or runtime.

    The score is the sum of the task's weighted rewards, with its rewards and metrics as parts; those that need a
    runtime are left out, as verifiers does. The first tasks are held out. The agent is told messages where a task has
    a system prompt, and then the model must have a chat template.

    Args:
        taskset: the taskset, or any iterable of its tasks.
        run: plays a task of several turns, as the `run` of an environment does; it may wait for nothing but the turns
            of one agent. By default, the task is asked once.
        **kwargs: of `TurnTask`.

    Examples:
        >>> import my_taskset  # doctest: +SKIP
        >>> task = Verifiers(my_taskset.load_taskset(), num_test=16)  # doctest: +SKIP
    """

    max_new_tokens = 256
    max_prompt_tokens = 1024
    max_reply_tokens = 2048

    def __init__(self, taskset: Iterable[Any], *, run: Run = ask_once, **kwargs: Any) -> None:
        try:
            import verifiers.v1  # noqa: F401
        except ImportError as error:
            raise ImportError("the task Verifiers needs the package verifiers: pip install verifiers") from error
        super().__init__(**kwargs)
        self.run = run
        self._tasks = list(islice(iter(taskset), self.num_test + self.num_train))
        if len(self._tasks) <= self.num_test:
            raise ValueError(
                f"the taskset has {len(self._tasks)} tasks, of which num_test={self.num_test} are held out: none is "
                "left to train on; set num_test lower"
            )

    def rows(self) -> Mapping[str, Sequence[Any]]:
        """The tasks of both splits."""
        return {"test": self._tasks[: self.num_test], "train": self._tasks[self.num_test :]}

    def play_row(self, row: Any, rng: np.random.Generator) -> Play:
        """One task."""
        seat = _Seat(row)
        playing = self.run(row, seat).__await__()
        said = None
        while True:
            try:
                asked = playing.send(said)
            except StopIteration:
                break
            if not isinstance(asked, _Asked):
                raise TypeError(f"{self.run!r} waits for {asked!r}; it may wait for nothing but the turns of its agent")
            said = yield _told(asked.messages)
        _finish(row.score(seat.trace))
        rewards = {name: float(reward.value) for name, reward in seat.trace.rewards.items() if reward is not None}
        metrics = {name: value for name, value in seat.trace.metrics.items() if value is not None}
        return Score(sum(rewards.values()), {**metrics, **rewards})


class _Asked:
    """What a turn waits for: an answer to these messages."""

    def __init__(self, messages: list[Message]) -> None:
        self.messages = messages

    def __await__(self) -> Generator[_Asked, str, str]:
        return (yield self)


class _Seat:
    """Stands in for the one agent of an episode, whatever it is called, and for its interaction."""

    def __init__(self, task: Any) -> None:
        from verifiers import v1 as vf
        from verifiers.v1.trace import AgentInfo, TraceTask

        about = TraceTask(type=type(task).__name__, data=task.data, key=task.key, hash=task.hash)
        self.trace = vf.Trace(task=about, agent=AgentInfo(config=vf.AgentConfig()))
        self._name: str | None = None

    def __getattr__(self, name: str) -> _Seat:
        if name.startswith("_"):
            raise AttributeError(name)
        if self._name not in (None, name):
            raise ValueError(f"a task of verifiers has one agent here, but asks for {self._name!r} and {name!r}")
        self._name = name
        return self

    def interaction(self, task: Any) -> _Interaction:
        return _Interaction(task, self.trace)


class _Interaction:
    def __init__(self, task: Any, trace: Any) -> None:
        self.trace = trace
        self._data = task.data

    async def __aenter__(self) -> _Interaction:
        return self

    async def __aexit__(self, *error: object) -> None:
        return None

    async def turn(self, message: Any = None) -> Any:
        from verifiers import v1 as vf

        given = self._data.prompt if message is None else message
        said = [{"role": "user", "content": given}] if isinstance(given, str) else given
        messages = [_plain(one) for one in said]
        if not self.trace.nodes and self._data.system_prompt:
            messages = [{"role": "system", "content": self._data.system_prompt}, *messages]
        for one in messages:
            self._add(_of_verifiers(one), sampled=False)
        answer = vf.AssistantMessage(content=await _Asked(messages))
        self._add(answer, sampled=True)
        return vf.Segment(messages=[answer])

    def _add(self, message: Any, *, sampled: bool) -> None:
        from verifiers.v1.graph import MessageNode

        parent = len(self.trace.nodes) - 1 if self.trace.nodes else None
        self.trace.nodes.append(MessageNode(parent=parent, message=message, sampled=sampled))


def _plain(message: Any) -> Message:
    """A message of verifiers as a mapping of what it says."""
    given = message if isinstance(message, Mapping) else message.model_dump()
    return {"role": given["role"], "content": given["content"]}


def _of_verifiers(message: Message) -> Any:
    from verifiers import v1 as vf

    kind = {"system": vf.SystemMessage, "user": vf.UserMessage, "assistant": vf.AssistantMessage}[message["role"]]
    return kind(content=message["content"])


def _told(messages: list[Message]) -> Told:
    """A single message of the user as its text, which models without a chat template can be told, too."""
    if len(messages) == 1 and messages[0]["role"] == "user" and isinstance(messages[0]["content"], str):
        return str(messages[0]["content"]).rstrip() + "\n"
    return messages


def _finish(scoring: Any) -> None:
    """Run a coroutine to its end, also where an event loop runs already (in a notebook, say)."""
    with ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, scoring).result()
