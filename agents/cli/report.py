"""`llm-env report`: one page of runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from agents.cli.options import flag_registry
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
