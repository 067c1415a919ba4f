"""A key-value cache whose rows are independent texts, each at its own position."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin


@dataclass(frozen=True, slots=True)
class Plan:
    """Where one forward pass writes to and reads from; the same for every layer.

    Attributes:
        target: `[m]` places in the flattened cache (`slot * context + position`) of the pass's m real tokens.
        source: `[m]` which of the pass's `n * width` tokens they are; None if all are real, in this order.
        rows: the slots that the model's attention is given, `[n]`, one for each row of the pass; None for all slots.
        columns: how many positions it is given, from the first; None for all.
    """

    target: torch.Tensor
    source: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    columns: int | None = None


class SlotLayer(CacheLayerMixin):
    """One layer: keys and values `[num_slots, context, heads, dim]`, allocated at first use.

    A step writes one position of each row in place, and reads a view if the rows lie in order: then nothing that
    is already there is copied. Positions come before heads, so what a step writes for a slot is one block of memory.
    """

    def __init__(self, num_slots: int, context: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shape = (num_slots, context)
        self.plan: Plan | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate. Zeros, because attention multiplies what it masks by 0, and 0 times an old NaN is NaN."""
        (_, key_heads, _, key_dim), (_, value_heads, _, value_dim) = key_states.shape, value_states.shape
        self.keys = key_states.new_zeros(*self.shape, key_heads, key_dim)
        self.values = value_states.new_zeros(*self.shape, value_heads, value_dim)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new `[n, heads, width, dim]` and return all that the rows of this pass may look at."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.plan is not None
        assert self.keys is not None
        assert self.values is not None
        return _write_and_read(self.keys, key_states, self.plan), _write_and_read(self.values, value_states, self.plan)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Unused: the engine makes its own mask."""
        raise NotImplementedError("a slot cache needs an explicit 4D attention mask")

    def get_seq_length(self) -> int:
        """Some models ask although they are given positions; rows differ in length, so there is no answer."""
        return 0

    def get_max_length(self) -> int:
        """How many positions a slot has."""
        return self.shape[1]

    def copy_rows(self, source: torch.Tensor, target: torch.Tensor, columns: int) -> None:
        """Copy the first positions of some slots to others."""
        for cache in (self.keys, self.values):
            if cache is not None:
                cache[target, :columns] = cache[source, :columns]


class SlotCache(Cache):
    """A `transformers` cache made of `SlotLayer`s."""

    def __init__(self, num_layers: int, num_slots: int, context: int) -> None:
        self.slot_layers = [SlotLayer(num_slots, context) for _ in range(num_layers)]
        super().__init__(layers=list(self.slot_layers))

    def use(self, plan: Plan) -> None:
        """Set where the next forward pass writes and reads."""
        for layer in self.slot_layers:
            layer.plan = plan

    def copy_rows(self, source: torch.Tensor, target: torch.Tensor, columns: int) -> None:
        """Copy the first positions of some slots to others, in every layer."""
        for layer in self.slot_layers:
            layer.copy_rows(source, target, columns)


def _write_and_read(cache: torch.Tensor, new: torch.Tensor, plan: Plan) -> torch.Tensor:
    tokens = new.transpose(1, 2).flatten(0, 1)
    if plan.source is not None:
        tokens = tokens[plan.source]
    cache.flatten(0, 1).index_copy_(0, plan.target, tokens)
    return (cache if plan.rows is None else cache[plan.rows, : plan.columns]).transpose(1, 2)
