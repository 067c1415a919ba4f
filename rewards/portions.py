"""Which texts are read together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

WASTE = 1.25
"""Texts are read together if the longest has at most so many times the tokens of the shortest."""


def portions(lengths: Sequence[int], most: int | None = None) -> Iterator[tuple[int, int]]:
    """Which neighbours are read together: of about the same length, so that little is padding.

    Args:
        lengths: the shortest first.
        most: in a portion.

    Examples:
        >>> list(portions([8, 9, 10, 30, 31, 31, 99]))
        [(0, 3), (3, 6), (6, 7)]
        >>> list(portions([8, 9, 10, 30, 31, 31, 99], most=2))
        [(0, 2), (2, 3), (3, 5), (5, 6), (6, 7)]
    """
    begin = 0
    for end in range(1, len(lengths) + 1):
        if end == len(lengths) or end - begin == most or lengths[end] > WASTE * lengths[begin]:
            yield begin, end
            begin = end
