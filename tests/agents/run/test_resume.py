"""Promise 7: a run that is killed at any instant goes on to the same numbers it would have had."""

from __future__ import annotations

import json
import math
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from agents.config import TrainConfig
from agents.config.files import save_config
from agents.run.warm_start import SFT_CHECKPOINTS
from tests.agents.killed import newest_step, wait
from tests.agents.runs import save_small_model, small_config

Attempt = Callable[..., tuple[int, float]]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("model"), spread=0.1)


def config_in(out: Path, folder: Path, **changes: object) -> TrainConfig:
    """A warm start that takes about half of the time, then iterations with all that has a state."""
    own: dict[str, object] = {
        "iterations": 12,
        "sft__steps": 60,
        "sft__learning_rate": 1e-2,
        "sft__checkpoint_every": 7,
        "kl__beta": 0.05,
        "kl__target": 0.5,
        "kl__horizon": 200,
        "actor__warmup": 10,
        "actor__decay": "linear",
        "rollout__drop_cut": True,
        "model__refresh_reference": 5,
        "evaluation__every": 3,
        "checkpoint__every": 2,
    }
    return small_config(out, folder, **own | changes)


@pytest.fixture(scope="module")
def attempt() -> Iterator[Attempt]:
    """Runs the command line in a process of its own, which may be killed; see `tests.agents.killed`."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.agents.killed"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=ENVIRONMENT,
    ) as server:

        def run(arguments: list[str], **when: Any) -> tuple[int, float]:
            assert server.stdin is not None
            assert server.stdout is not None
            server.stdin.write(json.dumps({"arguments": arguments, **when}) + "\n")
            server.stdin.flush()
            answer = json.loads(server.stdout.readline())
            return answer["status"], answer["seconds"]

        yield run
        assert server.stdin is not None
        server.stdin.close()


def in_a_new_interpreter(arguments: list[str], **when: Any) -> tuple[int, float]:
    """The same as a user would: imports and all."""
    start = time.monotonic()
    process = os.spawnve(os.P_NOWAIT, sys.executable, [sys.executable, "-m", "agents.cli", *arguments], ENVIRONMENT)
    return wait(process, **when), time.monotonic() - start


def arguments(config: TrainConfig, command: str = "train") -> list[str]:
    """Of the command that begins this run, or goes on with it."""
    if (config.out / "config.yaml").exists():
        return [command, "--resume", "--out", str(config.out)]
    path = config.out.with_suffix(".yaml")
    save_config(config, path)
    return [command, "--config", str(path), "--out", str(config.out)]


def kill_again_and_again(attempt: Attempt, config: TrainConfig, moments: list[float], seconds: float) -> None:
    """Kills a process of a run at each of these moments, then lets one come to its end.

    Args:
        attempt: starts and kills.
        config: of the run.
        moments: 3.5 is in the middle of iteration 4; -0.5 in the middle of the warm start, roughly.
        seconds: that the whole run takes.
    """
    for moment in moments:
        begun = moment >= 0
        file = config.out / ("metrics.jsonl" if begun else "config.yaml")
        status, _ = attempt(
            arguments(config),
            file=str(file),
            lines=math.floor(moment) + 1 if begun else 1,
            # Well before the end, even if all else on the machine was busier while the whole run was timed.
            delay=moment % 1 * (seconds / config.iterations if begun else seconds) / 4,
        )
        assert status == -9
        assert not (config.out / "curves.png").exists()  # it was not done
    status, _ = attempt(arguments(config))
    assert status == 0


def rows_of(out: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("time", "speed"))} for row in rows]


def assert_same_run(one: Path, other: Path) -> None:
    assert rows_of(one) == rows_of(other)
    assert (one / "samples.jsonl").read_text() == (other / "samples.jsonl").read_text()
    checkpoints = [sorted(path.name for path in (out / "checkpoints").iterdir()) for out in (one, other)]
    assert checkpoints[0] == checkpoints[1]
    places = [f"{name}/model.safetensors" for name in ("sft", "best", "model")]
    files = sorted(path.name for path in (one / "checkpoints" / checkpoints[0][-1]).glob("*.safetensors"))
    assert files == [f"{name}.safetensors" for name in ("actor_optimizer", "critic_optimizer", "rng", "weights")]
    for place in [*places, *(f"checkpoints/{checkpoints[0][-1]}/{file}" for file in files)]:
        assert_same_tensors(one / place, other / place)
    assert_nothing_left(other)


def assert_same_tensors(one: Path, other: Path) -> None:
    """Bit for bit."""
    ours, theirs = load_file(one), load_file(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), f"{other}: {name}"


def assert_nothing_left(out: Path) -> None:
    """Neither a half-written file nor a checkpoint that nobody needs any more."""
    left = [path.name for path in out.rglob("*") if path.name.startswith(".") or path.name == SFT_CHECKPOINTS]
    assert not left


def kill_in_the_warm_start(
    attempt: Attempt, config: TrainConfig, moments: list[tuple[int, float]], command: str = "train"
) -> list[int]:
    """Kills a process of a run at each of these moments; each must go on from the newest checkpoint there was.

    Args:
        attempt: starts and kills.
        config: of the run; its display is on.
        moments: so many steps after the newest checkpoint there was (at least: after the next checkpoint that is as
            late), and then so many seconds.
        command: train or sft.

    Returns:
        The step that each process went on from, -1 if there was no checkpoint.
    """
    folder, said = config.out / SFT_CHECKPOINTS, config.out.with_suffix(".txt")
    begun = []
    for steps, delay in moments:
        before = newest_step(folder)  # hidden folders, half written, are not counted
        target = max(0, before + steps)
        status, _ = attempt(
            arguments(config, command), checkpoints=str(folder), step=target, delay=delay, output=str(said)
        )
        assert status == -9
        assert folder.exists(), "the kill came too late: the warm start was over"
        assert_goes_on_from(said, before)
        assert newest_step(folder) >= target, "a checkpoint that was there has vanished"
        begun.append(before)
    return begun


def assert_goes_on_from(said: Path, step: int) -> None:
    """What a process has printed: it took up the supervised steps after this one; -1 is for a new beginning."""
    found = re.findall(r"going on from supervised step (\d+)", said.read_text())
    assert found == ([] if step < 0 else [str(step)])


def test_killed_and_resumed(attempt: Attempt, folder: Path, tmp_path: Path) -> None:
    """At random moments, in the warm start too."""
    whole, killed = (config_in(tmp_path / name, folder) for name in ("whole", "killed"))
    status, seconds = attempt(arguments(whole))
    assert status == 0
    assert len(rows_of(whole.out)) == 13
    chance = random.Random(0)
    moments = [chance.uniform(-1, 0) for _ in range(2)] + sorted(chance.uniform(0, 11) for _ in range(4))
    kill_again_and_again(attempt, killed, moments, seconds)
    assert_same_run(whole.out, killed.out)


def test_killed_between_evaluations_that_fail(attempt: Attempt, folder: Path, tmp_path: Path) -> None:
    """A reward that is no number on held-out prompts stops neither the run nor its going on."""
    changes: dict[str, object] = {"module": "tests.agents.runs", "task__name": "NoNumberHeldOut", "task__args": {}}
    changes |= {"iterations": 5, "sft__steps": 0, "evaluation__every": 2, "checkpoint__every": 1}
    whole, killed = (config_in(tmp_path / name, folder, **changes) for name in ("whole", "killed"))
    assert attempt(arguments(whole))[0] == 0
    rows = rows_of(whole.out)
    assert [row["iteration"] for row in rows if row.get("eval/failed")] == [0, 2, 4, 5]
    for lines in (3, 4):  # the last line is that of an evaluation, and of none
        status, _ = attempt(arguments(killed), file=str(killed.out / "metrics.jsonl"), lines=lines)
        assert status == -9
    assert attempt(arguments(killed))[0] == 0
    assert rows_of(killed.out) == rows
    assert_same_tensors(*(out / "model" / "model.safetensors" for out in (whole.out, killed.out)))
    assert not (killed.out / "best").exists()


def test_the_comparison_can_fail(attempt: Attempt, folder: Path, tmp_path: Path) -> None:
    """Random numbers of another seed, from the last two iterations on, are noticed."""
    one, other = (config_in(tmp_path / name, folder, iterations=4) for name in ("one", "other"))
    assert attempt(arguments(one))[0] == 0
    assert attempt(arguments(other.replace(iterations=2)))[0] == 0
    text = (other.out / "config.yaml").read_text()
    (other.out / "config.yaml").write_text(text.replace("seed: 0", "seed: 1").replace("iterations: 2", "iterations: 4"))
    assert attempt(arguments(other))[0] == 0
    assert len(rows_of(other.out)) == len(rows_of(one.out))
    with pytest.raises(AssertionError):
        assert_same_run(one.out, other.out)


def test_killed_in_the_warm_start(attempt: Attempt, folder: Path, tmp_path: Path) -> None:
    """Several times at random moments: no process begins its steps again, and all ends as if nothing had been.

    With dropout in the adapters, the steps depend on the global random numbers, too.
    """
    changes = {"sft__steps": 160, "sft__checkpoint_every": 4, "log__display": True, "model__lora__rank": 4}
    whole, killed = (
        config_in(tmp_path / name, folder, iterations=2, model__lora__dropout=0.2, **changes)
        for name in ("whole", "killed")
    )
    said = killed.out.with_suffix(".txt")
    assert attempt(arguments(whole))[0] == 0
    chance = random.Random(2)
    moments = [(chance.randint(1, 12), chance.uniform(0, 0.03)) for _ in range(5)]
    begun = kill_in_the_warm_start(attempt, killed, moments)
    assert begun == sorted(set(begun)), "each process went on from a later step than the one before it"
    last = newest_step(killed.out / SFT_CHECKPOINTS)
    assert attempt(arguments(killed), output=str(said))[0] == 0
    assert last >= 16
    assert_goes_on_from(said, last)
    assert_same_run(whole.out, killed.out)


def test_a_long_warm_start_makes_progress_however_often_it_is_killed(
    attempt: Attempt, folder: Path, tmp_path: Path
) -> None:
    """Each process lives for one checkpoint, and the last of five is far from the end."""
    config = config_in(
        tmp_path / "run", folder, sft__steps=100_000, sft__checkpoint_every=3, log__display=True, iterations=1
    )
    begun = kill_in_the_warm_start(attempt, config, [(1, 0.0)] * 5)
    assert begun == sorted(set(begun))
    assert begun[-1] >= 9
    assert not (config.out / "metrics.jsonl").exists()


def test_the_command_sft_goes_on_too(attempt: Attempt, folder: Path, tmp_path: Path) -> None:
    whole, killed = (
        config_in(tmp_path / name, folder, sft__steps=40, sft__checkpoint_every=5, log__display=True)
        for name in ("whole", "killed")
    )
    said = killed.out.with_suffix(".txt")
    assert attempt(arguments(whole, "sft"))[0] == 0
    kill_in_the_warm_start(attempt, killed, [(1, 0.0), (4, 0.01), (6, 0.02)], "sft")
    assert attempt(arguments(killed, "sft"))[0] == 0
    assert_same_tensors(*(config.out / "model" / "model.safetensors" for config in (whole, killed)))
    assert_nothing_left(killed.out)
    made = (killed.out / "model" / "model.safetensors").stat().st_mtime_ns
    assert attempt(arguments(killed, "sft"), output=str(said))[0] == 0
    assert "is finished already" in said.read_text()
    assert (killed.out / "model" / "model.safetensors").stat().st_mtime_ns == made


@pytest.mark.slow
def test_killed_ten_times_from_the_command_line(folder: Path, tmp_path: Path) -> None:
    """Each time in an interpreter of its own, as a user would."""
    whole, killed = (config_in(tmp_path / name, folder, iterations=40) for name in ("whole", "killed"))
    status, seconds = in_a_new_interpreter(arguments(whole))
    assert status == 0
    chance = random.Random(1)
    moments = [chance.uniform(-1, 0) for _ in range(2)] + sorted(chance.uniform(0, 39) for _ in range(8))
    kill_again_and_again(in_a_new_interpreter, killed, moments, seconds)
    assert_same_run(whole.out, killed.out)
