"""Tasks that only the suite has."""

from __future__ import annotations

import numpy as np

from llm_env import Prompt, register_task
from llm_env.tasks import Task
from llm_env.tasks.base import Episodes
from llm_env.tokens.arrays import BoolArray, IntArray
from llm_env.tokens.vocabulary import Vocabulary
from rewards import Rollout


@register_task
class Tile(Task):
    """Write three letters again and again, 64 letters in all; the one reward comes at the end: the share that is right.

    Nothing says which letters it was that were right, and each text is long: a reward is the sum of 64 choices.
    """

    letters = "abcd"
    max_new_tokens = 64
    max_prompt_tokens = 5
    num_test = 12

    def setup(self, vocabulary: Vocabulary) -> None:
        self._allowed = np.isin(vocabulary.token_bytes, [letter.encode() for letter in self.letters])

    def sample(self, rng: np.random.Generator) -> Prompt:
        pattern = "".join(rng.choice(list(self.letters), size=3))
        tiles = (pattern * 22)[: self.max_new_tokens]
        return Prompt(f"{pattern}: ", {"tiles": tiles, "answer": tiles[:-1]})  # the warm start needs room for an end

    def action_mask(self, episodes: Episodes, rows: IntArray) -> BoolArray:
        return np.broadcast_to(self._allowed, (len(rows), len(self._allowed)))

    def score(self, rollout: Rollout) -> float:
        return sum(a == b for a, b in zip(rollout.metadata["tiles"], rollout.text, strict=True)) / self.max_new_tokens
