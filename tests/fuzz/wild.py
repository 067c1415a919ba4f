"""A task that does everything a task may do, and much that it should not; and its rules once more, slow and obvious.

All that it does is a function of the text, so that the slow copy knows it beforehand: a checksum of the text decides.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from llm_env.tasks import Task
from llm_env.tokens.prompts import Prompt
from rewards import Score

LETTERS = "abcxyz?"
PROMPTS = ["", "q", "why not", "abab", "xyz?" * 3]


class ToolBroke(Exception):
    """What a tool raises."""


def checksum(text: str, salt: str) -> int:
    return zlib.crc32((salt + text).encode())


def reply_to(text: str) -> Any:
    """What the task answers to an agent whose turn is over; may raise."""
    kind = checksum(text, "reply") % 8
    if kind == 0:
        raise ToolBroke(f"the tool broke on {text!r}")
    if kind == 1:
        return [10**9]  # not a token
    if kind == 2:
        return 3.5  # not a reply
    if kind == 3:
        return "much longer than anybody has room for, " * 3
    return (None, None, "ok", "", "a?")[kind - 3]


def is_over(prompt: int, text: str) -> bool:
    return checksum(text, f"over{prompt}") % 23 == 0


def earned(prompt: int, text: str) -> float:
    """For the last token of the agent."""
    return (checksum(text, f"pay{prompt}") % 5) / 8


def allowed(prompt: int, text: str) -> set[str]:
    """Letters that may come next; the end of sequence may, always."""
    return {letter for letter in LETTERS if checksum(text + letter, f"mask{prompt}") % 3}


def worth(prompt: int, text: str) -> float:
    """The score of a finished text; may raise."""
    if checksum(text, "score") % 6 == 0:
        raise ToolBroke(f"no score for {text!r}")
    return (checksum(text, f"score{prompt}") % 9) / 4


class Wild(Task):
    """See the module."""

    stop = ("ba", "?")
    max_prompt_tokens = 16
    max_reply_tokens = 8

    def __init__(self, when_cut: Literal["score", "bootstrap"], answer: str | None, talks: bool, masks: bool) -> None:
        super().__init__()
        self.when_cut = when_cut
        self.on_reply_error = answer
        self.talks = talks
        self.masks = masks

    def splits(self) -> dict[str, list[Prompt]]:
        return {"train": [Prompt(text, {"index": index}) for index, text in enumerate(PROMPTS)]}

    def setup(self, vocabulary: Any) -> None:
        self.tokens = {letter: int(vocabulary.encode(letter)[0]) for letter in LETTERS}

    def reply(self, rollout: Any) -> Any:
        return reply_to(rollout.transcript) if self.talks and rollout.end == "stop" else None

    def over(self, episodes: Any, rows: np.ndarray) -> np.ndarray:
        return np.array([is_over(self._prompt(episodes, row), episodes.rollout(row).transcript) for row in rows])

    def token_reward(self, episodes: Any, rows: np.ndarray) -> np.ndarray:
        return np.array([earned(self._prompt(episodes, row), episodes.rollout(row).transcript) for row in rows])

    def action_mask(self, episodes: Any, rows: np.ndarray) -> np.ndarray:
        mask = np.full((len(rows), self.vocabulary.size), not self.masks)
        mask[:, self.vocabulary.eos_tokens] = True
        for place, row in enumerate(rows):
            letters = allowed(self._prompt(episodes, row), episodes.rollout(row).transcript)
            mask[place, [self.tokens[letter] for letter in letters]] = True
        return mask

    def score(self, rollout: Any) -> Score:
        return Score(worth(rollout.metadata["index"], rollout.transcript))

    def _prompt(self, episodes: Any, row: int) -> int:
        index: int = episodes.prompt(row).metadata["index"]
        return index


@dataclass
class SlowEpisode:
    """An episode of `Wild` as Python lists."""

    vocabulary: Any
    task: Wild
    prompt_index: int
    context: int
    budget: int
    prompt: list[int] = field(default_factory=list)
    written: list[int] = field(default_factory=list)
    is_action: list[bool] = field(default_factory=list)
    turn: str = ""
    end: str = "running"
    earned: float = 0.0

    def __post_init__(self) -> None:
        if not self.prompt:
            self.prompt = self.vocabulary.encode(PROMPTS[self.prompt_index]).tolist() or [self.vocabulary.bos_token]

    def copied(self) -> SlowEpisode:
        return replace(self, written=list(self.written), is_action=list(self.is_action))

    @property
    def transcript(self) -> str:
        """The vocabulary's tokens are characters, and special ones have no text."""
        return "".join(self.letter(token) for token in self.written)

    def letter(self, token: int) -> str:
        return "" if token in self.vocabulary.eos_tokens else str(self.vocabulary.token_bytes[token].decode())

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.written)

    def act(self, token: int, on_error: float) -> float:
        assert self.end == "running"
        self.written.append(token)
        self.is_action.append(True)
        self.turn += self.letter(token)
        if token in self.vocabulary.eos_tokens:
            self.end = "eos"
        elif any(stop in self.turn for stop in Wild.stop):
            self.end = "stop"
        if self.end == "stop" and self.task.talks:
            self._hear()
        if self.end == "running" and is_over(self.prompt_index, self.transcript):
            self.end = "task"
        if self.end == "running" and sum(self.is_action) >= self.budget:
            self.end = "budget"
        if self.end == "running" and self.length >= self.context:
            self.end = "context"
        paid = earned(self.prompt_index, self.transcript)
        if self.terminated:
            try:
                paid += worth(self.prompt_index, self.transcript)
            except ToolBroke:
                paid += on_error
        self.earned += paid
        return paid

    def _hear(self) -> None:
        try:
            reply = reply_to(self.transcript)
            bad = reply is not None and not isinstance(reply, str)
        except ToolBroke:
            bad = True
        if bad:
            reply = self.task.on_reply_error
        if reply is None:
            return
        tokens = [int(token) for token in self.vocabulary.encode(reply, add_special_tokens=False)]
        if sum(self.is_action) >= self.budget:
            self.end = "budget"
        elif self.length + len(tokens) >= self.context:
            self.end = "context"
        else:
            self.written += tokens
            self.is_action += [False] * len(tokens)
            self.turn, self.end = "", "running"

    @property
    def terminated(self) -> bool:
        cut = self.end in ("budget", "context")
        return self.end != "running" and not (cut and self.task.when_cut == "bootstrap")

    @property
    def mask(self) -> set[str]:
        if self.end != "running" or not self.task.masks:
            return set(LETTERS)
        return allowed(self.prompt_index, self.transcript)
