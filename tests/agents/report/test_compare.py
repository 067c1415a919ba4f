"""Runs as a table, and a run that is followed."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agents.cli import main
from agents.config import TrainConfig
from agents.config.files import save_config
from agents.report.compare import as_table, compared, mean_of
from agents.report.log import RunLog
from agents.run.follow import follow


def run(folder: Path, scores: list[float], **changes: Any) -> Path:
    """A run with these held-out scores, one an iteration from the start on."""
    config = TrainConfig().replace(out=folder, iterations=len(scores) - 1, **changes)
    folder.mkdir(parents=True)
    save_config(config, folder / "config.yaml")
    with RunLog(folder, config.log) as log:
        for iteration, score in enumerate(scores):
            sample = {"prompt": "?", "transcript": f"text {iteration}", "reward": score, "end": "eos"}
            log.write({"iteration": iteration, "eval/sampled": score, "time": 60.0 * iteration}, [sample])
    return folder


def test_seeds_are_one_row(tmp_path: Path) -> None:
    """Three seeds of one setting, one of another: means, an interval by hand, and in what they differ."""
    ours = [run(tmp_path / f"a{seed}", [0.0, end], seed=seed) for seed, end in enumerate((0.5, 0.6, 0.7))]
    other = run(tmp_path / "b", [0.1, 0.2, 0.3], actor__learning_rate=1e-5)
    found = compared([*ours, other])
    assert found["differ"] == {"iterations": ["1", "2"], "actor.learning_rate": ["0.0003", "1e-05"]}
    first, second = found["rows"]
    figure = first["figures"]["eval/sampled"]
    half = 4.303 * 0.1 / np.sqrt(3)
    assert figure == pytest.approx({"mean": 0.6, "low": 0.6 - half, "high": 0.6 + half, "first": 0.0})
    assert second["figures"]["eval/sampled"] == pytest.approx({"mean": 0.3, "first": 0.1})
    assert (first["seeds"], second["iterations"], second["minutes"]) == (["0", "1", "2"], [2], 2.0)
    assert first["figures"]["policy/entropy"] is None
    table = as_table(found)
    assert "0.000 → 0.600 [0.352, 0.848]" in table
    assert "entropy" not in table


def test_an_interval_covers_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    for count in (2, 5, 12, 30):
        covered = 0
        for _ in range(400):
            of = mean_of(rng.normal(1.0, 3.0, size=count).tolist())
            covered += of["low"] <= 1.0 <= of["high"]
        assert 365 <= covered <= 396


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = run(tmp_path / "one", [0.0, 0.5])
    assert main(["compare", str(one), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["runs"] == [str(one)]
    assert main(["compare", str(one), str(tmp_path)]) == 2
    assert "there is no run with a log in" in capsys.readouterr().err
    assert main(["compare"]) == 2
    assert "which runs?" in capsys.readouterr().err


def test_a_run_that_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What comes while it is followed is shown once, and its last iteration is the end."""
    folder = run(tmp_path / "run", [0.0, 0.25])
    save_config(TrainConfig().replace(out=folder, iterations=3), folder / "config.yaml")
    later = iter([2, 3])

    def pause() -> None:
        iteration = next(later)
        with RunLog(folder, TrainConfig().log, resume_from=iteration - 1) as log:
            log.write({"iteration": iteration, "eval/sampled": 0.1 * iteration, "time": 1.0})

    assert follow(folder, pause) == 3
    said = capsys.readouterr().out
    assert [said.count(f"{iteration}/3") for iteration in range(4)] == [1, 1, 1, 1]
    assert "text 1" in said


def test_when_a_run_is_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that has ended early has its last model; one that was resumed since has newer numbers."""
    folder = run(tmp_path / "run", [0.0, 0.25])
    save_config(TrainConfig().replace(out=folder, iterations=3), folder / "config.yaml")
    (folder / "model").mkdir()
    (folder / "model" / "config.json").touch()
    (folder / "report.html").touch()
    assert follow(folder, lambda: pytest.fail("it is over")) == 1
    numbers = (folder / "metrics.jsonl").stat().st_mtime
    os.utime(folder / "model" / "config.json", (numbers - 9, numbers - 9))

    def pause() -> None:
        with RunLog(folder, TrainConfig().log, resume_from=1) as log:
            for iteration in (2, 3):
                log.write({"iteration": iteration, "time": 1.0})

    assert follow(folder, pause) == 3
    assert "3/3" in capsys.readouterr().out


def test_watching_in_a_terminal_ends_with_ctrl_c(tmp_path: Path) -> None:
    folder = run(tmp_path / "run", [0.0, 0.25])
    save_config(TrainConfig().replace(out=folder, iterations=3), folder / "config.yaml")
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "agents.cli", "watch", str(folder)]

    def heed_ctrl_c() -> None:  # where tests run in the background, it is ignored, and so by all that they start
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, preexec_fn=heed_ctrl_c
    )
    os.close(theirs)
    seen, interrupted = b"", False
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline and select.select([ours], [], [], 60)[0]:
        try:
            seen += os.read(ours, 4096)
        except OSError:  # that is how the end looks
            break
        if b"0.25" in seen and not interrupted:
            interrupted = True
            process.send_signal(signal.SIGINT)
    assert interrupted, seen
    assert process.wait(timeout=60) == 0
    os.close(ours)


def test_nothing_to_watch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", str(tmp_path)]) == 2
    assert "there is no run in" in capsys.readouterr().err
