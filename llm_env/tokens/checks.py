"""What callers get wrong about rows and token ids, said in their own terms."""

from __future__ import annotations

from typing import Any

import numpy as np

from llm_env.tokens.arrays import IntArray


def as_indices(values: Any, count: int, what: str) -> IntArray:
    """Numbers of rows (or slots, as `what` says) as an array: each in range, each at most once.

    Examples:
        >>> as_indices([0, 2], 3, "row")
        array([0, 2])
        >>> as_indices([True, False, True], 3, "row")
        Traceback (most recent call last):
        ValueError: rows must be a flat sequence of row numbers, got [True, False, True]
    """
    array = np.asarray(values)
    if array.ndim != 1 or (len(array) and array.dtype.kind not in "iu"):
        raise ValueError(f"{what}s must be a flat sequence of {what} numbers, got {values!r}")
    array = array.astype(np.int64, copy=False)
    if len(array) and array[0] >= 0 and array[-1] < count and (array[1:] > array[:-1]).all():
        return array  # rising from a good number to a good one, as nearly always: no need to look closer
    if len(array) and (array.min() < 0 or array.max() >= count):
        raise ValueError(f"{what}s go from 0 to {count - 1}, got {array.tolist()}")
    if len(array) > 1 and np.bincount(array).max() > 1:
        raise ValueError(f"a {what} may be named only once in a call, got {array.tolist()}")
    return array


def as_token_ids(values: Any, vocab_size: int, what: str) -> IntArray:
    """Token ids as an array: integers, each in the vocabulary.

    Examples:
        >>> as_token_ids([3, 10], 10, "a prompt")
        Traceback (most recent call last):
        ValueError: a prompt has token id 10; this vocabulary has ids 0 to 9
    """
    array = np.asarray(values.cpu() if hasattr(values, "cpu") else values)  # a torch tensor may lie on a GPU
    hint = "(text becomes token ids with `vocabulary.encode`)"
    if array.ndim != 1:
        raise ValueError(f"{what} must be a flat sequence of token ids, got shape {array.shape}: {values!r} {hint}")
    if len(array) and array.dtype.kind not in "iu":
        raise TypeError(f"{what} must be integer token ids, got dtype {array.dtype}: {values!r} {hint}")
    array = np.ascontiguousarray(array, dtype=np.int64)
    # Seen as unsigned, a negative id is a huge one: one pass finds both.
    if len(array) and array.view(np.uint64).max() >= vocab_size:
        wrong = array[(array < 0) | (array >= vocab_size)][0]
        raise ValueError(f"{what} has token id {wrong}; this vocabulary has ids 0 to {vocab_size - 1}")
    return array
