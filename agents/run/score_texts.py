"""Scores for texts that were written elsewhere, by a task's own reward."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from agents.config.files import ConfigError
from llm_env.tasks.base import Task
from llm_env.tokens.prompts import Prompt
from llm_env.tokens.vocabulary import Vocabulary
from rewards import End, Guard, Rollout


@dataclass(frozen=True)
class WrittenText:
    """A text, and the number of the prompt that it answers."""

    prompt_index: int
    text: str


def read_texts(path: Path, count: int) -> list[WrittenText]:
    """The texts of a JSONL file, whose lines have `prompt_index` (less than `count`) and `text`."""
    if not path.is_file():
        raise ConfigError(f"--texts is {path}, but there is no such file: expected JSONL with prompt_index and text")
    texts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path}, line {number} is no JSON ({error}): {line[:80]!r}") from error
        index, text = (row.get(name) if isinstance(row, dict) else None for name in ("prompt_index", "text"))
        if not isinstance(text, str) or isinstance(index, bool) or not isinstance(index, int):
            raise ConfigError(f'{path}, line {number}: expected {{"prompt_index": 0, "text": "..."}}, got {line[:80]}')
        if not 0 <= index < count:
            raise ConfigError(f"{path}, line {number}: prompt_index is {index}, but there are {count} prompts, from 0")
        texts.append(WrittenText(index, text))
    return texts


class TextScorer:
    """Scores texts as if the task's own episodes had ended in them.

    Args:
        task: whose prompts they answer.
        vocabulary: says what tokens a text has, for rewards that look at those.
        timeout: seconds that one text may take.

    Examples:
        >>> from llm_env.models import load_tokenizer
        >>> from llm_env.tasks import Reverse
        >>> scorer = TextScorer(Reverse(length=3), Vocabulary(load_tokenizer("tiny")))
        >>> prompts = scorer.task.prompts("test")
        >>> texts = [WrittenText(0, prompts[0].metadata["answer"]), WrittenText(1, "no")]
        >>> [row["score"] for row in scorer.scores(prompts, texts)]
        [1.0, 0.0]
        >>> scorer.close()
    """

    def __init__(self, task: Task, vocabulary: Vocabulary, timeout: float | None = None) -> None:
        for method in ("reply", "token_reward"):
            if task.overrides(method):
                raise ConfigError(
                    f"the task {task.name} has `{method}`, so that what an episode is worth depends on more than its "
                    "prompt and one text: its texts cannot be scored by themselves"
                )
        self.task = task.bind(vocabulary)
        self.vocabulary = vocabulary
        self.reward = Guard(self.task.as_reward(), timeout=timeout)

    def scores(self, prompts: Sequence[Prompt], texts: Sequence[WrittenText]) -> Iterator[dict[str, Any]]:
        """For each text its `prompt_index`, `score` and `parts`, and what `failed`: None, or an error in a line."""
        for written in texts:
            failures = self.reward.num_failures
            [score] = self.reward([self._rollout(prompts[written.prompt_index], written.text)])
            failed = self.reward.failures[-1].error if self.reward.num_failures > failures else None
            yield {
                "prompt_index": written.prompt_index,
                "score": score.total,
                "parts": {name: value for name, value in score.parts.items() if name != "reward_failed"},
                "failed": failed,
            }

    def close(self) -> None:
        """End the processes that rewards run in."""
        self.reward.close()

    def _rollout(self, prompt: Prompt, text: str) -> Rollout:
        ends = self.vocabulary.eos_tokens[:1]
        tokens = [*self.vocabulary.encode(text, add_special_tokens=False), *ends]
        return Rollout.of(text, prompt.written, prompt.metadata, End.EOS, np.array(tokens, dtype=np.int64))
