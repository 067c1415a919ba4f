"""Countdown: reach a number with the numbers given. Easy to check, hard to write: a small test of reasoning."""

from __future__ import annotations

import ast
import operator
import re
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np

from llm_env.tasks.answers import tagged_answer
from llm_env.tasks.base import Task
from llm_env.tasks.registry import register_task
from llm_env.tokens.prompts import Prompt
from rewards import Rollout, Score

_OPERATIONS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_CHARACTERS = re.compile(r"[0-9+\-*/()\s]*")
_LONGEST = 200  # characters of an expression; far more than any honest one, and it bounds the parser's work


def evaluate(expression: str) -> tuple[Fraction, list[int]]:
    """The exact value of an expression of whole numbers, + - * / and brackets, and the numbers it uses.

    Nothing is executed: the text is parsed, and anything but those is an error.

    Raises:
        ValueError: if the text is not such an expression, or divides by zero.

    Examples:
        >>> evaluate("(3 + 5) / 4")
        (Fraction(2, 1), [3, 5, 4])
        >>> evaluate("__import__('os')")
        Traceback (most recent call last):
        ValueError: not arithmetic: "__import__('os')"
    """
    numbers: list[int] = []

    def value(node: ast.expr) -> Fraction:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            numbers.append(node.value)
            return Fraction(node.value)
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
            return _OPERATIONS[type(node.op)](value(node.left), value(node.right))
        raise ValueError

    try:
        # Python's parser has warnings to give about other texts, such as "3x".
        if len(expression) > _LONGEST or not _CHARACTERS.fullmatch(expression):
            raise ValueError
        return value(ast.parse(expression.strip(), mode="eval").body), numbers
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"not arithmetic: {expression!r}") from error
    except ZeroDivisionError as error:
        raise ValueError(f"division by zero: {expression!r}") from error


@register_task
class Countdown(Task):
    """Use each of the numbers once, with + - * / and brackets, to reach the target.

    The answer is what stands in the last `<answer>...</answer>`, or else the last line that is not empty; "= 12" at
    its end is allowed. The score is 1 if the answer reaches the target with exactly those numbers. An answer that is at
    least arithmetic has `format_score`.

    Prompts have the expression that the target was made by under "answer", for a warm start.

    Args:
        count: how many numbers.
        largest: the numbers are from 1 to this.
        brief: "3 5 7>22:" in place of a request in words, for tiny models; the text is the expression.
        format_score: the score of arithmetic that misses the target or uses other numbers.

    Examples:
        >>> from rewards import Rollout
        >>> task = Countdown()
        >>> facts = {"numbers": [2, 3, 4], "target": 10}
        >>> [task.score(Rollout.of(text, metadata=facts)).value for text in ("2*3+4", "<answer>2*(3+2)</answer>", "10")]
        [1.0, 0.1, 0.1]
    """

    chat = None
    max_new_tokens = 256
    num_train = 1024

    def __init__(
        self, count: int = 3, *, largest: int = 20, format_score: float = 0.1, brief: bool = False, **kwargs: Any
    ) -> None:
        if count < 2 or largest < 1:
            raise ValueError(
                f"Countdown needs at least 2 numbers, each at least 1, got count={count}, largest={largest}"
            )
        super().__init__(**kwargs)
        self.count = count
        self.largest = largest
        self.format_score = format_score
        self.brief = brief
        self.max_prompt_tokens = 8 + 8 * count if brief else 256 + 8 * count
        if brief:
            self.max_new_tokens = 8 * count

    def sample(self, rng: np.random.Generator) -> Prompt:
        """Random numbers, and a target that some random expression of them reaches."""
        while True:
            numbers = rng.integers(1, self.largest + 1, size=self.count).tolist()
            terms = [(Fraction(number), str(number)) for number in numbers]
            while len(terms) > 1:
                right, left = (terms.pop(int(rng.integers(len(terms)))) for _ in range(2))
                choices = [(left[0] + right[0], "+"), (left[0] - right[0], "-"), (left[0] * right[0], "*")]
                if right[0]:
                    choices.append((left[0] / right[0], "/"))
                value, sign = choices[int(rng.integers(len(choices)))]
                terms.append((value, f"({left[1]}{sign}{right[1]})" if terms else f"{left[1]}{sign}{right[1]}"))
            target, answer = terms[0]
            if target.denominator == 1 and 0 < target < 10 * self.largest:
                facts = {"numbers": numbers, "target": int(target), "answer": answer}
                if self.brief:
                    return Prompt(f"{' '.join(map(str, numbers))}>{target}:", facts)
                listed = ", ".join(map(str, numbers))
                text = (
                    f"Use each of the numbers {listed} exactly once, with + - * / and brackets, to make {target}. "
                    "Write the expression between <answer> and </answer>."
                )
                return Prompt(text, facts)

    def score(self, rollout: Rollout) -> Score:
        """1 for a solution; see the class."""
        try:
            value, used = evaluate(_answer(rollout.text))
        except ValueError:
            return Score(0.0, {"correct": 0.0, "arithmetic": 0.0})
        facts = rollout.metadata
        correct = value == facts["target"] and Counter(used) == Counter(facts["numbers"])
        return Score(1.0 if correct else self.format_score, {"correct": float(correct), "arithmetic": 1.0})


def _answer(text: str) -> str:
    tagged = tagged_answer(text)
    lines = [line for line in (text if tagged is None else tagged).splitlines() if line.strip()]
    return lines[-1].split("=")[0] if lines else ""
