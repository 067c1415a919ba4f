"""GSM8K: word problems, solved in steps that end in a number."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from llm_env.tasks.base import Splits, Task
from llm_env.tasks.registry import register_task
from llm_env.tokens.prompts import Prompt, read_prompts
from rewards import Math, final_answer

HUB = "openai/gsm8k"

_REQUEST = "Solve the problem step by step. End with a line that has #### and the number.\n\n"
_CALCULATION = re.compile(r"<<[^<>]*>>")  # the data set's notes for a calculator, which say everything twice


@register_task
class GSM8K(Task):
    """Word problems of the kind that GSM8K has: a question, a solution in steps, and "#### 72" as its last line.

    The score is 1 if the answer is right, else 0; `rewards.Math` says what counts as the answer. Each prompt keeps the
    number under "answer" and the steps under "solution", for a warm start with `--sft.answer solution`.

    Args:
        path: a JSONL file whose lines have "question" and "answer"; by default the data set is fetched from the Hugging
            Face hub, which needs the package datasets.
        test: the same of held-out problems. By default they are the hub's, or `num_test` of those in `path`, of which
            they are a fifth at most.
        split: "train" or "test", if all problems in `path` belong to it, in the order of the file; then there is no
            other.
        shots: how many solved problems each prompt shows first; they are not learned from.
        num_train: at most so many problems are for training.
        num_test: at most so many are held out.
        seed: decides which problems are held out, and which are shown solved.

    Examples:
        >>> import json, tempfile
        >>> rows = [{"question": f"What is {n} and {n}?", "answer": f"It is <<{n}+{n}={2*n}>>{2*n}.\\n#### {2*n}"}
        ...         for n in range(10)]
        >>> with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        ...     _ = file.write("\\n".join(map(json.dumps, rows)))
        ...     file.flush()
        ...     task = GSM8K(file.name, num_test=2, shots=1)
        >>> len(task.prompts("train")), len(task.prompts("test"))
        (7, 2)
        >>> prompt = task.prompts("train")[0]
        >>> print(prompt.text)
        Solve the problem step by step. End with a line that has #### and the number.
        <BLANKLINE>
        Question: What is 2 and 2?
        Answer: It is 4.
        #### 4
        <BLANKLINE>
        Question: What is 7 and 7?
        Answer:
        >>> prompt.metadata["answer"], prompt.metadata["solution"]
        ('14', ' It is 14.\\n#### 14')
    """

    chat = None
    max_new_tokens = 256
    stop = ("\n\n", "\nQuestion:")
    num_train = 10_000

    def __init__(
        self,
        path: str | None = None,
        *,
        test: str | None = None,
        split: Literal["train", "test"] | None = None,
        shots: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if split is not None and (split not in ("train", "test") or path is None or test is not None or shots):
            raise ValueError(
                f"split is {split!r}; expected 'train' or 'test', and with it a path, but neither test nor shots: all "
                "problems of the file belong to it"
            )
        if shots < 0:
            raise ValueError(f"shots must be 0 or more, got {shots}")
        if path is None and test is not None:
            raise ValueError(
                f"test is {test!r}, but path is None, so that the problems are those of the hub: give both"
            )
        self.shots = shots
        self.max_prompt_tokens = 384 * (shots + 1)
        self.reward = Math()
        if split is not None:
            self._solved: Sequence[Prompt] = []
            rows = _rows(str(path))
            self._problems: Splits = {"train": [], "test": []} | {split: rows}
            return
        train, held_out = _from_hub() if path is None else (_rows(path), None if test is None else _rows(test))
        order = np.random.default_rng(self.seed).permutation(len(train)).tolist()
        shuffled = [train[index] for index in order]
        if held_out is None:
            few = min(self.num_test, len(train) // 5)
            held_out, shuffled = shuffled[:few], shuffled[few:]
        if len(shuffled) <= shots:
            raise ValueError(
                f"{len(train)} problems are too few: {len(train) - len(shuffled)} are held out (num_test) and {shots} "
                "are shown solved (shots), so that none is left for training"
            )
        self._solved = shuffled[:shots]
        self._problems = {"train": shuffled[shots : shots + self.num_train], "test": held_out[: self.num_test]}

    def splits(self) -> Splits:
        """The problems, each after the solved ones."""
        shown = _REQUEST + "".join(f"{_asked(row)}{_solution(row)}\n\n" for row in self._solved)
        return {
            split: [Prompt(shown + _asked(row), {"answer": _number(row), "solution": _solution(row)}) for row in rows]
            for split, rows in self._problems.items()
        }


def _asked(row: Prompt) -> str:
    return f"Question: {row.text}\nAnswer:"


def _solution(row: Prompt) -> str:
    return " " + _CALCULATION.sub("", row.metadata["answer"]).strip()


def _number(row: Prompt) -> str:
    number = final_answer(row.metadata["answer"])
    assert number is not None
    return number


def _rows(path: str) -> list[Prompt]:
    rows = read_prompts(path, "question")
    for number, row in enumerate(rows, start=1):
        answer = row.metadata.get("answer")
        if not isinstance(answer, str) or final_answer(answer) is None:
            raise ValueError(
                f"{path}, problem {number}: its answer is {answer!r}; expected a text that ends with #### and a number"
            )
    return rows


def _from_hub() -> tuple[Sequence[Prompt], Sequence[Prompt]]:
    try:
        from datasets import load_dataset  # type: ignore[import-not-found]
    except ImportError as error:
        raise ImportError(
            "GSM8K without a path fetches the data set from the Hugging Face hub, which needs the package datasets: "
            "pip install datasets, or give the path of a JSONL file whose lines have a question and an answer"
        ) from error
    both = load_dataset(HUB, "main")
    train, test = ([Prompt.of(row, "question") for row in both[split]] for split in ("train", "test"))
    return train, test
