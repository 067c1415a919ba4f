"""What a run tells of a task whose replies fail or find no room."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agents.config import TrainConfig
from llm_env.tasks import Task, register_task
from llm_env.tokens.prompts import Prompt
from rewards import AlwaysFailsError, Rollout
from tests.agents.runs import running, save_small_model, small_config


@register_task
class Moody(Task):
    """A tool that is asked after the first token, and fails for every other prompt."""

    max_new_tokens = 2
    max_prompt_tokens = 1
    max_reply_tokens = 3
    num_test = 0

    def splits(self) -> dict[str, list[Prompt]]:
        return {"train": [Prompt(letter, {"letter": letter}) for letter in "abcd"]}

    def setup(self, vocabulary: Any) -> None:
        self.stop = [[token] for token in range(vocabulary.size)]

    def reply(self, rollout: Rollout) -> str | None:
        if rollout.num_actions > 1:
            return None
        if rollout.metadata["letter"] in "ac":
            raise TimeoutError("no answer")
        return "much too long" if rollout.metadata["letter"] == "d" else "ok"

    def score(self, rollout: Rollout) -> float:
        return float(np.mean([token % 2 for token in rollout.tokens.tolist()]))


@register_task
class Silent(Moody):
    """One that fails always."""

    def reply(self, rollout: Rollout) -> str | None:
        raise TimeoutError("no answer")


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    model = save_small_model(tmp_path / "model")
    return small_config(tmp_path / "run", model, task__name="Moody", task__args={}, rollout__batch_size=8)


def test_a_failing_tool_is_counted_and_ends_nothing_else(config: TrainConfig) -> None:
    with running(config) as run:
        for iteration in (1, 2):
            metrics = run.algorithm.step()
            assert metrics["reply/failed"] == 0.5
            assert metrics["reply/failures"] == 4 * iteration
            assert metrics["reply/left_out"] == 2 * iteration
            assert metrics["text/length"] == 1.25  # the two after b have a second token
        state = json.loads(json.dumps(run.algorithm.state()[1]))
    with running(config) as resumed:
        resumed.algorithm.load_state(run.algorithm.state()[0], state)
        assert resumed.algorithm.step()["reply/failures"] == 12


def test_a_tool_that_never_works_ends_the_run(config: TrainConfig) -> None:
    with (
        running(config.replace(task__name="Silent", rollout__batch_size=24)) as run,
        pytest.raises(AlwaysFailsError, match="`reply` of the task Silent"),
    ):
        run.algorithm.step()
