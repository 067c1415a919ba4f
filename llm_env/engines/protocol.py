"""What an engine can do, for whoever steps one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch

from llm_env.engines.sampling import Sampling
from llm_env.engines.writing import Job
from llm_env.tasks.base import Task
from llm_env.tokens.arrays import IntArray
from llm_env.tokens.episode import Episode
from llm_env.tokens.prompts import TokenizedPrompts
from llm_env.tokens.vocabulary import Vocabulary

Tokens = Sequence[int] | IntArray
NamedTensors = Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]]


@runtime_checkable
class Engine(Protocol):
    """Steps a language model one token at a time, for many texts at once. `EngineBase` documents each method.

    Attributes:
        num_slots: how many texts live side by side.
        context: how many tokens a slot can hold, prompt included.
        vocab_size: how many tokens there are, and logits for each text.
        vocabulary: the tokens and their text; its size is `vocab_size`.
        version: of the weights, as given to `load_weights`.

    Examples:
        >>> from llm_env.engines import make_engine
        >>> isinstance(make_engine("transformers", "tiny", num_slots=1, context=8), Engine)
        True
    """

    num_slots: int
    context: int
    vocab_size: int
    vocabulary: Vocabulary
    version: int

    def start(self, slots: Tokens, prompts: Sequence[Tokens]) -> torch.Tensor:
        """Begin texts; `[n, V]` float32 logits of the next token."""

    def step(self, slots: Tokens, tokens: Tokens) -> torch.Tensor:
        """Append one token to each; `[n, V]` float32 logits of the next one."""

    def extend(self, slots: Tokens, token_lists: Sequence[Tokens]) -> torch.Tensor:
        """Append several tokens to each; `[n, V]` float32 logits of the next one."""

    def advance(
        self, slots: IntArray, token_lists: IntArray | Sequence[IntArray], fresh: IntArray, prompts: Sequence[IntArray]
    ) -> torch.Tensor:
        """`extend` and `start` in one call, for callers whose arguments need no checks."""

    def stop(self, slots: Tokens) -> None:
        """Free slots."""

    def claim(self, count: int) -> IntArray:
        """Free slots, for the caller alone until `release`."""

    def release(self, slots: Tokens) -> None:
        """Stop slots and give them back."""

    def generate(self, prompts: Sequence[Tokens], sampling: Sampling | None = None) -> list[Episode]:
        """Sample every prompt to its end."""

    def stream(self, prompts: Sequence[Tokens], sampling: Sampling | None = None) -> Iterator[Episode]:
        """The same, each as soon as it is done."""

    def write(
        self,
        task: Task,
        prompts: TokenizedPrompts,
        jobs: Sequence[Job],
        sampling: Sampling,
        *,
        context: int | None = None,
        max_new_tokens: int | None = None,
    ) -> Iterator[tuple[Job, Episode]]:
        """Write episodes of a task, by its rules, each handed out with its job as soon as it has ended."""

    def log_probs(self, sequences: Sequence[Tokens]) -> list[npt.NDArray[np.float32]]:
        """Log-probability of each token but the first, given those before it."""

    def load_weights(self, named_tensors: NamedTensors, version: int) -> None:
        """Replace the weights."""

    def duplicate(self) -> Engine:
        """Another engine with the same weights and texts."""

    def close(self) -> None:
        """Free everything."""
