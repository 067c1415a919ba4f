"""The curves' picture: drawn from whatever was measured, and without side effects."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from agents.metrics import Metric, register_metric
from agents.metrics.built_in import BUILT_IN
from agents.report.curves import FRAMES, plot_curves

EVERYTHING = {entry.name: 0.5 for entry in BUILT_IN if entry.panel is not None}


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved."""
    seen: list[Figure] = []
    save = Figure.savefig

    def spy(figure: Figure, *arguments: object, **options: object) -> None:
        seen.append(figure)
        save(figure, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Figure, "savefig", spy)
    return seen


def panels(figure: Figure) -> dict[str, dict[str, list[list[float]]]]:
    """Panel -> label of the line -> its points."""
    drawn: dict[str, dict[str, list[list[float]]]] = {}
    title = ""
    for axes in figure.axes:  # a right-hand axis follows the left one
        title = axes.get_title(loc="left") or title
        for line in axes.lines:
            if not str(line.get_label()).startswith("_"):
                drawn.setdefault(title, {})[str(line.get_label())] = line.get_xydata().tolist()  # type: ignore[union-attr]
    return drawn


@pytest.mark.parametrize("length", [1, 2, 200])
def test_all_is_drawn_against_tokens(tmp_path: Path, figures: list[Figure], length: int) -> None:
    path = tmp_path / "folder" / "curves.png"
    plot_curves([{"iteration": i, "tokens": 70 * i, **EVERYTHING} for i in range(1, length + 1)], path, "title")
    assert imread(path).shape[1] > imread(path).shape[0] > 300
    assert [p.name for p in path.parent.iterdir()] == ["curves.png"]
    drawn = panels(figures[0])
    assert drawn.keys() == {frame.title for frame in FRAMES.values()}
    assert {title: list(lines) for title, lines in drawn.items()} == {
        "Reward, in training and held out": ["reward", "held out, sampled", "held out, greedy"],
        "KL (nats per token)": ["KL to reference", "KL to old"],
        "Entropy (nats per token)": ["entropy"],
        "Critic": ["value loss", "explained variance"],
        "Length (tokens)": ["length", "share cut off"],
        "Policy update": ["gradient norm", "clip fraction"],
    }
    for lines in drawn.values():
        for points in lines.values():
            assert points[-1] == [70 * length, pytest.approx(0.5)]
            assert len(points) == length


@pytest.mark.usefixtures("own_metrics")
def test_ones_own_metrics_are_drawn_where_they_say(tmp_path: Path, figures: list[Figure]) -> None:
    register_metric(Metric(name="my/depth", label="depth", meaning="Deepest bracket.", panel="length"))
    register_metric(Metric(name="my/rhymes", label="rhymes", meaning="Share of lines that rhyme.", panel="Poetry"))
    register_metric(Metric(name="my/verses", label="verses", meaning="Verses a text.", panel="Poetry", right=True))
    register_metric(Metric(name="my/secret", label="secret", meaning="Drawn nowhere."))
    row = {"iteration": 1, "text/length": 8.0, "my/depth": 2.0, "my/rhymes": 0.5, "my/verses": 3.0, "my/secret": 1.0}
    plot_curves([row], tmp_path / "curves.png", "title")
    assert panels(figures[0]) == {
        "Length (tokens)": {"length": [[1, 8.0]], "depth": [[1, 2.0]]},
        "Poetry": {"rhymes": [[1, 0.5]], "verses": [[1, 3.0]]},
    }


def test_a_curve_keeps_its_colour_whatever_else_was_measured(tmp_path: Path, figures: list[Figure]) -> None:
    plot_curves([{"iteration": 1, "kl/old": 0.5}], tmp_path / "curves.png", "title")
    plot_curves([{"iteration": 1, "kl/old": 0.5, "kl/reference": 0.5}], tmp_path / "curves.png", "title")
    alone, beside = figures[0].axes[0].lines[0], figures[1].axes[0].lines[1]
    assert (alone.get_label(), alone.get_color()) == (beside.get_label(), beside.get_color())


def test_what_was_not_measured_is_left_out(tmp_path: Path, figures: list[Figure]) -> None:
    rows = [{"iteration": i, "reward/mean": 0.1 * i, "kl/reference": math.nan} for i in range(4)]
    rows[2] |= {"eval/greedy": 0.9, "value/explained_variance": -50.0}
    rows[3]["reward/mean"] = math.inf
    plot_curves(rows, tmp_path / "curves.png", "title")
    assert panels(figures[0]) == {
        "Reward, in training and held out": {"reward": [[0, 0], [1, 0.1], [2, 0.2]], "held out, greedy": [[2, 0.9]]},
        "Critic": {"explained variance": [[2, -50.0]]},
    }


def test_nothing_to_draw(tmp_path: Path) -> None:
    plot_curves([], tmp_path / "none.png", "title")
    plot_curves([{"iteration": 1}], tmp_path / "none.png", "title")
    assert imread(tmp_path / "none.png").size


def test_pyplot_is_left_alone(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib, agents.report.curves\n"
        "agents.report.curves.plot_curves([{'iteration': 1, 'reward/mean': 1.0}], pathlib.Path(sys.argv[1]), 'title')\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "curves.png")], check=True)
