"""`llm-env label` in a real terminal: keys, going on, undoing, and what the file then teaches."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import sys
import time
from pathlib import Path

import pytest

from agents.cli import main
from agents.preferences.label import Labels
from agents.preferences.pairs import read_pairs

TEXTS = [
    {"prompt": f"{n}+{n}=", "prompt_index": n, "sample": sample, "text": text, "score": float(text == str(2 * n))}
    for n in range(1, 5)
    for sample, text in enumerate([str(2 * n), f"{n}\x1b[2J"])
]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps(text) + "\n" for text in TEXTS))
    return path


class Terminal:
    """The command in a terminal of its own."""

    def __init__(self, texts: Path, out: Path) -> None:
        command = [sys.executable, "-m", "agents.cli", "label", "--texts", str(texts), "--out", str(out)]
        self.process, self.terminal = pty.fork()
        if self.process == 0:
            os.execv(sys.executable, command)
        self.seen = ""

    def until(self, text: str, seconds: float = 120) -> str:
        """What it shows up to some text."""
        end = time.monotonic() + seconds
        while text not in self.seen and time.monotonic() < end:
            if select.select([self.terminal], [], [], 0.5)[0]:
                try:
                    self.seen += os.read(self.terminal, 4096).decode()
                except OSError:  # it has ended
                    break
        assert text in self.seen, self.seen
        shown, _, self.seen = self.seen.partition(text)
        return shown

    def press(self, keys: str) -> None:
        os.write(self.terminal, keys.encode())

    def close(self) -> int:
        """Its exit code, when it has said all."""
        with contextlib.suppress(OSError):  # that is how the end looks
            while os.read(self.terminal, 4096):
                pass
        status = os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])
        os.close(self.terminal)
        return status


def better(shown: str) -> str:
    """The key of the right sum among what is shown."""
    lines = shown.replace("\r", "").split("\n")
    asked = next(line for line in lines if line.endswith("="))
    return (
        "1"
        if lines[next(i for i, line in enumerate(lines) if line.startswith("── 1")) + 1] == str(2 * int(asked[0]))
        else "2"
    )


def test_keys_in_a_terminal(texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "pairs.jsonl"
    terminal = Terminal(texts, out)
    first = terminal.until("q stop: ")
    assert "pair 1 of 4" in first
    assert "\x1b[2J" not in first  # what a model writes does not clear the screen
    assert "\\x1b[2J" in first
    terminal.press("x" + better(first))  # x is no answer
    terminal.press(better(terminal.until("q stop: ")))
    terminal.until("pair 3 of 4")
    terminal.press("u")
    again = terminal.until("pair 2 of 4") + terminal.until("q stop: ")
    assert len(out.read_text().splitlines()) == 1  # taken back
    terminal.press("=")
    terminal.until("pair 3 of 4")
    terminal.press("q")
    assert "1 pair, 1 without a better one, 2 left" in terminal.until("agree about 1 of 1")
    assert terminal.close() == 0
    assert again

    terminal = Terminal(texts, out)  # and goes on
    third = terminal.until("q stop: ")
    assert "pair 3 of 4" in third
    terminal.press(better(third))
    terminal.press(better(terminal.until("q stop: ")))
    assert "3 pairs, 1 without a better one, 0 left" in terminal.until("agree about 3 of 3")
    assert terminal.close() == 0
    pairs = read_pairs(out)
    assert len(pairs) == 3
    assert pairs.left_out == {"neither is better": 1}
    assert all(pair.chosen == str(2 * int(str(pair.prompt)[0])) for pair in pairs.pairs)


def test_without_a_terminal(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Answers come from lines; what is put off comes at the end; the end of the lines is an end."""
    import io

    out = tmp_path / "pairs.jsonl"
    monkeypatch.setattr("sys.stdin", io.StringIO("s\n1\n2\n"))
    assert main(["label", "--texts", str(texts), "--out", str(out)]) == 0
    asked = [row["prompt"] for row in map(json.loads, out.read_text().splitlines())]
    questions = Labels(TEXTS, tmp_path / "none.jsonl").questions
    assert asked == [question.prompt for question in questions[1:3]]
    assert "the same command goes on where you are now" in capsys.readouterr().out


def test_nothing_is_asked_twice(tmp_path: Path) -> None:
    """Two pairs of the same two texts are one question."""
    twice = [{"prompt": "?", "text": text, "score": 0.0} for text in "aabb"]
    for seed in range(6):
        assert len(Labels(twice, tmp_path / "none.jsonl", seed).questions) <= 1


@pytest.mark.parametrize(
    ("line", "message"),
    [("nonsense", "line 1 is no answer of llm-env label"), ('{"prompt": "?"}', "line 1 is no answer of llm-env label")],
)
def test_a_file_of_something_else(
    texts: Path, tmp_path: Path, line: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "pairs.jsonl"
    out.write_text(line + "\n")
    assert main(["label", "--texts", str(texts), "--out", str(out)]) == 2
    assert message in capsys.readouterr().err
    assert out.read_text() == line + "\n"


def test_texts_that_cannot_be_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text(json.dumps(TEXTS[0]) + "\n")
    assert main(["label", "--texts", str(path), "--out", str(tmp_path / "pairs.jsonl")]) == 2
    assert "has no two different texts after a prompt" in capsys.readouterr().err
