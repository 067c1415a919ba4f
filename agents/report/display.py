"""What a run shows while it goes: a live panel in a terminal, plain lines everywhere else."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from agents.metrics import metric
from agents.report.readout import number_columns, phases, plain_numbers
from agents.report.text import literal, literal_lines, sample_line, short

Number = float | str | None

PLAIN_LINES = 50
"""About how many plain lines a run prints."""


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
        ...     sample = {"prompt": "ab>", "transcript": "[b]", "reward": 0.5}
        ...     display.update({"iteration": 1, "reward/mean": 0.25}, [sample])
        ...     display.warn("All rewards are equal.")
        1/2  reward 0.25
          sample (reward 0.5): ab> | [b]
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
        # What is measured now and then is shown until it is measured again; all else is of this iteration.
        self._latest = {name: value for name, value in self._latest.items() if metric(name).occasional} | known
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
            samples: some rollouts, each with `prompt`, `transcript` and `score`.
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
        every = max(1, math.ceil(self.total / PLAIN_LINES))
        occasional = any(metric(name).occasional for name in known)
        if self._done % every == 0 or self._done in (1, self.total) or occasional or samples:
            self._print(Text(self._literal(f"{self._done}/{self.total}  {plain_numbers(known)}")))
        for sample in samples[:2]:
            self._print(self._sample_line(sample))

    def _panel(self) -> RenderableType:
        parts: list[RenderableType] = [self._progress]
        # This runs in the display's own thread: each look takes the numbers once.
        latest, sample = self._latest, self._sample
        if latest:
            parts += [Text(), number_columns(latest, self._history, self.console.encoding)]
        if line := phases(latest):
            parts += [Text(), Text(self._literal(line), style="dim")]
        if sample is not None:
            parts += [Text(), self._sample_line(sample)]
        return Panel(Group(*parts), title=Text(self._literal(self.title)), border_style="blue", padding=(0, 1))

    def _value(self, value: Number, style: str = "") -> Text:
        shown = "" if value is None else self._literal(value) if isinstance(value, str) else short(value)
        return Text(shown, style=style)

    def _sample_line(self, sample: Mapping[str, Any]) -> Text:
        return sample_line(sample, self.console.encoding)

    def _lines(self, text: str) -> str:
        return literal_lines(text, self.console.encoding)

    def _literal(self, text: str) -> str:
        return literal(text, self.console.encoding)
