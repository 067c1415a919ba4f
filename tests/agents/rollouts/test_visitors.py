"""Processes that come from elsewhere to write texts: the same as here, whoever dies, and nobody who should not."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pickle
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from pathlib import Path
from typing import Any

import pytest
import torch

from agents.cli import main
from agents.config import TrainConfig
from agents.config.address import KEY, Address
from agents.config.checks import problems
from agents.config.files import ConfigError
from agents.rollouts.workers import Workers, gate
from agents.rollouts.workers.gate import Gate, Visitor, Visitors
from agents.rollouts.workers.here import Here
from agents.rollouts.workers.link import NobodyCameError
from agents.rollouts.workers.shards import Failed, Ready
from agents.rollouts.workers.visit import about_me
from agents.run.links import check_links, make_links
from tests.agents.rollouts.scribes import CONTEXT, make_scribe, weights
from tests.agents.rollouts.test_workers import SEES, ask, shown, taken

SECRET = "secret"


@contextlib.contextmanager
def coming_to(address: Address, count: int, secret: str = SECRET) -> Iterator[list[subprocess.Popen[str]]]:
    """So many `llm-env worker`."""
    found = [
        subprocess.Popen(
            [sys.executable, "-m", "agents.cli", "worker", str(address)],
            env={**os.environ, **SEES, KEY: secret},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(count)
    ]
    try:
        yield found
    finally:
        for process in found:
            process.kill()
            process.communicate()


def no_gate(**changes: Any) -> Gate:
    return Gate(Address("127.0.0.1", 0), SECRET.encode(), **changes)


def until(holds: Any, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_they_write_what_is_written_here_and_another_takes_the_place_of_one_that_dies(tmp_path: Path) -> None:
    """Three come for two places."""
    links = Visitors(no_gate())
    make = functools.partial(make_scribe, tmp_path)
    pool = Workers(make, 2, weights(), context=CONTEXT, copies=2, links=links)
    with coming_to(links.gate.address, 3) as processes:
        pool.load_weights(weights(), version=1)
        assert shown(taken(ask(pool))) == shown(taken(ask(make_scribe(tmp_path).engine)))
        until(lambda: len(links.gate._waiting) == 1)
        undisturbed = taken(ask(pool))
        (tmp_path / "die").write_text("once")
        assert shown(taken(ask(pool))) == shown(undisturbed)
        assert pool.lost == 1
        assert [process.poll() for process in processes].count(None) == 2

        old = ask(pool)  # begun with the weights of before
        pool.load_weights(weights(seed=9), version=2)
        new = ask(pool)
        assert shown(taken(old)) == shown(undisturbed)
        engine = make_scribe(tmp_path).engine
        engine.load_weights(weights(seed=9), version=2)
        assert shown(taken(new)) == shown(taken(ask(engine))) != shown(undisturbed)

        pool.close()
        for process in processes:
            said, _ = process.communicate(timeout=60)
            assert process.returncode == -9 or (process.returncode == 0 and said.endswith("the run has ended\n"))


def test_one_that_has_gone_while_it_waited_is_passed_over(tmp_path: Path) -> None:
    links = Visitors(no_gate())
    gone = [_let_in(links.gate, about_me())[0] for _ in range(7)]
    until(lambda: len(links.gate._waiting) == 7)
    for connection in gone:
        connection.close()
    with coming_to(links.gate.address, 1):
        until(lambda: len(links.gate._waiting) == 8)
        pool = Workers(functools.partial(make_scribe, tmp_path), 1, weights(), context=CONTEXT, links=links)
        pool.load_weights(weights(), version=1)
        assert len(taken(ask(pool))) == 11
        assert pool.lost == 0
        connection, _ = _let_in(links.gate, about_me())  # too many
        pool.close()
        connection.close()


def test_one_that_cannot_begin_ends_nothing_where_others_write(tmp_path: Path) -> None:
    """As long as anybody writes, all is written: of two places, one is taken."""
    links = Visitors(no_gate())
    pool = Workers(functools.partial(make_scribe, tmp_path), 2, weights(), context=CONTEXT, links=links)
    with coming_to(links.gate.address, 1):
        pool.load_weights(weights(), version=1)
        assert len(taken(ask(pool))) == 11
        connection, _ = _let_in(links.gate, about_me())
        connection.recv_bytes()  # what there is to make
        connection.send_bytes(pickle.dumps(Failed("ImportError: no such module", "")))
        until(lambda: pool.lost == 1)
        assert len(taken(ask(pool))) == 11
    pool.close()


def test_if_nobody_comes_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Visitor.__init__, "__defaults__", (0.2,))
    links = Visitors(no_gate())
    pool = Workers(dict, 2, {"weight": torch.zeros(1)}, context=CONTEXT, links=links)
    with pytest.raises(NobodyCameError, match=f"start some, with the same {KEY}, by `llm-env worker 127.0.0.1:"):
        taken(ask(pool))
    pool.close()


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    monkeypatch.setattr(gate, "GREETING_SECONDS", 1.0)
    found = no_gate()
    yield found
    found.close()


def knock(address: Address) -> Connection:
    return Connection(socket.create_connection(address).detach())


def test_who_does_not_know_the_key_is_not_let_in(guarded: Gate, caplog: pytest.LogCaptureFixture) -> None:
    with coming_to(guarded.address, 1, "another") as (process,):
        said, _ = process.communicate(timeout=60)
        assert process.returncode == 2
        assert f"does not let this process in: is {KEY} the same as there?" in said
    assert f"who has another {KEY}" in caplog.text
    with knock(guarded.address) as silent:  # it is sent away, and others are let in meanwhile
        visitor, said = _let_in(guarded, about_me())
        assert said["refused"] is None
        silent.recv_bytes()
        with pytest.raises((EOFError, ConnectionError)):
            silent.recv_bytes()
    assert guarded.take("", 5.0) is not None
    assert guarded.take("", 0.0) is None
    visitor.close()


def test_who_has_other_software_is_not_let_in(guarded: Gate) -> None:
    for odd in ({**about_me(), "python": "3.9"}, {"python": about_me()["python"]}):
        refused = _let_in(guarded, odd)[1]["refused"]
        assert "install there what is installed here" in refused
    assert "llm_env None, not" in refused
    assert guarded.take("", 0.0) is None


def _let_in(guarded: Gate, said: dict[str, str]) -> tuple[Connection, Any]:
    connection = knock(guarded.address)
    answer_challenge(connection, guarded.key)
    deliver_challenge(connection, guarded.key)
    connection.send_bytes(json.dumps({"ticket": "", **said}).encode())
    return connection, json.loads(connection.recv_bytes())


def test_one_that_takes_nothing_in_is_lost() -> None:
    """Else the program would wait for ever to send it weights."""
    room = 1 << 26
    links = Visitors(no_gate(patience=1.0))
    pool = Workers(dict, 1, {"weight": torch.zeros(room)}, context=CONTEXT, links=links)
    connection, _ = _let_in(links.gate, about_me())
    connection.recv_bytes()  # what there is to make
    connection.send_bytes(pickle.dumps(Ready()))
    written = ask(pool)
    until(lambda: pool.lost == 1)
    pool.close()
    del written


def test_a_gpu_for_each(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,6,7,8")
    found = tmp_path / "found"
    code = f"import os; open({str(found)!r}, 'w').write(os.environ['CUDA_VISIBLE_DEVICES'])"
    monkeypatch.setattr("agents.rollouts.workers.worker.__file__", str(tmp_path / "script.py"))
    (tmp_path / "script.py").write_text(code)
    link = Here(gpus=2, first_gpu=1).begin(1, [])
    link.popen.wait()
    assert found.read_text() == "7,8"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"ray": "auto"}, "--ray is auto, but --workers is 0"),
        ({"worker_gpus": 1}, "--worker-gpus is 1, but --workers is 0"),
        ({"worker_gpus": 2, "workers": 3}, "which with the learner's makes 6, but torch finds 0 CUDA devices here"),
        ({"workers": 1, "listen": "7000"}, "--listen is 7000, expected HOST:PORT"),
        ({"workers": 1, "listen": "host:70000"}, "--listen is host:70000, expected HOST:PORT"),
        ({"workers": 1, "listen": "0.0.0.0:7000"}, f"the environment variable {KEY} is empty: it must hold a secret"),
        ({"workers": 1, "listen": "0.0.0.0:7000", "ray": "auto"}, "leave one of them out"),
    ],
)
def test_what_contradicts_itself(
    changes: dict[str, Any], problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(KEY, raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert any(problem in each for each in problems(TrainConfig(out=tmp_path).replace(**changes)))


@pytest.mark.parametrize(
    ("words", "key", "problem"),
    [
        (["7000"], SECRET, "'7000' is no address: expected HOST:PORT, such as 10.0.0.1:7000"),
        (["127.0.0.1:7000"], "", f"the environment variable {KEY} is empty"),
        (["no-such-machine.invalid:7000"], SECRET, "there is no machine named 'no-such-machine.invalid'"),
        (["127.0.0.1:1", "--patience", "0"], SECRET, "nobody waits at 127.0.0.1:1"),
    ],
)
def test_a_command_that_cannot_work_says_why(
    words: list[str], key: str, problem: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(KEY, key)
    assert main(["worker", *words]) == 2
    assert problem in capsys.readouterr().err


def test_where_they_come_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, SECRET)
    config = TrainConfig(out=tmp_path, workers=2)
    assert isinstance(make_links(config), Here)
    own = make_links(config.replace(device="cuda", worker_gpus=2, worker_cpus=3), learners=4)
    assert isinstance(own, Here)
    assert (own.threads, own.gpus, own.first_gpu) == (3, 2, 4)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    check_links(config.replace(listen=address))
    visitors = make_links(config.replace(listen=address))
    with pytest.raises(ConfigError, match=rf"--listen is {address}, but nothing can wait there .*use another port"):
        check_links(config.replace(listen=address))
    assert visitors.announcement == f"waiting for processes to write texts: llm-env worker {address}"
    visitors.close()


def test_ray_starts_them(tmp_path: Path) -> None:
    """A cluster of this machine; of a process that is killed another takes the place."""
    ray = pytest.importorskip("ray")
    from agents.rollouts.workers.on_ray import OnRay

    with pytest.raises(ConnectionError, match=r"there is no Ray cluster 'auto'.*--ray local"):
        check_links(TrainConfig(workers=1, ray="auto"))
    check_links(TrainConfig(workers=1, ray="local"))
    pool = Workers(functools.partial(make_scribe, tmp_path), 2, weights(), context=CONTEXT, links=OnRay("local"))
    try:
        pool.load_weights(weights(), version=1)
        undisturbed = taken(ask(pool))
        assert shown(undisturbed) == shown(taken(ask(make_scribe(tmp_path).engine)))
        (tmp_path / "die").write_text("once")
        assert shown(taken(ask(pool))) == shown(undisturbed)
        assert pool.lost == 1
    finally:
        pool.close()
    assert not ray.is_initialized()
