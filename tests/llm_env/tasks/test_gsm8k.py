"""GSM8K: prompts, what is held out, what is shown solved, and bad files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llm_env import TokenMDP
from llm_env.tasks import GSM8K
from rewards import Rollout


def rows(count: int, first: int = 0) -> list[dict[str, str]]:
    return [
        {"question": f"{n} eggs, and {n} more?", "answer": f"{n}+{n}=<<{n}+{n}={2 * n}>>{2 * n} eggs.\n#### {2 * n}"}
        for n in range(first, first + count)
    ]


def write(path: Path, lines: list[Any]) -> str:
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return str(path)


@pytest.fixture
def path(tmp_path: Path) -> str:
    return write(tmp_path / "problems.jsonl", rows(20))


def test_a_part_is_held_out_and_solved_ones_are_in_no_split(path: str) -> None:
    task = GSM8K(path, num_test=4, shots=3)
    train, test = task.prompts("train"), task.prompts("test")
    assert (len(train), len(test)) == (13, 4)
    asked = [prompt.identity.rpartition("Question: ")[2] for prompt in (*train, *test)]
    assert len(set(asked)) == 17
    shown = train[0].identity.split("Question: ")[1:-1]
    assert len(shown) == 3
    assert not {question.partition("\n")[0] for question in shown} & {question.partition("\n")[0] for question in asked}
    assert all("####" in solved and "<<" not in solved for solved in shown)
    assert all(prompt.identity.startswith(train[0].identity.rpartition("Question: ")[0]) for prompt in (*train, *test))


def test_a_file_of_held_out_problems(path: str, tmp_path: Path) -> None:
    task = GSM8K(path, test=write(tmp_path / "test.jsonl", rows(5, first=100)), num_train=7, num_test=3)
    assert (len(task.prompts("train")), len(task.prompts("test"))) == (7, 3)
    assert task.prompts("test")[0].metadata == {"answer": "200", "solution": " 100+100=200 eggs.\n#### 200"}


def test_its_own_solutions_are_right_and_an_environment_scores_them(path: str) -> None:
    mdp = TokenMDP(GSM8K(path, num_test=4), drop_long_prompts=True)
    for prompt in mdp.task.prompts("train"):
        [right] = mdp.reward([Rollout.of(prompt.metadata["solution"], metadata=prompt.metadata)])
        [wrong] = mdp.reward([Rollout.of(" So it is 5.\n#### 5", metadata=prompt.metadata)])
        assert (right.value, wrong.value) == (1.0, 0.0)


def test_two_seeds_hold_out_others(path: str) -> None:
    tasks = [GSM8K(path, num_test=4, seed=seed) for seed in (0, 0, 1)]
    held_out = [[prompt.identity for prompt in task.prompts("test")] for task in tasks]
    assert held_out[0] == held_out[1] != held_out[2]


def test_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `datasets` gives is read like rows of a file."""
    asked = []

    def load_dataset(*arguments: str) -> dict[str, list[dict[str, str]]]:
        asked.append(arguments)
        return {"train": rows(6), "test": rows(3, first=50)}

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    task = GSM8K()
    assert asked == [("openai/gsm8k", "main")]
    assert (len(task.prompts("train")), len(task.prompts("test"))) == (6, 3)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install datasets, or give the path of a JSONL file"):
        GSM8K()


@pytest.mark.parametrize(
    ("lines", "arguments", "message"),
    [
        ([{"question": "a?", "answer": "none"}], {}, r"problem 1: its answer is 'none'; expected a text that ends"),
        ([{"question": "a?"}], {}, "problem 1: its answer is None"),
        ([{"answer": "1"}], {}, "line 1: a row of prompts has no field 'question'"),
        (rows(10), {"shots": 8}, "10 problems are too few: 2 are held out"),
        (rows(4), {"shots": -1}, "shots must be 0 or more, got -1"),
    ],
)
def test_bad_input(tmp_path: Path, lines: list[Any], arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GSM8K(write(tmp_path / "bad.jsonl", lines), **arguments)


def test_held_out_problems_without_a_path() -> None:
    with pytest.raises(ValueError, match="give both"):
        GSM8K(test="test.jsonl")
