"""Rewards that raise, hang, fork, leave, and speak out of turn: each text gets its own score, or what errors cost."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from rewards import Guard, Rollout

ON_ERROR = -1.0
MISBEHAVE = ["well"] * 12 + ["raise", "fork", "fork and answer", "child", "print", "exit", "hang"]
FAILS = {"raise", "exit", "hang"}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def wild_reward(rollout: Rollout) -> float:
    """What it does stands in the metadata; what it pays is the length of the text."""
    kind = rollout.metadata["kind"]
    if kind == "raise":
        raise RuntimeError(rollout.text)
    if kind == "fork" and os.fork() == 0:
        time.sleep(0.05)
        os._exit(0)
    if kind == "fork and answer":
        os.fork()  # the child goes on and answers as well
    if kind == "child":
        sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
        with Path(rollout.metadata["pids"]).open("a") as pids:
            pids.write(f"{sleeper.pid}\n")
    if kind == "print":
        print("a reward that speaks", flush=True)
    if kind == "exit":
        os._exit(3)
    if kind == "hang":
        time.sleep(60)
    return float(len(rollout.text))


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def walk(seed: int, calls: int, pids: Path) -> None:
    rng = np.random.default_rng(seed)
    guard = Guard(wild_reward, on_error=ON_ERROR, timeout=0.5)
    try:
        for _ in range(calls):
            kinds = rng.choice(MISBEHAVE, size=rng.integers(1, 4)).tolist()
            texts = ["x" * int(rng.integers(0, 50)) for _ in kinds]
            rollouts = [
                Rollout.of(text, metadata={"kind": kind, "pids": str(pids)})
                for text, kind in zip(texts, kinds, strict=True)
            ]
            expected = [
                ON_ERROR if kind in FAILS else float(len(text)) for text, kind in zip(texts, kinds, strict=True)
            ]
            assert [score.value for score in guard(rollouts)] == expected, kinds
    finally:
        guard.close()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="rewards that fork")
@pytest.mark.parametrize("seed", range(4))
def test_rewards(seed: int, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    pids.touch()
    walk(seed, calls=120, pids=pids)
    time.sleep(0.2)
    assert not [pid for pid in map(int, pids.read_text().split()) if is_alive(pid)]
