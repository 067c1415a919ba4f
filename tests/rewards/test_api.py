"""The public names of `rewards`: a change here is a change for every user."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import rewards
from tests.public import has_example, undocumented

PUBLIC = [
    "AlwaysFailsError",
    "Clip",
    "CodeTests",
    "End",
    "Ensemble",
    "ExactMatch",
    "Failure",
    "Format",
    "Guard",
    "Judge",
    "JudgeError",
    "LengthPenalty",
    "Limits",
    "Math",
    "MissingEosPenalty",
    "NumericMatch",
    "Outcome",
    "Product",
    "RepetitionPenalty",
    "Reward",
    "RewardError",
    "RewardLike",
    "RewardModel",
    "Rollout",
    "Sandbox",
    "SandboxUnavailable",
    "Score",
    "Turn",
    "VaderSentiment",
    "WeightedSum",
    "as_reward",
    "final_answer",
    "make_reward",
    "program_in",
    "register_reward",
    "reward",
    "reward_names",
]
DOCUMENTED = [name for name in PUBLIC if name != "RewardLike"]  # a type alias cannot carry a docstring


def test_the_list():
    assert rewards.__all__ == PUBLIC
    assert all(hasattr(rewards, name) for name in PUBLIC)


@pytest.mark.parametrize("name", DOCUMENTED)
def test_every_name_is_documented(name):
    thing = getattr(rewards, name)
    assert undocumented(name, thing) == []
    assert has_example(thing)


def test_no_module_imports_inside_a_function_for_want_of_order():
    """Each module of the package can be imported first, so none waits for another that imports it."""
    for path in sorted(Path(rewards.__file__).parent.glob("*.py")):
        tree = ast.parse(path.read_text())
        inner = [
            f"{path.name}: {node.module}"
            for function in ast.walk(tree)
            if isinstance(function, ast.FunctionDef)
            for node in ast.walk(function)
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rewards")
        ]
        # The worker process learns only from its first message where packages are installed.
        assert inner == (["worker.py: rewards.score"] if path.name == "worker.py" else []), inner
