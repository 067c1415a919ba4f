"""A task over prompts you already have: a JSONL file, a Hugging Face data set, any iterable."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llm_env.tasks.base import Splits, Task
from llm_env.tasks.registry import register_task
from llm_env.tokens.prompts import read_prompts
from rewards import Reward, Rollout

Source = str | Path | Iterable[Any]


@register_task
class Dataset(Task):
    """Prompts from a JSONL file (or any iterable), scored by a reward of your choice.

    Args:
        train: a path to a JSONL file, or an iterable of rows (mappings, strings or `Prompt`s).
        test: held-out prompts likewise; by default a tenth of `train`, drawn with `seed`, is held out.
        prompt: the field of a row that is the prompt, a string or chat messages. The other fields are what the reward
            finds in `rollout.metadata`.
        reward: scores a finished rollout; None leaves it to whoever makes the task, as `--task.reward` does.
        stop: as in `Task`; a string is one stop sequence.
        chat, max_new_tokens, max_prompt_tokens: see `Task`.
        seed: of the prompts that are held out.

    Examples:
        >>> from rewards import NumericMatch
        >>> rows = [{"question": f"{i}+{i}=", "answer": 2 * i} for i in range(20)]
        >>> task = Dataset(rows, prompt="question", reward=NumericMatch())
        >>> len(task.prompts("train")), len(task.prompts("test"))
        (18, 2)
    """

    def __init__(
        self,
        train: Source,
        *,
        reward: Reward | Callable[[Rollout], float] | None = None,
        test: Source | None = None,
        prompt: str = "prompt",
        stop: str | Sequence[str | Sequence[int]] = (),
        chat: bool | None = False,
        max_new_tokens: int = 64,
        max_prompt_tokens: int = 192,
        seed: int = 0,
    ) -> None:
        super().__init__(seed=seed)
        self.reward = reward
        self.stop = (stop,) if isinstance(stop, str) else stop
        self.chat = chat
        self.max_new_tokens = max_new_tokens
        self.max_prompt_tokens = max_prompt_tokens
        self._train = read_prompts(train, prompt)
        self._test = None if test is None else read_prompts(test, prompt)

    def splits(self) -> Splits:
        """As given, or a tenth of the distinct prompts held out."""
        if self._test is not None:
            return {"train": self._train, "test": self._test}
        distinct = {prompt.identity: prompt for prompt in self._train}
        order = np.random.default_rng(self.seed).permutation(len(distinct)).tolist()
        prompts = list(distinct.values())
        return {"train": self._train, "test": [prompts[i] for i in order[: len(order) // 10]]}
