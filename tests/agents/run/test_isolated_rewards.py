"""Rewards that draw at random in a process of their own follow the seed of the run."""

from __future__ import annotations

import random

import pytest

from agents.rollouts.writers import EngineWriter
from agents.run.evaluate import Evaluator
from llm_env.engines import make_engine
from llm_env.mdp.core import TokenMDP
from llm_env.tasks import Dataset
from rewards import register_reward
from tests.agents.runs import Config, learn, without_times


@pytest.mark.slow
def test_two_runs_with_one_seed_agree(config: Config) -> None:
    @register_reward("isolated_lottery")
    def lottery(rollout: object) -> float:
        return random.random()

    drawn = config(iterations=2, task__name="Copy", task__args={"length": 2}, task__reward="isolated_lottery")
    drawn = drawn.replace(task__reward_timeout=20.0)
    (_, first), (_, again), (_, other) = map(learn, (drawn, drawn, drawn.replace(seed=1)))
    assert list(map(without_times, first)) == list(map(without_times, again))
    assert first[0]["reward/mean"] != other[0]["reward/mean"]
    assert first[0]["reward/mean"] != first[1]["reward/mean"]


def test_every_evaluation_draws_the_same_and_leaves_the_run_its_numbers() -> None:
    def lottery(rollout: object) -> float:
        return random.random()

    mdp = TokenMDP(Dataset(["a", "b", "c"], reward=lottery, max_new_tokens=1), reward_timeout=20.0)
    engine = make_engine("transformers", "tiny", num_slots=3, context=mdp.context)
    evaluator = Evaluator(EngineWriter(mdp, engine), prompts=3, seed=1)
    before = random.getstate()
    first = evaluator.evaluate()
    assert evaluator.evaluate().metrics == first.metrics
    assert random.getstate() == before
    assert len({episode.score.total for episode in first.episodes}) == 3
    mdp.close()
