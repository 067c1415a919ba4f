"""Prompts: what they are, in which order they are dealt, and where their token ids are kept."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llm_env.tokens.arrays import IntArray
from llm_env.tokens.vocabulary import Vocabulary

Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt and what its task knows about it.

    Attributes:
        text: a string, or chat messages (`[{"role": "user", "content": "..."}]`).
        metadata: whatever the reward needs, such as `{"answer": "42"}`.
        key: what sets it apart from others with the same text, such as the seed of a game that begins like all others.
        tools: what a chat template is told of tools, as JSON schemas.

    Examples:
        >>> Prompt.of({"prompt": "1+1=", "answer": "2"})
        Prompt(text='1+1=', metadata={'answer': '2'})
    """

    text: str | Messages
    metadata: Mapping[str, Any] = field(default_factory=dict)
    key: str = field(default="", repr=False)
    tools: Sequence[Mapping[str, Any]] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        text = self.text
        if not isinstance(text, str) and not (
            isinstance(text, Sequence) and len(text) and all(isinstance(message, Mapping) for message in text)
        ):
            raise TypeError(f"a prompt must be a string or a list of chat messages (mappings), got {text!r}")

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
    def written(self) -> str:
        """Its text; chat messages as JSON."""
        return self.text if isinstance(self.text, str) else json.dumps([dict(m) for m in self.text], sort_keys=True)

    @property
    def identity(self) -> str:
        """What makes two prompts the same prompt."""
        return f"{self.written}\0{self.key}" if self.key else self.written


def read_prompts(source: str | Path | Iterable[Any], key: str = "prompt") -> list[Prompt]:
    """Prompts from a JSONL file (by its path) or from any iterable of rows, a Hugging Face data set included.

    Examples:
        >>> read_prompts(["a", {"prompt": "b", "answer": 1}])[1].metadata
        {'answer': 1}
    """
    if isinstance(source, Mapping):
        raise TypeError(f"prompts must be a list of rows, or the path of a JSONL file, got one mapping: {source!r}")
    if not isinstance(source, str | Path):
        return [Prompt.of(row, key) for row in source]
    if not Path(source).is_file():
        raise FileNotFoundError(f"there is no file {source}: expected the path of a JSONL file, a prompt on each line")
    prompts = []
    with open(source, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                prompts.append(Prompt.of(json.loads(line), key))
            except (ValueError, TypeError, KeyError) as error:
                # str() of a KeyError is the repr of its message.
                raise ValueError(f"{source}, line {number}: {error.args[0] if error.args else error}") from error
    return prompts


@dataclass(frozen=True, slots=True, eq=False)
class TokenizedPrompts:
    """A list of prompts with their token ids.

    Attributes:
        prompts: the prompts.
        tokens: the token ids of each.
        dropped: how many were left out because they were too long.
    """

    prompts: Sequence[Prompt]
    tokens: Sequence[IntArray]
    dropped: int = 0

    @classmethod
    def encode(
        cls,
        prompts: Sequence[Prompt],
        vocabulary: Vocabulary,
        chat: bool | None = False,
        *,
        longest: int | None = None,
        drop_long: bool = False,
    ) -> TokenizedPrompts:
        """Encode all prompts and check their lengths now, so that none fails in the middle of training.

        Args:
            prompts: the prompts.
            vocabulary: encodes them.
            chat: put them through the chat template; None means where they are messages, or the vocabulary has one.
            longest: how many tokens a prompt may have.
            drop_long: leave longer ones out, instead of raising an error.
        """
        tokens = _encode_all(prompts, vocabulary, chat)
        long = [] if longest is None else [index for index, ids in enumerate(tokens) if len(ids) > longest]
        if not long:
            return cls(prompts, tokens)
        if drop_long:
            left_out = set(long)
            kept = [index for index in range(len(prompts)) if index not in left_out]
            if not kept:
                raise ValueError(f"all {len(prompts)} prompts have more than {longest} tokens: none is left")
            return cls([prompts[index] for index in kept], [tokens[index] for index in kept], len(long))
        worst = max(long, key=lambda index: len(tokens[index]))
        raise ValueError(
            f"{len(long)} of {len(prompts)} prompts leave no room to act: at most {longest} tokens fit, and prompt "
            f"{worst} has {len(tokens[worst])} ({str(prompts[worst].text)[:200]!r}). Use a context of at least "
            f"{len(tokens[worst]) + 1}, or drop_long_prompts=True"
        )

    def __len__(self) -> int:
        return len(self.prompts)


def _encode_all(prompts: Sequence[Prompt], vocabulary: Vocabulary, chat: bool | None) -> list[IntArray]:
    as_chat = chat or (chat is None and vocabulary.has_chat_template)
    texts = [None if as_chat or not isinstance(prompt.text, str) else prompt.text for prompt in prompts]
    plain = iter(vocabulary.encode_batch([text for text in texts if text is not None]))
    encoded = []
    for prompt, text in zip(prompts, texts, strict=True):
        if text is not None:
            tokens = next(plain)
        elif isinstance(prompt.text, str):
            tokens = vocabulary.encode_chat([{"role": "user", "content": prompt.text}], prompt.tools)
        else:
            tokens = vocabulary.encode_chat([dict(message) for message in prompt.text], prompt.tools)
        if not len(tokens) and vocabulary.bos_token is not None:
            # A language model needs a token to go on from.
            tokens = np.array([vocabulary.bos_token], dtype=np.int64)
        encoded.append(tokens)
    return encoded


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

    def begin_group(self) -> None:
        """Leave the rest of a group that has been dealt in part, so that the next deal begins a group."""
        self.dealt += -self.dealt % self.completions_per_prompt

    def deal(self, count: int) -> tuple[IntArray, IntArray]:
        """The next `count` deals: `[count]` indices of prompts and `[count]` numbers of the group each belongs to."""
        groups = np.arange(self.dealt, self.dealt + count)
        if self.completions_per_prompt > 1:
            groups //= self.completions_per_prompt
        self.dealt += count
        if not count:
            return groups, groups
        epochs = range(int(groups[0]) // self.num_prompts, int(groups[-1]) // self.num_prompts + 1)
        if len(epochs) == 1:  # as nearly always
            return self._order(epochs[0])[groups - epochs[0] * self.num_prompts], groups
        of_epoch, places = np.divmod(groups, self.num_prompts)
        return np.concatenate([self._order(epoch)[places[of_epoch == epoch]] for epoch in epochs]), groups

    def state_dict(self) -> dict[str, int]:
        """What `load_state_dict` needs to go on from here."""
        return {"seed": self.seed, "dealt": self.dealt, **self._deck()}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on where another sampler over the same prompts was."""
        saved = {name: state[name] for name in self._deck()}
        if saved != self._deck():
            raise ValueError(f"the saved sampler deals {saved}, this one {self._deck()}: they are not the same deck")
        self.reseed(state["seed"])
        self.dealt = state["dealt"]

    def _deck(self) -> dict[str, int]:
        return {
            "num_prompts": self.num_prompts,
            "completions_per_prompt": self.completions_per_prompt,
            "shuffle": int(self.shuffle),
        }

    def _order(self, epoch: int) -> IntArray:
        if epoch != self._epoch:
            self._epoch = epoch
            order = np.arange(self.num_prompts)
            self._current = np.random.default_rng([self.seed, epoch]).permutation(order) if self.shuffle else order
        return self._current
