"""Texts of different lengths one behind the other: a model computes nothing for the padding between them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from llm_env.engines.transformers.attention import attends_plainly, can_pack

NAME = "llm_env_ragged"
WASTE = 1.25
"""Texts are attended to together if the longest has at most so many times the tokens of the shortest."""
NEAR = {torch.float32: 1e-4, torch.float64: 1e-4}
"""By how much hidden states may differ, as a share of the largest; 0.02 in precisions that round more."""
WORTH = 1.05
"""With fewer times the tokens, padding costs less than doing without."""


@dataclass(frozen=True)
class Bucket:
    """Neighbours of about the same length, which attention sees side by side.

    Attributes:
        size: how many tokens they have together.
        shape: how many texts, and the length of the longest.
        fill: `[texts * longest]` which of the tokens stands where, any one for padding; None if all are as long.
        real: `[size]` where the tokens then are.
    """

    size: int
    shape: tuple[int, int]
    fill: Tensor | None
    real: Tensor | None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """`[size, heads, dim]` of as many queries, keys and values."""
        query, key, value = (self._side_by_side(each) for each in (query, key, value))
        shared = query.shape[1] != key.shape[1]  # several heads with the keys of one
        found = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=shared)
        found = found.transpose(1, 2).flatten(0, 1)
        return found if self.real is None else found.index_select(0, self.real)

    def _side_by_side(self, each: Tensor) -> Tensor:
        """`[texts, heads, longest, dim]` of `[size, heads, dim]`."""
        padded = each if self.fill is None else each.index_select(0, self.fill)
        return padded.view(*self.shape, *padded.shape[1:]).transpose(1, 2)


@dataclass(frozen=True)
class Ragged:
    """Texts of a padded batch one behind the other, the shortest first.

    Attributes:
        tokens: `[1, N]`.
        positions: `[1, N]` of each token in its text.
        begin: `[B]` where each text of the batch begins.
        buckets: of all texts, in order.
    """

    tokens: Tensor
    positions: Tensor
    begin: Tensor
    buckets: list[Bucket]

    @classmethod
    def of(cls, tokens: Tensor, lengths: Tensor) -> Ragged:
        """Those of `[B, L]` tokens, padded on the right, of which the first `[B]` count.

        Examples:
            >>> ragged = Ragged.of(torch.tensor([[7, 8, 9], [5, 0, 0]]), torch.tensor([3, 1]))
            >>> ragged.tokens.tolist(), ragged.positions.tolist(), ragged.begin.tolist()
            ([[5, 7, 8, 9]], [[0, 0, 1, 2]], [1, 0])
        """
        order = lengths.argsort(stable=True)
        ordered = lengths[order]
        places = torch.arange(tokens.shape[1], device=tokens.device).expand(len(tokens), -1)
        kept = places < ordered[:, None]
        begin = torch.empty_like(lengths)
        begin[order] = ordered.cumsum(0) - ordered
        return cls(tokens[order][kept][None], places[kept][None], begin, _buckets(ordered.tolist(), tokens.device))

    def states(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """`[B, S, H]` at `[B, S]` positions of texts, of `[1, N, H]` hidden states."""
        return hidden[0].index_select(0, (self.begin[:, None] + positions).flatten()).view(*positions.shape, -1)


def is_worth_it(tokens: Tensor, lengths: Tensor) -> bool:
    """Whether a padded batch has enough padding to be read without."""
    return tokens.numel() >= WORTH * int(lengths.sum())


@torch.no_grad()
def can_read(body: Any) -> bool:
    """Whether a model gives for ragged texts what it gives for each by itself, which is tried out.

    Not those that write out attention themselves, look at the last tokens only, or are no transformers.
    """
    config = body.config.get_text_config()
    if not can_pack(body) or not attends_plainly(config):
        return False
    tokens = torch.arange(8, device=body.device).view(2, 4) % config.vocab_size
    lengths = torch.tensor([2, 4], device=body.device)
    ragged = Ragged.of(tokens, lengths)
    try:
        with reading(config, ragged):
            read = body(input_ids=ragged.tokens, position_ids=ragged.positions, use_cache=False).last_hidden_state
    except Exception:
        return False  # a model that is told what it does not know says so in many ways
    each = [body(input_ids=row[None, :length], use_cache=False) for row, length in zip(tokens, lengths, strict=True)]
    expected = torch.cat([each[row].last_hidden_state for row in ragged.begin.argsort().tolist()], 1)
    near = NEAR.get(read.dtype, 0.02) * expected.abs().max()
    return bool((read - expected).abs().max() <= near)


def _buckets(lengths: Sequence[int], device: torch.device) -> list[Bucket]:
    found, begin = [], 0
    for end in range(1, len(lengths) + 1):
        if end == len(lengths) or lengths[end] > WASTE * lengths[begin]:
            found.append(_bucket(lengths[begin:end], device))
            begin = end
    return found


def _bucket(lengths: Sequence[int], device: torch.device) -> Bucket:
    shape, size = (len(lengths), lengths[-1]), sum(lengths)
    if lengths[0] == lengths[-1]:
        return Bucket(size, shape, None, None)
    each = torch.tensor(lengths, device=device)
    real = (torch.arange(shape[1], device=device) < each[:, None]).flatten()
    fill = torch.zeros(real.shape, dtype=torch.long, device=device)
    fill[real] = torch.arange(size, device=device)
    return Bucket(size, shape, fill, real.nonzero()[:, 0])


# What a model calls in place of its own attention.

_reading: ContextVar[tuple[Any, Ragged]] = ContextVar("whose model reads which texts")


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    buckets = _reading.get()[1].buckets
    sizes = [bucket.size for bucket in buckets]
    queries, keys, values = (torch.split(each[0].transpose(0, 1), sizes) for each in (query, key, value))
    parts = zip(buckets, queries, keys, values, strict=True)
    return torch.cat([bucket.attend(q, k, v, scaling) for bucket, q, k, v in parts])[None], None


AttentionInterface.register(NAME, _attention)


@contextlib.contextmanager
def reading(config: Any, ragged: Ragged) -> Iterator[None]:
    """Let the model of this config attend to each text by itself for a while."""
    own = config._attn_implementation
    config._attn_implementation = NAME
    token = _reading.set((config, ragged))
    try:
        yield
    finally:
        _reading.reset(token)
        config._attn_implementation = own


def reading_as_now() -> AbstractContextManager[None]:
    """Later, let the model attend as it does now."""
    now = _reading.get(None)
    return contextlib.nullcontext() if now is None else reading(*now)
