"""What callers of an engine get wrong, said in their own terms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from llm_env.tokens.arrays import IntArray
from llm_env.tokens.checks import as_indices, as_token_ids


def as_slots(slots: Any, num_slots: int) -> IntArray:
    """Slot numbers as an array: each in range, each at most once."""
    return as_indices(slots, num_slots, "slot")


def as_token_lists(token_lists: Sequence[Any], slots: IntArray, vocab_size: int, what: str) -> list[IntArray]:
    """One array of token ids for each slot."""
    if len(token_lists) != len(slots):
        raise ValueError(f"{len(slots)} slots need one {what} each, got {len(token_lists)}")
    return [as_token_ids(tokens, vocab_size, f"a {what}") for tokens in token_lists]


def check_prompt(prompt: IntArray, context: int, room: int, bos_token: int | None) -> None:
    """A prompt must not be empty, and leave `room` in the context."""
    if not len(prompt):
        advice = "" if bos_token is None else f", such as the tokenizer's bos_token, {bos_token}"
        raise ValueError(f"a prompt is empty, but a language model needs a token to go on from: begin with one{advice}")
    if len(prompt) + room > context:
        raise ValueError(
            f"a prompt of {len(prompt)} tokens does not fit a context of {context}"
            f"{' with a token after it' if room else ''}: make the engine with a larger context"
        )


def check_room(slots: IntArray, lengths: IntArray, added: IntArray, context: int) -> None:
    """Slots of these lengths must be in use and have room for so many more tokens."""
    if not lengths.all():
        raise ValueError(
            f"slot {slots[lengths == 0][0]} holds no text (it was never started, or stopped, or the weights were "
            "replaced): call start first"
        )
    full = np.flatnonzero(lengths + added > context)
    if len(full):
        slot, length, more = slots[full[0]], lengths[full[0]], added[full[0]]
        raise ValueError(
            f"slot {slot} holds {length} of at most {context} tokens: there is no room for {more} more. "
            "End the episode there, or make the engine with a larger context"
        )
