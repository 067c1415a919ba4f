"""Nim: against a search through all games, and played by hand."""

from __future__ import annotations

from functools import cache
from itertools import product

import numpy as np
import pytest

from llm_env import TokenVectorEnv
from llm_env.tasks import Nim
from llm_env.tasks.nim import any_move, moved, winning_move
from llm_env.tasks.turns import Game
from rewards import Rollout


def legal_moves(heaps: tuple[int, ...]) -> list[str]:
    return ["abcde"[heap] + str(sticks) for heap, left in enumerate(heaps) for sticks in range(1, left + 1)]


@cache
def can_win(heaps: tuple[int, ...]) -> bool:
    """By trying everything: whoever finds no sticks has lost."""
    return any(not can_win(moved(heaps, move) or ()) for move in legal_moves(heaps))


@pytest.mark.parametrize("heaps", list(product(range(5), repeat=3)))
def test_the_winning_move_wins(heaps: tuple[int, ...]) -> None:
    move = winning_move(heaps)
    assert (move is not None) == can_win(heaps)
    if move is not None:
        assert move in legal_moves(heaps)
        assert not can_win(moved(heaps, move) or ())


def test_any_move_is_any_legal_move() -> None:
    rng = np.random.default_rng(0)
    assert {any_move((2, 0, 1), rng) for _ in range(100)} == {"a1", "a2", "c1"}


@pytest.mark.parametrize("move", ["a4", "d1", "a0", "b1", "1a", "", "a", "a12", "A1", "a²"])
def test_an_illegal_move_loses(move: str) -> None:
    assert moved((3, 0, 1), move) is None
    task = Nim(3, largest=4, num_train=4)
    game = task.session(task.prompts("train")[0])
    if moved(tuple(map(int, str(game.first)[:-1])), move) is None:
        assert game.told(move) is None
        assert game.score == 0.0


def play(game: Game, choose: object) -> float:
    told = game.first
    while not game.over:
        told = game.told(choose(tuple(map(int, str(told)[:-1])))) or ""  # type: ignore[operator]
    return float(game.score)  # type: ignore[arg-type]


@pytest.mark.parametrize("skill", [0.0, 0.5, 1.0])
def test_the_best_play_always_wins_and_any_play_seldom_does(skill: float) -> None:
    task = Nim(3, largest=5, skill=skill, num_train=200)
    rng = np.random.default_rng(0)
    prompts = task.prompts("train")
    assert {play(task.session(prompt), winning_move) for prompt in prompts} == {1.0}
    assert all(can_win(tuple(map(int, prompt.text[:-1]))) for prompt in prompts)
    at_random = np.mean([play(task.session(prompt), lambda heaps: any_move(heaps, rng)) for prompt in prompts])
    assert at_random < 0.65 - 0.5 * skill


def test_the_answer_is_a_game_that_is_won() -> None:
    task = Nim(3, largest=4, num_train=50)
    for prompt in task.prompts("train"):
        game = task.session(prompt)
        for move in prompt.metadata["answer"]:
            assert not game.over
            game.told(move)
        assert game.score == 1.0


def test_positions_are_held_out() -> None:
    task = Nim(2, largest=4, num_train=40, num_test=8)
    assert [len(task.prompts(split)) for split in ("train", "test")] == [40, 8]
    train, test = ({prompt.text for prompt in task.prompts(split)} for split in ("train", "test"))
    assert len(test) == 12 // 5
    assert len(train) == 12 - len(test)
    assert not train & test


def test_hints() -> None:
    task = Nim(2, largest=4)
    assert task.hints(Rollout.of([], prompt="31:")) == (1.0, 0.5)
    assert task.hints(Rollout.of(["a1", "11:"], prompt="31:")) == (0.0, 0.25)
    assert task.hints(Rollout.of(["a1", "11:", "b"], prompt="31:")) == (0.0, 0.25)


def test_in_an_environment() -> None:
    task = Nim(1, largest=1)
    envs = TokenVectorEnv(task, num_envs=1)
    _, info = envs.reset(seed=0)
    vocabulary = envs.unwrapped.mdp.vocabulary
    assert vocabulary.decode(np.flatnonzero(info["action_mask"][0])) == "123456789a"
    envs.step(vocabulary.encode("a"))
    _, reward, terminated, _, _ = envs.step(vocabulary.encode("1"))
    assert reward.tolist() == [1.0]
    assert terminated.all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"heaps": 6}, "heaps must be from 1 to 5, got 6"), ({"largest": 0}, "largest must be from 1 to 9, got 0"),
     ({"skill": 1.5}, "skill must be from 0 to 1, got 1.5")],
)  # fmt: skip
def test_what_it_refuses(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Nim(**arguments)  # type: ignore[arg-type]
