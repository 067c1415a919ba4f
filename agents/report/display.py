"""What a run shows while it goes: a live panel in a terminal, plain lines everywhere else."""

from __future__ import annotations

import math
import unicodedata
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

Number = float | str | None

GROUPS: dict[str, dict[str, str]] = {
    "score": {
        "reward/mean": "reward",
        "reward/std": "deviation",
        "eval/sampled": "held out, sampled",
        "eval/greedy": "held out, greedy",
        "reward/failures": "failures",
    },
    "policy": {
        "kl/reference": "KL to reference",
        "kl/old": "KL to old",
        "policy/clip_fraction": "clip fraction",
        "policy/entropy": "entropy",
        "policy/gradient_norm": "gradient norm",
    },
    "critic": {
        "value/loss": "value loss",
        "value/explained_variance": "explained variance",
        "value/gradient_norm": "gradient norm",
    },
    "texts": {
        "text/length": "length",
        "text/truncated": "truncated",
        "text/distinct_2": "distinct pairs",
        "speed/rollout_tokens_per_s": "written tokens/s",
        "speed/update_tokens_per_s": "learned tokens/s",
        "guard/skipped": "steps skipped",
    },
}
"""What is watched, by its name in the metrics. Those that are missing are left out."""

QUIET_ZEROS = frozenset({"reward/failures", "guard/skipped"})
"""Shown only if something has happened."""

SHORT = {
    "reward/mean": "reward",
    "eval/sampled": "held-out sampled",
    "eval/greedy": "held-out greedy",
    "kl/reference": "kl",
    "policy/clip_fraction": "clipped",
    "policy/entropy": "entropy",
    "value/explained_variance": "explained",
    "text/length": "length",
    "text/truncated": "truncated",
    "speed/rollout_tokens_per_s": "written/s",
    "speed/update_tokens_per_s": "learned/s",
    "time/total": "seconds",
}
"""What a plain line says."""

PLAIN_LINES = 50
"""About how many plain lines a run prints."""
BARS = "▁▂▃▄▅▆▇█"
LONGEST = 400
"""Characters of a sample that are shown."""


class Display:
    """Shows how a run goes.

    In a terminal this is a panel that stays in place; else one line for each iteration, or for about fifty of a long
    run and for every evaluation. Texts are shown literally: markup and control characters in them do nothing.

    Args:
        total: how many iterations there will be.
        title: what is running.
        enabled: False shows warnings only.
        start: the iterations that an earlier process has done.
        console: where to write; by default the standard output.

    Examples:
        >>> with Display(2, "demo", enabled=True, console=Console(width=80, force_terminal=False)) as display:
        ...     display.phase("writing texts")
        ...     display.update({"iteration": 1, "reward/mean": 0.25}, [{"prompt": "ab>", "text": "[b]a", "score": 0.5}])
        ...     display.warn("All rewards are equal.")
        1/2  reward 0.25
          sample (score 0.5): ab> | [b]a
        warning: All rewards are equal.
    """

    def __init__(
        self, total: int, title: str, enabled: bool = True, start: int = 0, console: Console | None = None
    ) -> None:
        self.total = total
        self.title = title
        self.enabled = enabled
        self.console = console or Console()
        self._live: Live | None = None
        self._done = start
        self._latest: dict[str, float] = {}
        self._history: dict[str, deque[float]] = {}
        self._sample: Mapping[str, Any] | None = None
        # A long window for the speed: an iteration may take minutes, and evaluations come only now and then.
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", style="cyan", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("·"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=self.console,
            speed_estimate_period=1800.0,
            expand=True,
        )
        self._task = self._progress.add_task("starting", total=total, completed=start)

    def __enter__(self) -> Display:
        # An ASCII or dumb terminal gets lines.
        if self.enabled and self.console.is_interactive and not self.console.options.ascii_only:
            self._live = Live(get_renderable=self._panel, console=self.console, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def phase(self, name: str) -> None:
        """Say what is going on, such as "writing texts"."""
        self._progress.update(self._task, description=name)

    def update(self, metrics: Mapping[str, float], samples: Sequence[Mapping[str, Any]] | None = None) -> None:
        """Show the numbers of an iteration that has ended, and some texts of it if there are any."""
        self._done = int(metrics.get("iteration", self._done + 1))
        known = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        for name, value in known.items():
            self._history.setdefault(name, deque(maxlen=30)).append(value)
        # An evaluation is shown until there is a newer one; all else is of this iteration.
        self._latest = {name: value for name, value in self._latest.items() if name.startswith("eval/")} | known
        self._sample = samples[0] if samples else self._sample
        self._progress.update(self._task, completed=self._done)
        if self.enabled and self._live is None:
            self._print_plain(known, samples or ())

    def message(self, text: str) -> None:
        """A line that stays."""
        if self.enabled:
            self._print(Text(self._lines(text)))

    def warn(self, text: str) -> None:
        """A warning that stays; it is printed even if the display is off."""
        self._print(Text.assemble(("warning: ", "bold yellow"), (self._lines(text), "yellow")))

    def summary(
        self,
        title: str,
        rows: Sequence[tuple[str, Number, Number]],
        samples: Sequence[Mapping[str, Any]],
        paths: Mapping[str, Path | str],
    ) -> None:
        """The report at the end of a run.

        Args:
            title: its headline.
            rows: name, before and after of each number; None leaves a place empty.
            samples: some rollouts, each with `prompt`, `text` and `score`.
            paths: what lies where, such as `{"model": out / "model", "curves": out / "curves.png"}`.
        """
        self._stop()
        if not self.enabled:
            return
        self._print(Text("\n" + self._literal(title), style="bold"))
        if rows:
            table = Table("", "before", "after", box=None, padding=(0, 3, 0, 0), header_style="dim")
            for column in table.columns[1:]:
                column.justify = "right"
            for name, before, after in rows:
                table.add_row(Text(self._literal(name)), self._value(before), self._value(after, style="bold"))
            self.console.print(table, highlight=False)
        for sample in samples:
            self._print(self._sample_line(sample))
        width = max(map(len, paths), default=0)
        for name, path in paths.items():
            self._print(Text.assemble((f"{self._literal(name):<{width}}  ", "dim"), self._literal(str(path))))

    def _stop(self) -> None:
        if self._live is not None:
            live, self._live = self._live, None
            live.stop()

    def _print(self, text: Text) -> None:
        # A file gets whole lines, for whoever searches it.
        self.console.print(text, highlight=False, soft_wrap=not self.console.is_terminal)

    def _print_plain(self, known: Mapping[str, float], samples: Sequence[Mapping[str, Any]]) -> None:
        every = math.ceil(self.total / PLAIN_LINES)
        evaluated = any(name.startswith("eval/") for name in known)
        if self._done % every == 0 or self._done in (1, self.total) or evaluated or samples:
            shown = {label: known[name] for name, label in SHORT.items() if name in known} or _others(known)
            numbers = "  ".join(f"{label} {_short(value)}" for label, value in shown.items())
            self._print(Text(self._literal(f"{self._done}/{self.total}  {numbers}")))
        for sample in samples[:2]:
            self._print(self._sample_line(sample))

    def _panel(self) -> RenderableType:
        parts: list[RenderableType] = [self._progress]
        # This runs in the display's own thread: each look takes the numbers once.
        latest, sample = self._latest, self._sample
        if latest:
            parts += [Text(), self._numbers(latest)]
        phases = [
            f"{name.removeprefix('time/')} {_short(value)} s" for name, value in latest.items() if _is_phase(name)
        ]
        if phases:
            parts += [Text(), Text(" · ".join(phases), style="dim")]
        if sample is not None:
            parts += [Text(), self._sample_line(sample)]
        return Panel(Group(*parts), title=Text(self._literal(self.title)), border_style="blue", padding=(0, 1))

    def _numbers(self, latest: Mapping[str, float]) -> Columns:
        groups = {title: dict(labels) for title, labels in GROUPS.items()}
        watched = {name for labels in groups.values() for name in labels}
        # The parts that a reward is made of are the task's own.
        groups["score"] |= {
            name: name.removeprefix("reward/") for name in latest if name.startswith("reward/") and name not in watched
        }
        if not any(name in latest for labels in groups.values() for name in labels):
            groups = {"numbers": {name: name for name in _others(latest)}}
        tables = []
        for title, labels in groups.items():
            table = Table.grid(padding=(0, 1))
            table.add_row(Text(title, style="bold blue"))
            for name, label in labels.items():
                value = latest.get(name)
                if value is None or (not value and name in QUIET_ZEROS):
                    continue
                history = self._history[name]
                table.add_row(Text(self._literal(label), style="dim"), Text(_short(value)), _arrow(list(history)))
                if name == "reward/mean" and len(history) > 1:
                    table.add_row(Text("", style="dim"), Text(_sparkline(list(history)), style="green"))
            if table.row_count > 1:
                tables.append(table)
        return Columns(tables, padding=(0, 4))

    def _sample_line(self, sample: Mapping[str, Any]) -> Text:
        score = sample.get("score")
        prompt, text = self._literal(str(sample.get("prompt", ""))), self._literal(str(sample.get("text", "")))
        # Of a long prompt the end matters most, of a long text its beginning.
        prompt = prompt if len(prompt) <= LONGEST else "..." + prompt[-LONGEST:]
        text = text if len(text) <= LONGEST else text[:LONGEST] + "..."
        return Text.assemble(
            ("  sample" if score is None else f"  sample (score {_short(float(score))})", "cyan"),
            ": ",
            (prompt, "dim"),
            (" | ", "cyan"),
            text,
        )

    def _value(self, value: Number, style: str = "") -> Text:
        shown = "" if value is None else self._literal(value) if isinstance(value, str) else _short(value)
        return Text(shown, style=style)

    def _lines(self, text: str) -> str:
        return "\n".join(map(self._literal, text.split("\n")))

    def _literal(self, text: str) -> str:
        """One line in which every character can be seen: what would move the cursor is written as its escape."""
        shown = "".join(
            char if char.isprintable() or unicodedata.category(char) == "Zs" else char.encode("unicode_escape").decode()
            for char in text
        )
        return shown.encode(self.console.encoding, "backslashreplace").decode(self.console.encoding)


def _is_phase(name: str) -> bool:
    return name.startswith("time/") and name != "time/total"


def _others(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if name not in ("iteration", "time") and not _is_phase(name)}


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


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
