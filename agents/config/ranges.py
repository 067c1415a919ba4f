"""What a number may be. A range stands in the type of a setting: `Annotated[float, Range("above 0", above=0)]`."""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Union, get_args, get_origin


@dataclass(frozen=True)
class Range:
    """The numbers that a setting may take. Infinity and NaN are in no range.

    Attributes:
        words: what is expected, to end the sentence "--seed is -1, expected ...".
        at_least: the smallest number allowed.
        above: all numbers must be larger than this.
        at_most: the largest number allowed.
        below: all numbers must be smaller than this.

    Examples:
        >>> share = Range("a number from 0 to below 1", at_least=0, below=1)
        >>> 0 in share, 1 in share
        (True, False)
    """

    words: str
    at_least: float = -math.inf
    above: float = -math.inf
    at_most: float = math.inf
    below: float = math.inf

    def __contains__(self, number: float) -> bool:
        inside = self.at_least <= number <= self.at_most and self.above < number < self.below
        return math.isfinite(number) and inside


Count = Annotated[int, Range("at least 1", at_least=1)]
CountOrZero = Annotated[int, Range("0 or more", at_least=0)]
Finite = Annotated[float, Range("a finite number")]
Positive = Annotated[float, Range("a number above 0", above=0)]
NotNegative = Annotated[float, Range("0 or more", at_least=0)]
UpToOne = Annotated[float, Range("a number above 0 and at most 1", above=0, at_most=1)]
FromZeroToOne = Annotated[float, Range("a number from 0 to 1", at_least=0, at_most=1)]
BelowOne = Annotated[float, Range("a number from 0 to below 1", at_least=0, below=1)]
AtLeastOne = Annotated[float, Range("at least 1", at_least=1)]
AboveOne = Annotated[float, Range("a number above 1 (3 is usual)", above=1)]


def expected(kind: Any, value: Any) -> str | None:
    """What was expected instead of `value`, in words; None if its numbers are in the ranges of the type `kind`.

    Whether the value is of that type at all is not asked here: what is no number is in every range.

    Examples:
        >>> expected(Count | None, 0), expected(Count | None, None)
        ('at least 1', None)
        >>> expected(tuple[BelowOne, BelowOne], (0.9, 1.0))
        '2 values, each a number from 0 to below 1'
    """
    origin, members = get_origin(kind), get_args(kind)
    if origin is Annotated:
        ranges = [mark for mark in members[1:] if isinstance(mark, Range)]
        if isinstance(value, int | float):
            return next((each.words for each in ranges if value not in each), None)
        return expected(members[0], value)
    if origin in (Union, types.UnionType):
        return next((words for member in members if (words := expected(member, value))), None)
    if origin is tuple and isinstance(value, tuple):
        if members[-1] is Ellipsis:
            return next((words for one in value if (words := expected(members[0], one))), None)
        found = [words for member, one in zip(members, value, strict=True) if (words := expected(member, one))]
        return f"{len(members)} values, each {found[0]}" if found else None
    if origin is dict and isinstance(value, Mapping):
        found = [words for one in value.values() if (words := expected(members[1], one))]
        return f"values that are each {found[0]}" if found else None
    return None
