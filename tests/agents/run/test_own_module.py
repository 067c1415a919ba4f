"""A user's own module brings a task, a reward, an engine and a metric to a run; nothing of ours changes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from agents.metrics import metric
from llm_env.engines import engine_names
from llm_env.tasks import task_names
from rewards import reward_names
from tests.agents.runs import Config, learn

SOURCE = """
from agents.metrics import Metric, register_metric
from llm_env import Prompt, Task, register_task
from llm_env.engines import register_engine
from llm_env.engines.transformers import TransformersEngine
from rewards import register_reward

STARTED = []


@register_task
class OwnVowels(Task):
    max_new_tokens = 4
    max_prompt_tokens = 8
    max_reply_tokens = 3

    def sample(self, rng):
        return Prompt(f"say {rng.integers(100)}")

    def reply(self, rollout):
        return "!" if rollout.num_actions < 4 else None

    def score(self, rollout):
        return sum(letter in "aeiou" for letter in rollout.text)


@register_reward("shortness")
def shortness(rollout, most=4):
    return 100.0 + most - rollout.num_actions


@register_engine("counting")
class CountingEngine(TransformersEngine):
    def _advance(self, slots, token_lists, fresh, prompts):
        STARTED.append(len(fresh))
        return super()._advance(slots, token_lists, fresh, prompts)


register_metric(Metric(name="reward/shortness", label="shortness", meaning="How short the texts are, plus 100."))
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "my_parts.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    yield "my_parts"
    sys.modules.pop("my_parts", None)


def test_a_module_brings_a_task_a_reward_an_engine_and_a_metric(config: Config, module: str) -> None:
    own = config(module=module, task__name="OwnVowels", rollout__engine="counting", iterations=1)
    _, (row,) = learn(own)
    assert 0 <= row["reward/mean"] <= 4
    _, (row,) = learn(own.replace(task__reward="shortness", task__reward_args={"most": 40}))
    assert 100 <= row["reward/mean"] <= 140
    assert row["reward/shortness"] == row["reward/mean"]
    assert sum(sys.modules[module].STARTED) >= 2 * own.rollout.batch_size
    assert "OwnVowels" in task_names()
    assert "shortness" in reward_names()
    assert "counting" in engine_names()
    assert metric("reward/shortness").label == "shortness"
