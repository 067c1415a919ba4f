"""Runs beside each other as a table: those that differ in their seeds only are one row."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from agents.report.page import SAME, differing, gathered, last_of

FIGURES: Mapping[str, str] = {
    "eval/sampled": "held out, sampled",
    "eval/greedy": "held out, greedy",
    "reward/mean": "reward in training",
    "value/explained_variance": "explained",
    "policy/entropy": "entropy",
    "text/length": "length",
}
"""What is compared at the end of runs, where they have it."""
STUDENT = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
)
"""Of what a mean may be off, in standard errors, in 95 of 100 cases: of two values, of three, and so on."""


def compared(folders: Sequence[Path]) -> dict[str, Any]:
    """What the table says, as JSON can hold it.

    Returns:
        "differ": the settings in which rows differ, each with a value for each row; "rows": for each the "runs",
        "seeds", and "figures" at the end by their metrics: "mean", and with several runs "low" and "high", a 95%
        interval of the mean by Student's t; "first" is the mean of what there was before the first iteration.
    """
    found = gathered(folders, texts=False)
    groups: dict[str, list[tuple[dict[str, Any], dict[str, str]]]] = {}
    for run, settings in zip(found["runs"], found["settings"], strict=True):
        same = {name: value for name, value in settings.items() if name != "seed" and not name.startswith(SAME)}
        groups.setdefault(repr(sorted(same.items())), []).append((run, settings))
    rows = [
        {
            "runs": [run["folder"] for run, _ in group],
            "seeds": [settings["seed"] for _, settings in group],
            "iterations": [run["iterations"][-1] for run, _ in group],
            "minutes": float(np.mean([(_last(run, "time") or 0.0) / 60 for run, _ in group])),
            "figures": {name: _figure([run for run, _ in group], name) for name in FIGURES},
        }
        for group in groups.values()
    ]
    return {"differ": differing([group[0][1] for group in groups.values()], besides=("seed",)), "rows": rows}


def as_table(found: Mapping[str, Any]) -> str:
    """The same for a terminal."""
    rows, lines = found["rows"], []
    for number, row in enumerate(rows, start=1):
        seeds = f"seed {row['seeds'][0]}" if len(row["seeds"]) == 1 else f"{len(row['seeds'])} seeds"
        settings = ", ".join(f"{name} {values[number - 1]}" for name, values in found["differ"].items())
        done = f"{min(row['iterations'])} iterations, {row['minutes']:.1f} min"
        lines.append(f"{number}  {settings or Path(row['runs'][0]).name}   ({seeds}, {done})")
    lines += ["", f"{'':22}" + "".join(f"{number:>24}" for number in range(1, len(rows) + 1))]
    for name, label in FIGURES.items():
        cells = [_cell(row["figures"][name]) for row in rows]
        if any(cells):
            lines.append(f"{label:22}" + "".join(f"{cell:>24}" for cell in cells))
    if any(len(row["seeds"]) > 1 for row in rows):
        lines.append("\n[95% interval of the mean over seeds]")
    return "\n".join(lines)


def mean_of(values: Sequence[float]) -> dict[str, float]:
    """Their mean, and of several a 95% interval by Student's t.

    >>> {name: round(value, 3) for name, value in mean_of([1.0, 2.0, 3.0]).items()}
    {'mean': 2.0, 'low': -0.484, 'high': 4.484}
    """
    count, mean = len(values), float(np.mean(values))
    if count < 2:
        return {"mean": mean}
    quantile = STUDENT[count - 2] if count - 2 < len(STUDENT) else 1.96
    half = quantile * float(np.std(values, ddof=1)) / math.sqrt(count)
    return {"mean": mean, "low": mean - half, "high": mean + half}


def _figure(runs: Sequence[Mapping[str, Any]], name: str) -> dict[str, float] | None:
    ends = [_last(run, name) for run in runs]
    if any(value is None for value in ends):
        return None
    starts = [run["metrics"][name][0] for run in runs if run["iterations"][0] == 0]
    starts = [value for value in starts if value is not None]
    first = {"first": float(np.mean(starts))} if starts else {}
    return mean_of([value for value in ends if value is not None]) | first


def _last(run: Mapping[str, Any], name: str) -> float | None:
    return last_of(run["metrics"].get(name, []))


def _cell(figure: Mapping[str, float] | None) -> str:
    if figure is None:
        return ""
    first = f"{figure['first']:.3f} → " if "first" in figure else ""
    interval = f" [{figure['low']:.3f}, {figure['high']:.3f}]" if "low" in figure else ""
    return f"{first}{figure['mean']:.3f}{interval}"
