"""Tasks that only the suite has."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from llm_env import Prompt, register_task
from llm_env.tasks import Task
from llm_env.tasks.base import Episodes
from llm_env.tokens.arrays import BoolArray, IntArray
from llm_env.tokens.vocabulary import Vocabulary
from rewards import Rollout

FOLLOWS = dict(zip("abcdefgh", "dgahfbec", strict=True))


@register_task
class Chain(Task):
    """Write 64 letters, each the one that follows the letter before it; the one reward comes at the end: the share that
    is right.

    Which letter follows which nobody says: it is to be found out. Nothing says either which of the 64 it was that were
    right. The critic is told how many there are so far, and how many are still to come.
    """

    max_new_tokens = 64
    max_prompt_tokens = 3
    num_test = 64
    hint_names = ("right", "to_come")

    def setup(self, vocabulary: Vocabulary) -> None:
        self._allowed = np.isin(vocabulary.token_bytes, [letter.encode() for letter in FOLLOWS])

    def sample(self, rng: np.random.Generator) -> Prompt:
        return Prompt("".join(rng.choice(list(FOLLOWS), size=3)))

    def action_mask(self, episodes: Episodes, rows: IntArray) -> BoolArray:
        return np.broadcast_to(self._allowed, (len(rows), len(self._allowed)))

    def score(self, rollout: Rollout) -> float:
        text = rollout.prompt[-1] + rollout.text
        return sum(FOLLOWS[one] == other for one, other in pairwise(text)) / self.max_new_tokens

    def hints(self, rollout: Rollout) -> tuple[float, float]:
        return self.score(rollout), 1 - rollout.num_actions / self.max_new_tokens
