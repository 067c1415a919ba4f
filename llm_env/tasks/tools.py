"""Tools: a task whose agent may call a calculator, or whatever else is registered, before it answers."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from llm_env.tasks.answers import RIGHT_SO_FAR, right_so_far
from llm_env.tasks.base import Splits, Task
from llm_env.tasks.calls import Calls, TaggedCalls, TemplateCalls, Tool
from llm_env.tasks.countdown import evaluate
from llm_env.tasks.registry import make_task, register_task
from llm_env.tasks.search import Search
from llm_env.tokens.chat import Message
from llm_env.tokens.prompts import Prompt
from llm_env.tokens.vocabulary import Vocabulary
from rewards import Limits, Reward, Rollout, Sandbox, Score, Turn, as_reward, program_in
from rewards.registry import Registry

_TOOLS: Registry[Tool] = Registry("tool", room="llm_env.tasks")
_AROUND = len("<result>error: </result>")
_NAME = re.compile(r"[a-z][a-z0-9_]*")


def register_tool(name: str) -> Callable[[Tool], Tool]:
    """Decorate a function to make it a tool, called as `<name>...</name>`. Its docstring's first line explains it.

    Examples:
        >>> @register_tool("upper")
        ... def upper(text):
        ...     '''A text in capital letters.'''
        ...     return text.upper()
        >>> task = Tools("Copy", tools="upper", length=3)
        >>> task.reply(Rollout.of("<upper>abc</upper>"))
        '<result>ABC</result>'
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"a tool is called by its name, <name>...</name>: it must be like 'calculator', got {name!r}")
    return _TOOLS.register(name)


@register_tool("calculator")
def calculator(expression: str) -> str:
    """What an expression of whole numbers, + - * / and brackets comes to: (12 + 3) * 4

    Examples:
        >>> calculator("(12 + 3) * 4"), calculator("1/3")
        ('60', '0.333333')
    """
    value, _ = evaluate(expression)
    return str(value) if value.denominator == 1 else f"{float(value):.6g}"


@register_tool("python")
def python(program: str) -> str:
    """What a Python program prints: print(sum(range(10)))

    It runs in a sandbox, see `rewards.Sandbox`.
    """
    outcome = _sandbox().run(program_in(program))
    if not outcome.passed:
        raise ValueError(f"{outcome.stdout}{outcome.why}")
    return outcome.stdout.strip()


@functools.cache
def _sandbox() -> Sandbox:
    return Sandbox(Limits(seconds=5, memory=128, output=4096))


@register_task
class Tools(Task):
    """Another task's prompts, with tools at hand: "<calculator>12*7</calculator>" is answered "<result>84</result>".

    The answer is what the agent writes when it calls nothing any more; the other task scores it as if it had been
    written alone. A call that cannot be understood, or is one too many, is answered by what is wrong with it. Parts of
    the score are the number of "calls", and of those that were "refused".

    Args:
        task: the other task, or its name; one that has no replies and rewards no single tokens.
        tools: which, by name: a list, or names with commas between them; or functions of your own, by the names that
            they are called by.
        corpus: a JSONL file of documents, each line a string or an object with a "text"; "search" is among the tools
            then, and finds the best of them.
        calls: how many calls are answered in an episode.
        call_tokens: how many tokens there are for each call, besides those that the other task gives for its answer.
        longest: characters of a result; the rest of a longer one is cut off.
        explain: begin prompts with what the tools are, and how they are called.
        template: have the model's chat template say so in its own words, and call tools as it has learned to: by JSON
            between `<tool_call>` and `</tool_call>`, answered in messages of the role "tool".
        **arguments: of the other task.

    Examples:
        >>> task = Tools("Addition", tools="calculator", digits=3)
        >>> print(task.prompts("test")[0].text)
        You may use these tools as often as 3 times, before you answer:
        <calculator>...</calculator> What an expression of whole numbers, + - * / and brackets comes to: (12 + 3) * 4
        Each is answered by <result>...</result>.
        <BLANKLINE>
        850+636=
        >>> task.reply(Rollout.of("<calculator>850+636</calculator>"))
        '<result>1486</result>'
        >>> task.reply(Rollout.of("1486")) is None
        True
    """

    def __init__(
        self,
        task: str | Task = "Addition",
        *,
        tools: str | Sequence[str] | Mapping[str, Tool] = "calculator",
        corpus: str | None = None,
        calls: int = 3,
        call_tokens: int = 40,
        longest: int = 64,
        explain: bool = True,
        template: bool = False,
        **arguments: Any,
    ) -> None:
        names = [name.strip() for name in tools.split(",") if name.strip()] if isinstance(tools, str) else list(tools)
        if corpus is not None:
            names.append("search")
        if calls < 1 or call_tokens < 1 or longest < 1 or not names:
            raise ValueError(
                f"expected at least one tool, and calls, call_tokens and longest of 1 or more, got tools={tools!r}, "
                f"calls={calls}, call_tokens={call_tokens}, longest={longest}"
            )
        own: Mapping[str, Tool] = tools if isinstance(tools, Mapping) else {}
        if corpus is not None:
            own = {"search": Search.of_file(corpus), **own}
        self.tools: Mapping[str, Tool] = {name: own[name] if name in own else _TOOLS[name] for name in names}
        self.inner = make_task(task, arguments)
        for method in ("reply", "over", "token_reward"):
            if self.inner.overrides(method):
                raise ValueError(
                    f"Tools cannot hand out tools in the task {self.inner.name}, which has `{method}` itself"
                )
        super().__init__(seed=self.inner.seed)
        self.calls = calls
        self.longest = longest
        self.format: Calls = TemplateCalls(self.tools) if template else TaggedCalls(self.tools, calls)
        self.explanation = self.format.explanation if explain else ""
        self.chat = True if template else self.inner.chat
        self.stop = (*self.inner.stop, *self.format.stop)
        self.max_new_tokens = self.inner.max_new_tokens + calls * call_tokens
        # Characters, for there may be a token for each; and what a template may say beside them.
        self.max_prompt_tokens = self.inner.max_prompt_tokens + len(self.explanation)
        self.max_reply_tokens = (calls + 1) * (longest + _AROUND)
        if template:
            self.max_prompt_tokens += len(json.dumps(self.format.schemas)) + 512
            self.max_reply_tokens += (calls + 1) * 64

    def setup(self, vocabulary: Vocabulary) -> None:
        """Set the other task up for the same tokens."""
        self.inner = self.inner.bind(vocabulary)
        failed = self.format.answer("error: the tool has failed")
        self.on_reply_error = failed if isinstance(failed, str) else vocabulary.turn_text(failed, ended=False)

    def splits(self) -> Splits:
        """The other task's prompts, after the explanation."""
        return {
            split: [self._with_tools(Prompt.of(row)) for row in rows] for split, rows in self.inner.splits().items()
        }

    def demonstration(self, prompt: Prompt) -> list[str] | None:
        """The agent's turns of a right episode, for a warm start; None where it is not known."""
        return None

    def reply(self, rollout: Rollout) -> str | Sequence[Message] | None:
        """The result of a call; None after a turn that calls nothing, which is the answer."""
        made = sum(turn.who == "agent" for turn in rollout.turns)
        try:
            call = self.format.read(rollout.turns[-1].text)
            if call is None or made > self.calls + 1:  # it was told that none is left; then that was its answer
                return None
            if made > self.calls:
                raise ValueError("no calls are left; answer now")
            return self.format.answer(str(self.tools[call.name](call.written))[: self.longest])
        except ValueError as error:
            return None if made > self.calls + 1 else self.format.answer(f"error: {error}"[: self.longest])

    def score(self, rollout: Rollout) -> Score:
        """What the other task gives for the last turn."""
        last = rollout.turns[-1]
        if last.who == "task":  # there was no room to answer in; a result is no answer of the agent's
            last = Turn("agent", last.tokens[:0], "")
        alone = Rollout(
            rollout.prompt_tokens, last.tokens, rollout.metadata, rollout.end, turns=(last,), episode=rollout.episode
        )
        [score] = self._reward_of_answers()([alone])
        answers = [turn.text for turn in rollout.turns if turn.who == "task"]
        parts = {"calls": float(len(answers)), "refused": float(sum(map(self.format.refused, answers)))}
        paid = score.per_token
        if paid is not None:  # in its place, behind the turns before
            paid = np.pad(paid, (rollout.num_actions - len(paid), 0))
        return Score(score.value, {**score.parts, **parts}, paid)

    def as_reward(self) -> Reward:
        """`score`, by the reward of this task where one is set, or else by the other task's."""
        self._reward_of_answers()  # or the other task says that it has none
        return as_reward(self.score)

    def _reward_of_answers(self) -> Reward:
        return self.inner.as_reward() if self.reward is None else as_reward(self.reward)

    def _with_tools(self, prompt: Prompt) -> Prompt:
        turns = self.demonstration(prompt)
        metadata = prompt.metadata if turns is None else {**prompt.metadata, "turns": turns}
        text = prompt.text
        if self.explanation:
            ahead = {"role": "system", "content": self.explanation.strip()}
            text = self.explanation + text if isinstance(text, str) else [ahead, *text]
        return Prompt(text, metadata, tools=self.format.schemas)


@register_task
class CalculatorSums(Tools):
    """Sums of large numbers, with a calculator: for tiny models, which cannot add them up by themselves.

    Under "turns" each prompt has what an agent writes that uses the calculator, for a warm start
    (`--sft.answer turns`). The critic is told whether all is as in that demonstration so far.

    Args:
        digits: of each number, at most.
        **arguments: of `Tools`.

    Examples:
        >>> CalculatorSums(digits=4).prompts("test")[0].metadata["turns"]
        ['<calculator>8506+6369</calculator>', '14875']
    """

    hint_names = RIGHT_SO_FAR

    def __init__(self, digits: int = 4, **arguments: Any) -> None:
        super().__init__("Addition", tools="calculator", explain=False, digits=digits, **{"calls": 1} | arguments)

    def hints(self, rollout: Rollout) -> tuple[float, float]:
        """Whether all is as in the demonstration so far, and if so, how much of it there is."""
        return right_so_far(rollout.text, "\n".join(rollout.metadata["turns"]))

    def demonstration(self, prompt: Prompt) -> list[str]:
        """Copy the sum into a call, and the result into the answer."""
        assert isinstance(prompt.text, str)
        return [f"<calculator>{prompt.text.rstrip('=')}</calculator>", prompt.metadata["answer"]]
