"""The table of metrics as text, for whoever reads a log."""

from __future__ import annotations

import textwrap

from agents.metrics.entry import Metric
from agents.metrics.table import FAMILIES, METRICS

WIDTH = 118


def list_of_metrics() -> str:
    """Every metric under its group: its name, and what it means.

    Examples:
        >>> [line for line in list_of_metrics().splitlines() if "ratio/max" in line]
        ["  ratio/max                   Largest ratio of a token's new to its old probability."]
    """
    groups: dict[str, list[Metric]] = {}
    for entry in [*METRICS.values(), *FAMILIES]:
        groups.setdefault(entry.group, []).append(entry)
    return "\n\n".join("\n".join([group, *map(_line, members)]) for group, members in groups.items())


def _line(entry: Metric) -> str:
    text = entry.meaning if entry.needs is None else f"{entry.meaning} Needs {entry.needs}."
    indent = " " * 30
    wrapped = textwrap.wrap(text, WIDTH - len(indent), break_on_hyphens=False)
    return f"  {entry.name:<27} " + f"\n{indent}".join(wrapped)
