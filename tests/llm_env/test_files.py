"""Files and folders are replaced whole or not at all, whatever kills the process."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from llm_env.files import ABANDONED_AFTER, create_folder, replace_file, replace_folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fill(folder: Path, text: str) -> None:
    (folder / "inner").mkdir()
    (folder / "inner" / "one").write_text(text)
    (folder / "two").write_text(text)


def read(folder: Path) -> str:
    texts = {(folder / "inner" / "one").read_text(), (folder / "two").read_text()}
    assert len(texts) == 1, "half of the old and half of the new"
    return texts.pop()


def fail(_: object) -> None:
    raise ZeroDivisionError


def test_a_file_is_made_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "made" / "on the way" / "notes.txt"
    for text in ("first", "second"):
        with replace_file(path) as new:
            new.write_text(text)
            assert not path.exists() or path.read_text() == "first", "the old one stays until the new one is whole"
        assert (path.read_text(), names(path.parent)) == (text, ["notes.txt"])


def test_a_folder_is_made_and_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "model"
    for text in ("first", "second"):
        with replace_folder(folder) as new:
            fill(new, text)
        assert (read(folder), names(folder.parent)) == (text, ["model"])


def test_an_error_leaves_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(ZeroDivisionError), replace_file(tmp_path / "file") as new:
        fail(new.write_text("half"))
    with pytest.raises(FileNotFoundError), replace_file(tmp_path / "file"):
        pass  # nothing was written
    with replace_folder(tmp_path / "folder") as new:
        fill(new, "old")
    with pytest.raises(ZeroDivisionError), replace_folder(tmp_path / "folder") as new:
        fail((new / "half").write_text("half"))
    with pytest.raises(ZeroDivisionError), create_folder(tmp_path / "other") as new:
        fail((new / "half").write_text("half"))
    assert names(tmp_path) == ["file", "folder"]
    assert ((tmp_path / "file").read_text(), read(tmp_path / "folder")) == ("old", "old")


def test_what_belongs_to_others_is_left_alone(tmp_path: Path) -> None:
    """Names that begin or end alike are no leftovers."""
    for name in (".model-large.new", ".model.new.txt", "model.new", ".a.model.new"):
        (tmp_path / name).write_text("mine")
    before = names(tmp_path)
    with replace_folder(tmp_path / "model") as new:
        fill(new, "1")
    assert names(tmp_path) == sorted([*before, "model"])


def test_of_several_that_create_a_folder_the_first_one_stays(tmp_path: Path) -> None:
    """All begin before any ends."""
    folder, everyone = tmp_path / "cache" / "model", threading.Barrier(4)

    def create(text: str) -> None:
        with create_folder(folder) as new:
            fill(new, text)
            everyone.wait()

    threads = [threading.Thread(target=create, args=(str(number),)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read(folder) in {"0", "1", "2", "3"}
    assert names(folder.parent) == ["model"]


def test_a_folder_that_nobody_finishes_is_deleted_after_a_day(tmp_path: Path) -> None:
    old, young = (tmp_path / f".model.creating-{name}" for name in ("old", "young"))
    for left in (old, young):
        left.mkdir()
        (left / "half").write_text("a model")
    long_ago = old.stat().st_mtime - ABANDONED_AFTER - 60
    os.utime(old, (long_ago, long_ago))
    with create_folder(tmp_path / "model") as new:
        fill(new, "1")
    assert names(tmp_path) == [young.name, "model"]


def test_a_folder_cannot_take_the_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("a file")
    with pytest.raises(OSError, match="model"), create_folder(tmp_path / "model") as new:
        fill(new, "1")
    assert names(tmp_path) == ["model"]


EVERY_KILL = """
import itertools, os, sys
from pathlib import Path
from llm_env.files import replace_file, replace_folder
from tests.llm_env.test_files import fill, names, read

countdown = None

def die(event, _):
    # Before whatever changes a folder, or opens a file.
    global countdown
    if countdown is not None and event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"):
        countdown -= 1
        if countdown < 0:
            os._exit(9)

def write_file(root, text):
    with replace_file(root / "file") as new:
        new.write_text(text)

def write_folder(root, text):
    with replace_folder(root / "folder") as new:
        fill(new, text)

def see_file(root):
    return (root / "file").read_text() if (root / "file").exists() else None

def see_folder(root):
    return read(root / "folder") if (root / "folder").exists() else None

sys.addaudithook(die)
for write, see in ((write_file, see_file), (write_folder, see_folder)):
    for before in (None, "old"):
        missing = 0
        for place in itertools.count():
            root = Path(sys.argv[1]) / f"{write.__name__}-{before}-{place}"
            root.mkdir()
            if before:
                write(root, before)
            child = os.fork()
            if not child:
                countdown = place
                write(root, "new")
                os._exit(0)
            done = os.waitpid(child, 0)[1] == 0
            seen = see(root)
            if before and seen is None:  # between two renames: it is there under a hidden name, and comes back
                missing += 1
                try:
                    with replace_folder(root / "folder"):
                        raise ZeroDivisionError
                except ZeroDivisionError:
                    seen = see(root)
            assert seen in (before, "new"), (root, seen)
            write(root, "next")
            assert (see(root), names(root)) == ("next", [write.__name__.removeprefix("write_")]), (root, names(root))
            if done:
                assert seen == "new"
                break
        print(place, missing, flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_killed_before_every_change_of_the_disk(tmp_path: Path) -> None:
    """A file and a folder, each made for the first time and replaced."""
    command = [sys.executable, "-W", "ignore", "-c", EVERY_KILL, str(tmp_path)]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    places, missing = zip(*(map(int, line.split()) for line in process.stdout.splitlines()), strict=True)
    assert len(places) == 4
    assert all(count >= 4 for count in places), "so many kills were there in each case"
    assert missing == (0, 0, 0, 1), "only a folder that is replaced is away for an instant"
