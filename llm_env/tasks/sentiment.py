"""Sentiment: continue the opening of a review so that it turns out well."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import numpy as np

from llm_env.tasks.base import Splits, Task
from llm_env.tasks.registry import register_task
from llm_env.tokens.prompts import Prompt
from rewards import Rollout, VaderSentiment

_SUBJECTS = (
    "movie", "film", "documentary", "comedy", "thriller", "series", "play", "novel", "album", "game",
    "restaurant", "hotel", "museum", "concert", "podcast", "app", "camera", "phone", "course", "bakery",
)  # fmt: skip
_OPENINGS = (
    "I went into this {} without any expectations, and",
    "My sister had told me about this {} for weeks. In the end,",
    "After everything I had heard about the {}, I",
    "It took me a while to make up my mind about this {}, but",
    "This is the second time that I write about the {}. This time",
    "The first thing you notice about this {} is",
    "We came across this {} by chance last weekend and",
    "People keep asking me what I think of the {}. Well,",
    "There are many things to say about this {}, but mostly",
    "If you have never heard of this {},",
    "Before I talk about the {} itself, let me say that",
    "Having spent a whole evening with this {}, I can say",
)  # fmt: skip


@register_task
class Sentiment(Task):
    """Continue the opening of a review positively. The score is VADER's, from 0 (negative) to 1 (positive).

    The critic is told what the text so far would score.

    Needs `pip install 'llm-env[tasks]'`.

    Examples:
        >>> task = Sentiment(num_test=40)
        >>> len(task.prompts("train")), len(task.prompts("test"))
        (200, 40)
    """

    max_new_tokens = 32
    max_prompt_tokens = 96
    hint_names = ("score_so_far",)

    def __init__(self, *, num_train: int = 200, num_test: int = 40, seed: int = 0) -> None:
        super().__init__(num_train=num_train, num_test=num_test, seed=seed)
        self.reward = self._vader = VaderSentiment()

    def hints(self, rollout: Rollout) -> tuple[float]:
        """See the class."""
        return (self._vader.score(rollout),)

    def splits(self) -> Splits:
        """Every opening about every subject, shuffled; the held-out ones come first."""
        prompts = list(_openings())
        if self.num_train + self.num_test > len(prompts):
            raise ValueError(
                f"Sentiment has {len(prompts)} prompts in all, got num_train={self.num_train}, num_test={self.num_test}"
            )
        order = np.random.default_rng(self.seed).permutation(len(prompts)).tolist()
        shuffled = [prompts[i] for i in order]
        return {"test": shuffled[: self.num_test], "train": shuffled[self.num_test :][: self.num_train]}


def _openings() -> Iterator[Prompt]:
    for opening, subject in product(_OPENINGS, _SUBJECTS):
        yield Prompt(opening.format(subject), {"subject": subject})
