"""The run's log: strict JSON lines, whole after a kill, equal after a resume."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from agents.config import LogConfig
from agents.report.log import RunLog, read_metrics

PLAIN = LogConfig()
TEXT = "two\nlines, a separator \u2028, é, and half a character \ud83d"


def write_iterations(log: RunLog, first: int, last: int) -> None:
    for iteration in range(first, last + 1):
        samples = [{"prompt": "p", "text": f"{TEXT} {iteration}", "score": 0.5}] if iteration % 2 == 0 else None
        log.write({"iteration": iteration, "reward/mean": iteration / 7}, samples)


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.jsonl"))}


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


def test_lines_are_strict_json_and_there_at_once(tmp_path: Path) -> None:
    log = RunLog(tmp_path, PLAIN)
    log.write(
        {
            "iteration": 3,
            "a": math.nan,
            "b": math.inf,
            "c": torch.tensor(0.5),
            "d": np.float32(0.25),
            "e": np.int64(2),
        },
        [{"prompt": [{"role": "user"}], "text": TEXT, "score": math.nan, "parts": {"x": -math.inf}}],
    )
    # Not closed yet.
    (line,) = (tmp_path / "metrics.jsonl").read_bytes().splitlines()
    row = json.loads(line, parse_constant=refuse)
    assert row == {"iteration": 3, "a": None, "b": None, "c": 0.5, "d": 0.25, "e": 2}
    (sample,) = (tmp_path / "samples.jsonl").read_bytes().splitlines()
    assert json.loads(sample, parse_constant=refuse) == {
        "iteration": 3,
        "prompt": [{"role": "user"}],
        "text": TEXT,
        "score": None,
        "parts": {"x": None},
    }
    log.close()
    log.close()


def test_reading(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []
    with RunLog(tmp_path, PLAIN) as log:
        log.write({"iteration": 1, "a": math.nan})
        log.write({"iteration": 2, "a": 1})
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"iteration": 3, "a"')
    first, second = read_metrics(tmp_path)
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b": 1}")  # all but the end of the line is there
    assert read_metrics(tmp_path)[2:] == [{"iteration": 3.0, "a": 1.0}]
    assert first["iteration"] == 1.0
    assert math.isnan(first["a"])
    assert second == {"iteration": 2.0, "a": 1.0}


def test_metrics_without_an_iteration(tmp_path: Path) -> None:
    with RunLog(tmp_path, PLAIN) as log, pytest.raises(KeyError, match="must have an 'iteration', got only"):
        log.write({"reward/mean": 1.0})


@pytest.mark.parametrize("checkpoint", [0, 1, 4, 6, 9])
@pytest.mark.parametrize("torn", [b"", b'{"iteration": 7, "rew', b"\x00\x00\x00", b'{"iteration": 7, "a": "\xf0\x9f'])
def test_a_resumed_log_equals_an_undisturbed_one(tmp_path: Path, checkpoint: int, torn: bytes) -> None:
    with RunLog(tmp_path / "whole", PLAIN) as log:
        write_iterations(log, 1, 9)
    with RunLog(tmp_path / "killed", PLAIN) as log:
        write_iterations(log, 1, 6)
    for name in ("metrics.jsonl", "samples.jsonl"):
        with open(tmp_path / "killed" / name, "ab") as file:
            file.write(torn)
    with RunLog(tmp_path / "killed", PLAIN, resume_from=checkpoint) as log:
        if checkpoint < 6:
            assert read_metrics(tmp_path / "killed")[-1:] == (
                [{"iteration": checkpoint, "reward/mean": checkpoint / 7}] if checkpoint else []
            )
        write_iterations(log, min(checkpoint, 6) + 1, 9)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


WRITER = """
import sys
from pathlib import Path
from agents.config import LogConfig
from agents.report.log import RunLog
with RunLog(Path(sys.argv[1]), LogConfig()) as log:
    for iteration in range(1, 10**9):
        log.write({"iteration": iteration, "reward/mean": iteration / 7}, [{"text": "x" * 5000}])
"""


def test_a_killed_writer_leaves_whole_lines_and_resumes(tmp_path: Path) -> None:
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        while len(read_metrics(tmp_path)) < 20:
            assert writer.poll() is None
            time.sleep(0.01)
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    rows = read_metrics(tmp_path)
    assert [row["iteration"] for row in rows] == list(range(1, len(rows) + 1))
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_bytes().split(b"\n")[: len(rows)]]
    assert [sample["iteration"] for sample in samples] == [row["iteration"] for row in rows]
    with RunLog(tmp_path, PLAIN, resume_from=15) as log:
        log.write({"iteration": 16, "reward/mean": 0.0})
    assert [row["iteration"] for row in read_metrics(tmp_path)] == list(range(1, 17))
    assert len((tmp_path / "samples.jsonl").read_bytes().splitlines()) == 15


def test_a_new_run_sets_an_old_log_aside(tmp_path: Path) -> None:
    with RunLog(tmp_path, PLAIN) as log:
        write_iterations(log, 1, 3)
    old = contents(tmp_path)
    with RunLog(tmp_path, PLAIN) as log:
        write_iterations(log, 1, 1)
    assert [row["iteration"] for row in read_metrics(tmp_path)] == [1]
    assert (tmp_path / "metrics.jsonl.old").read_bytes() == old["metrics.jsonl"]
    assert (tmp_path / "samples.jsonl.old").read_bytes() == old["samples.jsonl"]


def test_tensorboard_hides_what_a_resumed_run_writes_again(tmp_path: Path) -> None:
    config = LogConfig(tensorboard=True)
    with RunLog(tmp_path, config) as log:
        write_iterations(log, 1, 6)
    with RunLog(tmp_path, config, resume_from=3) as log:
        log.write({"iteration": 4, "reward/mean": 40.0})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    values = [(event.step, event.value) for event in events.Scalars("reward/mean")]
    assert values == [(step, pytest.approx(step / 7)) for step in (1, 2, 3)] + [(4, 40.0)]
    assert events.Tags()["tensors"] == ["samples/text_summary"]


class FakeRun:
    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.finished = 0

    def log(self, row: dict[str, Any], step: int) -> None:
        self.logged.append((step, row))

    def finish(self) -> None:
        self.finished += 1


def test_wandb_goes_on_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    runs: list[FakeRun] = []

    def init(**arguments: Any) -> FakeRun:
        calls.append(arguments)
        runs.append(FakeRun())
        return runs[-1]

    stub = types.ModuleType("wandb")
    stub.init = init  # type: ignore[attr-defined]
    stub.Table = lambda columns, data: (columns, data)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", stub)
    config = LogConfig(wandb=True, wandb_project="mine")
    out = tmp_path / "reverse"
    with RunLog(out, config, settings={"seed": 3}) as log:
        log.write({"iteration": 1, "a": 0.5}, [{"text": "x", "score": 1.0}, {"text": "y"}])
    with RunLog(out, config, resume_from=1, run_name="again"):
        pass
    with RunLog(out, config):
        pass
    first, resumed, fresh = calls
    assert (first["project"], first["name"], first["config"]) == ("mine", "reverse", {"seed": 3})
    assert resumed["id"] == first["id"] != fresh["id"]
    assert (resumed["name"], resumed["resume"]) == ("again", "allow")
    table = (["text", "score"], [["x", "1.0"], ["y", ""]])
    assert runs[0].logged == [(1, {"iteration": 1, "a": 0.5, "samples": table})]
    assert [run.finished for run in runs] == [1, 1, 1]


@pytest.mark.parametrize(
    ("module", "config", "command"),
    [
        ("wandb", LogConfig(wandb=True), "pip install wandb"),
        ("torch.utils.tensorboard", LogConfig(tensorboard=True), "pip install tensorboard"),
    ],
)
def test_what_is_missing_is_named_and_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, config: LogConfig, command: str
) -> None:
    with RunLog(tmp_path, PLAIN) as log:
        write_iterations(log, 1, 3)
    before = contents(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=command):
        RunLog(tmp_path, config, resume_from=1)
    assert contents(tmp_path) == before
