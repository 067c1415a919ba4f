"""Texts of different lengths one behind the other: a model computes nothing for the padding between them.

Nor twice for a prompt that several of them have: all layers but attention read it once.
"""

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
from rewards.portions import portions

NAME = "llm_env_ragged"
NEAR = {torch.float32: 1e-4, torch.float64: 1e-4}
"""By how much hidden states may differ, as a share of the largest; 0.02 in precisions that round more."""
WORTH = 1.05
"""With fewer times the tokens, padding costs less than doing without."""


@dataclass(frozen=True)
class Bucket:
    """Neighbours of about the same length, which attention sees side by side.

    Attributes:
        begin: where their tokens begin.
        size: how many tokens they have of their own, together.
        shape: how many texts, and the length of the longest.
        fill: `[texts * longest]` which of all tokens stands where, any one for padding; None if these are the tokens of
            the bucket as they come.
        real: `[size]` where its own tokens then are.
    """

    begin: int
    size: int
    shape: tuple[int, int]
    fill: Tensor | None = None
    real: Tensor | None = None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """`[size, heads, dim]` of the queries, keys and values of all tokens."""
        query, key, value = (self._side_by_side(each) for each in (query, key, value))
        shared = query.shape[1] != key.shape[1]  # several heads with the keys of one
        found = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=shared)
        found = found.transpose(1, 2).flatten(0, 1)
        return found if self.real is None else found.index_select(0, self.real)

    def _side_by_side(self, each: Tensor) -> Tensor:
        """`[texts, heads, longest, dim]` of `[N, heads, dim]`."""
        own = each[self.begin : self.begin + self.size] if self.fill is None else each.index_select(0, self.fill)
        return own.view(*self.shape, *own.shape[1:]).transpose(1, 2)


@dataclass(frozen=True)
class Ragged:
    """Texts of a padded batch one behind the other, the shortest first.

    Of texts that begin alike, the first one brings what they share, and the others only what comes after it.

    Attributes:
        tokens: `[1, N]`.
        positions: `[1, N]` of each token in its text.
        shared: `[B]` how many tokens at the beginning of a text another one brings.
        origin: `[B]` where these begin.
        begin: `[B]` where the whole text would begin, were they its own.
        buckets: of all texts, in order.
    """

    tokens: Tensor
    positions: Tensor
    shared: Tensor
    origin: Tensor
    begin: Tensor
    buckets: list[Bucket]

    @classmethod
    def of(cls, tokens: Tensor, lengths: Tensor, prompts: Tensor | None = None) -> Ragged:
        """Those of `[B, L]` tokens, padded on the right, of which the first `[B]` count.

        Args:
            tokens: of the texts.
            lengths: of the texts.
            prompts: `[B]` how many tokens of each are a prompt, which others may share.

        Examples:
            >>> texts, lengths = torch.tensor([[7, 8, 9], [7, 8, 0], [5, 0, 0]]), torch.tensor([3, 2, 1])
            >>> Ragged.of(texts, lengths).tokens.tolist()
            [[5, 7, 8, 7, 8, 9]]
            >>> ragged = Ragged.of(texts, lengths, prompts=torch.tensor([1, 1, 1]))
            >>> ragged.tokens.tolist(), ragged.positions.tolist(), ragged.shared.tolist()
            ([[5, 7, 8, 8, 9]], [[0, 0, 1, 1, 2]], [1, 0, 0])
        """
        order = lengths.argsort(stable=True)
        leader, shared = _first_alike(tokens, order.tolist(), prompts)
        own = (lengths - shared)[order]
        begin = torch.empty_like(lengths)
        begin[order] = own.cumsum(0) - own
        origin = begin[leader]
        places = torch.arange(tokens.shape[1], device=tokens.device).expand(len(tokens), -1)
        kept = (places >= shared[order][:, None]) & (places < lengths[order][:, None])
        begin = begin - shared
        found = cls(tokens[order][kept][None], places[kept][None], shared, origin, begin, [])
        found.buckets.extend(found._buckets(order, lengths))
        return found

    def states(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """`[B, S, H]` at `[B, S]` positions of texts, of `[1, N, H]` hidden states."""
        places = self._places(slice(None), positions)
        return hidden[0].index_select(0, places.flatten()).view(*positions.shape, -1)

    def _places(self, rows: Tensor | slice, positions: Tensor) -> Tensor:
        """Where the tokens at these positions of some texts lie."""
        is_shared = positions < self.shared[rows, None]
        return torch.where(is_shared, self.origin[rows, None], self.begin[rows, None]) + positions

    def _buckets(self, order: Tensor, lengths: Tensor) -> Iterator[Bucket]:
        sizes, shared = lengths[order].tolist(), self.shared[order].tolist()
        start = 0
        for first, end in portions(sizes):
            own = sum(sizes[first:end]) - sum(shared[first:end])
            shape = (end - first, sizes[end - 1])
            if sizes[first] == sizes[end - 1] and not any(shared[first:end]):
                yield Bucket(start, own, shape)
            else:
                yield self._filled(start, own, shape, order[first:end], lengths)
            start += own

    def _filled(self, begin: int, size: int, shape: tuple[int, int], rows: Tensor, lengths: Tensor) -> Bucket:
        positions = torch.arange(shape[1], device=rows.device).expand(shape)
        is_text = positions < lengths[rows, None]
        is_own = is_text & (positions >= self.shared[rows, None])
        fill = (self._places(rows, positions) * is_text).flatten()
        return Bucket(begin, size, shape, fill, is_own.flatten().nonzero()[:, 0])


def _first_alike(tokens: Tensor, order: Sequence[int], prompts: Tensor | None) -> tuple[Tensor, Tensor]:
    """`[B]` which text brings the prompt of each, and how many tokens of it are then not the text's own."""
    leader = torch.arange(len(tokens))
    shared = torch.zeros(len(tokens), dtype=torch.long)
    if prompts is not None:
        texts, sizes = tokens.cpu().numpy(), prompts.tolist()
        first: dict[bytes, int] = {}
        for row in order:
            found = first.setdefault(texts[row, : sizes[row]].tobytes(), row)
            if found != row:
                leader[row], shared[row] = found, sizes[row]
    return leader.to(tokens.device), shared.to(tokens.device)


def is_worth_it(tokens: Tensor, lengths: Tensor, prompts: Tensor) -> bool:
    """Whether a padded batch has enough padding, and prompts that are there several times, to be read without."""
    if tokens.numel() >= WORTH * int(lengths.sum()):  # prompts need not be looked at
        return True
    _, shared = _first_alike(tokens, range(len(tokens)), prompts)
    return tokens.numel() >= WORTH * int((lengths - shared).sum())


@torch.no_grad()
def can_read(body: Any) -> bool:
    """Whether a model gives for ragged texts what it gives for each by itself, which is tried out.

    Not those that write out attention themselves, look at the last tokens only, or are no transformers.
    """
    config = body.config.get_text_config()
    if not can_pack(body) or not attends_plainly(config):
        return False
    tokens = torch.tensor([[0, 1, 0, 0], [0, 2, 3, 4]], device=body.device) % config.vocab_size
    lengths = torch.tensor([2, 4], device=body.device)
    ragged = Ragged.of(tokens, lengths, prompts=torch.ones_like(lengths))
    try:
        with reading(config, ragged):
            read = body(input_ids=ragged.tokens, position_ids=ragged.positions, use_cache=False).last_hidden_state
    except Exception:
        return False  # a model that is told what it does not know says so in many ways
    places = torch.arange(tokens.shape[1], device=body.device).expand_as(tokens)
    found = ragged.states(read, places.clamp_max(lengths[:, None] - 1))
    each = [body(input_ids=row[None, :length], use_cache=False) for row, length in zip(tokens, lengths, strict=True)]
    expected = torch.cat([one.last_hidden_state[0] for one in each])
    near = NEAR.get(read.dtype, 0.02) * expected.abs().max()
    return bool((found[places < lengths[:, None]] - expected).abs().max() <= near)


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
    queries, keys, values = (each[0].transpose(0, 1) for each in (query, key, value))
    found = [bucket.attend(queries, keys, values, scaling) for bucket in _reading.get()[1].buckets]
    return torch.cat(found)[None], None


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
