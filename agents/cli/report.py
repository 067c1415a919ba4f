"""`llm-env report`, `compare` and `watch`: runs as a page, as a table, and as they go."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from agents.cli.options import flag_registry
from agents.report.compare import as_table, compared
from agents.report.page import REPORT, write_report


@dataclass(frozen=True)
class ReportOptions:
    """What the command is told."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs, which may still go on."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="PAGE.html")] = None
    """Where to write the page; by default into the folder of the first run."""
    traceback: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Show where in the program an error came from."""


@dataclass(frozen=True)
class CompareOptions:
    """What `compare` is told."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs. Those that differ in their seeds only are one row, with an interval."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON object in place of the table."""
    traceback: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Show where in the program an error came from."""


@dataclass(frozen=True)
class WatchOptions:
    """What `watch` is told."""

    run: tyro.conf.Positional[Path]
    """The folder of a run, which goes on in another process."""
    traceback: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Show where in the program an error came from."""


def compare(arguments: Sequence[str]) -> None:
    """Compare runs."""
    options = tyro.cli(
        CompareOptions,
        args=arguments,
        prog="llm-env compare",
        description="Runs beside each other: in which settings they differ, and what they have come to.",
        registry=flag_registry(),
    )
    if not options.runs:
        raise ValueError("which runs? Give their folders: llm-env compare runs/one runs/other")
    found = compared(options.runs)
    print(json.dumps(found) if options.json else as_table(found))


def watch(arguments: Sequence[str]) -> None:
    """Follow a run."""
    options = tyro.cli(
        WatchOptions,
        args=arguments,
        prog="llm-env watch",
        description="Follow a run of another process, until its end or Ctrl-C; the run itself goes on.",
        registry=flag_registry(),
    )
    from agents.run.follow import follow

    follow(options.run)


def report(arguments: Sequence[str]) -> None:
    """Run the command."""
    options = tyro.cli(
        ReportOptions,
        args=arguments,
        prog="llm-env report",
        description="One page of a run, or of several beside each other: curves, and texts token by token. It opens "
        "without a server.",
        registry=flag_registry(),
    )
    if not options.runs:
        raise ValueError("which run? Give the folder of one, or of several: llm-env report runs/one runs/other")
    path = options.out or options.runs[0] / REPORT
    write_report(options.runs, path)
    print(path)
