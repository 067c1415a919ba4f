"""The tasks of the reasoning-gym package: a hundred kinds of puzzles, generated and scored by code."""

from __future__ import annotations

from typing import Any

from llm_env.tasks.answers import tagged_answer
from llm_env.tasks.base import Splits, Task
from llm_env.tasks.registry import register_task
from llm_env.tokens.prompts import Prompt
from rewards import Rollout
from rewards.registry import did_you_mean


@register_task
class ReasoningGym(Task):
    """Any data set of reasoning-gym, by name. Needs `pip install 'llm-env[tasks]'`.

    The answer is what stands in the last `<answer>...</answer>`, or else the whole text; reasoning-gym scores it. The
    right one is in the metadata as "answer", for a warm start; a few data sets, such as "graph_color", know none.

    Args:
        dataset: its name, such as "chain_sum" or "leg_counting".
        config: the data set's own settings, such as `{"max_terms": 3}`.
        tags: ask for the answer between tags; without, a question ends as the data set wrote it.

    Examples:
        >>> task = ReasoningGym("chain_sum", num_train=3, num_test=1, tags=False, config={"max_terms": 2})
        >>> len(task.prompts("train"))
        3
        >>> task.prompts("test")[0].metadata["answer"]
        '-3579'
    """

    chat = None
    max_prompt_tokens = 768
    max_new_tokens = 256
    num_train = 1024

    def __init__(
        self, dataset: str = "chain_sum", *, config: dict[str, Any] | None = None, tags: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        try:
            from reasoning_gym.factory import DATASETS, create_dataset
        except ImportError as error:
            raise ImportError("the task ReasoningGym needs reasoning-gym: pip install 'llm-env[tasks]'") from error
        if dataset not in DATASETS:
            hint = did_you_mean(dataset, DATASETS, count=5) or f"expected one of {', '.join(sorted(DATASETS))}"
            raise ValueError(f"reasoning-gym has no data set {dataset!r}; {hint.strip()}")
        self.dataset, self.tags = dataset, tags
        self._data = create_dataset(dataset, size=self.num_train + self.num_test, seed=self.seed, **(config or {}))

    def splits(self) -> Splits:
        """The data set's questions; those held out come first."""
        rows = [self._prompt(entry) for entry in self._data]
        return {"test": rows[: self.num_test], "train": rows[self.num_test :]}

    def score(self, rollout: Rollout) -> float:
        """What reasoning-gym gives for the answer, from 0 to 1."""
        tagged = tagged_answer(rollout.text)
        answer = rollout.text if tagged is None else tagged
        return float(self._data.score_answer(answer.strip(), rollout.metadata["entry"]))

    def _prompt(self, entry: dict[str, Any]) -> Prompt:
        question, answer = entry["question"], entry["answer"]
        if self.tags:
            question, answer = question + _REQUEST, answer and f"<answer>{answer}</answer>"
        return Prompt(question, {"entry": entry} | ({"answer": answer} if answer else {}))


_REQUEST = "\nGive the final answer between <answer> and </answer>."
