"""What an engine is: a causal language model with a number of slots, each holding one growing text."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch

from llm_env.engines.complete import Completion, complete
from llm_env.engines.sampling import Sampling
from llm_env.stopping import IntArray
from llm_env.text import Vocabulary

Tokens = Sequence[int] | IntArray
NamedTensors = Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]]
Self = TypeVar("Self", bound="EngineBase")


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

    def generate(self, prompts: Sequence[Tokens], sampling: Sampling) -> list[Completion]:
        """Sample every prompt to its end."""

    def stream(self, prompts: Sequence[Tokens], sampling: Sampling) -> Iterator[Completion]:
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
        self._closed = False

    def start(self, slots: Tokens, prompts: Sequence[Tokens]) -> torch.Tensor:
        """Begin a text in each of `slots`, whatever they held before.

        Args:
            slots: which slots, each at most once, in any order.
            prompts: their prompts, as token ids, at least one token each.

        Returns:
            `[n, V]` float32 logits of the next token, in the order of `slots`.
        """
        slots = self._check_slots(slots)
        token_lists = self._check_lists(slots, prompts, "prompt")
        for prompt in token_lists:
            self._check_prompt(prompt, room=0)
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
        slots, tokens = self._check_slots(slots), self._check_tokens(tokens, "tokens")
        if tokens.shape != slots.shape:
            raise ValueError(f"a step of {len(slots)} slots needs as many tokens, got {len(tokens)}")
        self._check_room(slots, np.ones_like(slots))
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
        slots = self._check_slots(slots)
        arrays = self._check_lists(slots, token_lists, "list of tokens")
        if not all(len(tokens) for tokens in arrays):
            raise ValueError(
                "every slot must be extended by at least one token: leave out those that are not"
            )
        added = np.array([len(tokens) for tokens in arrays], dtype=np.int64)
        self._check_room(slots, added)
        logits = self._extend(slots, arrays)
        self.lengths[slots] += added
        return logits

    def stop(self, slots: Tokens) -> None:
        """Free slots; stopping a free one does nothing."""
        slots = self._check_slots(slots)
        self.lengths[slots] = 0
        self._stop(slots)

    def generate(self, prompts: Sequence[Tokens], sampling: Sampling | None = None) -> list[Completion]:
        """Sample every prompt to its end, `sampling.n` times.

        With a seed, a completion depends on the weights, the prompt and its index only: neither on the number of slots
        nor on what else is generated (up to the rounding of the arithmetic, which differs between batch sizes).
        Only free slots are used, so texts being stepped are safe.

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
        arrays = [self._check_tokens(prompt, "a prompt") for prompt in prompts]
        for prompt in arrays:
            self._check_prompt(prompt, room=1)
        return complete(self, arrays, sampling or Sampling())

    def log_probs(self, sequences: Sequence[Tokens]) -> list[npt.NDArray[np.float32]]:
        """Score given sequences at temperature 1.

        Args:
            sequences: as token ids, each at most `context` long.

        Returns:
            For each the log-probability of its tokens from the second on, given those before: one fewer than tokens.
        """
        self._check_open()
        arrays = [self._check_tokens(sequence, "a sequence") for sequence in sequences]
        for array in arrays:
            if len(array) > self.context:
                raise ValueError(
                    f"a sequence of {len(array)} tokens does not fit a context of {self.context}"
                )
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

    def __enter__(self: Self) -> Self:
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

    @abc.abstractmethod
    def _log_probs(self, sequences: list[IntArray]) -> list[npt.NDArray[np.float32]]:
        """`log_probs`, with checked arguments."""

    @abc.abstractmethod
    def _load_weights(self, named_tensors: dict[str, torch.Tensor]) -> None:
        """Copy all weights, or raise before the first."""

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("this engine has been closed: make a new one")

    def _check_slots(self, slots: Tokens) -> IntArray:
        self._check_open()
        array = np.asarray(slots)
        if array.ndim != 1 or (len(array) and array.dtype.kind not in "iu"):
            raise ValueError(f"slots must be a flat sequence of slot numbers, got {slots!r}")
        array = array.astype(np.int64)
        if len(array) and (array.min() < 0 or array.max() >= self.num_slots):
            raise ValueError(f"slots go from 0 to {self.num_slots - 1}, got {array.tolist()}")
        if len(array) > 1 and np.bincount(array).max() > 1:
            raise ValueError(f"a slot may be named only once in a call, got {array.tolist()}")
        return array

    def _check_tokens(self, tokens: Any, what: str) -> IntArray:
        array = np.asarray(tokens.cpu() if isinstance(tokens, torch.Tensor) else tokens)
        if array.ndim != 1 or (len(array) and array.dtype.kind not in "iu"):
            raise ValueError(
                f"{what} must be a flat sequence of integer token ids (encode text with `vocabulary.encode`), "
                f"got {tokens!r}"
            )
        if len(array) and (array.min() < 0 or array.max() >= self.vocab_size):
            wrong = array[(array < 0) | (array >= self.vocab_size)][0]
            raise ValueError(f"{what} must have ids from 0 to {self.vocab_size - 1}, got {wrong}")
        return array.astype(np.int64)

    def _check_lists(self, slots: IntArray, token_lists: Sequence[Tokens], what: str) -> list[IntArray]:
        if len(token_lists) != len(slots):
            raise ValueError(f"{len(slots)} slots need one {what} each, got {len(token_lists)}")
        return [self._check_tokens(tokens, f"a {what}") for tokens in token_lists]

    def _check_prompt(self, prompt: IntArray, room: int) -> None:
        if not len(prompt):
            bos = self.vocabulary.bos_token
            advice = "any token you like" if bos is None else f"bos_token, {bos}"
            raise ValueError(
                "a prompt is empty, but a language model can only go on from at least one token: "
                f"begin it with {advice}"
            )
        if len(prompt) + room > self.context:
            raise ValueError(
                f"a prompt of {len(prompt)} tokens does not fit a context of {self.context}"
                f"{' with a token after it' if room else ''}: make the engine with a larger context"
            )

    def _check_room(self, slots: IntArray, added: IntArray) -> None:
        lengths = self.lengths[slots]
        if not lengths.all():
            raise ValueError(
                f"slot {slots[lengths == 0][0]} holds no text (never started, stopped, or the weights were replaced): "
                "call start first"
            )
        if (lengths + added > self.context).any():
            index = int(np.flatnonzero(lengths + added > self.context)[0])
            raise ValueError(
                f"slot {slots[index]} holds {lengths[index]} of at most {self.context} tokens: no room for "
                f"{added[index]} more; end the episode there, or make the engine with a larger context"
            )
