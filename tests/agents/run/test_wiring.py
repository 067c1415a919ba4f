"""What the parts of a run hand to each other, and would be wrong in silence: random numbers, weights, greediness."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from agents.report.log import RunLog, read_metrics
from agents.rollouts.writers import EngineWriter
from agents.run.training import train
from llm_env.engines import Sampling
from llm_env.tokens.episode import Episode
from tests.agents.runs import Config, running, train_until_it_breaks


def test_no_random_numbers_are_used_twice(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in another iteration, nor in another round of one, nor in an evaluation."""
    used: list[int] = []
    honest = EngineWriter.episodes

    def listening(self: EngineWriter, indices: Any, groups: Any, sampling: Sampling) -> list[Episode]:
        if sampling.temperature:
            used.append(sampling.seed)
        return honest(self, indices, groups, sampling)

    monkeypatch.setattr(EngineWriter, "episodes", listening)
    # Most texts of one token are cut off, so a batch takes several rounds.
    with running(config(rollout__drop_cut=True, task__max_new_tokens=1)) as run:
        assert run.evaluator is not None
        run.evaluator.evaluate()
        for _ in range(3):
            run.algorithm.step()
    assert len(used) > 1 + 3
    assert len(set(used)) == len(used)


def test_the_engine_writes_with_what_was_learned(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a copy of the weights, its log-probs are the trainer's own in every iteration, after a stop as well."""
    made = config(iterations=3, rollout__engine_dtype="float32", actor__learning_rate=1e-2, evaluation__every=0)
    train_until_it_breaks(made, monkeypatch, iteration=1)
    train(made, resume=True)
    rows = [row for row in read_metrics(made.out) if row["iteration"]]
    assert [row["iteration"] for row in rows] == [1, 2, 3]
    assert max(row["kl/mismatch"] for row in rows) < 1e-4
    assert rows[0]["kl/old"] > 1e-2  # an iteration moves the policy far more than that


def test_weights_and_biases_is_told_all_settings(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, Any] = {}

    class Listening(RunLog):
        def __init__(self, *given: Any, settings: Any, **how: Any) -> None:
            told.update(settings)
            super().__init__(*given, settings=settings, **how)

    monkeypatch.setattr("agents.run.loop.RunLog", Listening)
    made = config(iterations=1, actor__learning_rate=2e-4)
    train(made)
    assert told["actor.learning_rate"] == 2e-4
    assert told["out"] == str(made.out)
    assert "task.name" in told


def test_a_greedy_evaluation_takes_the_likeliest_tokens(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(config(rollout__temperature=2.0)) as run:
        assert run.evaluator is not None
        model, written = run.network.model, []
        honest = EngineWriter.episodes

        def listening(self: EngineWriter, indices: Any, groups: Any, sampling: Sampling) -> list[Episode]:
            written.append(honest(self, indices, groups, sampling))
            return written[-1]

        monkeypatch.setattr(EngineWriter, "episodes", listening)
        metrics = run.evaluator.evaluate().metrics

        def is_greedy(episode: Episode) -> bool:
            tokens = np.concatenate([episode.rollout.prompt_tokens, episode.rollout.tokens])
            with torch.no_grad():
                likeliest = model(torch.from_numpy(tokens)[None]).logits[0].argmax(-1)
            start = len(episode.rollout.prompt_tokens)
            return bool((likeliest[start - 1 : -1].numpy() == tokens[start:]).all())

    scores = [np.mean([episode.score.total for episode in episodes]) for episodes in written]
    assert [all(map(is_greedy, episodes)) for episodes in written] == [False, True]
    assert [metrics["eval/sampled"], metrics["eval/greedy"]] == pytest.approx(scores)
    assert scores[0] != scores[1]
