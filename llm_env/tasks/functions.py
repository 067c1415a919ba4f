"""Functions to be found from examples and written down as code, which a sandbox runs: for tiny models."""

from __future__ import annotations

from itertools import product

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
    and 0 if not. The functions are a*x+b; some pairs of a and b are held out, so that it takes more than a good memory.

    The critic is told a and b. Prompts have an expression under "answer", for a warm start.

    Args:
        largest: of a and b.
        seconds: that a program may take.
        unsafe: run programs even where the kernel cannot fence them in.

    Examples:
        >>> task = Functions(largest=3)
        >>> prompt = task.prompts("train")[0]
        >>> prompt.text, prompt.metadata["answer"]
        ('5>5 3>3:', 'x')
        >>> rollouts = [Rollout.of(text, metadata=prompt.metadata) for text in ("x*1+0", "x*x", "(")]
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
        """Random examples of the functions; a fifth of the functions is held out."""
        rng = np.random.default_rng(self.seed)
        pairs = list(product(range(1, self.largest + 1), range(self.largest + 1)))
        order = [pairs[index] for index in rng.permutation(len(pairs))]
        held_out = len(order) // 5
        of = {"test": (order[:held_out], self.num_test), "train": (order[held_out:], self.num_train)}
        return {split: self._sample(functions, number, rng) for split, (functions, number) in of.items()}

    def hints(self, rollout: Rollout) -> tuple[float, float]:
        """See the class; as shares of the largest."""
        return rollout.metadata["a"] / self.largest, rollout.metadata["b"] / self.largest

    def _sample(self, functions: list[tuple[int, int]], number: int, rng: np.random.Generator) -> list[Prompt]:
        """Different prompts, as many as there are or `number`."""
        found: dict[str, Prompt] = {}
        shown = [(x, y) for x in range(6) for y in range(6) if x != y]
        every = [(*function, *xs) for function in functions for xs in shown]
        for index in rng.permutation(len(every)):
            a, b, x, y = every[index]
            text = f"{x}>{a * x + b} {y}>{a * y + b}:"
            found.setdefault(text, Prompt(text, _metadata(a, b)))
            if len(found) == number:
                break
        return list(found.values())


def _metadata(a: int, b: int) -> dict[str, object]:
    tests = "\n".join(f"assert candidate({x}) == {a * x + b}" for x in _TESTED)
    slope = "x" if a == 1 else f"{a}*x"
    return {
        "a": a, "b": b, "answer": f"{slope}+{b}" if b else slope,
        "code": "def f(x):\n    return ", "entry_point": "f", "test": tests,
    }  # fmt: skip
