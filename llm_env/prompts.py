"""Prompts: what they are, in which order they are dealt, and where their token ids are kept."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llm_env.stopping import IntArray
from llm_env.text import Vocabulary

Messages = Sequence[Mapping[str, str]]

_BLOCK = 256  # prompts are tokenized this many at a time: a tokenizer is several times faster on a list


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt and what its task knows about it.

    Attributes:
        text: a string, or chat messages (`[{"role": "user", "content": "..."}]`).
        metadata: whatever the reward needs, such as `{"answer": "42"}`.

    Examples:
        >>> Prompt.of({"prompt": "1+1=", "answer": "2"})
        Prompt(text='1+1=', metadata={'answer': '2'})
    """

    text: str | Messages
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, row: Prompt | str | Mapping[str, Any], key: str = "prompt") -> Prompt:
        """A prompt from a string, or from a row of a data set: `row[key]` is the prompt, the rest is metadata."""
        if isinstance(row, Prompt):
            return row
        if isinstance(row, str):
            return cls(row)
        if not isinstance(row, Mapping):
            raise TypeError(f"a prompt is a string, a Prompt, or a mapping with the field {key!r}; got {row!r}")
        if key not in row:
            raise KeyError(f"a row of prompts has no field {key!r}; its fields are {sorted(row)}")
        return cls(row[key], {name: value for name, value in row.items() if name != key})

    @property
    def identity(self) -> str:
        """What makes two prompts the same prompt."""
        return self.text if isinstance(self.text, str) else json.dumps([dict(m) for m in self.text], sort_keys=True)


def read_prompts(source: str | Path | Iterable[Any], key: str = "prompt") -> list[Prompt]:
    """Prompts from a JSONL file (by its path) or from any iterable of rows, a Hugging Face data set included.

    Examples:
        >>> read_prompts(["a", {"prompt": "b", "answer": 1}])[1].metadata
        {'answer': 1}
    """
    if isinstance(source, str | Path):
        with open(source, encoding="utf-8") as file:
            rows: Iterable[Any] = [json.loads(line) for line in file if line.strip()]
    else:
        rows = source
    return [Prompt.of(row, key) for row in rows]


class TokenizedPrompts:
    """A list of prompts with their token ids, encoded when first asked for.

    Args:
        prompts: the prompts.
        vocabulary: encodes them.
        chat: put them through the chat template; None means where they are messages, or the vocabulary has a template.
    """

    def __init__(self, prompts: Sequence[Prompt], vocabulary: Vocabulary, chat: bool | None = False) -> None:
        self.prompts = prompts
        self._vocabulary = vocabulary
        self._chat = chat
        self._blocks: dict[int, list[IntArray]] = {}

    def __len__(self) -> int:
        return len(self.prompts)

    def tokens(self, index: int) -> IntArray:
        """The token ids of prompt `index`. An empty text becomes the beginning-of-sequence token, if there is one."""
        block, place = divmod(index, _BLOCK)
        if block not in self._blocks:
            self._blocks[block] = [self._encode(p) for p in self.prompts[block * _BLOCK : (block + 1) * _BLOCK]]
        return self._blocks[block][place]

    def _encode(self, prompt: Prompt) -> IntArray:
        vocabulary, text = self._vocabulary, prompt.text
        if isinstance(text, str) and not (self._chat or (self._chat is None and vocabulary.has_chat_template)):
            tokens = vocabulary.encode(text)
        else:
            messages = [{"role": "user", "content": text}] if isinstance(text, str) else [dict(m) for m in text]
            tokens = vocabulary.encode_chat(messages)
        if not len(tokens) and vocabulary.bos_token is not None:
            return np.array([vocabulary.bos_token], dtype=np.int64)
        return tokens


class PromptSampler:
    """Deals indices of prompts: shuffled, without replacement, an epoch after the other; each several times if asked.

    The order is a function of the seed alone, and `state_dict` is three numbers, so a resumed run sees what it would
    have seen.

    Args:
        num_prompts: how many prompts there are.
        seed: of the order.
        completions_per_prompt: how often each prompt is dealt in a row (group-based algorithms compare these).
        shuffle: False deals them in their own order.

    Examples:
        >>> sampler = PromptSampler(3, seed=0, completions_per_prompt=2)
        >>> indices, groups = sampler.deal(6)
        >>> sorted(indices.tolist()), groups.tolist()
        ([0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 2, 2])
    """

    def __init__(
        self, num_prompts: int, seed: int = 0, *, completions_per_prompt: int = 1, shuffle: bool = True
    ) -> None:
        if num_prompts < 1:
            raise ValueError("there are no prompts to deal: the task's split is empty")
        if completions_per_prompt < 1:
            raise ValueError(f"completions_per_prompt must be at least 1, got {completions_per_prompt}")
        self.num_prompts = num_prompts
        self.completions_per_prompt = completions_per_prompt
        self.shuffle = shuffle
        self.reseed(seed)

    def reseed(self, seed: int) -> None:
        """Start over, with another order."""
        self.seed = seed
        self.dealt = 0
        self._epoch = -1

    def deal(self, count: int) -> tuple[IntArray, IntArray]:
        """The next `count` deals: `[count]` indices of prompts and `[count]` numbers of the group each belongs to."""
        groups = np.arange(self.dealt, self.dealt + count) // self.completions_per_prompt
        self.dealt += count
        epochs, places = np.divmod(groups, self.num_prompts)
        return np.array([self._order(e)[p] for e, p in zip(epochs.tolist(), places.tolist(), strict=True)], int), groups

    def state_dict(self) -> dict[str, int]:
        """What `load_state_dict` needs to go on from here."""
        return {"seed": self.seed, "dealt": self.dealt, "num_prompts": self.num_prompts}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on where another sampler over the same prompts was."""
        if state["num_prompts"] != self.num_prompts:
            raise ValueError(
                f"the saved sampler dealt {state['num_prompts']} prompts, this one has {self.num_prompts}: "
                "they are not the same prompts"
            )
        self.reseed(state["seed"])
        self.dealt = state["dealt"]

    def _order(self, epoch: int) -> IntArray:
        if epoch != self._epoch:
            self._epoch = epoch
            order = np.arange(self.num_prompts)
            self._current = np.random.default_rng([self.seed, epoch]).permutation(order) if self.shuffle else order
        return self._current
