"""`llm-env score`: texts from elsewhere get the scores that the task's own episodes would."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from agents.cli import main
from llm_env.tasks import Reverse, register_task
from rewards import Rollout


@register_task
class Fussy(Reverse):
    """Fails on one text."""

    def score(self, rollout: Rollout) -> float:
        return 1 / len(rollout.text)


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


def run(tmp_path: Path, texts: list[Any], *flags: str) -> list[dict[str, Any]]:
    out = tmp_path / "scores.jsonl"
    call = ["score", "--texts", str(write(tmp_path / "texts.jsonl", texts)), "--out", str(out), *flags]
    assert main(call) == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_scores_in_the_order_of_the_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Letters that are right where they stand, and the end, are a seventh each, as in training."""
    answers = [prompt.metadata["answer"] for prompt in Reverse(6, alphabet="abcd", dense=True).prompts("test")]
    half = answers[3][:3]
    texts = [
        {"prompt_index": 3, "text": half},
        {"prompt_index": 0, "text": answers[0]},
        {"prompt_index": 3, "text": ""},
    ]
    args = ["--task.name", "Reverse", "--task.args", "length", "6", "alphabet", "abcd", "dense", "true"]
    rows = run(tmp_path, texts, *args)
    assert [row["prompt_index"] for row in rows] == [3, 0, 3]
    assert [row["score"] for row in rows] == pytest.approx([3 / 7, 1.0, 0.0])
    assert [row["parts"]["exact"] for row in rows] == [0.0, 1.0, 0.0]
    assert [row["failed"] for row in rows] == [None] * 3
    assert "3 texts, mean score 0.4762, 0 failed" in capsys.readouterr().out


def test_what_fails_is_named_and_the_rest_is_scored(tmp_path: Path) -> None:
    texts = [{"prompt_index": 0, "text": text} for text in ("ab", "", "abcd")]
    rows = run(tmp_path, texts, "--task.name", "Fussy")
    assert [row["score"] for row in rows] == [0.5, 0.0, 0.25]
    assert [row["failed"] for row in rows] == [None, "ZeroDivisionError: division by zero", None]


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_task_of_one_file_counts_its_lines(tmp_path: Path, split: str) -> None:
    problems = [{"question": f"{n}?", "answer": f"#### {n}"} for n in range(30)]
    path = write(tmp_path / "problems.jsonl", problems)
    texts = [{"prompt_index": n, "text": f"It is {n}."} for n in (29, 0, 7)]
    args = ["--task.name", "GSM8K", "--task.args", "path", str(path), "--split", split]
    assert [row["score"] for row in run(tmp_path, texts, *args)] == [1.0] * 3


@pytest.mark.parametrize(
    ("texts", "flags", "message"),
    [
        (["{"], "", "line 1 is no JSON"),
        ([{"prompt_index": 0, "text": "a"}, {"text": "a"}], "", 'line 2: expected {"prompt_index": 0, "text": "..."}'),
        ([{"prompt_index": True, "text": "a"}], "", "line 1: expected"),
        ([[0, "a"]], "", "line 1: expected"),
        ([{"prompt_index": 999, "text": "a"}], "", "line 1: prompt_index is 999, but there are 256 prompts, from 0"),
        ([], "--split dev", "no split 'dev'"),
        ([], "--task.name Reverze", "did you mean 'Reverse'"),
        ([], "--task.name Maze", "the task Maze has `reply`"),
        ([], "--texts nowhere.jsonl", "--texts is nowhere.jsonl, but there is no such file"),
    ],
)
def test_mistakes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], texts: list[Any], flags: str, message: str
) -> None:
    out = tmp_path / "scores.jsonl"
    path = write(tmp_path / "texts.jsonl", texts)
    assert main(["score", "--texts", str(path), "--out", str(out), *flags.split()]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()
