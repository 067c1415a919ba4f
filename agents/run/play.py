"""A person in the agent's place: on the environment itself, token by token, with a model at hand."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from llm_env import END_OF_CODE, TokenEnv
from llm_env.models import load_model
from llm_env.tasks import Task


@dataclass
class Said:
    """What came of some tokens.

    Attributes:
        written: those of the agent, as text.
        reply: what the task replied.
        reward: what was paid.
        over: why the episode has ended; None: it goes on.
        parts: of the score, once it has ended.
    """

    written: str = ""
    reply: str = ""
    reward: float = 0.0
    over: str | None = None
    parts: dict[str, float] = field(default_factory=dict)


class Play:
    """An episode that a person writes, and may take back.

    Args:
        task: what is played.
        model: its tokens are used; and it is asked for the likeliest next ones, or to go on.
        split: of the prompts.
        device: what the model computes on.

    Examples:
        >>> from llm_env.tasks import Reverse
        >>> play = Play(Reverse(length=3, num_train=8), "tiny")
        >>> play.begin(0).split()[0]
        'reverse'
        >>> answer = play.answer
        >>> play.write(str(answer)).over, play.write("", end=True).reward
        (None, 1.0)
    """

    def __init__(self, task: Task, model: str, split: str = "train", device: str = "cpu") -> None:
        self.env = TokenEnv(task, model=model, split=split, shuffle=False)
        self.mdp = self.env.mdp
        self.vocabulary = self.mdp.vocabulary
        self.name, self.device = model, device
        self.tokens: list[list[int]] = []  # of each time that something was written
        self.index, self.over = 0, True
        self._model: Any = None

    @property
    def count(self) -> int:
        """How many prompts there are."""
        return len(self.mdp.prompts)

    @property
    def answer(self) -> Any:
        """What the prompt knows to be right; None if it does not say."""
        return self.mdp.prompts.prompts[self.index].metadata.get("answer")

    @property
    def transcript(self) -> str:
        """The prompt, and all that stands after it."""
        return self._text(0)

    def begin(self, index: int) -> str:
        """Begin an episode with a prompt; what is asked."""
        self.index, self.tokens, self.over = index % self.count, [], False
        self.env.reset(seed=0, options={"prompt_index": self.index})
        return self._text(0)

    def write(self, text: str, end: bool = False) -> Said:
        """Write a text, and perhaps an end-of-sequence token after it."""
        tokens = self.vocabulary.encode(text, add_special_tokens=False).tolist() if text else []
        return self.step([*tokens, *self.vocabulary.eos_tokens[:end]])

    def step(self, tokens: list[int]) -> Said:
        """Choose tokens, one after the other, until the task replies or the episode ends."""
        said, done = Said(), []
        for token in tokens:
            before = self.length
            _, reward, terminated, truncated, info = self.env.step(token)
            done.append(token)
            said.reward += reward
            if token not in self.vocabulary.eos_tokens:
                said.written += self.vocabulary.decode(np.array([token]))
            if terminated or truncated:
                self.over = True
                parts = {name.removeprefix("score/"): float(info[name]) for name in info if name.startswith("score/")}
                said.over = END_OF_CODE[int(info["end_code"])].value
                said.parts = {name: value for name, value in parts.items() if name != "reward_failed" or value}
                break
            if self.length > before + 1:
                said.reply = self._text(before + 1)
                break
        if done:
            self.tokens.append(done)
        return said

    def undo(self) -> bool:
        """Take back what was written last; false if there is nothing."""
        if not self.tokens:
            return False
        kept = self.tokens[:-1]
        self.begin(self.index)
        for tokens in kept:
            self.step(tokens)
        return True

    def likeliest(self, count: int = 8) -> list[tuple[int, str, float]]:
        """The next tokens that the model holds likeliest: their ids, what they say, and their probabilities."""
        chances = self._chances()
        best = chances.topk(min(count, len(chances)))
        ids = best.indices.tolist()
        names = [self.vocabulary.decode(np.array([token])) for token in ids]
        return list(zip(ids, names, best.values.tolist(), strict=True))

    def go_on(self, temperature: float = 0.0) -> Said:
        """Let the model write until the task replies, or the episode ends."""
        whole = Said()
        generator = torch.Generator().manual_seed(len(self.tokens))
        written: list[int] = []
        kept = list(self.tokens)
        while not self.over:
            chances = self._chances() if not temperature else (self._chances().log() / temperature).softmax(-1)
            token = (
                int(chances.argmax()) if not temperature else int(torch.multinomial(chances, 1, generator=generator))
            )
            said = self.step([token])
            written.append(token)
            whole = Said(whole.written + said.written, said.reply, whole.reward + said.reward, said.over, said.parts)
            if said.reply:
                break
        self.tokens = [*kept, written] if written else kept
        return whole

    @property
    def length(self) -> int:
        """Tokens of the prompt and the text so far."""
        return int(self.mdp.state.length[0])

    def _text(self, begin: int) -> str:
        return self.vocabulary.decode(self.mdp.state.tokens[0, begin : self.length])

    @torch.no_grad()
    def _chances(self) -> torch.Tensor:
        """`[V]` of the next token, of those that the task allows."""
        if self._model is None:
            self._model = load_model(self.name, device=self.device).eval()
        tokens = torch.as_tensor(self.mdp.state.tokens[:1, : self.length], device=self.device)
        logits = self._model(tokens).logits[0, -1].float().cpu()
        logits = self.vocabulary.usable(logits)
        mask = self.mdp.action_mask()
        if mask is not None:
            logits = logits.masked_fill(torch.as_tensor(mask[0]) == 0, -torch.inf)
        return logits.softmax(-1)
