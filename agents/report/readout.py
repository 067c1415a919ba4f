"""The numbers of an iteration, as the table of metrics says: in columns for a terminal, on one line for a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.columns import Columns
from rich.table import Table
from rich.text import Text

from agents.metrics import METRICS, Metric, described
from agents.report.text import literal, short

HEADLINE = "reward/mean"
"""The metric whose history is drawn beneath it."""

PHASES = "phases"
"""The column that is written as one line: it says where the time went."""

BARS = "▁▂▃▄▅▆▇█"


def plain_numbers(metrics: Mapping[str, float]) -> str:
    """Label and value of those metrics that are short enough to have a place on a plain line.

    Examples:
        >>> plain_numbers({"iteration": 3, "reward/mean": 0.25, "ratio/max": 1.5, "kl/reference": 0.0123})
        'reward 0.25  kl 0.0123'
    """
    entries = described(metrics)
    shown = {entry.short: metrics[entry.name] for entry in entries if entry.short is not None}
    shown = shown or {entry.label: metrics[entry.name] for entry in _unknown(entries)}
    return "  ".join(f"{label} {short(value)}" for label, value in shown.items())


def phases(metrics: Mapping[str, float]) -> str:
    """Where the time went.

    Examples:
        >>> phases({"time/rollout": 0.35, "time/update": 0.5, "time/total": 0.9})
        'rollout 0.35 s · update 0.5 s'
    """
    entries = [entry for entry in described(metrics) if entry.column == PHASES]
    return " · ".join(f"{entry.label} {short(metrics[entry.name])} s" for entry in entries)


def number_columns(
    latest: Mapping[str, float], history: Mapping[str, Sequence[float]], encoding: str = "utf-8"
) -> Columns:
    """The metrics of an iteration, side by side in their columns, each with an arrow that says where it is going.

    Args:
        latest: the newest value of each metric.
        history: its values of the last iterations, the newest last.
        encoding: what the terminal can show.
    """
    entries = described(latest)
    columns: dict[str, list[Metric]] = {}
    for entry in entries:
        if entry.column not in (None, PHASES):
            columns.setdefault(entry.column, []).append(entry)
    tables = []
    for title, members in (columns or {"numbers": _unknown(entries)}).items():
        table = Table.grid(padding=(0, 1))
        table.add_row(Text(literal(title, encoding), style="bold blue"))
        for entry in members:
            value, values = latest[entry.name], list(history[entry.name])
            if entry.quiet and not value:
                continue
            table.add_row(Text(literal(entry.label, encoding), style="dim"), Text(short(value)), _arrow(values))
            if entry.name == HEADLINE and len(values) > 1:
                table.add_row(Text("", style="dim"), Text(_sparkline(values), style="green"))
        if table.row_count > 1:
            tables.append(table)
    return Columns(tables, padding=(0, 4))


def _unknown(entries: Sequence[Metric]) -> list[Metric]:
    """Metrics that nobody has described: shown where there is nothing else."""
    return [entry for entry in entries if entry.name not in METRICS and entry.column is None]


def _arrow(history: Sequence[float]) -> Text:
    """Where the newest value lies beside the few before it, by the measure of how much it moves anyway."""
    if len(history) < 3:
        return Text(" ")  # a column without width would take it from its neighbours
    before = history[-6:-1]
    change, spread = history[-1] - sum(before) / len(before), max(history) - min(history)
    if abs(change) <= 0.1 * spread:
        return Text("→", style="dim")
    return Text("↗" if change > 0 else "↘")


def _sparkline(history: Sequence[float]) -> str:
    newest = history[-16:]
    low, high = min(newest), max(newest)
    steps = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((value - low) * steps)] for value in newest)
