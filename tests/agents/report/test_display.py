"""The display: what a terminal shows, what a file gets, and that no text can break either."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from agents.metrics import Metric, register_metric
from agents.report.display import Display, Number

METRICS = {
    "iteration": 1.0,
    "tokens": 100.0,
    "reward/mean": 0.25,
    "reward/std": 0.5,
    "reward/spelling": 0.125,
    "reward/failures": 0.0,
    "kl/reference": 0.0123,
    "kl/old": 0.0045,
    "policy/clip_fraction": 0.11,
    "policy/entropy": 1.5,
    "policy/gradient_norm": 0.75,
    "value/loss": 0.31,
    "value/explained_variance": -0.5,
    "value/gradient_norm": 0.65,
    "text/length": 6.5,
    "text/cut": 0.02,
    "speed/rollout_tokens_per_s": 5321.4,
    "speed/update_tokens_per_s": 3213.0,
    "time/rollout": 0.35,
    "time/total": 1.0,
    "guard/skipped": 0.0,
}
NASTY = "[red]a[/red] [/] \x1b[2J\x1b[31mb\rc\x07\u202ed\nlast \\[x] 漢 é"
SHOWN = "[red]a[/red] [/] \\x1b[2J\\x1b[31mb\\rc\\x07\\u202ed\\nlast \\[x] 漢 é"


def at(iteration: int, **more: float) -> dict[str, float]:
    return {**METRICS, "iteration": iteration, **{name.replace("__", "/"): value for name, value in more.items()}}


class Plain:
    """A display that writes to a file."""

    def __init__(self, total: int, enabled: bool = True, start: int = 0, encoding: str = "utf-8") -> None:
        self._bytes = io.BytesIO()
        self._file = io.TextIOWrapper(self._bytes, encoding=encoding, newline="\n")
        console = Console(file=self._file, width=60, force_terminal=False, force_interactive=False)
        self.display = Display(total, "a title", enabled, start=start, console=console)

    @property
    def text(self) -> str:
        self._file.flush()
        return self._bytes.getvalue().decode(self._file.encoding)

    @property
    def lines(self) -> list[str]:
        return self.text.splitlines()


class Terminal:
    """A display in a terminal, of which one sees the panel as it is now, and all that was ever written."""

    def __init__(self, total: int = 20, width: int = 130) -> None:
        self.file = io.StringIO()
        console = Console(file=self.file, width=width, height=60, force_terminal=True, force_interactive=True)
        self.console = console
        self.display = Display(total, "a [title]", True, console=console)

    @property
    def panel(self) -> str:
        with self.console.capture() as capture:
            self.console.print(self.display._panel())
        return re.sub(r"\x1b\[[0-9;]*m", "", capture.get())


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    terminal = Terminal()
    with terminal.display:
        yield terminal


def test_a_file_gets_one_whole_line_for_each_iteration() -> None:
    plain = Plain(3)
    with plain.display as display:
        for iteration in (1, 2, 3):
            display.phase("learning")
            display.update(at(iteration))
    assert len(plain.lines) == 3
    # One line, though the console is sixty wide.
    assert plain.lines[1] == (
        "2/3  reward 0.25  kl 0.0123  clipped 0.11  entropy 1.5  explained -0.5  length 6.5  cut off 0.02  "
        "written/s 5,321  learned/s 3,213  seconds 1"
    )


def test_a_long_run_is_throttled_but_for_evaluations() -> None:
    plain = Plain(1000)
    with plain.display as display:
        for iteration in range(1, 1001):
            display.update(at(iteration, eval__sampled=0.875) if iteration == 777 else at(iteration))
    shown = [int(line.split("/")[0]) for line in plain.lines]
    assert shown == sorted([1, 777, *range(20, 1001, 20)])
    assert "held-out sampled 0.875" in plain.lines[shown.index(777)]


def test_samples_in_a_file_are_shown_literally() -> None:
    plain = Plain(5)
    with plain.display as display:
        display.update(at(1), [{"prompt": "go>", "transcript": NASTY, "reward": 0.5}])
        display.message(f"first\n{NASTY}")
    assert plain.lines[1] == f"  sample (reward 0.5): go> | {SHOWN}"
    assert plain.lines[2:] == ["first", *SHOWN.replace("\\nlast", "\nlast").split("\n")]


def test_an_ascii_file_gets_escapes() -> None:
    plain = Plain(5, encoding="ascii")
    with plain.display as display:
        display.update(at(1), [{"transcript": "漢 \ud800"}])
        display.summary("dÉjà", [("é", 0.5, 1.0)], [], {})
    assert "\\u6f22 \\ud800" in plain.text
    assert "d\\xc9j\\xe0" in plain.text


@pytest.mark.parametrize("metrics", [{}, {"iteration": 1}, {"reward/mean": float("nan")}, {"sft/loss": 0.5}])
def test_missing_metrics_break_nothing(metrics: dict[str, float], terminal: Terminal) -> None:
    plain = Plain(3)
    plain.display.update(metrics)
    assert plain.lines[0].startswith("1/3")
    terminal.display.update(metrics)
    assert "1/20" in terminal.panel
    # Numbers of which it knows no name are shown as they are.
    assert ("sft/loss" in terminal.panel) == ("sft/loss" in plain.text) == ("sft/loss" in metrics)


def test_a_terminal_shows_the_numbers_one_watches(terminal: Terminal) -> None:
    display = terminal.display
    display.update(at(1, eval__greedy=0.625))
    display.update(at(2, reward__mean=0.5))
    display.phase("judging [all]")
    display.update(
        at(3, reward__mean=0.75, policy__entropy=1.0), [{"prompt": "go>", "transcript": NASTY, "reward": 0.5}]
    )
    panel = terminal.panel
    for pattern in (
        r"a \[title\]",
        r"judging \[all\].* 3/20",
        r"reward +0.75 +↗",
        r"▁▅█",
        r"spelling +0.125 +→",
        r"held out, greedy +0.625",  # the last one that was measured
        r"KL to reference +0.0123",
        r"KL to old +0.0045",
        r"clip fraction +0.11",
        r"entropy +1 +↘",
        r"gradient norm +0.75",
        r"value loss +0.31",
        r"explained variance +-0.5",
        r"length +6.5",
        r"share cut off +0.02",
        r"written tokens/s +5,321",
        r"rollout 0.35 s",
        r"sample \(reward 0.5\): go> \| " + re.escape(SHOWN[:20]),
    ):
        assert re.search(pattern, panel), pattern
    assert "failures" not in panel
    assert "skipped" not in panel
    display.update(at(4, reward__failures=2.0, guard__skipped=3.0))
    assert re.search(r"failures +2", terminal.panel)
    assert re.search(r"steps skipped +3", terminal.panel)
    assert "\x1b[2J" not in terminal.file.getvalue()


@pytest.mark.usefixtures("own_metrics")
def test_ones_own_metrics_are_shown_where_they_say(terminal: Terminal) -> None:
    register_metric(
        Metric(name="my/depth", label="depth [b]", meaning="Deepest bracket.", column="texts", short="deep", quiet=True)
    )
    register_metric(
        Metric(name="my/rhymes", label="rhymes", meaning="Rhyming lines.", column="poetry", occasional=True)
    )
    plain = Plain(1000)
    for display in (terminal.display, plain.display):
        display.update(at(20, my__depth=2.0))
        display.update(at(21, my__depth=0.0, my__rhymes=0.5))  # measured now and then: it gets a line
        display.update(at(22, my__depth=0.0))
    assert [line.split("/")[0] for line in plain.lines] == ["20", "21"]
    assert plain.lines[0].endswith("seconds 1  deep 2")
    assert "depth" not in terminal.panel  # it is quiet at 0
    assert "poetry" in terminal.panel
    assert re.search(r"rhymes +0.5", terminal.panel)
    terminal.display.update(at(23, my__depth=3.0))
    assert re.search(r"depth \[b\] +3", terminal.panel)


def test_messages_stay_above_the_panel_and_the_panel_ends(terminal: Terminal) -> None:
    terminal.display.update(at(1))
    terminal.display.message("a message [b]")
    terminal.display.warn("careful [b]")
    terminal.display.summary("done", [], [], {})
    text = terminal.file.getvalue()
    assert "a message [b]" in text
    assert "careful [b]" in text
    # The cursor, hidden by the panel, is shown again before the report.
    assert text.rindex("\x1b[?25h") < text.rindex("done")
    assert terminal.display._live is None


def test_the_panel_is_taken_down_by_an_error() -> None:
    terminal = Terminal()
    with pytest.raises(KeyboardInterrupt), terminal.display:
        raise KeyboardInterrupt
    assert terminal.file.getvalue().rstrip("\n").endswith("\x1b[?25h")


def test_a_resumed_run_begins_where_it_was() -> None:
    plain = Plain(10, start=7)
    assert plain.display._progress.tasks[0].completed == 7
    plain.display.update({"reward/mean": 1.0})
    assert plain.lines == ["8/10  reward 1"]


def test_a_display_that_is_off_still_warns() -> None:
    plain = Plain(3, enabled=False)
    with plain.display as display:
        display.update(at(1), [{"transcript": "x"}])
        display.message("unseen")
        display.warn("The reward failed.")
        display.summary("unseen", [("unseen", 1.0, 2.0)], [], {"unseen": "x"})
    assert plain.text == "warning: The reward failed.\n"


def test_the_summary() -> None:
    plain = Plain(3)
    rows: list[tuple[str, Number, Number]] = [("held out, sampled [b]", 0.31, 0.97), ("KL", None, "0.12 nats")]
    samples = [{"prompt": "p>", "transcript": f"{NASTY}{number}", "reward": number} for number in range(3)]
    folder = Path("runs") / ("a-long-name" * 10)
    plain.display.summary("Reverse [b]: done", rows, samples, {"model": folder / "model", "curves": folder / "c.png"})
    lines = [line.rstrip() for line in plain.lines]
    assert lines[1] == "Reverse [b]: done"
    assert re.fullmatch(r" +before +after", lines[2])
    assert re.fullmatch(r"held out, sampled \[b\] +0\.31 +0\.97", lines[3])
    assert re.fullmatch(r"KL +0\.12 nats", lines[4])
    assert lines[5:8] == [f"  sample (reward {number}): p> | {SHOWN}{number}" for number in range(3)]
    assert lines[8:] == [f"model   {folder / 'model'}", f"curves  {folder / 'c.png'}"]


def test_long_samples_are_cut() -> None:
    plain = Plain(3)
    plain.display.update(at(1), [{"prompt": "a" * 1000 + "!", "transcript": "b" * 1000, "score": 1.0}])
    assert len(plain.lines[1]) < 900
    assert "aaa! | bbb" in plain.lines[1]
    assert plain.lines[1].endswith("bbb...")
