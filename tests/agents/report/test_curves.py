"""The curves' picture: drawn from whatever was measured, and without side effects."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from agents.report.curves import PANELS, plot_curves

EVERYTHING = {line.metric: 0.5 for panel in PANELS for line in panel.lines}


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
    assert list(drawn) == [panel.title for panel in PANELS]
    for panel in PANELS:
        assert sorted(drawn[panel.title]) == sorted(line.label for line in panel.lines)
        for points in drawn[panel.title].values():
            assert points[-1] == [70 * length, pytest.approx(0.5)]
            assert len(points) == length


def test_what_was_not_measured_is_left_out(tmp_path: Path, figures: list[Figure]) -> None:
    rows = [{"iteration": i, "reward/mean": 0.1 * i, "kl/reference": math.nan} for i in range(4)]
    rows[2] |= {"eval/greedy": 0.9, "value/explained_variance": -50.0}
    rows[3]["reward/mean"] = math.inf
    plot_curves(rows, tmp_path / "curves.png", "title")
    assert panels(figures[0]) == {
        "Reward and held-out score": {"reward": [[0, 0], [1, 0.1], [2, 0.2]], "held out, greedy": [[2, 0.9]]},
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
