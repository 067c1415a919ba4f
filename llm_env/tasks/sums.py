"""Sums in words: a question that reads like language, with one right answer. For models that know the words."""

from __future__ import annotations

from itertools import combinations_with_replacement
from typing import Any

import numpy as np

from llm_env.tasks.answers import RIGHT_SO_FAR, right_so_far
from llm_env.tasks.base import Splits, Task
from llm_env.tasks.registry import register_task
from llm_env.tokens.prompts import Prompt
from llm_env.tokens.vocabulary import Vocabulary
from rewards import Rollout

_SMALL = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_LARGEST = 499  # so that every sum is below one thousand


def in_words(number: int) -> str:
    """A whole number from 0 to 999, in words.

    Examples:
        >>> in_words(59), in_words(140)
        ('fifty-nine', 'one hundred forty')
    """
    if number < 20:
        return _SMALL[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return _TENS[tens - 2] + (f"-{_SMALL[ones]}" if ones else "")
    hundreds, rest = divmod(number, 100)
    return f"{_SMALL[hundreds]} hundred" + (f" {in_words(rest)}" if rest else "")


@register_task
class WordSums(Task):
    """Add two numbers, in words: "What is forty-two plus seventeen?" is to be answered " fifty-nine", and then ended.

    The score is 1 for the right answer and 0 otherwise. Capitals, a hyphen, "and" after "hundred", and a full stop at
    the end make no difference; anything else that is said beside the number is wrong.

    The critic is told whether all is right so far, and if so, how much of it there is.

    A sum and the same with its numbers exchanged are both learned from, or both held out.

    Args:
        largest: the numbers are from 1 to this, 499 at most.

    Examples:
        >>> from rewards import Rollout
        >>> task = WordSums(largest=50)
        >>> facts = {"answer": " fifty-nine"}
        >>> texts = (" fifty-nine", "Fifty nine.", " fifty-eight", " fifty-nine or so")
        >>> [task.score(Rollout.of(text, metadata=facts)) for text in texts]
        [1.0, 1.0, 0.0, 0.0]
    """

    num_train = 8192
    hint_names = RIGHT_SO_FAR

    def __init__(self, largest: int = 99, **kwargs: Any) -> None:
        if not 1 <= largest <= _LARGEST:
            raise ValueError(f"the numbers of WordSums are from 1 to {_LARGEST} at most, got largest={largest}")
        super().__init__(**kwargs)
        self.largest = largest

    def setup(self, vocabulary: Vocabulary) -> None:
        """Make room for the longest answer, a full stop and the end, and for two of the longest numbers in a prompt."""

        def tokens(text: str) -> int:
            return len(vocabulary.encode(text, add_special_tokens=False))

        answer = max(tokens(f" {in_words(number)}") for number in range(2, 2 * self.largest + 1))
        operand = max(tokens(f" {in_words(number)}") for number in range(1, self.largest + 1))
        self.max_new_tokens = answer + 2
        self.max_prompt_tokens = len(vocabulary.encode("What is plus?")) + 2 * operand

    def splits(self) -> Splits:
        """The pairs of numbers, shuffled; the held-out ones come first, each in one of its two orders."""
        rng = np.random.default_rng(self.seed)
        pairs = rng.permutation(list(combinations_with_replacement(range(1, self.largest + 1), 2)))
        held_out = min(self.num_test, len(pairs) // 5)
        test = rng.permuted(pairs[:held_out], axis=1).tolist()
        train = [order for a, b in pairs[held_out:].tolist() for order in dict.fromkeys([(a, b), (b, a)])]
        return {
            "train": [_prompt(*train[i]) for i in rng.permutation(len(train))[: self.num_train]],
            "test": [_prompt(*pair) for pair in test],
        }

    def hints(self, rollout: Rollout) -> tuple[float, float]:
        """See the class."""
        return right_so_far(_plain(rollout.text), _plain(rollout.metadata["answer"]))

    def score(self, rollout: Rollout) -> float:
        """1 if the text is the answer; see the class."""
        return float(_plain(rollout.text) == _plain(rollout.metadata["answer"]))


def _prompt(left: int, right: int) -> Prompt:
    # The answer begins with a space, as the word after a question mark does: most vocabularies have such tokens.
    question = f"What is {in_words(left)} plus {in_words(right)}?"
    return Prompt(question, {"answer": f" {in_words(left + right)}"})


def _plain(text: str) -> str:
    """A number in words without what makes no difference."""
    return text.casefold().replace("-", " ").replace("hundred and ", "hundred ").strip(" ").removesuffix(".")
