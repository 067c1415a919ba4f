"""Files and folders that are there whole or not at all, whatever kills the process that writes them.

What is new is written beside the old under a hidden name, flushed to the disk, and only then renamed: a reader sees the
old or the new, never a part. The hidden names do not change, so what a killed process has left is found and deleted by
the next one that writes the same thing. Hence one process at a time may replace a file or a folder; several may make
one that is not there yet (`create_folder`).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

ABANDONED_AFTER = 24 * 3600.0
"""Seconds after which a folder that was never finished belongs to nobody: no model takes that long to build."""


@contextlib.contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Gives the path of a new file to write; at the end it takes the place of `path`, whatever was there.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as place:
        ...     with replace_file(Path(place) / "notes.txt") as new:
        ...         _ = new.write_text("all of it")
        ...     (Path(place) / "notes.txt").read_text(), len(list(Path(place).iterdir()))
        ('all of it', 1)
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    new.unlink(missing_ok=True)
    try:
        yield new
        sync(new)
        new.replace(path)
        sync(path.parent)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def write_rows(path: Path, rows: Iterable[Any]) -> None:
    """Write JSON lines, in the place of what was there.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as place:
        ...     write_rows(Path(place) / "rows.jsonl", [{"text": "a"}, {"text": "b"}])
        ...     (Path(place) / "rows.jsonl").read_text()
        '{"text": "a"}\\n{"text": "b"}\\n'
    """
    with replace_file(path) as new, new.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@contextlib.contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """Gives a new folder to fill; at the end it takes the place of `folder`, whatever was there.

    No system call of Python's swaps two folders: a process killed between the two renames leaves the old folder under
    a hidden name. The next one to replace it puts it back first.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as place:
        ...     with replace_folder(Path(place) / "model") as new:
        ...         _ = (new / "weights").write_text("1")
        ...     (Path(place) / "model" / "weights").read_text()
        '1'
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    new, old = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
    if old.exists() and not folder.exists():
        old.rename(folder)
    for left in (new, old):
        _remove(left)
    new.mkdir()
    try:
        yield new
        _sync_tree(new)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
        sync(folder.parent)
    except BaseException:
        _remove(new)
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise
    _remove(old)


@contextlib.contextmanager
def create_folder(folder: Path) -> Iterator[Path]:
    """Gives a new folder to fill, which becomes `folder` if that is not there by then.

    Several processes may do this at once: the first one's folder stays, and what the others made is deleted. A folder
    that a killed process has begun is deleted when it is a day old.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as place:
        ...     with create_folder(Path(place) / "model") as new:
        ...         _ = (new / "weights").write_text("1")
        ...     (Path(place) / "model" / "weights").read_text()
        '1'
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{folder.name}.creating-"
    for left in folder.parent.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process deletes it, too
            if left.name.startswith(prefix) and time.time() - left.stat().st_mtime > ABANDONED_AFTER:
                _remove(left)
    new = folder.with_name(f"{prefix}{uuid.uuid4().hex[:8]}")
    new.mkdir()
    try:
        yield new
        _sync_tree(new)
        try:
            new.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster, and its folder is as good
                raise
        sync(folder.parent)
    finally:
        _remove(new)


def sync(path: Path) -> None:
    """Wait until a file's contents, or the names in a folder, are on the disk."""
    posix = os.name == "posix"
    if path.is_dir() and not posix:
        return  # Windows does not open folders
    descriptor = os.open(path, os.O_RDONLY if posix else os.O_RDWR)  # Windows flushes only what may be written to
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
