"""How an agent calls tools, and how it is answered: by tags of their names, or as its chat template teaches it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from llm_env.tokens.chat import Message

Tool = Callable[[str], str]
"""From what the agent wrote to what it is answered; a ValueError is told to the agent, as its own mistake."""


class Call(NamedTuple):
    """A tool's name, and what it is given."""

    name: str
    written: str


class Calls(Protocol):
    """A way to call tools.

    Attributes:
        stop: what ends a turn that calls one.
        explanation: what a prompt has to say about it; a template does it by itself.
        schemas: what a chat template is told about the tools.
    """

    stop: tuple[str, ...]
    explanation: str
    schemas: Sequence[Mapping[str, Any]]

    def read(self, text: str) -> Call | None:
        """The call at the end of a turn, or None where there is none; a ValueError says what is wrong with it."""

    def answer(self, result: str) -> str | list[Message]:
        """What the agent is told."""

    def refused(self, told: str) -> bool:
        """Whether it was told of an error."""


class TaggedCalls:
    """A call such as `<calculator>12*7</calculator>` is answered `<result>84</result>`.

    Args:
        tools: by name.
        times: how often they may be called.
    """

    schemas: Sequence[Mapping[str, Any]] = ()

    def __init__(self, tools: Mapping[str, Tool], times: int) -> None:
        self.names = tuple(tools)
        self.stop: tuple[str, ...] = tuple(f"</{name}>" for name in tools)
        often = "once" if times == 1 else f"as often as {times} times"
        lines = "\n".join(f"<{name}>...</{name}> {_purpose(tool)}".rstrip() for name, tool in tools.items())
        self.explanation = (
            f"You may use these tools {often}, before you answer:\n{lines}\n"
            "Each is answered by <result>...</result>.\n\n"
        )

    def read(self, text: str) -> Call | None:
        """What stands between the tags."""
        for name in self.names:
            if text.endswith(f"</{name}>"):
                _, opened, written = text.removesuffix(f"</{name}>").rpartition(f"<{name}>")
                if not opened:
                    raise ValueError(f"write <{name}>...</{name}>")
                return Call(name, written.strip())
        return None

    def answer(self, result: str) -> str:
        """The result between tags."""
        return f"<result>{result}</result>"

    def refused(self, told: str) -> bool:
        """Whether the result begins as an error."""
        return "<result>error" in told


class TemplateCalls:
    """`<tool_call>{"name": "calculator", "arguments": {"input": "12*7"}}</tool_call>` is answered by the role "tool".

    That is how the chat templates of Qwen, Hermes and others have it; what tools there are is for them to say.

    Args:
        tools: by name.
    """

    stop: tuple[str, ...] = ("</tool_call>",)
    explanation: str = ""

    def __init__(self, tools: Mapping[str, Tool]) -> None:
        self.names = tuple(tools)
        self.schemas: Sequence[Mapping[str, Any]] = [_schema(name, tool) for name, tool in tools.items()]

    def read(self, text: str) -> Call | None:
        """The JSON between the tags."""
        if not text.endswith("</tool_call>"):
            return None
        _, opened, written = text.removesuffix("</tool_call>").rpartition("<tool_call>")
        how = 'write <tool_call>{"name": "...", "arguments": {"input": "..."}}</tool_call>'
        try:
            call = json.loads(written)
        except ValueError:
            raise ValueError(how) from None
        if not opened or not isinstance(call, dict) or not isinstance(call.get("name"), str):
            raise ValueError(how)
        if call["name"] not in self.names:
            raise ValueError(f"there is no tool {call['name']!r}; there are {', '.join(self.names)}")
        given = call.get("arguments")
        values = list(given.values()) if isinstance(given, dict) else [given]
        if len(values) != 1 or not isinstance(values[0], str | int | float):
            raise ValueError(how)
        return Call(call["name"], str(values[0]))

    def answer(self, result: str) -> list[Message]:
        """A message of the tool."""
        return [{"role": "tool", "content": result}]

    def refused(self, told: str) -> bool:
        """Whether the message begins as an error."""
        return re.search(r"(?:^|[>\n])\s*error: ", told) is not None


def _purpose(tool: Tool) -> str:
    return (tool.__doc__ or "").strip().partition("\n")[0]


def _schema(name: str, tool: Tool) -> Mapping[str, Any]:
    given = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}
    return {"type": "function", "function": {"name": name, "description": _purpose(tool), "parameters": given}}
