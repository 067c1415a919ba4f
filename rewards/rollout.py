"""What a reward is given: a `Rollout`, the `Turn`s in it, and why it is over, an `End`."""

from __future__ import annotations

import enum
import itertools
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["End", "Rollout", "Turn", "excerpt", "new_episode", "shown"]

Decode = Callable[[NDArray[np.int64]], str]


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


class Turn:
    """What one side wrote in one go: the agent, or the task that replied to it.

    Args:
        who: "agent" or "task".
        tokens: Token ids, int64 `[T]`.
        text: Their text, where it is known already; else it is decoded on first use and kept.
        decode: Turns token ids into text.

    Attributes:
        who: "agent" or "task".
        tokens: Token ids, int64 `[T]`.

    Example:
        >>> asked, replied = Rollout.of(["6 * 7?", "42"]).turns
        >>> asked.who, asked.text, replied.who, replied.text
        ('agent', '6 * 7?', 'task', '42')
    """

    __slots__ = ("_decode", "_text", "tokens", "who")

    def __init__(
        self,
        who: Literal["agent", "task"],
        tokens: NDArray[np.int64],
        text: str | None = None,
        decode: Decode | None = None,
    ) -> None:
        self.who = who
        self.tokens = tokens
        self._text = text
        self._decode = decode

    @property
    def text(self) -> str:
        """Its text. Each turn is decoded by itself: what is said across a change of turns is nobody's word."""
        if self._text is None:
            self._text = _decoded(self.tokens, self._decode)
        return self._text

    @property
    def is_read(self) -> bool:
        """Whether its text is known without decoding it."""
        return self._text is not None

    def __reduce__(self) -> tuple[Any, ...]:
        text = self._text if self._decode is None else self.text
        return Turn, (self.who, self.tokens, text)

    def __repr__(self) -> str:
        text = "" if self._text is None else f"{excerpt(self._text)}, "
        return f"Turn({self.who!r}, {text}{len(self.tokens)} tokens)"


_NO_METADATA: Mapping[str, Any] = {}
_episodes = itertools.count(1)


def new_episode() -> int:
    """The identity of an episode that begins: a number that no other has had in this process.

    Example:
        >>> new_episode() == new_episode()
        False
    """
    return next(_episodes)


class Rollout:
    """One finished episode: a prompt, the turns that followed, and what the task knows about it.

    Environments build one per episode, so making one only stores references; texts are decoded on first use and kept.
    To make one by hand, use `Rollout.of`.

    Args:
        prompt_tokens: Token ids of the prompt, int64 `[P]`.
        tokens: Token ids of everything after the prompt, int64 `[T]`.
        metadata: What the task knows, such as `{"answer": "42"}`. Rewards read it and leave it as it is.
        end: Why the rollout is over: an `End` or its string.
        is_action: Bool `[T]`, True where the agent chose the token (rather than, say, a tool);
            None means it chose all of them.
        decode: Turns token ids into text.
        prompt: The prompt's text, where it is known already.
        turns: The turns, where they are known already; else they are the runs of equal `is_action`.
        episode: Which episode this is (of); None for one of its own.
        asked: The prompt as the task has written it, before any chat template: a text, or chat messages. None: the
            prompt's text.

    Attributes:
        session: What the task keeps for this episode (see `Task.session`) until it has been scored. It stays in this
            process: a copy that was pickled has None.
        episode: Which episode this is (of), a number that is unique in the process: the same each time that the
            episode is shown, to a task's `reply` as to the reward at its end, and in a copy that was pickled. A copy
            of the episode itself, made to go on in another way (`TokenMDP.restore`), is another episode and has a
            number of its own: a tool that remembers episodes by it finds one that it does not know with replies in
            it, and makes up what it must remember from `turns`. It says which episode and nothing else; a run that
            is resumed counts anew, so draw no random numbers from it.
    """

    __slots__ = (
        "_asked", "_decode", "_prompt", "_turns", "end", "episode", "is_action", "metadata", "prompt_tokens", "session",
        "tokens",
    )  # fmt: skip

    def __init__(
        self,
        prompt_tokens: NDArray[np.int64],
        tokens: NDArray[np.int64],
        metadata: Mapping[str, Any] = _NO_METADATA,
        end: End | str = End.EOS,
        is_action: NDArray[np.bool_] | None = None,
        decode: Decode | None = None,
        prompt: str | None = None,
        turns: tuple[Turn, ...] | None = None,
        episode: int | None = None,
        asked: str | Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        self.prompt_tokens = prompt_tokens
        self.tokens = tokens
        self.metadata = metadata
        self.end: End = end if type(end) is End else _as_end(end)  # the enum's own look-up is slow
        self.is_action = is_action
        self.episode = new_episode() if episode is None else episode
        self.session: Any = None
        self._decode = decode
        self._prompt = prompt
        self._turns = turns
        self._asked = asked

    @classmethod
    def of(
        cls,
        text: str | Sequence[str],
        prompt: str | Sequence[Mapping[str, Any]] = "",
        metadata: Mapping[str, Any] | None = None,
        end: End | str = End.EOS,
        tokens: NDArray[np.int64] | list[int] | None = None,
    ) -> Rollout:
        """Make a rollout from text, to try a reward out or to test it.

        Args:
            text: What the agent wrote; or several turns, the agent's and the task's by turns, the agent's first.
            prompt: What it was given: a text, or chat messages.
            metadata: What the task knows.
            end: Why the rollout is over: an `End` or its string.
            tokens: Token ids of `text`, if that is a single turn; None stands for one token per character.

        Example:
            >>> rollout = Rollout.of("42", prompt="6 * 7 =", metadata={"answer": "42"})
            >>> rollout.text, rollout.num_actions, rollout.terminated
            ('42', 2, True)
            >>> Rollout.of(["6 * 7?", "That is 42.", "so 42"]).text.splitlines()
            ['6 * 7?', 'so 42']
        """
        texts = [text] if isinstance(text, str) else list(text)
        if tokens is None:
            ids = [_one_per_character(each) for each in texts]
        elif len(texts) == 1:
            ids = [np.asarray(tokens, dtype=np.int64)]
        else:
            raise ValueError(
                f"Rollout.of got {len(texts)} turns and the tokens {tokens!r}; expected tokens with a single text. "
                "Leave them out, or use Rollout(...) with is_action."
            )
        agent = [place % 2 == 0 for place in range(len(texts))]
        parts = zip(agent, ids, texts, strict=True)
        asked = prompt if isinstance(prompt, str) else "\n\n".join(str(message["content"]) for message in prompt)
        turns = [Turn("agent" if own else "task", each, text) for own, each, text in parts]
        return cls(
            prompt_tokens=_one_per_character(asked),
            tokens=np.concatenate([np.zeros(0, dtype=np.int64), *ids]),
            metadata={} if metadata is None else metadata,
            end=end,
            is_action=None if len(texts) == 1 else np.repeat(agent, [len(each) for each in ids]),
            decode=_as_characters if tokens is None else None,
            prompt=asked,
            turns=tuple(turns),
            asked=prompt,
        )

    @property
    def prompt(self) -> str:
        """The prompt's text."""
        if self._prompt is None:
            self._prompt = _decoded(self.prompt_tokens, self._decode)
        return self._prompt

    @property
    def asked(self) -> str | Sequence[Mapping[str, Any]]:
        """The prompt as the task has written it: a text, or chat messages."""
        return self.prompt if self._asked is None else self._asked

    @property
    def turns(self) -> tuple[Turn, ...]:
        """Who wrote what after the prompt, in order. A reply without tokens makes no turn: the agent's goes on."""
        if self._turns is None:
            self._turns = self._found_turns()
        return self._turns

    @property
    def text(self) -> str:
        """What the agent wrote, and nothing that the task replied. Its turns stand on lines of their own.

        Between two turns stands a line break, so that 4 and then 2 do not read as 42.
        """
        return "\n".join([turn.text for turn in self.turns if turn.who == "agent"])

    @property
    def transcript(self) -> str:
        """Everything after the prompt, the agent's words and the task's as they follow each other."""
        return "".join([turn.text for turn in self.turns])

    @property
    def num_actions(self) -> int:
        """How many of `tokens` the agent chose."""
        return len(self.tokens) if self.is_action is None else int(np.count_nonzero(self.is_action))

    @property
    def terminated(self) -> bool:
        """Whether the text is finished (its end is EOS, STOP or TASK) rather than cut off or still running."""
        return self.end is not End.RUNNING and not self.end.is_cut

    def read_by(self, decode: Decode) -> None:
        """Read token ids with this from now on: a copy that was pickled has the texts, and nothing to read others."""
        self._decode = decode

    def before(self, action: int) -> Rollout:
        """The episode as it stood before the agent's action of that number; the last state is that of `num_actions`.

        Example:
            >>> rollout = Rollout.of(["n", "a2 ", "e"])
            >>> [rollout.before(action).transcript for action in range(rollout.num_actions + 1)]
            ['', 'na2 ', 'na2 e']
        """
        count = self.num_actions
        if not 0 <= action <= count:
            raise ValueError(f"expected an action from 0 to {count}, which is the state at the end, got {action}")
        if action == count:
            return self
        return self._cut(action if self.is_action is None else int(np.flatnonzero(self.is_action)[action]))

    def steps(self, mark: str) -> list[int]:
        """After how many of the agent's actions each of its steps is written: a step ends with a mark, or the text.

        Example:
            >>> Rollout.of("ab|c|d").steps("|"), Rollout.of("ab|").steps("|"), Rollout.of("").steps("|")
            ([3, 5, 6], [3], [])
        """
        actions = range(1, self.num_actions + 1)
        marks = range(1, self.text.count(mark) + 1)
        ends = [
            1 + bisect_left(actions, count, key=lambda action: self.before(action).text.count(mark)) for count in marks
        ]
        return ends if not actions or self.num_actions in ends else [*ends, self.num_actions]

    def up_to(self, turns: int) -> Rollout:
        """The episode as it stood after that many turns, of whomever.

        Example:
            >>> Rollout.of(["n", "a2 ", "e"]).up_to(2).transcript
            'na2 '
        """
        return self if turns >= len(self.turns) else self._cut(sum(len(turn.tokens) for turn in self.turns[:turns]))

    def _cut(self, stop: int) -> Rollout:
        return Rollout(
            self.prompt_tokens,
            self.tokens[:stop],
            self.metadata,
            End.RUNNING,
            is_action=None if self.is_action is None else self.is_action[:stop],
            decode=self._decode,
            prompt=self._prompt,
            episode=self.episode,
            asked=self._asked,
        )

    def _found_turns(self) -> tuple[Turn, ...]:
        if not len(self.tokens):
            return ()
        if self.is_action is None:
            return (Turn("agent", self.tokens, decode=self._decode),)
        starts = [0, *(np.flatnonzero(np.diff(self.is_action)) + 1).tolist(), len(self.tokens)]
        return tuple(
            Turn("agent" if self.is_action[start] else "task", self.tokens[start:stop], decode=self._decode)
            for start, stop in itertools.pairwise(starts)
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # `decode` is left out, since a tokenizer may be large or impossible to pickle; the texts are pickled instead.
        # Metadata becomes a dict because a read-only mapping proxy cannot be pickled.
        texts = (self._prompt, self._turns) if self._decode is None else (self.prompt, self.turns)
        state = (self.prompt_tokens, self.tokens, dict(self.metadata), self.end, self.is_action, None)
        return Rollout, (*state, *texts, self.episode, self._asked)

    def __repr__(self) -> str:
        known = self._turns is not None and all(turn.is_read for turn in self._turns)
        text = f"{excerpt(self.transcript)}, " if known else ""
        return f"Rollout({text}{len(self.tokens)} tokens, end={self.end.value!r})"


def _decoded(ids: NDArray[np.int64], decode: Decode | None) -> str:
    if decode is None:
        raise ValueError(
            "This Rollout has token ids but no way to read them as text: "
            "pass decode=tokenizer.decode, or prompt= and turns=, to Rollout(...)."
        )
    return decode(ids)


def _one_per_character(text: str) -> NDArray[np.int64]:
    return np.array([ord(char) for char in text], dtype=np.int64)


def _as_characters(ids: NDArray[np.int64]) -> str:
    return "".join(map(chr, ids.tolist()))


def _as_end(end: str) -> End:
    try:
        return End(end)
    except ValueError:
        raise ValueError(f"a rollout's end is {end!r}; expected one of {', '.join(End)}.") from None


def shown(rollout: Rollout, which: Literal["prompt", "text", "transcript"] = "text", limit: int = 200) -> str:
    """Quote a part of a rollout for a message, where it can be decoded at all."""
    try:
        return excerpt(str(getattr(rollout, which)), limit)
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
