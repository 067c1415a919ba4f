"""Functions to be found from examples and written down as code, which a sandbox runs: for tiny models."""

from __future__ import annotations

from itertools import permutations, product

import numpy as np

from llm_env.tasks.base import Episodes, Splits, Task
from llm_env.tasks.registry import register_task
from llm_env.tokens.arrays import BoolArray, IntArray
from llm_env.tokens.prompts import Prompt
from llm_env.tokens.vocabulary import Vocabulary
from rewards import CodeTests, Rollout

_CHARACTERS = "0123456789x+-*()"
_TESTED = range(-3, 8)


@register_task
class Functions(Task):
    """Find a function of x from two examples, and write it as an expression of Python.

    A prompt gives what the function makes of two numbers: "1>5 3>11:"; the text is the expression: "3*x+2". It is run
    in the sandbox (see `rewards.CodeTests`): the score is 1 if it agrees with the function there and on other numbers,
    and 0 if not. The functions are a*x+b, with each two of the numbers from 0 to 5.

    The critic is told a and b. Prompts have an expression under "answer", for a warm start.

    Args:
        largest: of a and b.
        seconds: that a program may take.
        unsafe: run programs even where the kernel cannot fence them in.

    Examples:
        >>> task = Functions(largest=3)
        >>> prompt = task.prompts("train")[0]
        >>> prompt.text, prompt.metadata["answer"]
        ('2>8 1>5:', '3*x+2')
        >>> rollouts = [Rollout.of(text, metadata=prompt.metadata) for text in ("x+2+x*2", "x*x", "(")]
        >>> [score.value for score in task.reward(rollouts)]
        [1.0, 0.0, 0.0]
    """

    max_new_tokens = 12
    hint_names = ("slope", "offset")

    def __init__(self, largest: int = 5, *, seconds: float = 2.0, unsafe: bool = False, **kwargs: int) -> None:
        if not 1 <= largest <= 9:
            raise ValueError(f"largest must be from 1 to 9, got {largest}")
        super().__init__(**kwargs)
        self.largest = largest
        self.max_prompt_tokens = len("5>54 4>45:")
        self.reward = CodeTests(seconds, unsafe=unsafe)

    def setup(self, vocabulary: Vocabulary) -> None:
        """Find the tokens that an expression can consist of."""
        characters = {character.encode() for character in _CHARACTERS}
        allowed = [token for token, text in enumerate(vocabulary.token_bytes) if text in characters]
        self._allowed = np.zeros(vocabulary.size, dtype=np.bool_)
        self._allowed[[*allowed, *vocabulary.eos_tokens]] = True

    def action_mask(self, episodes: Episodes, rows: IntArray) -> BoolArray:
        """Digits, x, + - * and brackets, and the end-of-sequence tokens."""
        return np.broadcast_to(self._allowed, (len(rows), len(self._allowed)))

    def splits(self) -> Splits:
        """Every function with examples of every two numbers from 0 to 5, shuffled; those held out come first."""
        functions = product(range(1, self.largest + 1), range(self.largest + 1))
        prompts = [_prompt(a, b, x, y) for a, b in functions for x, y in permutations(range(6), 2)]
        order = np.random.default_rng(self.seed).permutation(len(prompts)).tolist()
        held_out = min(self.num_test, len(prompts) // 5)
        return {
            "train": [prompts[index] for index in order[held_out:]][: self.num_train],
            "test": [prompts[index] for index in order[:held_out]],
        }

    def hints(self, rollout: Rollout) -> tuple[float, float]:
        """See the class; as shares of the largest."""
        return rollout.metadata["a"] / self.largest, rollout.metadata["b"] / self.largest


def _prompt(a: int, b: int, x: int, y: int) -> Prompt:
    tests = "\n".join(f"assert candidate({number}) == {a * number + b}" for number in _TESTED)
    slope = "x" if a == 1 else f"{a}*x"
    facts = {
        "a": a, "b": b, "answer": f"{slope}+{b}" if b else slope,
        "code": "def f(x):\n    return ", "entry_point": "f", "test": tests,
    }  # fmt: skip
    return Prompt(f"{x}>{a * x + b} {y}>{a * y + b}:", facts)
