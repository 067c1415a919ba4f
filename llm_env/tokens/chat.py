"""Turns of a conversation in the middle of a text, in the words of a model's own chat template."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]
Render = Callable[[Sequence[Message], bool], str]
"""What a template makes of messages, with the beginning of the assistant's answer after them or without."""

_SAID = "4b1d7e"  # stands for what the assistant has written; no template says it by itself
_BEFORE = ({"role": "user", "content": "Hello"}, {"role": "assistant", "content": _SAID})


class UnstableTemplateError(ValueError):
    """A chat template that writes what came before differently once more has been said."""


class ChatTurns:
    """What a template puts between what an assistant wrote and its next turn.

    The tokens that a model has written are never rendered again: a template, or a tokenizer, may write them otherwise.
    So only what follows them is taken from the template: the mark that ends the assistant's turn, the new messages, and
    the mark that begins its next turn. Of a template that changes what came before (by leaving out old thoughts, say)
    there is no such thing, and it is refused.

    Args:
        render: see `Render`.
        ends: texts of the tokens that end a turn; where one was written already, it is not written again.

    Examples:
        >>> def render(messages, begin):
        ...     text = "".join(f"[{message['role']}]{message['content']}<end>" for message in messages)
        ...     return text + "[assistant]" * begin
        >>> turns = ChatTurns(render, ends=["<end>"])
        >>> reply = [{"role": "user", "content": "Go on."}]
        >>> turns.between(reply, ended=True), turns.between(reply, ended=False)
        ('[user]Go on.<end>[assistant]', '<end>[user]Go on.<end>[assistant]')
    """

    def __init__(self, render: Render, ends: Sequence[str]) -> None:
        self._render = render
        self._ends = tuple(ends)
        alone = render(_BEFORE, False)
        self._before, found, after = alone.partition(_SAID)
        if not found:
            raise UnstableTemplateError("the chat template does not show what the assistant has said")
        self._end = next((end for end in self._ends if after.startswith(end)), "")

    def between(self, messages: Sequence[Message], ended: bool) -> str:
        """What follows the assistant's words.

        Args:
            messages: what is said to the assistant next.
            ended: whether the assistant has written the token that ends its turn.
        """
        before, found, after = self._render([*_BEFORE, *messages], True).partition(_SAID)
        if not found or before != self._before or not after.startswith(self._end):
            raise UnstableTemplateError(
                "the chat template writes what came before differently once more has been said (some leave out old "
                "thoughts), so that a model would not see what it has written. Use a template that only appends, or "
                "reply by strings that bring the marks of their turns along"
            )
        return after.removeprefix(self._end) if ended else after
