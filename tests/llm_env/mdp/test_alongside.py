"""Scoring in a thread of its own, while texts are written."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import pytest

from llm_env import Task
from llm_env.mdp.core import TokenMDP
from llm_env.tokens.episode import UNSCORED, Episode
from llm_env.tokens.prompts import Prompt
from rewards import ExactMatch, Guard, Reward, Rollout, Score, reward
from rewards.alongside import Alongside


class Waiting(Reward):
    """Says when it has begun, and goes on when it is told to."""

    alongside = True

    def __init__(self) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()
        self.batches: list[int] = []

    def score_batch(self, rollouts: Sequence[Rollout]) -> list[Score]:
        self.batches.append(len(rollouts))
        self.begun.set()
        assert self.go_on.wait(10)
        return [Score(float(len(rollout.text))) for rollout in rollouts]


class Failing(Waiting):
    def score(self, rollout: Rollout) -> float:
        raise ZeroDivisionError("no")

    score_batch = Reward.score_batch  # type: ignore[assignment]


def test_what_comes_meanwhile_is_one_batch() -> None:
    waiting = Waiting()
    with Alongside(waiting) as scorer:
        scorer.add(Rollout.of("a"))
        assert waiting.begun.wait(10)
        for text in ("bb", "ccc", "dddd"):
            scorer.add(Rollout.of(text))
        waiting.go_on.set()
        assert [score.value for score in scorer.scores()] == [1, 2, 3, 4]
    assert waiting.batches == [1, 3]


def test_its_error_is_raised_when_the_scores_are_asked_for() -> None:
    with Alongside(Failing()) as scorer:
        scorer.add(Rollout.of("a"))
        with pytest.raises(ZeroDivisionError, match="no"):
            scorer.scores()


def test_its_thread_ends_when_nobody_asks() -> None:
    waiting = Waiting()
    waiting.go_on.set()
    with Alongside(waiting) as scorer:
        scorer.add(Rollout.of("a"))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("scoring by waiting")]


def test_a_combination_waits_if_one_of_its_members_does() -> None:
    @reward
    def plain(rollout: Rollout) -> float:
        return 1.0

    assert (Waiting() + Waiting()).alongside is True
    assert (Waiting() * ExactMatch()).alongside is True
    assert (ExactMatch() + ExactMatch()).alongside is None
    assert (Waiting() + plain).alongside is False
    assert Guard(Waiting()).alongside
    assert not Guard(plain).alongside


class Words(Task):
    max_new_tokens = 4
    reward: Reward

    def splits(self) -> dict[str, list[Prompt]]:
        return {"train": [Prompt(letter) for letter in "abc"]}


def written(mdp: TokenMDP) -> list[tuple[int, Episode]]:
    """Three texts, the second of them truncated, in another order than their numbers."""
    mdp.reset(prompt_indices=[0, 1, 2])
    episodes = [
        Episode(Rollout.of(text), UNSCORED, None, None, truncated=index == 1, prompt_index=index, group=index)
        for index, text in enumerate(["x", "yy", "zzz"])
    ]
    return [(2, episodes[2]), (1, episodes[1]), (0, episodes[0])]


def test_texts_are_scored_before_the_last_is_written() -> None:
    task = Words()
    task.reward = waiting = Waiting()
    mdp = TokenMDP(task, num_envs=3)

    def writing() -> Iterator[tuple[int, Episode]]:
        first, *others = written(mdp)
        yield first
        assert waiting.begun.wait(10)  # the first is being scored, and the others are not written yet
        waiting.go_on.set()
        yield from others

    scored = mdp.score_written(writing())
    assert [episode.score.value for episode in scored] == [1.0, 0.0, 3.0]
    assert sum(waiting.batches) == 2


def test_the_same_as_all_together() -> None:
    task = Words()
    task.reward = waiting = Waiting()
    waiting.go_on.set()
    mdp = TokenMDP(task, num_envs=3)
    alongside = [episode.score for episode in mdp.score_written(written(mdp))]
    Waiting.alongside = False
    try:
        mdp = TokenMDP(task, num_envs=3)
        together = [episode.score for episode in mdp.score_written(written(mdp))]
    finally:
        Waiting.alongside = True
    assert alongside == together
