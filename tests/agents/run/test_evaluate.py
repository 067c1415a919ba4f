"""How a policy is judged: by all that its texts are paid, as in training, on the same texts every time."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from agents.config import TrainConfig
from agents.report.display import Display
from agents.report.log import read_metrics
from agents.rollouts.collector import not_uniform
from agents.run.evaluate import Evaluator
from agents.run.training import fine_tune, train
from llm_env.engines import Sampling
from llm_env.tasks import Task, register_task
from llm_env.tokens.prompts import Prompt
from rewards import RewardError, Rollout
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

    def token_reward(self, episodes: Any, rows: Any) -> Any:
        state = episodes.state
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


# A reward that is no number.


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The warnings of all runs."""
    found: list[str] = []
    monkeypatch.setattr(Display, "warn", lambda self, text: found.append(text))
    return found


def spoil(monkeypatch: pytest.MonkeyPatch, which: set[int]) -> None:
    """Evaluations of these numbers (the first is 0) meet a reward that is no number."""
    honest, count = Evaluator.write, itertools.count()

    def write(self: Evaluator, sampling: Sampling, some: int | None = None) -> Any:
        if sampling.temperature == 0 or some is not None or next(count) not in which:
            return honest(self, sampling, some)
        raise RewardError("reward 'score' returned nan")

    monkeypatch.setattr(Evaluator, "write", write)


def test_an_evaluation_without_numbers_is_counted_as_failed(config: Config) -> None:
    with running(config(task__name="NoNumberHeldOut")) as run:
        assert run.evaluator is not None
        found = run.evaluator.evaluate()
        assert run.evaluator.some(2) == []
        assert found.metrics == {"eval/failed": 1.0}
        assert found.episodes == []
        assert found.failure is not None
        assert re.search(r"not be judged; .* the run goes on. The reason: reward .* returned nan for", found.failure)
        assert run.algorithm.step()["reward/mean"] > 0, "the engine is free again"


def test_a_reward_of_a_token_that_is_no_number_fails_it_too(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is found in the middle of writing; the engine's slots are free again."""
    with running(paid(config)) as run:
        assert run.evaluator is not None
        task = run.evaluator.writer.mdp.task
        monkeypatch.setattr(task, "token_reward", lambda state, rows: np.full(len(rows), np.nan), raising=False)
        assert run.evaluator.evaluate().metrics == {"eval/failed": 1.0}
        monkeypatch.undo()
        assert run.evaluator.evaluate().metrics["eval/failed"] == 0
        assert run.algorithm.step()["reward/mean"] > 0


@pytest.mark.parametrize("failed", [{0, 2}, {1, 3}])
def test_a_run_outlives_evaluations_that_fail(
    config: Config, monkeypatch: pytest.MonkeyPatch, said: list[str], failed: set[int]
) -> None:
    """The one before it, one in the middle, the last: the weights are those of an undisturbed run."""
    made = config(iterations=3, evaluation__every=1)
    whole = made.replace(out=made.out.with_name("whole"))
    train(whole)
    spoil(monkeypatch, failed)
    result = train(made)
    assert result.finished
    rows, expected = read_metrics(made.out), read_metrics(whole.out)
    assert [row["eval/failed"] for row in rows] == [float(number in failed) for number in range(4)]
    for number, (row, undisturbed) in enumerate(zip(rows, expected, strict=True)):
        if number in failed:
            assert not {"eval/sampled", "eval/greedy"} & row.keys()
        else:
            assert row["eval/sampled"] == undisturbed["eval/sampled"]
    assert result.after["eval/failed"] == float(3 in failed)
    assert len(said) == len(failed)
    assert all("could not be judged" in line and line.endswith("reward 'score' returned nan") for line in said)
    assert (made.out / "best").exists()
    ours, theirs = (load_file(out / "model" / "model.safetensors") for out in (made.out, whole.out))
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


def test_a_failed_evaluation_does_not_end_a_run(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither it nor a resumed run takes the goal for reached; a later one that is good ends the run."""
    spoil(monkeypatch, {0, 1})
    made = config(iterations=4, evaluation__every=1, evaluation__stop_at=0.0)
    assert train(made).finished
    assert [row["iteration"] for row in read_metrics(made.out)] == [0, 1, 2]


def test_a_warm_start_outlives_evaluations_that_fail(config: Config, said: list[str]) -> None:
    made = config(task__name="NoNumberHeldOut", sft__steps=2, iterations=1)
    assert train(made).finished
    assert (made.out / "sft" / "model.safetensors").exists()
    assert len(said) == 4  # before and after the warm start, before and after the iteration
    assert fine_tune(made.replace(out=made.out.with_name("alone"))).exists()
