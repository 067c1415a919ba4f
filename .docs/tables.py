"""Fills tables of the documentation from the registries, so that they never differ: `{{ metrics }}` and its like."""

from __future__ import annotations

import ast
import inspect
import itertools
import re
import textwrap
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from agents import PRESETS, TrainConfig, algorithm_names
from agents.cli.main import USAGE
from agents.metrics.table import FAMILIES, METRICS
from llm_env import task_names
from rewards import reward_names


def _metrics() -> str:
    groups: dict[str, list[str]] = {}
    for entry in [*METRICS.values(), *FAMILIES]:
        meaning = entry.meaning if entry.needs is None else f"{entry.meaning} Needs {entry.needs}."
        groups.setdefault(entry.group, []).append(f"| `{entry.name}` | {meaning} |")
    return "\n\n".join(f"## {group}\n\n| | |\n|---|---|\n" + "\n".join(rows) for group, rows in groups.items())


def _presets() -> str:
    rows = [f"| `{name}` | {preset.description} |" for name, preset in PRESETS.items()]
    return "\n".join(["| preset | |", "|---|---|", *rows])


def _settings() -> str:
    tables: list[str] = []

    def add(config: Any, prefix: str) -> None:
        meanings, rows, inner = _said(type(config)), [], []
        for each in fields(config):
            value, flag = getattr(config, each.name), f"{prefix}{each.name}".replace("_", "-")
            if is_dataclass(value):
                inner.append((value, f"{flag}."))
            else:
                rows.append(f"| `--{flag}` | `{value}` | {meanings.get(each.name, '')} |")
        title = (
            f"## {prefix.removesuffix('.')}\n\n{(type(config).__doc__ or '').splitlines()[0]}" if prefix else "## run"
        )
        tables.append("\n".join([f"{title}\n", "| flag | default | |", "|---|---|---|", *rows]))
        for value, flags in inner:
            add(value, flags)

    add(TrainConfig(), "")
    return "\n\n".join(tables)


def _said(kind: type) -> dict[str, str]:
    """What the text under each field of a dataclass says."""
    [body] = [node.body for node in ast.parse(textwrap.dedent(inspect.getsource(kind))).body if hasattr(node, "body")]
    said = {}
    for field, text in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            said[ast.unparse(field.target)] = " ".join(str(text.value.value).split()).replace("|", "\\|")
    return said


def _names(names: Any) -> str:
    return ", ".join(f"`{name}`" for name in names)


TABLES = {
    "metrics": _metrics,
    "presets": _presets,
    "settings": _settings,
    "usage": lambda: f"```text\n{USAGE}```",
    "tasks": lambda: _names(task_names()),
    "rewards": lambda: _names(reward_names()),
    "algorithms": lambda: _names(algorithm_names()),
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The pictures of the README are at hand for pages, too."""
    for path in sorted((Path(__file__).parents[1] / ".pictures").iterdir()):
        files.append(File.generated(config, f"pictures/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """What mkdocs calls for each page."""
    return re.sub(r"\{\{ (\w+) \}\}", lambda found: TABLES[found[1]](), markdown)
