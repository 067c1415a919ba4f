"""What is known of one metric."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Reduce = Literal["mean", "max", "min"]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One number that is measured in every iteration, or now and then.

    Args:
        name: what it is logged under, such as `policy/entropy`; what comes before the slash groups it.
        label: what a person sees, beside others of its column or picture.
        meaning: one sentence with its unit.
        reduce: how the numbers of micro-batches become one: their mean, weighted with their tokens, or an extreme.
        column: the column of the live display that shows it: "score", "policy", "critic", "texts", or a new one.
        short: what a plain line calls it; None leaves it out there.
        panel: the picture in curves.png that draws it: "score", "kl", "entropy", "critic", "length", "update", or a
            new one, of which this is the title.
        right: draw it on the right-hand axis of the picture, for numbers of another size.
        occasional: it is measured now and then: the display keeps it, and curves show its points.
        quiet: shown only when it is not zero.
        needs: what a run must have for it to be measured, in words; None: every run measures it.

    Examples:
        >>> Metric(name="text/rhymes", label="rhymes", meaning="Share of the texts that rhyme.", column="texts").reduce
        'mean'
    """

    name: str
    label: str
    meaning: str
    reduce: Reduce = "mean"
    column: str | None = None
    short: str | None = None
    panel: str | None = None
    right: bool = False
    occasional: bool = False
    quiet: bool = False
    needs: str | None = None

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("a metric needs a name, such as 'text/rhymes', got an empty one")
        if self.reduce not in get_args(Reduce):
            raise ValueError(f"metric {self.name!r}: reduce must be one of {get_args(Reduce)}, got {self.reduce!r}")

    @property
    def group(self) -> str:
        """What comes before the slash of the name; "run" if there is none.

        Examples:
            >>> Metric(name="text/rhymes", label="rhymes", meaning="Share of the texts that rhyme.").group
            'text'
        """
        group, slash, _ = self.name.rpartition("/")
        return group if slash else "run"
