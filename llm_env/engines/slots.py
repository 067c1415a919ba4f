"""The slots of an engine: how long the text in each is, who has claimed it, and texts that grow by checked tokens."""

from __future__ import annotations

import abc
import copy
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch

from llm_env.engines.checks import as_slots, as_token_lists, check_prompt, check_room
from llm_env.engines.forks import use_one_thread_if_forked
from llm_env.engines.protocol import Tokens
from llm_env.tokens.arrays import IntArray
from llm_env.tokens.checks import as_token_ids
from llm_env.tokens.vocabulary import Vocabulary

NO_SLOTS: IntArray = np.zeros(0, dtype=np.int64)


class EngineSlots(abc.ABC):
    """Keeps slots, and steps the texts in them: the half of `EngineBase` that knows no tasks and no sampling.

    A subclass writes `_advance`, which runs the model, and `_stop` if there is something to free.

    Args:
        num_slots: how many texts live side by side.
        context: how many tokens a slot can hold, prompt included.
        vocabulary: the tokens. Logits that the model has beyond them are cut off here.

    Attributes:
        lengths: `[num_slots]` how many tokens each slot holds; 0 for a free slot.
    """

    def __init__(self, *, num_slots: int, context: int, vocabulary: Vocabulary) -> None:
        for name, value in (("num_slots", num_slots), ("context", context)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.num_slots = num_slots
        self.context = context
        self.vocabulary = vocabulary
        self.vocab_size = vocabulary.size
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
        return self.advance(NO_SLOTS, [], slots, token_lists)

    def step(self, slots: Tokens, tokens: Tokens) -> torch.Tensor:
        """Append the token that the agent chose to each of `slots`; the other slots stay as they are.

        Args:
            slots: which slots, each at most once, in any order.
            tokens: `[n]` their token ids.

        Returns:
            `[n, V]` float32 logits of the next token, in the order of `slots`.
        """
        slots, tokens = self._slots(slots), as_token_ids(tokens, self.vocab_size, "a step")
        if tokens.shape != slots.shape:
            raise ValueError(f"a step of {len(slots)} slots needs as many tokens, got {len(tokens)}")
        return self.advance(slots, tokens[:, None], NO_SLOTS, [])

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
        return self.advance(slots, arrays, NO_SLOTS, [])

    def advance(
        self, slots: IntArray, token_lists: IntArray | Sequence[IntArray], fresh: IntArray, prompts: Sequence[IntArray]
    ) -> torch.Tensor:
        """`extend` some slots and `start` others, in as few passes as the engine can.

        For those who have checked already what they hand over, such as the writing loop, for which `TokenState` has:
        only that the texts fit is checked here.

        Args:
            slots: which hold texts.
            token_lists: the tokens for each of them, at least one; `[n, 1]` is one for each.
            fresh: other slots, in which texts begin.
            prompts: their prompts.

        Returns:
            `[n, V]` float32 logits of the token after the last, those of `slots` first.
        """
        self._check_open()
        added = np.array([len(tokens) for tokens in token_lists], dtype=np.int64)
        check_room(slots, self.lengths[slots], added, self.context)
        self.lengths[fresh] = 0  # should the model fail half-way, nobody may step what is left
        logits = self.vocabulary.usable(self._advance(slots, token_lists, fresh, prompts))
        self.lengths[slots] += added
        self.lengths[fresh] = [len(prompt) for prompt in prompts]
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
        free = self._free()
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

    def duplicate(self) -> Self:
        """Another engine with the same weights, and the same texts in its slots."""
        self._check_open()
        other = object.__new__(type(self))
        other.__dict__.update(copy.deepcopy(vars(self)))
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # Engines are handed to those who use them, and copying those (or Gymnasium's record of how they were made) must
        # not copy the weights of a language model in silence. To have two, there is `duplicate`.
        return self

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

    def _free(self) -> IntArray:
        return np.flatnonzero(~self._claimed & (self.lengths == 0))

    def _check_open(self) -> None:
        """Before anything is done: the engine must be open, and torch must be able to compute in this process."""
        if self._closed:
            raise ValueError("this engine has been closed: make a new one")
        use_one_thread_if_forked()

    def _slots(self, slots: Tokens) -> IntArray:
        self._check_open()
        return as_slots(slots, self.num_slots)

    def _stop(self, slots: IntArray) -> None:  # noqa: B027  (not every engine has something to do here)
        pass

    @abc.abstractmethod
    def _advance(
        self, slots: IntArray, token_lists: IntArray | Sequence[IntArray], fresh: IntArray, prompts: Sequence[IntArray]
    ) -> torch.Tensor:
        """`advance`, with checked arguments; `lengths` are those before. There may be more logits than tokens."""
