"""Rewards of 0 or 1 for the right answer or the right form: `ExactMatch`, `NumericMatch`, `Format`."""

from __future__ import annotations

import math
import re
from collections import deque
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from rewards.base import Reward
from rewards.named import register_reward
from rewards.rollout import Rollout


@register_reward("exact_match")
@dataclass(eq=False)
class ExactMatch(Reward):
    r"""1 if the text is the expected answer, else 0.

    Args:
        key: Where the rollout's metadata has the answer; it is compared as `str(answer)`.
        strip: Whether white space around both is ignored.
        ignore_case: Whether upper and lower case are the same.

    Example:
        >>> ExactMatch()([Rollout.of(" 42\n", metadata={"answer": 42})])[0].value
        1.0
    """

    alongside = None

    key: str = "answer"
    strip: bool = True
    ignore_case: bool = False

    def score(self, rollout: Rollout) -> float:
        """Score one rollout."""
        expected = str(look_up(rollout, self.key, self.name))
        return float(self._normal(rollout.text) == self._normal(expected))

    def _normal(self, text: str) -> str:
        text = text.strip() if self.strip else text
        return text.casefold() if self.ignore_case else text


_UNSIGNED = r"""
    (?: [0-9]{1,3} (?:,[0-9]{3})+ (?![0-9])     # 1,234,567
      | [0-9]+ )
    (?: \.[0-9]+ )?                             # 3.14; the full stop after "42." is not part of it
    | (?<![0-9]) \.[0-9]+                       # .5
"""
_NUMBER = re.compile(
    rf"""
    (?P<sign> (?<![\w)\]]) [-+−] )?             # the hyphen in "5-3" and in "GPT-4" is not a sign
    (?P<top> {_UNSIGNED} )
    # Longer exponents are not read: no answer has one, and 1e999999999 would take gigabytes of memory.
    (?P<exponent> [eE] [+-]? [0-9]{{1,3}} (?![0-9]) )?
    (?: \s?/\s? (?P<bottom> {_UNSIGNED} ) )?    # 3/4
    """,
    re.VERBOSE,
)


def last_number(text: str) -> Decimal | None:
    """Read the last number of a text, None if there is none.

    A number is a run of digits, with well-formed commas for thousands, a sign directly before it, decimals
    after a point, an exponent (`-1,234.5`, `.5`, `6e-3`), or a fraction of two such (`3/4`). Units and
    signs around it (`$`, `%`, `km`) are not part of it, so "50%" reads as 50. A fraction over zero is not
    a number. Mixed numbers are not read: the last number of "1 1/2" is 1/2.

    Example:
        >>> last_number("It was 1,234.5 km, or -3/4 of it."), last_number("none")
        (Decimal('-0.75'), None)
    """
    found = deque(_NUMBER.finditer(text), maxlen=1)
    if not found:
        return None
    last = found.pop()
    # Decimal keeps all digits, where a float keeps about 16, and reads thousands of digits, which int() refuses.
    number = Decimal(last["top"].replace(",", "") + (last["exponent"] or ""))
    if last["bottom"] is not None:
        bottom = Decimal(last["bottom"].replace(",", ""))
        if not bottom:
            return None
        number /= bottom
    # copy_negate keeps all digits; -number would round to 28.
    return number if last["sign"] in (None, "+") else number.copy_negate()


@register_reward("numeric_match")
@dataclass(eq=False)
class NumericMatch(Reward):
    """1 if the last number in the text is the last one in the expected answer, else 0.

    `rewards.match.last_number` says what counts as a number.

    Args:
        key: Where the rollout's metadata has the answer: a number, or a text whose last number is meant.
        tolerance: How far apart the two may be, absolutely; 0 for exact.

    Example:
        >>> metadata = {"answer": "3.5"}
        >>> texts = ["2 + 1.5 = 3.50", "7/2", "3.6", "I don't know"]
        >>> [score.value for score in NumericMatch()([Rollout.of(text, metadata=metadata) for text in texts])]
        [1.0, 1.0, 0.0, 0.0]
    """

    alongside = None

    key: str = "answer"
    tolerance: float = 1e-6

    def __post_init__(self) -> None:
        if not (math.isfinite(self.tolerance) and self.tolerance >= 0):
            raise ValueError(f"NumericMatch: tolerance is {self.tolerance}; expected a finite number >= 0.")

    def score(self, rollout: Rollout) -> float:
        """Score one rollout."""
        answer = look_up(rollout, self.key, self.name)
        expected = last_number(str(answer))
        if expected is None:
            raise ValueError(
                f"reward {self.name!r}: the rollout's metadata has {self.key!r} = {answer!r}; expected a "
                "number. Use ExactMatch for answers that are not numbers."
            )
        found = last_number(rollout.text)
        # Through repr, since the float 0.3 is a little less than 0.3, and a difference of exactly 0.3 is to count.
        return float(found is not None and abs(found - expected) <= Decimal(repr(float(self.tolerance))))


@register_reward("format")
class Format(Reward):
    r"""1 if the text matches a regular expression, else 0.

    A pattern with nested repetition can take forever on some texts; `rewards.Guard` with a timeout helps.

    Args:
        pattern: The regular expression, with flags inline where needed (`(?s)` lets `.` match newlines).
        full: Whether the whole text must match, rather than some part of it.

    Example:
        >>> form = Format(r"(?s)<think>.*</think>\s*<answer>.*</answer>", full=True)
        >>> texts = ["<think>6</think> <answer>6</answer>", "6"]
        >>> [score.value for score in form([Rollout.of(text) for text in texts])]
        [1.0, 0.0]
    """

    alongside = None

    def __init__(self, pattern: str, full: bool = False) -> None:
        try:
            self.pattern = re.compile(pattern)
        except re.error as error:
            error.add_note(f"Format got {pattern!r}; expected a regular expression (re.escape quotes a text).")
            raise
        self.full = full

    def score(self, rollout: Rollout) -> float:
        """Score one rollout."""
        match = self.pattern.fullmatch if self.full else self.pattern.search
        return float(match(rollout.text) is not None)

    def __repr__(self) -> str:
        return f"Format(pattern={self.pattern.pattern!r}, full={self.full})"


def look_up(rollout: Rollout, key: str, name: str) -> Any:
    """What a rollout's metadata has under a key, for the reward of that name."""
    try:
        return rollout.metadata[key]
    except KeyError:
        keys = ", ".join(map(repr, rollout.metadata)) or "none"
        # Not a KeyError, which would print this message as a quoted string.
        raise LookupError(
            f"reward {name!r} looks for {key!r} in the rollout's metadata, whose keys are: {keys}. Add "
            f"{key!r} to the task's metadata, or give the reward another key."
        ) from None
