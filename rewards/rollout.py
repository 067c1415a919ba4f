"""What a reward is given and what it gives back: `Rollout` and `Score`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

End = Literal["eos", "stop", "task", "budget", "context", "running"]
"""Why a rollout is over: an end-of-sequence token, a stop string, the task said so; or it was cut off
because the token budget or the model's context was used up. "running" is one that is not over."""

_TERMINATED = frozenset({"eos", "stop", "task"})
_NO_METADATA: Mapping[str, Any] = {}


class Rollout:
    """One finished episode: a prompt, the tokens that followed, and what the task knows about it.

    Environments build one per episode, so construction only stores references; `prompt` and `text` are
    decoded on first use and kept. To make one by hand, use `Rollout.of`.

    Args:
        prompt_tokens: Token ids of the prompt, int64 `[P]`.
        tokens: Token ids of everything after the prompt, int64 `[T]`.
        metadata: What the task knows, such as `{"answer": "42"}`. Rewards read it and leave it as it is.
        end: Why the rollout is over: "eos", "stop", "task" (finished), "budget" or "context" (cut off).
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
        end: End = "eos",
        is_action: NDArray[np.bool_] | None = None,
        decode: Callable[[NDArray[np.int64]], str] | None = None,
        prompt: str | None = None,
        text: str | None = None,
    ) -> None:
        self.prompt_tokens = prompt_tokens
        self.tokens = tokens
        self.metadata = metadata
        self.end = end
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
        end: End = "eos",
        tokens: NDArray[np.int64] | list[int] | None = None,
    ) -> Rollout:
        """Make a rollout from text, to try a reward out or to test it.

        Args:
            text: What the agent wrote.
            prompt: What it was given.
            metadata: What the task knows.
            end: Why the rollout is over.
            tokens: Token ids of `text`; None stands for one token per character.

        Example:
            >>> rollout = Rollout.of("42", prompt="6 * 7 =", metadata={"answer": "42"})
            >>> rollout.text, rollout.num_actions, rollout.terminated
            ('42', 2, True)
        """
        if end not in get_args(End):
            raise ValueError(f"Rollout.of: end is {end!r}; expected one of {', '.join(get_args(End))}.")
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
        """Whether the rollout came to its own end ("eos", "stop", "task") rather than being cut off."""
        return self.end in _TERMINATED

    def _decoded(self, ids: NDArray[np.int64]) -> str:
        if self._decode is None:
            raise ValueError(
                "This Rollout has token ids but no way to read them as text: "
                "pass decode=tokenizer.decode, or prompt= and text=, to Rollout(...)."
            )
        return self._decode(ids)

    def __reduce__(self) -> tuple[Any, ...]:
        # A tokenizer may be large or refuse to be pickled, so the text travels and `decode` stays;
        # metadata becomes a dict because a read-only mapping proxy cannot be pickled.
        texts = (self._prompt, self._text) if self._decode is None else (self.prompt, self.text)
        state = (self.prompt_tokens, self.tokens, dict(self.metadata), self.end, self.is_action, None)
        return Rollout, (*state, *texts)

    def __repr__(self) -> str:
        text = "" if self._text is None else f"{excerpt(self._text)}, "
        return f"Rollout({text}{len(self.tokens)} tokens, end={self.end!r})"


@dataclass(frozen=True, slots=True, eq=False)
class Score:
    """What a rollout is worth: `value` at its end, and optionally some more at every token.

    Args:
        value: Paid at the end of the rollout.
        parts: Each component's value by name, for logging; it does not change what is paid.
        per_token: Float `[rollout.num_actions]`: paid at each token the agent chose, in addition to
            `value`.

    Example:
        >>> Score(1.0, per_token=np.array([-0.25, -0.25])).total
        0.5
    """

    value: float
    parts: dict[str, float] = field(default_factory=dict)
    per_token: NDArray[np.float64] | None = None

    @property
    def total(self) -> float:
        """All that is paid: `value` plus the sum of `per_token`."""
        return self.value if self.per_token is None else self.value + float(self.per_token.sum())

    def __eq__(self, other: object) -> bool:
        # A dataclass would compare the arrays with ==, whose result has no truth value.
        if not isinstance(other, Score):
            return NotImplemented
        if self.per_token is None or other.per_token is None:
            same_tokens = self.per_token is other.per_token
        else:
            same_tokens = np.array_equal(self.per_token, other.per_token)
        return self.value == other.value and self.parts == other.parts and same_tokens


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
