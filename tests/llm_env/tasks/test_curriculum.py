"""Curricula: when the next level comes, how prompts are dealt, and that it is resumed where it stood."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llm_env import TokenMDP
from llm_env.tasks import Curriculum, Mixture


def three(**arguments: Any) -> Curriculum:
    return Curriculum("Reverse", vary="length", levels=[2, 3, 4], num_train=40, num_test=8, **arguments)


def learned(task: Curriculum, level: int, score: float, count: int = 64) -> None:
    task.learned(np.full(count, level), np.full(count, score))


class TestSuccess:
    def test_the_next_level_comes_when_the_present_one_is_done(self) -> None:
        task = three(target=0.8, review=0.2)
        learned(task, 0, 0.79)
        assert task.weights_now() == {"length=2": 1.0, "length=3": 0.0, "length=4": 0.0}
        learned(task, 0, 1.0)
        assert task.weights_now() == {"length=2": 0.2, "length=3": 0.8, "length=4": 0.0}
        learned(task, 0, 1.0)  # it is the present one that counts
        learned(task, 1, 0.5)
        assert task.weights_now()["length=3"] == 0.8
        for _ in range(9):
            learned(task, 1, 0.9)
        assert task.weights_now() == {"length=2": 0.1, "length=3": 0.1, "length=4": 0.8}
        for _ in range(9):
            learned(task, 2, 1.0)
        assert task.weights_now()["length=4"] == 0.8

    def test_the_mean_is_a_running_one(self) -> None:
        """By hand: the first batch counts whole, and of each later eight texts a tenth."""
        task = three(target=0.5)
        learned(task, 0, 0.4, count=8)
        learned(task, 0, 1.0, count=8)
        assert task.state_dict()["fast"][0] == pytest.approx(0.9 * 0.4 + 0.1)
        learned(task, 0, 1.0, count=16)
        assert task.state_dict()["fast"][0] == pytest.approx(0.81 * 0.46 + 0.19)


def test_schedule() -> None:
    task = three(by="schedule", every=100, review=0.0)
    for expected in (0, 0, 1, 1, 2, 2):
        assert task.weights_now()[f"length={expected + 2}"] == 1.0
        learned(task, 0, 0.0, count=60)


def test_progress_goes_where_scores_change() -> None:
    task = three(by="progress", review=0.3)
    assert list(task.weights_now().values()) == pytest.approx([1 / 3] * 3, abs=1e-6)
    for level in range(3):
        learned(task, level, 0.5)
    learned(task, 1, 1.0)
    assert task.weights_now() == pytest.approx({"length=2": 0.1, "length=3": 0.8, "length=4": 0.1})


def test_prompts_are_dealt_by_the_weights_and_alike_within_a_group() -> None:
    mdp = TokenMDP(three(review=0.25), completions_per_prompt=4)
    mdp.sampler.reseed(0)
    learned(mdp.task, 0, 1.0)
    indices, groups = mdp.deal(4000)
    names = np.array([mdp.prompts.prompts[index].metadata["part"] for index in indices])
    assert np.mean(names == "length=2") == pytest.approx(0.25, abs=0.05)
    assert not (names == "length=4").any()
    assert all(len(set(indices[groups == group])) == 1 for group in np.unique(groups))
    assert len(set(indices)) == 80  # all of both levels


def test_held_out_prompts_are_of_all_levels_and_teach_it_nothing() -> None:
    mdp = TokenMDP(three(target=0.0), num_envs=8, split="test", max_new_tokens=1)
    mdp.reset(seed=0)
    mdp.step([5] * 8)
    assert {mdp.prompt(row).metadata["part"] for row in range(8)} == {"length=2", "length=3", "length=4"}
    assert mdp.task.state_dict()["episodes"] == 0


def test_an_environment_learns_from_what_it_has_scored() -> None:
    mdp = TokenMDP(three(target=0.5), num_envs=4)
    mdp.reset(seed=0)
    answers = [mdp.vocabulary.encode(mdp.prompt(row).metadata["answer"]).tolist() for row in range(4)]
    for actions in zip(*answers, strict=True):
        mdp.step(list(actions))
    mdp.step([mdp.vocabulary.eos_tokens[0]] * 4)
    assert mdp.task.state_dict()["level"] == 1
    assert mdp.finished[0].score.parts["level"] == 0.0


def test_it_is_resumed_where_it_stood() -> None:
    one, other = three(), three()
    learned(one, 0, 1.0)
    other.load_state_dict(one.state_dict())
    assert other.weights_now() == one.weights_now()
    with pytest.raises(ValueError, match="the saved curriculum has the levels"):
        Curriculum("Copy, Reverse").load_state_dict(one.state_dict())


def test_of_different_tasks() -> None:
    assert list(Curriculum("Copy, Reverse").weights_now()) == ["Copy", "Reverse"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": "Reverse", "vary": "length"}, "levels of one task need vary"),
        ({"tasks": "Reverse", "vary": "length", "levels": "2"}, "a Curriculum is of two tasks or more"),
        ({"tasks": "Copy, Reverse", "length": 2}, "levels of one task need vary"),
        ({"tasks": "Copy, Reverse", "by": "luck"}, "got by='luck'"),
        ({"tasks": "Copy, Reverse", "review": 1}, "review=1"),
    ],
)
def test_what_is_no_curriculum(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Curriculum(**arguments)


def test_names_of_a_mixture() -> None:
    task = Mixture(["Copy", "Copy"], names=["one", "two"])
    assert {prompt.metadata["part"] for prompt in task.prompts("train")} == {"one", "two"}
