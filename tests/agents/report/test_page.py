"""The page of a run: in a real browser where there is one, and as text everywhere."""

from __future__ import annotations

import html
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agents.cli import main
from agents.report.log import TOKENS, WARNINGS, read_lines
from agents.report.page import MOST_TEXTS, gathered, inert, thinned, write_report
from agents.run.training import train
from tests.agents.runs import save_small_model, small_config

HOSTILE = [
    "</script><script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "<!-- <script> -->]]>",
    "{{data}}{{table}}",
    "\u202eright\u2066left",
    "\ud800",  # half of a character
    "א ב ג",
    "\x00\x1b[2J",
    "x" * 1_000_000,
]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--virtual-time-budget=4000"),
)
browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs that differ in a setting: of a task that replies, and whose critic is told hints."""
    folder = tmp_path_factory.mktemp("runs")
    model = save_small_model(folder / "model", spread=0.1)
    made = []
    for name, rate in (("one", 1e-3), ("other", 2e-3)):
        config = small_config(folder / name, model, iterations=2, task__name="VowelShare", task__args={})
        train(config.replace(log__samples_every=1, actor__learning_rate=rate, kl__beta=0.1, loss__clip_low=0.05))
        made.append(config.out)
    return made


def dom(page: Path, profile: Path, link: str = "", script: str = "") -> str:
    """The document as the browser has it at last; a script may be run in it, at its end."""
    if script:
        driven = page.with_name("driven.html")
        text = page.read_text(encoding="utf-8")
        driven.write_text(text.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
        page = driven
    assert CHROMIUM is not None
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "--dump-dom", f"{page.as_uri()}{link}"]
    return subprocess.run(command, capture_output=True, check=True, timeout=120).stdout.decode(errors="replace")


def within(document: str, part: str) -> str:
    """The text of the element with this id."""

    class Reader(HTMLParser):
        depth, text = 0, ""

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            if self.depth or dict(attrs).get("id") == part:
                self.depth += tag not in ("br", "hr", "img", "line", "path", "rect", "circle")

        def handle_endtag(self, tag: str) -> None:
            if self.depth and tag not in ("br", "hr", "img", "line", "path", "rect", "circle"):
                self.depth -= 1

        def handle_data(self, data: str) -> None:
            if self.depth:
                self.text += data + " "

    reader = Reader()
    reader.feed(document)
    return reader.text


def test_what_is_written_down_of_a_text(runs: list[Path]) -> None:
    rows = read_lines(runs[0], TOKENS)
    assert {row["iteration"] for row in rows} == {1, 2}
    assert [row["why"] for row in rows[:2]] == ["the best paid", "the worst paid"]
    for row in rows:
        own = sum(row["loss_mask"])
        assert len(row["tokens"]) == len(row["token_ids"]) == len(row["loss_mask"])
        columns = {
            "reward", "advantages", "value", "value_target", "inference_logprobs", "trainer_logprobs", "ref_logprobs",
            "learned_logprobs", "entropy", "task_reward", "clipped",
        }  # fmt: skip
        for name in columns:
            assert sum(value is not None for value in row[name]) == own
        first = row["alternatives"][0]
        assert 0 < sum(chance for _, chance in first) <= 1.001
        assert [chance for _, chance in first] == sorted((chance for _, chance in first), reverse=True)
        paid = [value for value in row["reward"] if value is not None]
        kl = [was - ref for was, ref in zip(row["trainer_logprobs"], row["ref_logprobs"], strict=True)]
        assert sum(paid) == pytest.approx(row["score"] - 0.1 * sum(kl), abs=2e-3)
        assert sum(row["task_reward"]) == pytest.approx(row["score"], abs=2e-3)
        ratios = np.exp(np.subtract(row["learned_logprobs"], row["trainer_logprobs"]))
        sure = np.abs(ratios - 0.95) > 2e-3  # numbers are written with four digits
        assert (np.array(row["clipped"])[sure] == (ratios < 0.95)[sure]).all()
    assert {value for row in rows for value in row["clipped"]} == {0, 1}
    scores = [row["score"] for row in rows if row["iteration"] == 1]
    assert scores[0] == max(scores)
    assert scores[1] == min(scores)


def test_the_page_is_made_at_the_end_and_by_the_command(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert (runs[0] / "report.html").stat().st_size < 2_000_000
    out = runs[0].parent / "both.html"
    assert main(["report", *map(str, runs), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    found = gathered(runs)
    assert found["different"] == {"actor.learning_rate": ["0.001", "0.002"]}
    assert main(["report", str(runs[0].parent)]) == 2
    assert "there is no run with a log in" in capsys.readouterr().err


def test_without_javascript_it_is_a_table(runs: list[Path]) -> None:
    page = (runs[0] / "report.html").read_text()
    table = re.search(r"<noscript>(.*?)</noscript>", page, re.S)
    assert table is not None
    text = read_lines(runs[0], TOKENS)[0]
    assert html.escape("".join(text["tokens"])) in table.group(1)
    assert "<td>reward/mean</td>" in table.group(1)


def test_texts_are_left_out_evenly() -> None:
    rows = [{"iteration": n // 4, "n": n} for n in range(400)]
    kept = thinned(rows, MOST_TEXTS)
    assert len(kept) == MOST_TEXTS
    assert (kept[0]["iteration"], kept[-1]["iteration"]) == (0, 99)
    assert thinned(rows[:8], 50) == rows[:8]
    assert thinned([], 5) == []


def hostile(run: Path, folder: Path) -> Path:
    """A copy of a run whose texts are what an attacker would have a model write."""
    copy = folder / "<b>hostile"
    shutil.copytree(run, copy)
    row = read_lines(run, TOKENS)[0]
    rows = []
    for text in HOSTILE:
        same = {name: [value[0]] for name, value in row.items() if isinstance(value, list)}
        rows.append({**row, **same, "loss_mask": [True], "tokens": [text], "prompt": text, "end": text, "why": text})
    (copy / TOKENS).write_text("".join(json.dumps(each) + "\n" for each in rows))
    return copy


def test_hostile_texts_are_only_text(runs: list[Path], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    write_report([hostile(runs[0], tmp_path)], page)
    text = page.read_text(encoding="utf-8")
    assert text.count("<script") == 2  # the data and ours
    assert text.count("</script>") == 2
    assert "<img" not in text
    data = re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.S)
    assert data is not None
    shown = [row["tokens"][0] for row in json.loads(data.group(1))["runs"][0]["texts"]]
    assert shown[:-1] == HOSTILE[:-1]
    assert shown[-1] == f"{'x' * 2000} … (996000 characters) … {'x' * 2000}"
    assert page.stat().st_size < 1_000_000
    assert inert(HOSTILE).isascii()


@browser
def test_in_a_browser(runs: list[Path], tmp_path: Path) -> None:
    """Curves and texts are there; a link leads to a token; keys and clicks move; nothing goes wrong on the way."""
    page = tmp_path / "page.html"
    write_report(runs, page)
    listen = "document.title = 'fine'; addEventListener('error', e => document.title = 'error: ' + e.message);"
    page.write_text(page.read_text().replace('"use strict";', f'"use strict"; {listen}', 1))
    document = dom(page, tmp_path / "profile", "#run=1&iteration=1&text=0&token=0")
    assert "<title>fine</title>" in document
    assert "Reward, in training and held out" in within(document, "curves")
    assert "actor.learning_rate" in within(document, "different")
    text = next(row for row in read_lines(runs[1], TOKENS) if row["iteration"] == 1)
    assert f"({text['token_ids'][0]}), 1 of {len(text['tokens'])}" in within(document, "about")
    assert "likeliest now" in within(document, "about")

    keys = "".join(f"dispatchEvent(new KeyboardEvent('keydown', {{key: '{key}'}}));" for key in "pjlll")
    clicks = "document.querySelectorAll('.text')[1].querySelectorAll('.tokens span')[1].click();"
    moved = dom(page, tmp_path / "profile", "#run=0&iteration=2", keys + clicks + "document.title += location.hash;")
    assert re.search(r"<title>fine#run=0&amp;iteration=1&amp;text=1&amp;token=1", moved)
    curve = "document.querySelector('#curves svg').dispatchEvent(new MouseEvent('click', {clientX: 5}));"
    chosen = dom(page, tmp_path / "profile", "#run=0&iteration=2", curve + "document.title += location.hash;")
    assert "iteration=1" in re.search(r"<title>(.*?)</title>", chosen).group(1)  # type: ignore[union-attr]


@browser
def test_texts_are_found_and_kept_in_a_browser(runs: list[Path], tmp_path: Path) -> None:
    """The worst of all iterations are listed; one text stays while another iteration is looked at."""
    page = tmp_path / "page.html"
    write_report(runs[:1], page)
    texts = read_lines(runs[0], TOKENS)
    document = dom(page, tmp_path / "profile", f"#find=the+longest&beside=0.{len(texts) - 1}&iteration=1")
    found = within(document, "about")
    longest = sorted((len(text["tokens"]) for text in texts), reverse=True)[:8]
    assert [int(number) for number in re.findall(r"iteration \d+\s+(\d+) ", found)] == longest
    kept = within(document, "beside")
    assert kept.startswith(f"iteration {texts[-1]['iteration']} · {texts[-1]['why']}")
    assert "put away" in kept
    assert "keep beside" in within(document, "texts")
    put = "document.querySelector('#beside button').click(); document.title = location.hash;"
    away = re.search(r"<title>(.*?)</title>", dom(page, tmp_path / "profile", "#beside=0.0", put))
    assert away is not None
    assert "beside" not in away.group(1)


@browser
def test_texts_of_one_task_in_a_browser(runs: list[Path], tmp_path: Path) -> None:
    """Of a mixture; and the ratio is what it has become after learning."""
    copy: Any = tmp_path / "mixed"
    shutil.copytree(runs[0], copy)
    rows = [row for row in read_lines(copy, TOKENS) if row["iteration"] == 1]
    for number, row in enumerate(rows):
        row["part"] = ("Copy", "Reverse")[number % 2]
    (copy / TOKENS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_report([copy], tmp_path / "page.html")
    document = dom(tmp_path / "page.html", tmp_path / "profile", "#part=Reverse&token=0&color=ratio")
    shown = within(document, "texts")
    assert shown.count(" · Reverse · prompt") == len(rows) // 2
    assert " · Copy · prompt" not in shown
    moved = rows[1]["learned_logprobs"][0] - rows[1]["trainer_logprobs"][0]
    found = re.search(r"ratio − 1, learned\s+(\S+)", within(document, "about"))
    assert found is not None
    assert float(found.group(1)) == pytest.approx(math.expm1(moved), abs=1e-4)


def test_what_a_run_was(runs: list[Path], tmp_path: Path) -> None:
    """Its warnings with their iterations, the settings that are not the defaults, the machine, and where time went."""
    copy: Any = tmp_path / "warned"
    shutil.copytree(runs[0], copy)
    (copy / WARNINGS).write_text('{"iteration": 2, "warning": "All <b>rewards</b> are equal."}\n')
    [run] = gathered([copy])["runs"]
    assert run["warnings"] == [{"iteration": 2, "warning": "All <b>rewards</b> are equal."}]
    assert run["told"]["kl.beta"] == "0.1"
    assert "algo" not in run["told"]
    assert "torch " in run["machine"]["versions"]
    if CHROMIUM is not None:
        write_report([copy], tmp_path / "page.html")
        shown = within(dom(tmp_path / "page.html", tmp_path / "profile"), "runs")
        assert shown.startswith("1 warning, time, settings, machine iteration 2")
        assert "All <b>rewards</b> are equal." in shown
        assert re.search(r"rollout \d+(\.\d)? %", shown)


@browser
def test_hostile_texts_in_a_browser(runs: list[Path], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    write_report([hostile(runs[0], tmp_path)], page)
    document = dom(page, tmp_path / "profile")
    title = re.search(r"<title>(.*?)</title>", document, re.S)
    assert title is not None
    assert title.group(1) == "&lt;b&gt;hostile"
    shown = within(document, "texts")
    assert "<img src=x onerror=" in shown
    assert "<202e>right<2066>left" in shown


def test_a_run_of_before(runs: list[Path], tmp_path: Path) -> None:
    """A log without texts by token, as runs had it before, and one that has just begun."""
    copy: Any = tmp_path / "old"
    shutil.copytree(runs[0], copy)
    (copy / TOKENS).unlink()
    write_report([copy], tmp_path / "page.html")
    assert gathered([copy])["runs"][0]["texts"] == []
