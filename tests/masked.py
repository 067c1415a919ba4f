"""A task whose action mask differs from prompt to prompt and from step to step."""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from llm_env.tasks import Task, register_task
from llm_env.tokens.prompts import Prompt
from llm_env.tokens.vocabulary import Vocabulary
from rewards import Rollout

PROMPTS = ["a", "of what", "", "the longest of all prompts", "b?"]
VOWELS, OTHERS = "aeiou", "bcdfghjklmnpqrstvwxyz"


@register_task
class Alternating(Task):
    """Vowels and other letters by turns, vowels first after every other prompt; a text may end from its third token."""

    max_new_tokens = 6
    max_prompt_tokens = 30

    def splits(self) -> dict[str, list[Prompt]]:
        prompts = [Prompt(text, {"index": index}) for index, text in enumerate(PROMPTS)]
        return {"train": prompts, "test": [Prompt(f"{text}!", {"index": index}) for index, text in enumerate(PROMPTS)]}

    def setup(self, vocabulary: Vocabulary) -> None:
        pieces = vocabulary.token_bytes
        self.letters = np.array([[piece in map(str.encode, kind) for piece in pieces] for kind in (VOWELS, OTHERS)])
        self.ends = np.isin(np.arange(vocabulary.size), vocabulary.eos_tokens)

    def action_mask(self, episodes: Any, rows: np.ndarray) -> np.ndarray:
        index = np.array([episodes.prompt(row).metadata["index"] for row in rows])
        done = episodes.state.num_actions[rows]
        mask: np.ndarray = self.letters[(index + done) % 2]
        return mask | (self.ends & (done >= 2)[:, None])

    def score(self, rollout: Rollout) -> float:
        return sum(letter in "aeo" for letter in rollout.text) + 0.5 * rollout.metadata["index"]


def allowed_ids(tokenizer: PreTrainedTokenizerBase, index: int, step: int) -> list[int]:
    """What it allows, said once more in another way."""
    letters = (VOWELS, OTHERS)[(index + step) % 2]
    ids = [tokenizer.convert_tokens_to_ids(letter) for letter in letters]
    return sorted(ids + [tokenizer.eos_token_id] * (step >= 2))
