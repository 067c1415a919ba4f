"""What an engine is: a causal language model with a number of slots, each holding one growing text."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Protocol, Self, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch

from llm_env.engines.checks import as_slots, as_token_lists, as_tokens, check_prompt, check_room
from llm_env.engines.sampling import Sampling
from llm_env.engines.writing import Completion, complete
from llm_env.tokens.stopping import IntArray
from llm_env.tokens.vocabulary import Vocabulary

Tokens = Sequence[int] | IntArray
NamedTensors = Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]]


@runtime_checkable
class Engine(Protocol):
    """Steps a language model one token at a time, for many texts at once. `EngineBase` documents each method.

    Attributes:
        num_slots: how many texts live side by side.
        context: how many tokens a slot can hold, prompt included.
        vocab_size: how many logits there are.
        vocabulary: the tokens and their text; its size is `vocab_size`.
        version: of the weights, as given to `load_weights`.
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

    def stop(self, slots: Tokens) -> None:
        """Free slots."""

    def claim(self, count: int) -> IntArray:
        """Free slots, for the caller alone until `release`."""

    def release(self, slots: Tokens) -> None:
        """Stop slots and give them back."""

    def generate(self, prompts: Sequence[Tokens], sampling: Sampling | None = None) -> list[Completion]:
        """Sample every prompt to its end."""

    def stream(self, prompts: Sequence[Tokens], sampling: Sampling | None = None) -> Iterator[Completion]:
        """The same, each as soon as it is done."""

    def log_probs(self, sequences: Sequence[Tokens]) -> list[npt.NDArray[np.float32]]:
        """Log-probability of each token but the first, given those before it."""

    def load_weights(self, named_tensors: NamedTensors, version: int) -> None:
        """Replace the weights."""

    def close(self) -> None:
        """Free everything."""


class EngineBase(abc.ABC):
    """Checks arguments, keeps the length of every slot, and generates; a subclass runs the model.

    An engine is also a context manager, which closes it.

    Args:
        num_slots: how many texts live side by side.
        context: how many tokens a slot can hold, prompt included.
        vocabulary: the tokens; its size must be the number of logits.

    Attributes:
        lengths: `[num_slots]` how many tokens each slot holds; 0 for a free slot.

    Examples:
        >>> from llm_env.engines import make_engine
        >>> engine = make_engine("transformers", "tiny", num_slots=2, context=16)
        >>> prompts = [engine.vocabulary.encode(text) for text in ("1+1=", "Hi")]
        >>> logits = engine.start([0, 1], prompts)
        >>> logits = engine.step([1], logits[1:].argmax(-1).numpy())    # the agent chooses
        >>> logits.shape, engine.lengths.tolist()
        (torch.Size([1, 100]), [4, 3])
    """

    def __init__(self, *, num_slots: int, context: int, vocabulary: Vocabulary) -> None:
        for name, value in (("num_slots", num_slots), ("context", context)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.num_slots = num_slots
        self.context = context
        self.vocabulary = vocabulary
        self.vocab_size = vocabulary.size
        self.version = 0
        self.lengths: IntArray = np.zeros(num_slots, dtype=np.int64)
        self._claimed = np.zeros(num_slots, dtype=np.bool_)
        self._closed = False

    def start(self, slots: Tokens, prompts: Sequence[Tokens]) -> torch.Tensor:
        """Begin a text in each of `slots`, whatever they held before.

        Args:
            slots: which slots, each at most once, in any order.
            prompts: their prompts, as token ids, at least one token each.

        Returns:
            `[n, V]` float32 logits of the next token, in the order of `slots`.
        """
        slots = self._slots(slots)
        token_lists = as_token_lists(prompts, slots, self.vocab_size, "prompt")
        for prompt in token_lists:
            check_prompt(prompt, self.context, 0, self.vocabulary.bos_token)
        self.lengths[slots] = 0  # should the model fail half-way, nobody may step what is left
        logits = self._start(slots, token_lists)
        self.lengths[slots] = [len(prompt) for prompt in token_lists]
        return logits

    def step(self, slots: Tokens, tokens: Tokens) -> torch.Tensor:
        """Append the token that the agent chose to each of `slots`; the other slots stay as they are.

        Args:
            slots: which slots, each at most once, in any order.
            tokens: `[n]` their token ids.

        Returns:
            `[n, V]` float32 logits of the next token, in the order of `slots`.
        """
        slots, tokens = self._slots(slots), as_tokens(tokens, self.vocab_size, "tokens")
        if tokens.shape != slots.shape:
            raise ValueError(f"a step of {len(slots)} slots needs as many tokens, got {len(tokens)}")
        check_room(slots, self.lengths[slots], np.ones_like(slots), self.context)
        logits = self._step(slots, tokens)
        self.lengths[slots] += 1
        return logits

    def extend(self, slots: Tokens, token_lists: Sequence[Tokens]) -> torch.Tensor:
        """Append several tokens to each of `slots`, such as the agent's choice and a task's reply to it.

        Args:
            slots: which slots, each at most once, in any order.
            token_lists: the token ids for each, at least one; they need not be of the same length.

        Returns:
            `[n, V]` float32 logits of the token after the last, in the order of `slots`.
        """
        slots = self._slots(slots)
        arrays = as_token_lists(token_lists, slots, self.vocab_size, "list of tokens")
        if not all(len(tokens) for tokens in arrays):
            raise ValueError("every slot must be extended by at least one token: leave out those that are not")
        added = np.array([len(tokens) for tokens in arrays], dtype=np.int64)
        check_room(slots, self.lengths[slots], added, self.context)
        logits = self._extend(slots, arrays)
        self.lengths[slots] += added
        return logits

    def stop(self, slots: Tokens) -> None:
        """Free slots; stopping a free one does nothing."""
        if not self._closed:
            slots = self._slots(slots)
            self.lengths[slots] = 0
            self._stop(slots)

    def claim(self, count: int) -> IntArray:
        """Slots that hold no text and that nobody else has claimed; they are the caller's until `release`.

        Those who share an engine claim their slots, so that none steps another's text; whoever has it alone need not.

        Examples:
            >>> from llm_env.engines import make_engine
            >>> engine = make_engine("transformers", "tiny", num_slots=4, context=16)
            >>> engine.claim(2), engine.claim(2)
            (array([0, 1]), array([2, 3]))
        """
        self._check_open()
        free = np.flatnonzero(~self._claimed & (self.lengths == 0))
        if len(free) < count:
            raise ValueError(
                f"{count} slots are wanted, but of the engine's {self.num_slots} only {len(free)} are free; the others "
                "hold texts or belong to another environment: make the engine with more, or an engine for each"
            )
        self._claimed[free[:count]] = True
        return free[:count]

    def release(self, slots: Tokens) -> None:
        """Stop slots that were claimed, and give them back."""
        if not self._closed:
            slots = self._slots(slots)
            self.stop(slots)
            self._claimed[slots] = False

    def generate(self, prompts: Sequence[Tokens], sampling: Sampling | None = None) -> list[Completion]:
        """Sample every prompt to its end, `sampling.n` times.

        With a seed, a completion depends on the weights, the prompt and its index only, neither on the number of
        slots nor on what else is generated (but for the rounding of the arithmetic, which differs between batch
        sizes). Only free slots are used, so texts being stepped are safe.

        Args:
            prompts: as token ids; each may be any length that leaves room for one token.
            sampling: how; plain sampling by default.

        Returns:
            The completions, those of the first prompt first.

        Examples:
            >>> from llm_env.engines import Sampling, make_engine
            >>> engine = make_engine("transformers", "tiny", num_slots=4, context=32)
            >>> prompts = [engine.vocabulary.encode(text) for text in ("1+1=", "Hi")]
            >>> completions = engine.generate(prompts, Sampling(max_new_tokens=5, n=3, seed=0))
            >>> [completion.prompt_index for completion in completions]
            [0, 0, 0, 1, 1, 1]
        """
        done = self.stream(prompts, sampling)
        return sorted(done, key=lambda completion: (completion.prompt_index, completion.completion_index))

    def stream(self, prompts: Sequence[Tokens], sampling: Sampling | None = None) -> Iterator[Completion]:
        """As `generate`, but each completion comes as soon as it is done."""
        self._check_open()
        arrays = [as_tokens(prompt, self.vocab_size, "a prompt") for prompt in prompts]
        for prompt in arrays:
            check_prompt(prompt, self.context, 1, self.vocabulary.bos_token)
        if not self._num_free():
            raise ValueError(f"all {self.num_slots} slots hold texts or are claimed: stop some before you generate")
        return self._stream(arrays, sampling or Sampling())

    def _stream(self, prompts: list[IntArray], sampling: Sampling) -> Iterator[Completion]:
        slots = self.claim(max(1, min(self._num_free(), len(prompts) * sampling.n)))
        try:
            yield from complete(self, slots, prompts, sampling)
        finally:
            self.release(slots)

    def _num_free(self) -> int:
        return int(np.count_nonzero(~self._claimed & (self.lengths == 0)))

    def log_probs(self, sequences: Sequence[Tokens]) -> list[npt.NDArray[np.float32]]:
        """Score given sequences at temperature 1.

        Args:
            sequences: as token ids, each at most `context` long.

        Returns:
            For each the log-probability of its tokens from the second on, given those before.
        """
        self._check_open()
        arrays = [as_tokens(sequence, self.vocab_size, "a sequence") for sequence in sequences]
        for array in arrays:
            if len(array) > self.context:
                raise ValueError(f"a sequence of {len(array)} tokens does not fit a context of {self.context}")
        return self._log_probs(arrays)

    def load_weights(self, named_tensors: NamedTensors, version: int) -> None:
        """Replace all weights. All slots are stopped: what they remember was computed with the old ones.

        Args:
            named_tensors: every weight by the name it has in the model, such as `model.named_parameters()` or
                `model.state_dict()`. Of tied weights one name is enough.
            version: what `version` shall be from now on.
        """
        self._check_open()
        self._load_weights(dict(named_tensors))
        self.stop(np.arange(self.num_slots))
        self.version = version

    def close(self) -> None:
        """Free the slots and whatever the engine holds; it cannot be used any more."""
        self.lengths[:] = 0
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @abc.abstractmethod
    def _start(self, slots: IntArray, prompts: list[IntArray]) -> torch.Tensor:
        """`start`, with checked arguments."""

    @abc.abstractmethod
    def _extend(self, slots: IntArray, token_lists: list[IntArray]) -> torch.Tensor:
        """`extend`, with checked arguments; `lengths` are those before."""

    def _step(self, slots: IntArray, tokens: IntArray) -> torch.Tensor:
        return self._extend(slots, list(tokens[:, None]))

    def _stop(self, slots: IntArray) -> None:  # noqa: B027  (not every engine has something to do here)
        pass

    def _step_and_start(
        self, slots: IntArray, tokens: IntArray, fresh: IntArray, prompts: list[IntArray]
    ) -> torch.Tensor:
        """`step` of some slots and `start` of others, which some engines can do together; either may be none.

        Returns:
            `[n, V]` logits, those of `slots` first.
        """
        logits = [self.step(slots, tokens)] if len(slots) else []
        if len(fresh):
            logits.append(self.start(fresh, prompts))
        return torch.cat(logits)

    @abc.abstractmethod
    def _log_probs(self, sequences: list[IntArray]) -> list[npt.NDArray[np.float32]]:
        """`log_probs`, with checked arguments."""

    @abc.abstractmethod
    def _load_weights(self, named_tensors: dict[str, torch.Tensor]) -> None:
        """Copy all weights, or raise before the first."""

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("this engine has been closed: make a new one")

    def _slots(self, slots: Tokens) -> IntArray:
        self._check_open()
        return as_slots(slots, self.num_slots)
