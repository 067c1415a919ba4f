"""One page of a run, or of several beside each other: a file that opens without a server or a network."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agents.config import TrainConfig
from agents.config.checks import flatten
from agents.config.files import ConfigError, load_config
from agents.metrics import METRICS
from agents.report.curves import FRAMES
from agents.report.log import TOKENS, WARNINGS, read_lines, read_machine, read_metrics
from llm_env.files import replace_file

REPORT = "report.html"
TEMPLATE = Path(__file__).with_name("page.html")
MOST_TEXTS = 200
"""Texts of a page, over all runs; of more, iterations are left out evenly."""
SAME = ("out", "log.", "checkpoint.")
"""Settings in which runs may differ without being different."""


def write_report(runs: Sequence[Path], path: Path) -> None:
    """Write the page of runs.

    Args:
        runs: their folders.
        path: of the page.
    """
    page = TEMPLATE.read_text(encoding="utf-8")
    found = gathered(runs)
    del found["settings"]
    title = ", ".join(run["name"] for run in found["runs"])
    places = {"title": html.escape(title), "table": table(found), "data": inert(found)}
    with replace_file(path) as new:
        # In one go: what fills one place is not taken for another.
        filled = re.sub(r"\{\{(title|table|data)\}\}", lambda place: places[place.group(1)], page)
        new.write_text(filled, encoding="utf-8", errors="xmlcharrefreplace")


def inert(data: Any) -> str:
    """JSON that can stand in a script element, whatever a model has written: no tag or comment can begin or end in it.

    >>> inert("</script>")
    '"\\\\u003c/script\\\\u003e"'
    """
    text = json.dumps(data, allow_nan=False, separators=(",", ":"), ensure_ascii=True)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def gathered(runs: Sequence[Path], texts: bool = True) -> dict[str, Any]:
    """What the page shows, as JSON can hold it, and the settings of each run."""
    found = [_run(folder, texts) for folder in runs]
    settings = [run.pop("settings") for run in found]
    defaults = {name: str(value) for name, value in flatten(TrainConfig())}
    for run, told in zip(found, settings, strict=True):
        run["told"] = {
            name: value for name, value in told.items() if value != defaults.get(name) and not name.startswith(SAME)
        }
    panels = [
        {
            "title": frame.title,
            "metrics": [
                {"name": metric.name, "label": metric.label, "meaning": metric.meaning, "right": metric.right}
                for metric in METRICS.values()
                if metric.panel == panel
            ],
        }
        for panel, frame in FRAMES.items()
    ]
    total = sum(len(run["texts"]) for run in found)
    for run in found:
        run["texts"] = thinned(run["texts"], math.ceil(MOST_TEXTS * len(run["texts"]) / max(1, total)))
    return {"runs": found, "different": differing(settings), "panels": panels, "settings": settings}


def differing(settings: Sequence[Mapping[str, str]], besides: tuple[str, ...] = ()) -> dict[str, list[str]]:
    """In which settings runs differ, with the value of each; but for those in which they may.

    >>> differing([{"seed": "0", "out": "a"}, {"seed": "1", "out": "b"}])
    {'seed': ['0', '1']}
    """
    names = dict.fromkeys(name for each in settings for name in each)
    values = {
        name: [each.get(name, "") for each in settings] for name in names if not name.startswith((*SAME, *besides))
    }
    return {name: of for name, of in values.items() if len(set(of)) > 1}


def last_of(values: Sequence[float | None]) -> float | None:
    """The last number of a metric that was measured now and then.

    >>> last_of([0.1, 0.2, None])
    0.2
    """
    return next((value for value in reversed(values) if value is not None), None)


def short(value: Any, most: int = 4000) -> Any:
    """What was written down of a text, without the middle of what is too long for a page.

    >>> short({"prompt": "abcdefgh"}, most=4)
    {'prompt': 'ab … (4 characters) … gh'}
    """
    if isinstance(value, str) and len(value) > most:
        half = most // 2
        return f"{value[:half]} … ({len(value) - 2 * half} characters) … {value[-half:]}"
    if isinstance(value, dict):
        return {name: short(inner, most) for name, inner in value.items()}
    return [short(inner, most) for inner in value] if isinstance(value, list) else value


def thinned(texts: list[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """Texts of fewer iterations, the first and the last among them.

    >>> [row["iteration"] for row in thinned([{"iteration": n} for n in range(9)], 3)]
    [0, 4, 8]
    """
    iterations = sorted({row["iteration"] for row in texts})
    each = len(texts) / max(1, len(iterations))
    count = max(1, int(most / each)) if texts else 0
    if count >= len(iterations):
        return texts
    kept = {iterations[round(place * (len(iterations) - 1) / max(1, count - 1))] for place in range(count)}
    return [row for row in texts if row["iteration"] in kept]


def table(found: dict[str, Any]) -> str:
    """The last numbers of each run and its texts, for readers without JavaScript."""
    lines = []
    for run in found["runs"]:
        lines.append(f"<h2>{html.escape(run['name'])}</h2><table><tr><th>metric</th><th>last</th></tr>")
        for name, values in run["metrics"].items():
            if (last := last_of(values)) is not None:
                lines.append(f"<tr><td>{html.escape(name)}</td><td>{last:.4g}</td></tr>")
        lines.append("</table><table><tr><th>iteration</th><th>score</th><th>prompt</th><th>text</th></tr>")
        for text in run["texts"]:
            cells = (text["iteration"], f"{text['score']:.4g}", text["prompt"], "".join(text["tokens"]))
            lines.append("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in cells) + "</tr>")
        lines.append("</table>")
    return "\n".join(lines)


def _run(folder: Path, texts: bool) -> dict[str, Any]:
    saved = folder / "config.yaml"
    rows = [row for row in read_metrics(folder) if "iteration" in row]
    if not saved.is_file() or not rows:
        raise ConfigError(f"there is no run with a log in {folder}: expected the folder of llm-env train (--out)")
    names = list(dict.fromkeys(name for row in rows for name in row if name != "iteration"))
    metrics = {name: [_number(row.get(name, math.nan)) for row in rows] for name in names}
    return {
        "name": folder.name,
        "folder": str(folder),
        "settings": {name: str(value) for name, value in flatten(load_config(saved))},
        "iterations": [int(row["iteration"]) for row in rows],
        "metrics": metrics,
        "texts": [short(row) for row in read_lines(folder, TOKENS)] if texts else [],
        "warnings": read_lines(folder, WARNINGS),
        "machine": read_machine(folder),
    }


def _number(value: float) -> float | None:
    return float(f"{value:.5g}") if math.isfinite(value) else None
