"""The part of a language model that reads: from tokens to hidden states."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from agents.networks.adapters import adapted_as_now, using
from agents.networks.ragged import Ragged, is_worth_it, reading, reading_as_now

Tensor = torch.Tensor


class Backbone(nn.Module):
    """Hidden states of a language model at chosen positions, from one causal pass over whole texts.

    Texts are padded on the right, where causal attention does not look, so there is no attention mask. Where there is
    much padding, or prompts are there several times, and the model can do without, the texts are read one behind the
    other.

    Args:
        model: the whole model (its adapters are chosen through it), or the body itself.
        body: the part that gives hidden states.
        adapter: which adapter to compute with, if the model has any.
        autocast: compute in bfloat16.
        compile: run the body through torch.compile.
        packing: read texts one behind the other; only for a body that `ragged.can_read`.
    """

    def __init__(
        self,
        model: Any,
        body: Any,
        *,
        adapter: str | None = None,
        autocast: bool = False,
        compile: bool = False,
        packing: bool = False,
    ) -> None:
        super().__init__()
        self.packing = packing
        self.body = body
        self.adapter = adapter
        self.autocast = autocast
        # Hidden from nn.Module: the compiled body has the same weights, and the model holds the body.
        self._outside = (model, torch.compile(body, dynamic=True) if compile else body)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """`[B, S, H]` from `[B, L]` tokens and `[B, S]` positions; state `s` has read all up to its position."""
        lengths, prompts = positions.amax(1) + 1, positions[:, 0] + 1
        if self.packing and is_worth_it(tokens, lengths, prompts):
            ragged = Ragged.of(tokens, lengths, prompts)
            with reading(self.body.config.get_text_config(), ragged):
                return ragged.states(self.read(ragged.tokens, position_ids=ragged.positions), positions)
        hidden = self.read(tokens)
        return hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1]))

    def read(self, tokens: Tensor, **reading: Tensor) -> Tensor:
        """`[B, L, H]` from `[B, L]` tokens, at all positions; the model can be told more about how to read them."""
        model, body = self._outside
        with using(model, self.adapter), torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.autocast):
            hidden: Tensor = body(input_ids=tokens, use_cache=False, **reading).last_hidden_state
        return hidden


def recomputing(layers: Sequence[Any]) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """For gradient checkpointing: in the backward pass a layer reads the same texts again, in the same role."""
    return contextlib.nullcontext(), _both(reading_as_now(), adapted_as_now(layers))


@contextlib.contextmanager
def _both(one: AbstractContextManager[None], other: AbstractContextManager[None]) -> Iterator[None]:
    with one, other:
        yield
