"""Metrics of many micro-batches put together, each the way the table says."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import SupportsFloat

from agents.metrics.table import metric


class Average:
    """Puts the metrics of micro-batches together.

    `Metric.reduce` says how: means are weighted with the number of tokens behind them; of extremes the most extreme is
    kept. A metric that is not a number in one micro-batch is not a number in the end, so that it cannot go unnoticed.

    Examples:
        >>> average = Average()
        >>> average.add({"policy/entropy": 1.0, "ratio/max": 2.0}, tokens=1)
        >>> average.add({"policy/entropy": 4.0, "ratio/max": 1.0}, tokens=2)
        >>> average.means()
        {'policy/entropy': 3.0, 'ratio/max': 2.0}
    """

    def __init__(self) -> None:
        self._sums: dict[str, float] = defaultdict(float)
        self._tokens: dict[str, float] = defaultdict(float)
        self._extremes: dict[str, float] = {}

    def join(self, other: Average) -> None:
        """Add all that was added to another one."""
        for name, total in other._sums.items():
            self._sums[name] += total
            self._tokens[name] += other._tokens[name]
        self.add(other._extremes, 1.0)

    def add(self, metrics: Mapping[str, SupportsFloat], tokens: float) -> None:
        """Add what was measured over so many tokens.

        Args:
            metrics: by the names they are logged under; scalar tensors are welcome.
            tokens: how many tokens each of them is the mean of.
        """
        for name, value in metrics.items():
            number, reduce = float(value), metric(name).reduce
            if reduce == "mean":
                self._sums[name] += number * tokens
                self._tokens[name] += tokens
                continue
            known = self._extremes.get(name, number)
            if math.isnan(known) or math.isnan(number):
                self._extremes[name] = math.nan
            else:
                self._extremes[name] = max(known, number) if reduce == "max" else min(known, number)

    def means(self) -> dict[str, float]:
        """The number of each metric that was added, means before extremes."""
        return {name: total / max(self._tokens[name], 1) for name, total in self._sums.items()} | self._extremes
