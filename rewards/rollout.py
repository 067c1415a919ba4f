"""What a reward is given: a `Rollout`, and why it is over, an `End`."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["End", "Rollout", "excerpt", "shown"]


class End(enum.StrEnum):
    """Why a rollout is over. Each is a string, too, and is written to JSON as one.

    After EOS, STOP and TASK the text is finished; after BUDGET and CONTEXT it was cut off.

    Example:
        >>> End.EOS == "eos", End("budget") is End.BUDGET
        (True, True)
        >>> [end.value for end in End if end.is_cut]
        ['budget', 'context']
    """

    RUNNING = "running"  # it is not over yet
    EOS = "eos"  # the agent wrote an end-of-sequence token
    STOP = "stop"  # the agent completed a stop sequence
    TASK = "task"  # the task said so
    BUDGET = "budget"  # the agent has made as many choices as it may
    CONTEXT = "context"  # there is no room for another token

    @property
    def is_cut(self) -> bool:
        """Whether the text was cut off (BUDGET, CONTEXT), rather than finished or still running."""
        return self is End.BUDGET or self is End.CONTEXT


_NO_METADATA: Mapping[str, Any] = {}


class Rollout:
    """One finished episode: a prompt, the tokens that followed, and what the task knows about it.

    Environments build one per episode, so making one only stores references; `prompt` and `text` are
    decoded on first use and kept. To make one by hand, use `Rollout.of`.

    Args:
        prompt_tokens: Token ids of the prompt, int64 `[P]`.
        tokens: Token ids of everything after the prompt, int64 `[T]`.
        metadata: What the task knows, such as `{"answer": "42"}`. Rewards read it and leave it as it is.
        end: Why the rollout is over: an `End` or its string.
        is_action: Bool `[T]`, True where the agent chose the token (rather than, say, a tool);
            None means it chose all of them.
        decode: Turns token ids into text.
        prompt: The prompt's text, where it is known already.
        text: The text of `tokens`, where it is known already.
    """

    __slots__ = ("_decode", "_prompt", "_text", "end", "is_action", "metadata", "prompt_tokens", "tokens")

    def __init__(
        self,
        prompt_tokens: NDArray[np.int64],
        tokens: NDArray[np.int64],
        metadata: Mapping[str, Any] = _NO_METADATA,
        end: End | str = End.EOS,
        is_action: NDArray[np.bool_] | None = None,
        decode: Callable[[NDArray[np.int64]], str] | None = None,
        prompt: str | None = None,
        text: str | None = None,
    ) -> None:
        self.prompt_tokens = prompt_tokens
        self.tokens = tokens
        self.metadata = metadata
        self.end: End = end if type(end) is End else _as_end(end)  # the enum's own look-up is slow
        self.is_action = is_action
        self._decode = decode
        self._prompt = prompt
        self._text = text

    @classmethod
    def of(
        cls,
        text: str,
        prompt: str = "",
        metadata: Mapping[str, Any] | None = None,
        end: End | str = End.EOS,
        tokens: NDArray[np.int64] | list[int] | None = None,
    ) -> Rollout:
        """Make a rollout from text, to try a reward out or to test it.

        Args:
            text: What the agent wrote.
            prompt: What it was given.
            metadata: What the task knows.
            end: Why the rollout is over: an `End` or its string.
            tokens: Token ids of `text`; None stands for one token per character.

        Example:
            >>> rollout = Rollout.of("42", prompt="6 * 7 =", metadata={"answer": "42"})
            >>> rollout.text, rollout.num_actions, rollout.terminated
            ('42', 2, True)
        """
        ids = [ord(char) for char in text] if tokens is None else tokens
        return cls(
            prompt_tokens=np.array([ord(char) for char in prompt], dtype=np.int64),
            tokens=np.asarray(ids, dtype=np.int64),
            metadata={} if metadata is None else metadata,
            end=end,
            prompt=prompt,
            text=text,
        )

    @property
    def prompt(self) -> str:
        """The prompt's text."""
        if self._prompt is None:
            self._prompt = self._decoded(self.prompt_tokens)
        return self._prompt

    @property
    def text(self) -> str:
        """The text of everything after the prompt."""
        if self._text is None:
            self._text = self._decoded(self.tokens)
        return self._text

    @property
    def num_actions(self) -> int:
        """How many of `tokens` the agent chose."""
        return len(self.tokens) if self.is_action is None else int(np.count_nonzero(self.is_action))

    @property
    def terminated(self) -> bool:
        """Whether the text is finished (its end is EOS, STOP or TASK) rather than cut off or still running."""
        return self.end is not End.RUNNING and not self.end.is_cut

    def _decoded(self, ids: NDArray[np.int64]) -> str:
        if self._decode is None:
            raise ValueError(
                "This Rollout has token ids but no way to read them as text: "
                "pass decode=tokenizer.decode, or prompt= and text=, to Rollout(...)."
            )
        return self._decode(ids)

    def __reduce__(self) -> tuple[Any, ...]:
        # `decode` is left out, since a tokenizer may be large or impossible to pickle; the texts are pickled instead.
        # Metadata becomes a dict because a read-only mapping proxy cannot be pickled.
        texts = (self._prompt, self._text) if self._decode is None else (self.prompt, self.text)
        state = (self.prompt_tokens, self.tokens, dict(self.metadata), self.end, self.is_action, None)
        return Rollout, (*state, *texts)

    def __repr__(self) -> str:
        text = "" if self._text is None else f"{excerpt(self._text)}, "
        return f"Rollout({text}{len(self.tokens)} tokens, end={self.end.value!r})"


def _as_end(end: str) -> End:
    try:
        return End(end)
    except ValueError:
        raise ValueError(f"a rollout's end is {end!r}; expected one of {', '.join(End)}.") from None


def shown(rollout: Rollout, which: Literal["prompt", "text"] = "text", limit: int = 200) -> str:
    """Quote a rollout's text or prompt for a message, where it can be decoded at all."""
    try:
        return excerpt(rollout.prompt if which == "prompt" else rollout.text, limit)
    except Exception as error:
        return f"(cannot be shown: {error!r})"


def excerpt(text: str, limit: int = 200) -> str:
    """Quote a text for an error message, shortened in the middle to about `limit` characters.

    Example:
        >>> excerpt("a" * 1000, limit=6)
        "'aaa' ... 'aaa' (1000 characters)"
    """
    if len(text) <= limit:
        return repr(text)
    half = limit // 2
    return f"{text[:half]!r} ... {text[-half:]!r} ({len(text)} characters)"
