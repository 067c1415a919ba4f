"""The curves: for each regime, the sampled score against tokens, and beneath it how much the critic explains."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from learning.algorithms import ALGORITHMS
from learning.regimes import Regime
from learning.report import Run, Runs, column
from learning.statistics import RESAMPLES, iqm

INK, GRID = "#2b2f36", "#e5e7eb"
COLORS = dict(
    zip(
        ALGORITHMS,
        (
            *("#2563eb", "#0891b2", "#0f766e", "#475569"),  # ppo, and ppo without this or that
            *("#7c3aed", "#db2777", "#65a30d", "#92400e", "#d97706"),
        ),
        strict=True,
    )
)
Array = npt.NDArray[np.float64]


def draw(regimes: Sequence[Regime], runs: Runs, path: Path) -> None:
    """A column for each regime that has runs: means of the middle seeds, and 95% intervals as bands."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import EngFormatter, MaxNLocator

    drawn = [regime for regime in regimes if any(runs.get(regime.name, {}).values())]
    if not drawn:
        return
    figure = Figure(figsize=(max(7.0, 2.8 * len(drawn) + 0.6), 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, len(drawn), sharey="row", sharex="col", height_ratios=(3, 1), squeeze=False)
    seen = list(dict.fromkeys(name for regime in drawn for name, done in runs[regime.name].items() if done))
    colors = {name: COLORS.get(name, f"C{place}") for place, name in enumerate(seen)}  # of `--rates` there are others
    for i, regime in enumerate(drawn):
        upper, lower = panels[:, i]
        for name, done in runs[regime.name].items():
            if not done:
                continue
            _line(upper, name, done, "sampled", regime.tokens, colors[name])
            if any(value is not None for run in done for value in column(run, "explained_variance")):
                _line(lower, name, done, "explained_variance", regime.tokens, colors[name])
        upper.axhline(regime.threshold, color=INK, linewidth=0.8, linestyle=(0, (2, 3)))
        upper.set_title(regime.name, color=INK, fontsize=11, loc="left")
        upper.set_ylim(-0.02, 1.02)
        lower.axhline(0, color=INK, linewidth=0.6)
        lower.set_ylim(-0.5, 1.02)
        lower.set_xlabel("tokens written", color=INK)
        lower.set_xlim(0, regime.tokens)
        lower.xaxis.set_major_formatter(EngFormatter(sep=""))
        lower.xaxis.set_major_locator(MaxNLocator(3))
        for panel in (upper, lower):
            panel.grid(color=GRID)
            panel.set_axisbelow(True)
            panel.tick_params(colors=INK, labelsize=9)
            panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("held-out score, sampled", color=INK)
    panels[1][0].set_ylabel("explained variance\nof the critic", color=INK)
    handles = [Line2D([], [], color=colors[n], linewidth=_width(n), label=n) for n in seen]
    figure.get_layout_engine().set(wspace=0.04)  # the last number of an axis and the first of the next
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False, labelcolor=INK)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _line(panel: Any, name: str, runs: Sequence[Run], what: str, tokens: int, color: str) -> None:
    grid = np.linspace(0, tokens, 101)
    heights = np.array([_on_grid(run, what, grid) for run in runs])
    begins = int(np.argmax(~np.isnan(heights).any(0)))  # the first point has no critic yet
    grid, heights = grid[begins:], heights[:, begins:]
    rows = np.random.default_rng(0).integers(len(runs), size=(RESAMPLES // 4, len(runs)))
    low, high = np.quantile(iqm(np.moveaxis(heights[rows], 1, -1)), [0.025, 0.975], axis=0)
    panel.fill_between(grid, low, high, color=color, alpha=0.12, linewidth=0)
    panel.plot(grid, iqm(heights.T), color=color, linewidth=_width(name), zorder=3 if name == "ppo" else 2)


def _on_grid(run: Run, what: str, grid: Array) -> Array:
    points = [(point["tokens"], point[what]) for point in run["points"] if point[what] is not None]
    if not points:
        return np.full(len(grid), np.nan)
    xs, ys = zip(*points, strict=True)
    return np.asarray(np.interp(grid, xs, ys, left=np.nan))


def _width(name: str) -> float:
    return 2.4 if name == "ppo" else 1.3
