"""Texts that other processes write: the same as here, whoever dies on the way, and no older than they may be."""

from __future__ import annotations

import functools
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from agents.config.checks import problems
from agents.rollouts.workers import Workers
from agents.rollouts.workers.link import WorkerLostError
from agents.rollouts.workers.process import WorkerError
from agents.rollouts.workers.shards import split_evenly
from agents.rollouts.workers.worker import Scribe
from agents.run.training import train
from llm_env.engines import Job, Sampling
from llm_env.models import load_vocabulary
from llm_env.tasks.base import TaskError
from llm_env.tokens.prompts import TokenizedPrompts
from tests.agents.rollouts.scribes import CONTEXT, Short, make_scribe, weights
from tests.agents.runs import (
    learn,
    running,
    same,
    save_small_model,
    small_config,
    train_until_it_breaks,
    weights_of,
    without_times,
)

SEES = {"PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("folder")


@pytest.fixture(scope="module")
def pool(folder: Path) -> Iterator[Workers]:
    workers = Workers(functools.partial(make_scribe, folder), 2, weights(), context=CONTEXT, copies=2, patience=4.0)
    workers.load_weights(weights(), version=1)
    yield workers
    workers.close()


def ask(pool: Any, seed: int = 5) -> Iterator[tuple[Job, Any]]:
    task = Short().bind(load_vocabulary("tiny"))
    prompts = TokenizedPrompts.encode(task.prompts("train"), task.vocabulary)
    jobs = [Job(number % 6, number % 6, number) for number in range(11)]
    return pool.write(task, prompts, jobs, Sampling(seed=seed), context=CONTEXT)


def taken(written: Iterator[tuple[Job, Any]]) -> list[tuple[Job, Any]]:
    return sorted(written, key=lambda each: each[0].request)


def shown(written: list[tuple[Job, Any]]) -> list[tuple[Any, ...]]:
    return [
        (job, each.prompt_index, each.group, each.text, each.rollout.prompt, str(each.end), each.rollout.metadata)
        for job, each in written
    ]


def test_they_write_what_an_engine_here_writes(pool: Workers, folder: Path) -> None:
    here, there = taken(ask(make_scribe(folder).engine)), taken(ask(pool))
    assert shown(there) == shown(here)
    for (_, one), (_, other) in zip(here, there, strict=True):
        assert np.allclose(one.log_probs, other.log_probs, atol=1e-5)
        assert other.version == pool.version
        assert other.rollout.before(1).text == one.rollout.before(1).text  # it can be read by a piece, too


def test_texts_follow_the_weights_that_they_were_begun_with(pool: Workers) -> None:
    first, old = taken(ask(pool)), ask(pool)
    pool.load_weights(weights(seed=9), version=2)
    new = ask(pool)
    with pytest.raises(RuntimeError, match="take those first"):
        pool.load_weights(weights(), version=3)
    assert torch.equal(pool.weights_of(2)["model.norm.weight"], weights(seed=9)["model.norm.weight"])
    assert shown(taken(old)) == shown(first)
    assert shown(taken(new)) != shown(first)
    del old, new
    pool.load_weights(weights(), version=3)
    assert shown(taken(ask(pool))) == shown(first)


@pytest.mark.parametrize("how", ["die", "hang", "lie"])
def test_another_takes_the_place_of_one_that_is_lost(pool: Workers, folder: Path, how: str) -> None:
    lost, undisturbed = pool.lost, taken(ask(pool))
    (folder / how).write_text("once")
    written = taken(ask(pool))
    assert pool.lost == lost + 1
    assert shown(written) == shown(undisturbed)
    for (_, one), (_, other) in zip(undisturbed, written, strict=True):
        assert np.array_equal(one.log_probs, other.log_probs)


def test_texts_that_nobody_survives_are_given_up(pool: Workers, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agents.rollouts.workers.crew.MOST_TRIES", 2)
    (folder / "die").write_text("always")
    try:
        with pytest.raises(WorkerLostError, match=r"2 processes were lost .*killed by SIGKILL.* --workers 0"):
            taken(ask(pool))
    finally:
        (folder / "die").unlink()
    assert len(taken(ask(pool))) == 11


def test_an_error_there_is_one_here(pool: Workers, folder: Path) -> None:
    lost = pool.lost
    (folder / "raise").write_text("once")
    with pytest.raises(TaskError, match="`over` of the task Short raised ValueError: no more of this") as caught:
        taken(ask(pool))
    assert "In a process that writes texts" in "".join(caught.value.__notes__)
    assert len(taken(ask(pool))) == 11
    assert pool.lost == lost


def no_scribe() -> Scribe:
    class OfItsOwn(Exception):
        """Cannot be pickled."""

    raise OfItsOwn("there is no model")


def test_one_that_cannot_begin_says_why() -> None:
    pool = Workers(no_scribe, 1, {"weight": torch.zeros(1)}, context=18)
    with pytest.raises(WorkerError, match="OfItsOwn: there is no model"):
        taken(ask(pool))
    pool.close()


def test_what_cannot_be_sent_is_refused_at_once() -> None:
    with pytest.raises(TypeError, match=r"cannot be sent to other processes .*--workers 0"):
        Workers(functools.partial(make_scribe, threading.Lock()), 1, {"weight": torch.zeros(1)}, context=18)  # type: ignore[arg-type]


@given(st.integers(0, 50), st.integers(1, 9))
def test_parts_are_even_and_whole(count: int, shards: int) -> None:
    jobs = [Job(n, n, n) for n in range(count)]
    parts = split_evenly(jobs, shards)
    assert [job for part in parts for job in part] == jobs
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert not count or min(sizes) > 0


# Whole runs.


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("model"), spread=0.1)


def test_a_run_learns_the_same(model: Path, tmp_path: Path) -> None:
    """Of a task with hints, whose cut texts are valued."""
    config = small_config(tmp_path, model, task__name="VowelShare", task__args={}, kl__beta=0.1, iterations=2)
    (here, ours), (there, theirs) = learn(config), learn(config.replace(workers=2))
    for one, other in zip(ours, theirs, strict=True):
        assert other.pop("rollout/behind") == other.pop("rollout/lost") == 0
        one, other = without_times(one), without_times(other)
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert other[name] == pytest.approx(value, rel=1e-3, abs=1e-4, nan_ok=True), name
    same(weights_of(here), weights_of(there), 1e-5)


def test_games_are_scored_where_they_are_played(model: Path, tmp_path: Path) -> None:
    """Their generators cannot go from process to process; what they say and pay can."""
    config = small_config(tmp_path, model, task__name="Nim", task__args={"heaps": 1}, iterations=1)
    found = []
    for count in (0, 2):
        with running(config.replace(workers=count)) as run:
            batch, mdp = run.algorithm.collector.collect(), run.mdp
            texts = [(each.rollout.transcript, each.total, each.failed_replies) for each in batch.episodes]
            found.append((texts, mdp.reward.num_rollouts, mdp.task.replies.num_calls))
    assert found[0] == found[1]
    assert found[0][1:] == (16, found[0][2])
    assert found[0][2] > 0


def killed_at_random(config: Any, times: int) -> tuple[Any, int]:
    """Learn, while processes are killed, each again at some moment of its life."""
    chance, stop = random.Random(0), threading.Event()
    with running(config) as run:
        pool: Any = run.engine

        def kill() -> None:
            while not stop.is_set() and pool.lost < times:
                process = pool._crew.processes[chance.randrange(config.workers)]
                if process is not None and process.is_ready:
                    time.sleep(chance.uniform(0, 0.2))
                    if process.link.popen.poll() is None:
                        process.link.popen.kill()
                time.sleep(0.05)

        killer = threading.Thread(target=kill)
        killer.start()
        for _ in run.algorithm:
            run.update_engine()
        stop.set()
        killer.join()
        return run, pool.lost


@pytest.mark.slow
def test_processes_that_are_killed_change_nothing(model: Path, tmp_path: Path) -> None:
    """Twenty of two; the tests above lose one."""
    times = 20
    config = small_config(
        tmp_path, model, task__name="VowelShare", task__args={}, iterations=10 * times, workers=2, actor__epochs=1
    )
    undisturbed, _ = learn(config)
    run, lost = killed_at_random(config, times)
    assert lost >= times
    same(weights_of(undisturbed), weights_of(run))


def test_batches_that_are_written_ahead(model: Path, tmp_path: Path) -> None:
    """They are as old as was said, twice the same, and go on exactly after a stop, with the weights of then."""
    config = small_config(
        tmp_path / "whole", model, task__name="VowelShare", task__args={}, iterations=6, workers=1, rollout__ahead=2
    )
    train(config)
    rows = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
    assert [row["rollout/behind"] for row in rows[1:]] == [0, 1, 2, 2, 2, 2]
    assert all(0 < row["ratio/is_weight"] < 2 for row in rows[1:])
    with pytest.MonkeyPatch.context() as patch:
        again = config.replace(out=tmp_path / "stopped")
        train_until_it_breaks(again, patch, iteration=4, in_the_middle=True)
    train(again, resume=True)
    theirs = [json.loads(line) for line in (again.out / "metrics.jsonl").read_text().splitlines()]
    for one, other in zip(rows, theirs, strict=True):
        assert without_times(one) == without_times(other)


def test_nothing_is_written_ahead_in_this_process(model: Path, tmp_path: Path) -> None:
    (problem,) = problems(small_config(tmp_path, model, rollout__ahead=1))
    assert problem.startswith("--rollout.ahead is 1, but texts are written in this process")


def test_they_end_with_the_learner(model: Path, tmp_path: Path) -> None:
    """Even if it is killed."""
    program = (
        "from pathlib import Path; from tests.agents.runs import small_config; from agents.run.parts import build\n"
        f"run = build(small_config(Path({str(tmp_path)!r}), {str(model)!r}, workers=1)); run.algorithm.step()\n"
        "print(*[process.link.popen.pid for process in run.engine._crew.processes], flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, **SEES}
    ) as learner:
        assert learner.stdout is not None
        pids = [int(pid) for pid in learner.stdout.readline().split()]
        assert len(pids) == 1
        learner.kill()
    until = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < until
        time.sleep(0.1)
