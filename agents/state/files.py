"""Folders that are there as a whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """Gives a new folder to fill; at the end it takes the place of `folder`, whatever was there.

    A process killed meanwhile leaves the old one, or (between two renames) none, but never half a folder. What it has
    left aside is deleted the next time. One process at a time may replace a folder.

    Examples:
        >>> with tempfile.TemporaryDirectory() as place:
        ...     with replace_folder(Path(place) / "model") as aside:
        ...         _ = (aside / "weights").write_text("1")
        ...     (Path(place) / "model" / "weights").read_text()
        '1'
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f".{folder.name}-*"):
        shutil.rmtree(left)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield aside
        aside.chmod(0o755)
        old = aside.with_name(aside.name + "-old")
        if folder.exists():
            os.rename(folder, old)
        os.rename(aside, folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
