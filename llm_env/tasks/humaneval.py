"""Functions to be written from what their docstrings say, judged by tests: HumanEval, or any file in its form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from llm_env.tasks.base import Splits, Task
from llm_env.tasks.registry import register_task
from llm_env.tokens.prompts import Prompt, read_prompts
from rewards import CodeTests

_FIELDS = ("prompt", "entry_point", "test")
_REQUEST = "Complete this function. Answer with all of it, in one block of code.\n\n```python\n{}\n```"


@register_task
class HumanEval(Task):
    """The beginning of a Python function is to be completed; the score is 1 if it passes its tests, or else 0.

    Programs run in a sandbox, and are judged outside of it: see `rewards.CodeTests`.

    A model goes on with the code, and its text ends where something else begins. With `chat` it is asked in words, and
    its last block of code is what counts.

    Args:
        path: a JSONL file; each line has a "prompt", an "entry_point" and a "test", as HumanEval's have.
        test: another one of held-out problems; by default `num_test` of `path`, or a fifth of it at most.
        split: all problems of `path` are of this split ("train" or "test"), in their order.
        chat: ask in words, by the model's chat template.
        seconds: that a program may take.
        unsafe: run programs even where the kernel cannot fence them in: they can do whatever this program may.
        **kwargs: of `Task`.

    Examples:
        >>> import json, tempfile
        >>> row = {"prompt": "def plus_one(x):\\n", "entry_point": "plus_one", "test": "assert candidate(1) == 2"}
        >>> with tempfile.NamedTemporaryFile("w") as file:
        ...     _ = file.write(json.dumps(row))
        ...     file.flush()
        ...     task = HumanEval(file.name, split="test")
        >>> task.prompts("test")[0].text
        'def plus_one(x):\\n'
    """

    max_new_tokens = 384
    max_prompt_tokens = 768
    stop: Sequence[str] = ("\ndef ", "\nclass ", "\nif ", "\nprint(", "\n#", "\nassert ")

    def __init__(
        self,
        path: str,
        *,
        test: str | None = None,
        split: Literal["train", "test"] | None = None,
        chat: bool = False,
        seconds: float = 5.0,
        unsafe: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if split is not None and (split not in ("train", "test") or test is not None):
            raise ValueError(f"split is {split!r}; expected 'train' or 'test', and no other file of held-out problems")
        self.chat = chat
        self.reward = CodeTests(seconds, unsafe=unsafe)
        if chat:
            self.stop = ()
        rows = _rows(path, chat)
        if split is not None:
            self._problems: Splits = {"train": [], "test": []} | {split: rows}
        elif test is not None:
            self._problems = {"train": rows[: self.num_train], "test": _rows(test, chat)[: self.num_test]}
        else:
            order = np.random.default_rng(self.seed).permutation(len(rows)).tolist()
            few = min(self.num_test, len(rows) // 5)
            self._problems = {
                "train": [rows[index] for index in order[few:]][: self.num_train],
                "test": [rows[index] for index in order[:few]],
            }

    def splits(self) -> Splits:
        """The problems of the file."""
        return self._problems


def _rows(path: str, chat: bool) -> list[Prompt]:
    rows = read_prompts(path)
    for number, row in enumerate(rows, start=1):
        missing = [name for name in _FIELDS[1:] if not isinstance(row.metadata.get(name), str)]
        if missing or not isinstance(row.text, str):
            raise ValueError(
                f"{path}, problem {number} has no text under {missing or ['prompt']}; expected {', '.join(_FIELDS)}"
            )
    asked = _REQUEST if chat else "{}"
    return [Prompt(asked.replace("{}", str(row.text)), {**row.metadata, "code": row.text}) for row in rows]
