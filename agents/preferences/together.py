"""Two texts read as one row: what both begin with, mostly the prompt, is read once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Tokens = Sequence[int]
Body = Callable[..., Tensor]
"""Hidden states `[R, L, H]` of `[R, L]` tokens; takes `attention_mask` and `position_ids`, too."""

NEAR = 1e-3
"""By how much numbers may differ, as a share of the largest, for two ways of reading to be the same."""


@dataclass(frozen=True)
class Rows:
    """Pairs of texts as a model reads them.

    Attributes:
        tokens: `[R, L]`, padded on the right.
        column: `[R, K, N]` where in a row the n-th token of each of its texts lies; 0 after the last one.
        reading: what the model must be told for it: what each token reads, and where it stands in its text.
    """

    tokens: Tensor
    column: Tensor
    reading: dict[str, Tensor]

    def states(self, body: Body, places: Tensor) -> Tensor:
        """`[B, 2, S, H]` hidden states of pairs of texts at `[B, 2, S]` places."""
        rows, texts, _ = self.column.shape
        columns = self.column.gather(-1, places.view(rows, texts, -1)).view(rows, -1)
        hidden = body(self.tokens, **self.reading)
        found = hidden.gather(1, columns[..., None].expand(-1, -1, hidden.shape[-1]))
        return found.view(*places.shape, hidden.shape[-1])


def together(pairs: Sequence[tuple[Tokens, Tokens]], pad: int) -> Rows:
    """A row for each pair: the first text, and what the second does not share with it.

    A token reads what stands before it in its own text, and takes its own text's count for its position.

    Examples:
        >>> rows = together([([7, 8, 1, 2], [7, 8, 3])], pad=0)
        >>> rows.tokens.tolist(), rows.column.tolist(), rows.reading["position_ids"].tolist()
        ([[7, 8, 1, 2, 3]], [[[0, 1, 2, 3], [0, 1, 4, 0]]], [[0, 1, 2, 3, 2]])
        >>> rows.reading["attention_mask"][0, 0, 4].tolist()
        [True, True, False, False, True]
    """
    shared = [shared_by(first, second) for first, second in pairs]
    ends = [len(first) + len(second) - common for (first, second), common in zip(pairs, shared, strict=True)]
    width = max(ends)
    tokens = np.full((len(pairs), width), pad, np.int64)
    position = np.zeros((len(pairs), width), np.int64)
    column = np.zeros((len(pairs), 2, _longest(pairs)), np.int64)
    mask = np.tile(np.tril(np.ones((width, width), bool)), (len(pairs), 1, 1))
    for row, ((first, second), common, end) in enumerate(zip(pairs, shared, ends, strict=True)):
        own = len(first)
        tokens[row, :end] = [*first, *second[common:]]
        position[row, :end] = [*range(own), *range(common, len(second))]
        column[row, 0, :own] = range(own)
        column[row, 1, : len(second)] = [*range(common), *range(own, end)]
        mask[row, own:, common:own] = False
    reading = {"attention_mask": torch.from_numpy(mask[:, None]), "position_ids": torch.from_numpy(position)}
    return Rows(torch.from_numpy(tokens), torch.from_numpy(column), reading)


def apart(pairs: Sequence[tuple[Tokens, Tokens]], pad: int) -> Rows:
    """A row for each text, for models that do not take the other kind for what it is.

    Examples:
        >>> apart([([7, 8, 1], [7, 3])], pad=0).tokens.tolist()
        [[7, 8, 1], [7, 3, 0]]
    """
    width = _longest(pairs)
    rows = [[*text, *[pad] * (width - len(text))] for pair in pairs for text in pair]
    return Rows(torch.tensor(rows), torch.arange(width).expand(len(rows), 1, width), {})


def moved(rows: Rows, device: torch.device) -> Rows:
    """The same on another device."""
    reading = {name: each.to(device) for name, each in rows.reading.items()}
    return Rows(rows.tokens.to(device), rows.column.to(device), reading)


def shared_by(first: Tokens, second: Tokens) -> int:
    """How many tokens two texts have in common before they part.

    Examples:
        >>> shared_by([1, 2, 3], [1, 2, 4]), shared_by([1], [1, 2]), shared_by([1], [2])
        (2, 1, 0)
    """
    for place, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return place
    return min(len(first), len(second))


@torch.no_grad()
def alike(as_one: Callable[[], Tensor], each: Callable[[], Tensor]) -> bool:
    """Whether a model gives the same for both kinds of rows, which is tried out.

    Those do that let a mask say what is read. Others make one of their own, or look at the last tokens only.
    """
    expected = each()
    try:
        found = as_one()
    except Exception:
        return False  # a model that knows no such mask says so in many ways
    return bool((found - expected).abs().max() <= NEAR * expected.abs().max())


def _longest(pairs: Sequence[tuple[Tokens, Tokens]]) -> int:
    return max(len(text) for pair in pairs for text in pair)
