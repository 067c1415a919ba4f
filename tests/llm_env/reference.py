"""The token MDP once more, slow and obvious: Python lists, one episode at a time. Tests compare everything with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from llm_env.tasks import Task
from llm_env.tokens.prompts import Prompt
from rewards import Score

PROMPTS = ["", "q", "why", "abab", "what now"]
LETTERS = "ab?xz"  # what random agents write; enough to complete stops, to ask, and to be ended by the task


class Probe(Task):
    """A task with every rule at once: stop strings, replies, an end of its own, and rewards per token."""

    stop = ("ba?", "aa")
    max_new_tokens = 5
    max_prompt_tokens = 8
    max_reply_tokens = 2  # which is room for one reply, and sometimes for two

    def __init__(self, multi_turn: bool = True, when_cut: Literal["score", "bootstrap"] = "bootstrap") -> None:
        super().__init__()
        self.when_cut = when_cut
        self.multi_turn = multi_turn

    def splits(self) -> dict[str, list[Prompt]]:
        return {"train": [Prompt(text, {"index": i}) for i, text in enumerate(PROMPTS)]}

    def setup(self, vocabulary: Any) -> None:
        self.z = int(vocabulary.encode("z")[0])
        self.x = int(vocabulary.encode("x")[0])

    def over(self, episodes: Any, rows: np.ndarray) -> np.ndarray:
        """Two z in the text end it."""
        state = episodes.state
        return ((state.tokens[rows] == self.z) & state.is_action[rows]).sum(1) >= 2

    def reply(self, rollout: Any) -> str | None:
        """To a stop, an answer; to an end of sequence, none."""
        return "ok" if self.multi_turn and rollout.end == "stop" else None

    def token_reward(self, episodes: Any, rows: np.ndarray) -> np.ndarray:
        """An x earns an eighth."""
        state = episodes.state
        actions = np.array([state.tokens[r][state.is_action[r]][-1] for r in rows])
        return 0.125 * (actions == self.x)

    def score(self, rollout: Any) -> Score:
        return Score(rollout.text.count("a") + 0.5 * rollout.metadata["index"], {"length": float(len(rollout.tokens))})


@dataclass
class SlowEpisode:
    """One episode of `Probe`."""

    prompt_index: int
    prompt: list[int]
    context: int
    budget: int
    eos: Sequence[int]
    text_of: Sequence[bytes]
    encode: Any
    multi_turn: bool = True
    when_cut: str = "bootstrap"
    tokens: list[int] = field(default_factory=list)
    chosen: list[int] = field(default_factory=list)
    turn: list[int] = field(default_factory=list)
    end: str = "running"
    earned: float = 0.0

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)

    def act(self, token: int) -> float:
        assert self.end == "running"
        self.tokens.append(token)
        self.chosen.append(token)
        self.turn.append(token)
        text = b"".join(self.text_of[t] for t in self.turn)
        if token in self.eos:
            self.end = "eos"
        elif any(stop.encode() in text for stop in Probe.stop):
            self.end = "stop"
        if self.end == "stop" and self.multi_turn:
            answer = self.encode("ok").tolist()
            if len(self.chosen) >= self.budget:
                self.end = "budget"
            elif len(self.tokens) + len(answer) >= self.context:
                self.end = "context"
            else:
                self.tokens += answer
                self.turn = []
                self.end = "running"
        if self.end == "running":
            if [self.text_of[t] for t in self.chosen].count(b"z") >= 2:
                self.end = "task"
            elif len(self.chosen) >= self.budget:
                self.end = "budget"
            elif len(self.tokens) >= self.context:
                self.end = "context"
        reward = 0.125 * (self.text_of[token] == b"x")
        if self.terminated:
            written = b"".join(self.text_of[t] for t in self.tokens[len(self.prompt) :] if t not in self.eos)
            reward += written.count(b"a") + 0.5 * self.prompt_index
        self.earned += reward
        return reward

    @property
    def terminated(self) -> bool:
        cut = self.end in ("budget", "context")
        return self.end in ("eos", "stop", "task") or (cut and self.when_cut == "score")

    @property
    def truncated(self) -> bool:
        return self.end in ("budget", "context") and self.when_cut == "bootstrap"

    def observation(self, pad: int) -> dict[str, list[int]]:
        return {
            "tokens": self.tokens + [pad] * (self.context - len(self.tokens)),
            "length": [len(self.tokens)],
            "prompt_length": [len(self.prompt)],
        }


class SlowEnvs:
    """Several episodes, dealt their prompts in order."""

    def __init__(self, mdp: Any) -> None:
        self.mdp = mdp  # for its vocabulary and sizes only
        self.dealt = 0
        self.episodes: list[SlowEpisode] = [self._episode(0)] * mdp.num_envs

    def _episode(self, index: int) -> SlowEpisode:
        vocabulary = self.mdp.vocabulary
        prompt = vocabulary.encode(PROMPTS[index]).tolist() or [vocabulary.bos_token]
        return SlowEpisode(
            index,
            prompt,
            self.mdp.context,
            self.mdp.max_new_tokens,
            vocabulary.eos_tokens,
            vocabulary.token_bytes,
            vocabulary.encode,
            self.mdp.task.multi_turn,
            self.mdp.task.when_cut,
        )

    def begin(self, row: int) -> None:
        self.episodes[row] = self._episode(self.dealt % len(PROMPTS))
        self.dealt += 1

    def observation(self) -> dict[str, np.ndarray]:
        rows = [episode.observation(self.mdp.vocabulary.pad_token) for episode in self.episodes]
        return {key: np.array([row[key] for row in rows]) for key in rows[0]}
