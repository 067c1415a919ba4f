"""The curves of a run as one picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from types import MappingProxyType

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from agents.metrics import METRICS, Metric
from llm_env.files import replace_file

INK, FAINT, GRID = "#2b2f36", "#6b7280", "#e5e7eb"
COLORS = ("#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed")
"""Blue, orange, green, red, purple: the lines of a panel by their order in the table of metrics."""

Limits = tuple[float | None, float | None]


@dataclass(frozen=True)
class Frame:
    """What is around the curves of a panel: its title, and limits of its axes (None follows the data)."""

    title: str
    left: Limits = (None, None)
    right: Limits = (None, None)


FRAMES: Mapping[str, Frame] = MappingProxyType(
    {
        "score": Frame("Reward, in training and held out"),
        "kl": Frame("KL (nats per token)"),
        "entropy": Frame("Entropy (nats per token)", left=(0.0, None)),
        # A critic that has just begun may be at minus a hundred; all that matters is above -1.
        "critic": Frame("Critic", left=(0.0, None), right=(-1.0, 1.02)),
        "length": Frame("Length (tokens)", left=(0.0, None), right=(0.0, 1.02)),
        "update": Frame("Policy update", left=(0.0, None), right=(0.0, None)),
    }
)
"""The panels in their order, by the name that `Metric.panel` gives; what they draw is in the table of metrics."""


@dataclass(frozen=True)
class _Line:
    metric: Metric
    color: str


@dataclass(frozen=True)
class _Panel:
    frame: Frame
    lines: tuple[_Line, ...]


def plot_curves(metrics: Sequence[dict[str, float]], path: Path, title: str) -> None:
    """Draw the curves of a run, against the tokens it has generated, as a PNG.

    The table of metrics says what is drawn where. Panels of which no metric was measured are left out. Noisy curves are
    drawn faint with their running mean on top.

    Args:
        metrics: one dict an iteration, as `agents.report.log.read_metrics` gives them.
        path: where the PNG goes; it replaces one that is there.
        title: above all panels.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "curves.png"
        >>> plot_curves([{"iteration": 1, "tokens": 100, "reward/mean": 0.5}], path, "A run of one iteration")
        >>> path.read_bytes()[1:4]
        b'PNG'
    """
    panels = [panel for panel in _panels() if _measured(panel, metrics)]
    columns = min(3, max(1, len(panels)))
    rows = max(1, math.ceil(len(panels) / columns))
    # Not through pyplot: it would keep the figure, and choose a backend for whoever imports us.
    figure = Figure(figsize=(4.6 * columns + 0.4, 3.2 * rows + 0.7), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=13, fontweight="bold", color=INK)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)  # type: ignore[union-attr, call-arg]
    for number, panel in enumerate(panels, start=1):
        _draw(panel, metrics, figure.add_subplot(rows, columns, number))
    if not panels:
        figure.text(0.5, 0.5, "no metrics yet", ha="center", color=FAINT)
    with replace_file(path) as new:
        figure.savefig(new, format="png")


def _panels() -> list[_Panel]:
    """All panels with all their lines: a metric has the same colour in every run, whatever else was measured."""
    names = dict.fromkeys([*FRAMES, *(entry.panel for entry in METRICS.values() if entry.panel is not None)])
    panels = []
    for name in names:
        entries = [entry for entry in METRICS.values() if entry.panel == name]
        lines = tuple(_Line(entry, color) for entry, color in zip(entries, cycle(COLORS), strict=False))
        panels.append(_Panel(FRAMES.get(name, Frame(name)), lines))
    return panels


def _measured(panel: _Panel, metrics: Sequence[dict[str, float]]) -> list[_Line]:
    return [line for line in panel.lines if _points(metrics, line.metric.name)[0]]


def _points(metrics: Sequence[dict[str, float]], name: str) -> tuple[list[float], list[float]]:
    """Where a metric was measured and what it was; the place is in tokens, or in iterations if those are unknown."""
    unit = _unit(metrics)
    points = [(row[unit], row[name]) for row in metrics if unit in row and math.isfinite(row.get(name, math.nan))]
    return [place for place, _ in points], [value for _, value in points]


def _unit(metrics: Sequence[dict[str, float]]) -> str:
    return "tokens" if all("tokens" in row for row in metrics) else "iteration"


def _draw(panel: _Panel, metrics: Sequence[dict[str, float]], axes: Axes) -> None:
    lines = _measured(panel, metrics)
    both = any(line.metric.right for line in lines) and any(not line.metric.right for line in lines)
    other = axes.twinx() if both else axes
    handles = []
    for line in lines:
        on = other if line.metric.right else axes
        places, values = _points(metrics, line.metric.name)
        smooth = len(values) > 20 and not line.metric.occasional
        style = "o" if line.metric.occasional or len(values) == 1 else ""
        (drawn,) = on.plot(
            places, values, color=line.color, lw=1.0 if smooth else 1.8, alpha=0.28 if smooth else 1, marker=style, ms=4
        )
        if smooth:
            (drawn,) = on.plot(places, _running_mean(values), color=line.color, lw=1.9)
        drawn.set_label(line.metric.label)
        handles.append(drawn)
    for on, limits, right in ((axes, panel.frame.left, False), (other, panel.frame.right, True)):
        if any(line.metric.right == right for line in lines):
            on.set_ylim(bottom=limits[0], top=limits[1])
    _dress(axes, panel.frame.title, _unit(metrics))
    if both:
        for line in lines:
            (other if line.metric.right else axes).tick_params(axis="y", colors=line.color)
        other.tick_params(length=0, labelsize=8)
        for spine in other.spines.values():
            spine.set_visible(False)
    labels = [
        f"{handle.get_label()} (right)" if line.metric.right and both else str(handle.get_label())
        for handle, line in zip(handles, lines, strict=True)
    ]
    axes.legend(handles, labels, fontsize=7.5, frameon=False, loc="lower left", bbox_to_anchor=(-0.02, 0.98), ncols=3)


def _dress(axes: Axes, title: str, unit: str) -> None:
    axes.set_title(title, fontsize=10, color=INK, loc="left", pad=20)
    axes.set_xlabel("tokens generated" if unit == "tokens" else "iterations", fontsize=8, color=FAINT)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlim(left=0)
    axes.grid(True, color=GRID, lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=8, colors=FAINT)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(GRID)


def _running_mean(values: Sequence[float]) -> list[float]:
    """The mean of each value with its neighbours on both sides: it does not lag behind the curve."""
    reach = max(3, len(values) // 25)
    around = [values[max(0, place - reach) : place + reach + 1] for place in range(len(values))]
    return [sum(near) / len(near) for near in around]
