"""`llm-env play`: what a person writes is what the environment pays for, and can be taken back; in a real terminal."""

from __future__ import annotations

import os
import pty
import select
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agents.cli import main
from agents.cli.play import turn
from agents.config import TrainConfig
from agents.config.files import save_config
from agents.run.play import Play
from llm_env.models import load_model
from llm_env.tasks import CalculatorSums, Reverse
from llm_env.tasks.maze import Maze


@pytest.fixture
def reverse() -> Play:
    game = Play(Reverse(length=3, num_train=8), "tiny")
    game.begin(2)
    return game


def test_the_right_answer_is_paid(reverse: Play) -> None:
    said = reverse.write(str(reverse.answer), end=True)
    assert (said.reward, said.over, reverse.over) == (1.0, "eos", True)
    assert said.written == reverse.answer
    assert said.parts["score"] == 1.0


def test_what_is_taken_back_was_never_written(reverse: Play) -> None:
    """Whatever was written, also past the end."""
    asked = reverse.transcript
    reverse.write("a")
    before = reverse.transcript
    reverse.write("bcdef", end=True)
    assert reverse.over
    assert reverse.undo()
    assert (reverse.transcript, reverse.over) == (before, False)
    assert reverse.undo()
    assert reverse.transcript == asked
    assert not reverse.undo()


def test_the_likeliest_are_the_models_own() -> None:
    game = Play(CalculatorSums(digits=1), "tiny")
    game.begin(0)
    tokens = torch.as_tensor(game.mdp.state.tokens[:1, : game.length])
    with torch.no_grad():
        chances = game.vocabulary.usable(load_model("tiny")(tokens).logits[0, -1]).softmax(-1)
    found = game.likeliest(5)
    assert [token for token, _, _ in found] == chances.topk(5).indices.tolist()
    assert [chance for _, _, chance in found] == pytest.approx(chances.topk(5).values.tolist(), rel=1e-4)


def test_a_mask_leaves_what_is_allowed() -> None:
    game = Play(Maze(size=3), "tiny")
    game.begin(0)
    mask = game.mdp.action_mask()
    assert mask is not None
    allowed = set(np.flatnonzero(mask[0]).tolist())
    assert {token for token, _, chance in game.likeliest(50) if chance > 0} <= allowed


def test_the_task_replies_and_the_model_goes_on() -> None:
    game = Play(CalculatorSums(digits=1), "tiny")
    asked = game.begin(0)
    said = game.write("<calculator>3+4</calculator>", end=True)
    assert (said.reply, said.over) == ("<result>7</result>", None)
    end = game.write("7", end=True)
    assert (end.reward, end.over) == (float(sum(map(int, asked[:-1].split("+"))) == 7), "eos")
    game.begin(1)
    first, again = game.go_on(1.0), None
    assert game.over or first.reply
    assert game.undo()
    again = game.go_on(1.0)
    assert again == first  # the same random numbers


def test_lines_that_are_no_text(reverse: Play, capsys: pytest.CaptureFixture[str]) -> None:
    for line, said in {
        ":next x": "expected the number of a prompt after :next, got 'x'",
        ":go x": "expected a temperature after :go, such as 1.0, got 'x'",
        ":99": "there are 8 tokens to choose from",
        ":tpo": "unknown :tpo",
        ":undo": "there is nothing to take back",
        ":answer": str(reverse.answer),
    }.items():
        assert turn(reverse, line)
        assert said in capsys.readouterr().out
    before = reverse.transcript
    turn(reverse, ":add :")
    assert reverse.transcript == before + ":"
    turn(reverse, "::")
    assert reverse.over
    turn(reverse, "more")
    assert "this episode is over" in capsys.readouterr().out
    assert not turn(reverse, ":quit")


def test_in_a_terminal() -> None:
    task = ["--task.name", "Reverse", "--task.args", "length", "3", "--prompt", "1"]
    process, terminal = pty.fork()
    if process == 0:
        os.execv(sys.executable, [sys.executable, "-m", "agents.cli", "play", *task])
    seen = ""

    def until(text: str) -> str:
        nonlocal seen
        while text not in seen:
            assert select.select([terminal], [], [], 120)[0], seen
            seen += os.read(terminal, 4096).decode()
        before, _, seen = seen.partition(text)
        return before

    until("prompt 1 of")
    until("> ")
    os.write(terminal, b":answer\n")
    until(":answer\r\n")
    answer = until("\r\n")
    os.write(terminal, f"{answer}\n".encode())
    assert "reward 1" in until("over: eos")
    os.write(terminal, b":quit\n")
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    os.close(terminal)


def test_a_runs_own_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a run's folder the model and the task are the run's own, and flags go before them."""
    played: list[tuple[int, str]] = []

    class Stub:
        def __init__(self, task: Any, model: str, split: str, device: str) -> None:
            played.append((task.length, model))
            raise EOFError

    monkeypatch.setattr("agents.run.play.Play", Stub)
    args = {"length": 4, "alphabet": "abcd"}
    save_config(TrainConfig().replace(task__name="Reverse", task__args=args), tmp_path / "config.yaml")
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "config.json").touch()
    for more in ([], ["--task.args", "length", "5"]):
        with pytest.raises(EOFError):
            main(["play", "--model", str(tmp_path), *more])
    assert played == [(4, str(tmp_path / "best")), (5, str(tmp_path / "best"))]


def test_a_task_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["play", "--task.name", "Revers"]) == 2
    assert "did you mean 'Reverse'" in capsys.readouterr().err
