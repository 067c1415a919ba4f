"""`llm-env tasks NAME`: what a task asks, and what a right answer is worth."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from agents.cli import main
from llm_env.tasks import Copy, register_task
from rewards import Rollout


@register_task
class HalfCopy(Copy):
    """A copy that is worth half."""

    def score(self, rollout: Rollout) -> float:
        return 0.5 * super().score(rollout)  # type: ignore[operator]


@register_task
class CutCopy(Copy):
    """A copy for which there is no room."""

    def __init__(self) -> None:
        super().__init__(length=6)
        self.max_new_tokens = 3


def shown(capsys: pytest.CaptureFixture[str], line: str) -> str:
    assert main(["tasks", *line.split()]) == 0
    return capsys.readouterr().out


def test_prompts_answers_and_lengths(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "HalfCopy length 2 num_train 30 num_test 3")
    lines = text.splitlines()
    assert lines[0] == "HalfCopy: A copy that is worth half."
    assert lines[1] == "train      30 prompts, of 9 tokens by the tokenizer of tiny"
    assert lines[3] == "an agent   writes 3 tokens at most"
    prompts, answers = ([line[11:] for line in lines if line.startswith(label)] for label in ("prompt", "answer"))
    assert len(prompts) == 3
    assert [f"copy {answer[:2]}:"[:8] for answer in answers] == [prompt[:8] for prompt in prompts]
    assert all(answer.endswith(f"   (score 0.5, {len(answer.split()[0])} tokens)") for answer in answers)


def test_an_answer_that_cannot_be_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert "   (score 1, 6 tokens: more than the 3 it may have)" in shown(capsys, "CutCopy")


def test_a_task_of_turns_shows_them_without_a_score(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "Maze size 3")
    assert "and is replied" in text
    assert "score" not in text
    answer = next(line for line in text.splitlines() if line.startswith("answer"))
    assert set(answer[11:].split()) <= set("nesw")


def test_a_task_of_rows_without_held_out_ones_or_a_reward(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"two\nlines {n}", "answer": n}) for n in range(4)))
    text = shown(capsys, f"Dataset train {path}")
    assert "test " not in text
    assert "prompt     two\n           lines 0\nanswer     0\n" in text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("Revers", "unknown task 'Revers'; did you mean 'Reverse'"),
        ("Reverse lenght 6", "there is no argument 'lenght'; did you mean 'length'"),
        ("Reverse length", "expected names and values by turns"),
        ("Reverse --length 6", "takes the task's arguments, --model and --module, got --length"),
        ("Reverse --model", "--model is the last word"),
        ("Reverse --module no_such_module", "Python finds no module no_such_module"),
    ],
)
def test_mistakes(capsys: pytest.CaptureFixture[str], line: str, message: str) -> None:
    assert main(["tasks", *line.split()]) == 2
    assert message in capsys.readouterr().err
