"""Small tasks over characters, that a tiny model learns in minutes: copying, reversing, adding."""

from __future__ import annotations

import string
from typing import Any, ClassVar

import numpy as np

from llm_env.tasks.answers import RIGHT_SO_FAR, right_so_far
from llm_env.tasks.base import Episodes, Task
from llm_env.tasks.registry import register_task
from llm_env.tokens.arrays import BoolArray, IntArray
from llm_env.tokens.prompts import Prompt
from llm_env.tokens.vocabulary import Vocabulary
from rewards import Rollout, Score


class _CharacterTask(Task):
    """One right answer, to be written in full and then ended.

    The score is 1 for the right answer and 0 otherwise. With `dense`, each character that is right in its place is paid
    where it is written, and so is the end, all alike: the right answer earns 1 in all. "exact" says whether it was.

    The critic is told whether all is right so far, and if so, how much of it there is.
    """

    hint_names = RIGHT_SO_FAR

    def __init__(self, answer_length: int, prompt_length: int, alphabet: str, dense: bool, /, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.alphabet = alphabet
        self.dense = dense
        self.max_new_tokens = answer_length + 1  # and the end-of-sequence token
        self.max_prompt_tokens = prompt_length

    def setup(self, vocabulary: Vocabulary) -> None:
        """Find the tokens that an answer can consist of."""
        self._allowed = np.zeros(vocabulary.size, dtype=np.bool_)
        self._allowed[[*vocabulary.tokens_that_say(self.alphabet), *vocabulary.eos_tokens]] = True

    def action_mask(self, episodes: Episodes, rows: IntArray) -> BoolArray:
        """The characters that answers are made of, and the end-of-sequence tokens."""
        return np.broadcast_to(self._allowed, (len(rows), len(self._allowed)))

    def hints(self, rollout: Rollout) -> tuple[float, float]:
        """See the class."""
        return right_so_far(rollout.text, rollout.metadata["answer"])

    def score(self, rollout: Rollout) -> float | Score:
        """1 if the text is the answer; see the class for `dense`."""
        answer: str = rollout.metadata["answer"]
        text = rollout.text
        exact = float(text == answer)
        if not self.dense:
            return exact
        right = [a == b for a, b in zip(answer, text, strict=False)]
        tokens = rollout.num_actions
        if len(text) == len(answer) and tokens != len(text):
            right.append(True)  # the end, in its place
        pay = np.array(right, dtype=np.float64) / (len(answer) + 1)
        if tokens not in (len(text), len(text) + 1):  # they are no characters: what is earned is paid at the end
            return Score(float(pay.sum()), {"exact": exact})
        return Score(0.0, {"exact": exact}, np.pad(pay, (0, tokens - len(pay))))


class _WordTask(_CharacterTask):
    """A random word in, another word of the same letters out."""

    verb: ClassVar[str]

    def __init__(
        self,
        length: int = 6,
        *,
        shortest: int | None = None,
        alphabet: str = string.ascii_lowercase,
        dense: bool = False,
        **kwargs: Any,
    ) -> None:
        self.length = _at_least_one(length, "length")
        self.shortest = length if shortest is None else _at_least_one(shortest, "shortest")
        if self.shortest > length:
            raise ValueError(f"shortest must be at most length ({length}), got {shortest}")
        prompt_length = length + len(f"{self.verb} : ")
        super().__init__(length, prompt_length, alphabet, dense, **kwargs)

    def answer(self, word: str) -> str:
        """What to write when given a word."""
        raise NotImplementedError

    def sample(self, rng: np.random.Generator) -> Prompt:
        """A random word, of every length alike."""
        length = rng.integers(self.shortest, self.length + 1)
        word = "".join(self.alphabet[i] for i in rng.integers(len(self.alphabet), size=length))
        return Prompt(f"{self.verb} {word}: ", {"answer": self.answer(word)})


@register_task
class Copy(_WordTask):
    """Write the word again.

    Args:
        length: of the word, or of the longest.
        shortest: the length of the shortest; by default all are of one length.
        alphabet: its characters.
        dense: pay each right character where it is written, instead of all or nothing at the end.

    Examples:
        >>> prompt = Copy(length=3).prompts("train")[0]
        >>> prompt.text == f"copy {prompt.metadata['answer']}: "
        True
    """

    verb = "copy"

    def answer(self, word: str) -> str:
        """The word."""
        return word


@register_task
class Reverse(_WordTask):
    """Write the word backwards.

    Args:
        length: of the word, or of the longest.
        shortest: the length of the shortest; by default all are of one length.
        alphabet: its characters.
        dense: pay each right character where it is written, instead of all or nothing at the end.

    Examples:
        >>> prompt = Reverse(length=3).prompts("train")[0]
        >>> prompt.text == f"reverse {prompt.metadata['answer'][::-1]}: "
        True
    """

    verb = "reverse"

    def answer(self, word: str) -> str:
        """The word, backwards."""
        return word[::-1]


@register_task
class Addition(_CharacterTask):
    """Add two numbers.

    Args:
        digits: of each number, at most.
        dense: pay each right digit where it is written, instead of all or nothing at the end.

    Examples:
        >>> prompt = Addition(digits=2).prompts("train")[0]
        >>> left, right = prompt.text.rstrip("=").split("+")
        >>> int(left) + int(right) == int(prompt.metadata["answer"])
        True
    """

    def __init__(self, digits: int = 2, *, dense: bool = False, **kwargs: Any) -> None:
        self.digits = _at_least_one(digits, "digits")
        super().__init__(digits + 1, 2 * digits + 2, string.digits, dense, **kwargs)

    def sample(self, rng: np.random.Generator) -> Prompt:
        """Two random numbers."""
        left, right = rng.integers(10**self.digits, size=2).tolist()
        return Prompt(f"{left}+{right}=", {"answer": str(left + right)})


def _at_least_one(value: int, name: str) -> int:
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value
