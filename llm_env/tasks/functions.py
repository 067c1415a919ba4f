"""Functions to be found from an example and written down as code, which a sandbox runs: for tiny models."""

from __future__ import annotations

import string
from itertools import chain, product
from typing import Any

import numpy as np

from llm_env.tasks.answers import RIGHT_SO_FAR, right_so_far
from llm_env.tasks.base import Episodes, Task
from llm_env.tasks.registry import register_task
from llm_env.tokens.arrays import BoolArray, IntArray
from llm_env.tokens.prompts import Prompt
from llm_env.tokens.vocabulary import Vocabulary
from rewards import CodeTests, Rollout

_STEPS = ("[::-1]", "[1:]", "[:-1]", "[0]", "[-1]", ".upper()")
_LAST = (*_STEPS, "*2")  # what binds less than the others do can only come last
_TESTED = ("robin", "Owl", "stork")


@register_task
class Functions(Task):
    """Find from one example what a function does to a word, and write it as an expression of Python.

    A prompt says what becomes of a word: "crow>worc:"; the text is an expression of x: "x[::-1]". It is run in the
    sandbox (see `rewards.CodeTests`): the score is 1 if it does the same to that word and to others, and 0 if not. The
    functions take some of a word's ends, turn it round, write it in capitals or twice; words are random letters.

    The critic is told whether all is right so far, as in `Reverse`. Prompts have an expression under "answer", for a
    warm start.

    Args:
        steps: how many things are done to a word at most, one after the other: from 1 to 3.
        length: of the words.
        seconds: that a program may take.
        unsafe: run programs even where the kernel cannot fence them in.

    Examples:
        >>> task = Functions()
        >>> prompt = task.prompts("train")[0]
        >>> prompt.text, prompt.metadata["answer"]
        ('kvyj>KVYJ:', 'x.upper()')
        >>> rollouts = [Rollout.of(text, metadata=prompt.metadata) for text in (prompt.metadata["answer"], "x", "(")]
        >>> [score.value for score in task.reward(rollouts)]
        [1.0, 0.0, 0.0]
    """

    hint_names = RIGHT_SO_FAR

    def __init__(
        self, steps: int = 1, *, length: int = 4, seconds: float = 2.0, unsafe: bool = False, **kwargs: Any
    ) -> None:
        for name, value, low, high in (("steps", steps, 1, 3), ("length", length, 3, 20)):
            if not low <= value <= high:
                raise ValueError(f"{name} must be from {low} to {high}, got {value}")
        super().__init__(**kwargs)
        self.steps, self.length = steps, length
        self.max_new_tokens = 2 + 8 * steps  # x, the longest step as often, and the end
        self.max_prompt_tokens = 3 * length + len(">:")
        self.reward = CodeTests(seconds, unsafe=unsafe)
        self._functions = _functions(steps)

    def setup(self, vocabulary: Vocabulary) -> None:
        """Find the tokens that an expression can consist of."""
        self._allowed = np.zeros(vocabulary.size, dtype=np.bool_)
        self._allowed[[*vocabulary.tokens_that_say("x" + "".join(_LAST)), *vocabulary.eos_tokens]] = True

    def action_mask(self, episodes: Episodes, rows: IntArray) -> BoolArray:
        """The characters of expressions, and the end-of-sequence tokens."""
        return np.broadcast_to(self._allowed, (len(rows), len(self._allowed)))

    def sample(self, rng: np.random.Generator) -> Prompt:
        """A random function, and a word of different letters."""
        answer, *results = self._functions[int(rng.integers(len(self._functions)))]
        word = "".join(rng.choice(list(string.ascii_lowercase), self.length, replace=False))
        asserts = [f"assert candidate({given!r}) == {result!r}" for given, result in zip(_TESTED, results, strict=True)]
        result = _result(answer, word)
        facts = {
            "answer": answer, "code": "def f(x):\n    return ", "entry_point": "f",
            "test": "\n".join([f"assert candidate({word!r}) == {result!r}", *asserts]),
        }  # fmt: skip
        return Prompt(f"{word}>{result}:", facts)

    def hints(self, rollout: Rollout) -> tuple[float, float]:
        """See the class."""
        return right_so_far(rollout.text, rollout.metadata["answer"])


def _functions(steps: int) -> list[tuple[str, ...]]:
    """The shortest expression of each function of so many steps, and what it makes of the words that are tested."""
    found: dict[tuple[str, ...], str] = {}
    for chosen in chain.from_iterable(product(*[_STEPS] * before, _LAST) for before in range(steps)):
        expression = "x" + "".join(chosen)
        try:
            results = tuple(_result(expression, word) for word in _TESTED)
        except IndexError:  # the first letter of nothing
            continue
        if all(results):
            found.setdefault(results, expression)
    return [(expression, *results) for results, expression in found.items()]


def _result(expression: str, word: str) -> str:
    return str(eval(expression, {"x": word}))  # of our own making, see `_functions`
