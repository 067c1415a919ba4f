"""Tasks that only the suite has."""

from __future__ import annotations

import numpy as np

from llm_env.tasks import Reverse, register_task
from llm_env.tasks.base import Episodes
from llm_env.tokens.arrays import FloatArray, IntArray
from llm_env.tokens.vocabulary import Vocabulary
from rewards import Rollout


@register_task
class ReverseByLetter(Reverse):
    """Reverse, paid letter by letter: 1/length for each that is right in its place, at once, and nothing at the end."""

    def setup(self, vocabulary: Vocabulary) -> None:
        super().setup(vocabulary)
        self._characters = np.array([text.decode(errors="replace") for text in vocabulary.token_bytes], dtype=object)

    def token_reward(self, episodes: Episodes, rows: IntArray) -> FloatArray:
        state = episodes.state
        written = self._characters[state.tokens[rows, state.length[rows] - 1]]
        places = state.num_actions[rows] - 1
        answers = [episodes.prompt(row).metadata["answer"] for row in rows.tolist()]
        right = [
            place < self.length and answer[place] == letter
            for answer, place, letter in zip(answers, places.tolist(), written.tolist(), strict=True)
        ]
        return np.array(right, dtype=np.float64) / self.length

    def score(self, rollout: Rollout) -> float:
        return 0.0
