"""Folders of runs that are no `TrainConfig`'s: what a run was told lies in its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agents.config.files import ConfigError
from llm_env.files import replace_file


def claim(path: Path, told: Mapping[str, Any], resume: bool, free: tuple[str, ...] = ()) -> None:
    """Make a folder a run's own, or find that it is.

    Args:
        path: of the file in it that says what the run was told.
        told: that.
        resume: it has begun already, and may not be told otherwise.
        free: what it may be told otherwise.
    """
    folder, given = path.parent, json.loads(json.dumps(told, default=str))  # as JSON gives it back
    if path.is_file():
        if not resume:
            raise ConfigError(f"{folder} holds a run already: go on with it (--resume), or use another --out")
        before = json.loads(path.read_text())
        if changed := [name for name in given if given[name] != before.get(name) and name not in free]:
            raise ConfigError(f"{folder} was begun with another {', '.join(changed)}: use another --out")
    elif resume:
        raise ConfigError(f"there is no run to resume in {folder}: check --out, or leave out --resume")
    elif folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty: use another --out")
    folder.mkdir(parents=True, exist_ok=True)
    with replace_file(path) as new:
        new.write_text(json.dumps(given, indent=2) + "\n")
