"""Tasks that are functions to write, in HumanEval's form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llm_env.tasks import HumanEval
from rewards import Rollout

pytest.importorskip("pydantic_monty")


@pytest.fixture
def path(tmp_path: Path) -> str:
    rows = [
        {
            "task_id": f"mine/{number}",
            "prompt": f'def add_{number}(x):\n    """x and {number}"""\n',
            "entry_point": f"add_{number}",
            "test": f"def check(candidate):\n    assert candidate(1) == {number + 1}\n",
        }
        for number in range(10)
    ]
    file = tmp_path / "problems.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return str(file)


def test_completions_are_judged_by_their_tests(path: str) -> None:
    task = HumanEval(path)
    assert (len(task.prompts("train")), len(task.prompts("test"))) == (8, 2)
    rollouts = []
    for prompt in task.prompts("train"):
        right = f"    return x + {prompt.metadata['entry_point'].removeprefix('add_')}"
        rollouts += [Rollout.of(text, metadata=prompt.metadata) for text in (right, "    return x + 99")]
    assert [score.value for score in task.as_reward()(rollouts)] == [1.0, 0.0] * 8


def test_all_of_a_file_in_its_order(path: str) -> None:
    task = HumanEval(path, split="test")
    assert [prompt.metadata["task_id"] for prompt in task.prompts("test")] == [f"mine/{n}" for n in range(10)]


def test_asked_in_words(path: str) -> None:
    task = HumanEval(path, split="test", chat=True)
    prompt = task.prompts("test")[3]
    assert prompt.text.endswith('```python\ndef add_3(x):\n    """x and 3"""\n\n```')
    answer = "Sure.\n```python\ndef add_3(x):\n    return 3 + x\n```"
    assert task.as_reward()([Rollout.of(answer, metadata=prompt.metadata)])[0].value == 1.0
    assert task.stop == ()


def test_what_is_no_problem(tmp_path: Path, path: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text('{"prompt": "def f():", "entry_point": "f"}')
    with pytest.raises(ValueError, match=r"problem 1 has no text under \['test'\]"):
        HumanEval(str(file))
    with pytest.raises(ValueError, match="split is 'val'"):
        HumanEval(path, split="val")
