"""How a policy is judged: by all that its texts are paid, as in training, on the same texts every time."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from agents.config import TrainConfig
from agents.report.log import read_metrics
from agents.rollouts.collector import not_uniform
from agents.run.training import train
from llm_env.tasks import Task, register_task
from llm_env.tokens.prompts import Prompt
from llm_env.tokens.state import TokenState
from rewards import Rollout
from tests.agents.runs import running

Config = Callable[..., TrainConfig]


@register_task
class PaidByTheToken(Task):
    """Every token is worth one half, or one if it is in the upper half of the vocabulary; the whole text nothing."""

    max_new_tokens = 4
    max_prompt_tokens = 2
    num_train = 20
    num_test = 6

    def sample(self, rng: Any) -> Prompt:
        return Prompt("".join(chr(97 + c) for c in rng.integers(26, size=2)))

    def token_reward(self, state: TokenState, rows: Any) -> Any:
        chosen = state.tokens[rows, state.length[rows] - 1]
        return np.where(chosen >= self.vocabulary.size // 2, 1.0, 0.5)

    def score(self, rollout: Rollout) -> float:
        return 0.0


def by_hand(rollout: Rollout, size: int) -> float:
    return sum(1.0 if token >= size // 2 else 0.5 for token in rollout.tokens)


def paid(config: Config, **changes: object) -> TrainConfig:
    return config(task__name="PaidByTheToken", iterations=2, evaluation__every=1, **changes)


def test_an_evaluation_counts_what_tokens_are_paid(config: Config) -> None:
    with running(paid(config)) as run:
        assert run.evaluator is not None
        found = run.evaluator.evaluate()
        size = run.mdp.vocabulary.size
        expected = np.mean([by_hand(episode.rollout, size) for episode in found.episodes])
    assert 0.5 <= expected <= 4
    assert found.metrics["eval/sampled"] == pytest.approx(expected)
    assert 0.5 <= found.metrics["eval/greedy"] <= 4


def test_training_and_evaluation_measure_the_same(config: Config) -> None:
    """Where nothing is learned, on prompts that do not matter, both are near one number; samples say it, too."""
    made = paid(config, actor__learning_rate=0.0, rollout__batch_size=64, evaluation__prompts=64)
    made = made.replace(task__args={"num_test": 64}, log__samples_every=1)
    train(made)
    first, *rows = read_metrics(made.out)
    assert all(row["eval/sampled"] == first["eval/sampled"] > 0.5 for row in rows)
    spread = rows[0]["reward/std"] / np.sqrt(64)
    assert rows[0]["reward/mean"] == pytest.approx(first["eval/sampled"], abs=6 * spread)
    samples = [json.loads(line) for line in (made.out / "samples.jsonl").read_text().splitlines()]
    assert all(0.5 <= sample["reward"] <= 4 for sample in samples)


def test_rewards_of_tokens_decide_the_best_model_and_the_end(config: Config) -> None:
    result = train(paid(config, evaluation__stop_at=0.5))
    assert result.before["eval/sampled"] >= 0.5
    assert [row["iteration"] for row in read_metrics(result.model.parent)] == [0]


def test_rewards_of_tokens_make_a_group_one_to_learn_from(config: Config) -> None:
    """All scores are equal here, and the texts are not."""
    made = paid(config, algo="grpo", rollout__completions_per_prompt=4, rollout__drop_uniform_groups=True)
    with running(made) as run:
        batch = run.algorithm.collector.collect()
        size = run.mdp.vocabulary.size
    assert batch.refilled == 0
    totals = [by_hand(episode.rollout, size) for episode in batch.episodes]
    assert batch.data["total"].tolist() == pytest.approx(totals)
    assert not_uniform(batch.data).all()
