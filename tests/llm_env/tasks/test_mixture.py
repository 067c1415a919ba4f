"""Mixture: whose prompts they are, who scores and masks them, and what is logged of each."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from agents import TrainConfig, build
from llm_env import Prompt, TokenMDP
from llm_env.tasks import Copy, Mixture, Reverse, Task, register_task
from rewards import Rollout


class Short(Task):
    """Ends after two tokens, pays for each, and allows what its prompt says."""

    max_new_tokens = 4
    max_prompt_tokens = 8

    def splits(self) -> dict[str, list[Prompt]]:
        return {"train": [Prompt(f"x{n}") for n in range(10)], "test": [Prompt("y")]}

    def over(self, episodes: Any, rows: Any) -> Any:
        return episodes.state.num_actions[rows] == 2

    def token_reward(self, episodes: Any, rows: Any) -> Any:
        return np.full(len(rows), 0.25)

    def score(self, rollout: Rollout) -> float:
        return 2.0


@register_task
class Chatty(Task):
    """Replies."""

    stop = ("!",)

    def reply(self, rollout: Rollout) -> None:
        return None

    def splits(self) -> dict[str, list[Prompt]]:
        return {"train": [Prompt("a")]}

    def score(self, rollout: Rollout) -> float:
        return 0.0


def test_each_prompt_is_scored_by_its_own_task() -> None:
    mdp = TokenMDP(Mixture([Copy(length=2), Reverse(length=2)]))
    for prompt in mdp.task.prompts("train")[:40]:
        word, whose = prompt.identity.split()[1][:2], prompt.metadata["part"]
        right = {"Copy": word, "Reverse": word[::-1]}[whose]
        [score] = mdp.reward([Rollout.of(right, metadata=prompt.metadata)])
        assert (score.value, score.parts[whose]) == (1.0, 1.0)
        [wrong] = mdp.reward([Rollout.of("zzz", metadata=prompt.metadata)])
        assert (wrong.value, wrong.parts[whose]) == (0.0, 0.0)


@pytest.mark.parametrize("weights", ["1, 3", [0.25, 0.75], (10, 30)])
def test_weights_are_shares_of_the_prompts(weights: Any) -> None:
    task = Mixture("Copy, Reverse", weights=weights)
    for split in ("train", "test"):
        count = Counter(prompt.metadata["part"] for prompt in task.prompts(split))
        assert count["Copy"] / count.total() == pytest.approx(0.25, abs=0.001)
    order = [prompt.metadata["part"] for prompt in task.prompts("train")[:100]]
    assert 10 < Counter(order)["Copy"] < 40  # mixed, not one after the other
    assert order != [prompt.metadata["part"] for prompt in Mixture("Copy, Reverse", seed=1).prompts("train")[:100]]


def test_rows_are_asked_of_their_own_tasks() -> None:
    """Copy masks its letters, and has budget for 3; Short ends after two, and pays a quarter for each."""
    mdp = TokenMDP(Mixture([Copy(length=2, alphabet="ab"), Short()]), num_envs=12)
    mdp.reset(seed=0)
    whose = np.array([mdp.prompt(row).metadata["part"] for row in range(12)])
    assert set(whose) == {"Copy", "Short"}
    mask = mdp.action_mask()
    assert mask is not None
    assert set(mask[whose == "Copy"].sum(1)) == {3}  # two letters and the end
    assert set(mask[whose == "Short"].sum(1)) == {mdp.vocabulary.size}
    letter = int(mdp.vocabulary.encode("a")[0])
    first = mdp.step([letter] * 12)
    assert set(first[whose == "Short"]) == {0.25}
    assert set(first[whose == "Copy"]) == {0.0}
    second = mdp.step([letter] * 12)
    running = mdp.episodes.state.running
    assert running[whose == "Copy"].all()
    assert not running[whose == "Short"].any()
    assert set(second[whose == "Short"]) == {2.25}


def test_a_run_logs_each_task() -> None:
    config = TrainConfig(iterations=1).replace(
        task__name="Mixture", task__args={"tasks": "Copy, Reverse"}, rollout__batch_size=16
    )
    run = build(config)
    metrics = run.algorithm.step()
    run.close()
    assert {"reward/Copy", "reward/Reverse"} <= metrics.keys()


@pytest.mark.parametrize(
    ("tasks", "weights", "message"),
    [
        ("Copy", None, "of two tasks or more"),
        ("Copy, Copy", None, "of different names"),
        ("Copy, Revers", None, "unknown task 'Revers'"),
        ("Copy, Chatty", None, r"must agree in `stop`, but that of Copy is \(\), and that of Chatty \('!',\)"),
        ("Copy, Reverse", "1", "expected 2 numbers above 0"),
        ("Copy, Reverse", "1, none", "expected 2 numbers above 0"),
        ("Copy, Reverse", [1, 0], "expected 2 numbers above 0"),
    ],
)
def test_bad_input(tasks: str, weights: Any, message: str) -> None:
    with pytest.raises((ValueError, LookupError), match=message):
        Mixture(tasks, weights=weights)


def test_each_task_hints_in_its_own_places() -> None:
    task = Mixture([Reverse(length=2), Short(), Copy(length=2)])
    assert task.hint_names == (
        *("Reverse/right_so_far", "Reverse/right_share"),
        *("Copy/right_so_far", "Copy/right_share"),
    )
    for name, expected in (("Reverse", [1, 0.5, 0, 0]), ("Copy", [0, 0, 1, 0.5]), ("Short", [0, 0, 0, 0])):
        assert task.hints(Rollout.of("a", metadata={"answer": "ab", "part": name})) == expected
