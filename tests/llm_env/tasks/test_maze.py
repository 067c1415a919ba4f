"""The maze: its map and paths, what its replies and its score say, beside a slow walk over the drawn map."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llm_env import Prompt, TokenMDP
from llm_env.tasks import Maze
from rewards import Rollout

# 3 o-o o      By hand: from a3 to c3 one has to go down to the south and up again.
#     | |
# 2 o-o o
#   |   |
# 1 o-o-o
#   a b c
HAND = ["b3c3", "a2a3", "b2c2", "b1b2"]
MOVES = {"n": (0, 1), "e": (1, 0), "s": (0, -1), "w": (-1, 0)}


def walk(drawing: str, place: str, letter: str) -> str:
    """A move, looked up in the drawing: it is a line of the map if a character stands beside the place."""
    lines = drawing.splitlines()
    row = next(number for number, line in enumerate(lines) if line.startswith(place[1]))
    column = lines[-1].index(place[0])
    east, north = MOVES[letter]
    beside = lines[row - north].ljust(99)[column + east] if 0 <= row - north < len(lines) - 1 else " "
    return place if beside == " " else chr(ord(place[0]) + east) + str(int(place[1]) + north)


def play(mdp: TokenMDP, text: str) -> float:
    """One episode in row 0, of a letter each; gives what it earned in all, and ends with the letters."""
    for number, letter in enumerate(text, start=1):
        mdp.step(mdp.vocabulary.encode(letter))
        assert bool(mdp.finished) == (number == len(text))
    return mdp.finished[0].total


def only(prompt: Prompt, maze: Maze) -> TokenMDP:
    """An environment whose row 0 has begun with this prompt."""
    mdp = TokenMDP(maze)
    texts = [each.text for each in mdp.prompts.prompts]
    mdp.reset(prompt_indices=[texts.index(prompt.text)])
    return mdp


def test_a_map_made_by_hand() -> None:
    maze = Maze(3, walls=HAND, num_test=0)
    assert maze.drawing().splitlines() == ["3 o-o o", "    | |", "2 o-o o", "  |   |", "1 o-o-o", "  a b c"]
    prompt = maze.prompt("a3", "c3")
    assert prompt.text == "a3>c3 "
    assert prompt.metadata == {"start": "a3", "goal": "c3", "answer": ["e", "s", "w", "s", "e", "e", "n", "n"]}
    assert maze.max_new_tokens == 8
    mdp = only(prompt, maze)
    assert play(mdp, "eswseenn") == 1.0
    (done,) = mdp.finished.values()
    assert done.rollout.transcript == "eb3 sb2 wa2 sa1 eb1 ec1 nc2 n"
    assert done.rollout.end == "stop"
    assert done.score.parts == {"score": 1.0, "moves": 8.0, "shortest": 1.0, "reward_failed": 0.0}


def test_walls_hold_and_cost_a_move() -> None:
    mdp = only(Prompt("b2>c2 "), Maze(3, walls=HAND, moves=9, num_test=0))
    # Against three walls, over the edge in the west and in the south, and there by a way that is not the shortest.
    assert play(mdp, "esewswsee") == 0.0
    (done,) = mdp.finished.values()
    assert done.rollout.transcript == "eb2 sb2 eb2 wa2 sa1 wa1 sa1 eb1 e"
    assert done.rollout.end == "budget"
    assert done.score.parts == {"score": 0.0, "moves": 9.0, "shortest": 0.0, "reward_failed": 0.0}
    mdp = only(Prompt("b2>c2 "), Maze(3, walls=HAND, moves=9, num_test=0))
    assert play(mdp, "nswseen") == 1.0
    assert mdp.finished[0].score.parts == {"score": 1.0, "moves": 7.0, "shortest": 0.0, "reward_failed": 0.0}


@pytest.mark.parametrize("options", [{}, {"size": 2, "walls": 1}, {"size": 4, "walls": 9}, {"size": 6, "walls": 25}])
def test_every_answer_is_a_shortest_path(options: dict[str, Any]) -> None:
    maze = Maze(**options, layout_seed=3, num_train=200)
    drawing = maze.drawing()
    # Distances by brute force: one move more in each round, from all places at once.
    apart = {(place, place): 0 for place in maze.places}
    while len(apart) < len(maze.places) ** 2:
        for (start, place), moves in list(apart.items()):
            for letter in MOVES:
                apart.setdefault((start, walk(drawing, place, letter)), moves + 1)
    for prompt in maze.prompts("train"):
        place, answer = prompt.metadata["start"], prompt.metadata["answer"]
        for letter in answer:
            place = walk(drawing, place, letter)
        assert place == prompt.metadata["goal"]
        assert len(answer) == apart[prompt.metadata["start"], place] <= maze.max_new_tokens


def test_a_perfect_policy_earns_one_and_one_that_walks_into_walls_nothing() -> None:
    mdp = TokenMDP(Maze(), num_envs=64, split="test", shuffle=False)
    rows = mdp.reset()
    answers = [mdp.prompt(row).metadata["answer"] for row in rows]
    for number in range(max(len(answer) for answer in answers)):
        acting = [row for row in rows if number < len(answers[row])]
        paid = mdp.step([int(mdp.vocabulary.encode(answers[row][number])[0]) for row in acting], acting)
        assert paid.tolist() == [float(len(answer) == number + 1) for answer in answers]
    assert (mdp.state.end == 2).all()  # stopped
    rows = mdp.reset()
    maze = Maze()
    wall = {place: next((letter for letter in MOVES if letter not in maze.exits[place]), "") for place in maze.places}
    letters = {row: letter for row in rows.tolist() if (letter := wall[mdp.prompt(row).metadata["start"]])}
    assert len(letters) > 32
    tokens, acting = [int(mdp.vocabulary.encode(letter)[0]) for letter in letters.values()], list(letters)
    for _ in range(16):
        assert not mdp.step(tokens, acting).any()
    assert list(mdp.finished) == acting


@pytest.mark.parametrize("size", [3, 5])
def test_a_batch_walks_as_the_slow_reference_does(size: int) -> None:
    mdp, rng = TokenMDP(Maze(size, layout_seed=7), num_envs=6), np.random.default_rng(size)
    drawing = Maze(size, layout_seed=7).drawing()
    mdp.reset(seed=0)
    expected = ["" for _ in range(6)]
    place = [mdp.prompt(row).metadata["start"] for row in range(6)]
    ends = {"stop": 0, "budget": 0}
    for _ in range(150):
        mask = mdp.action_mask()
        assert mask is not None
        assert [mdp.vocabulary.decode(np.flatnonzero(row)) for row in mask] == ["ensw"] * 6
        letters = rng.choice(list("nesw"), size=6)
        reward = mdp.step(mdp.vocabulary.encode("".join(letters)))
        for row, letter in enumerate(letters):
            goal, moves = mdp.prompt(row).metadata["goal"], (len(expected[row]) + 4) // 4
            place[row] = walk(drawing, place[row], letter)
            over = place[row] == goal or moves == mdp.max_new_tokens
            assert (row in mdp.finished) == over
            assert reward[row] == float(place[row] == goal)
            expected[row] += letter if over else f"{letter}{place[row]} "
            assert mdp.rollout(row).transcript == expected[row]
        if mdp.finished:
            for episode in mdp.finished.values():
                ends[episode.rollout.end] += 1
            for row in mdp.reset(list(mdp.finished)):
                expected[row], place[row] = "", mdp.prompt(row).metadata["start"]
    assert min(ends.values()) > 5


def test_what_is_no_letter_moves_nobody() -> None:
    maze = Maze(3, walls=HAND)
    facts = maze.prompt("a1", "c1").metadata
    for text, place in (("", "a1"), ("xyz", "a1"), ("x n", "a2"), ("en", "b1"), ("w", "a1")):
        assert maze.place(Rollout.of(text, metadata=facts)) == place
    assert maze.place(Rollout.of(["e", "b1 "], metadata=facts)) == "b1"
    assert maze.place(Rollout.of(["e", "b1 ", "?", "b1 ", "e"], metadata=facts)) == "c1"
    mdp = only(Prompt("a1>c1 "), Maze(3, walls=HAND, num_test=0))
    for token in (mdp.vocabulary.encode("x"), mdp.vocabulary.eos_tokens, mdp.vocabulary.encode("e")):
        mdp.step(token)
    assert mdp.vocabulary.decode(mdp.state.tokens[0, : mdp.state.length[0]]) == "a1>c1 xa1 eb1 "


def test_prompts_are_all_pairs_and_none_twice() -> None:
    maze = Maze()
    train, test = ([prompt.text for prompt in maze.prompts(split)] for split in ("train", "test"))
    assert len(train), len(test) == (536, 64)
    assert len({*train, *test}) == 600 == 25 * 24
    fewer = Maze(num_train=10, layout_seed=1)
    assert [prompt.text for prompt in fewer.prompts("train")] == train[:10]
    assert [prompt.text for prompt in fewer.prompts("test")] == test
    assert [prompt.text for prompt in Maze(seed=1).prompts("test")] != test
    assert [len(Maze(2).prompts(split)) for split in ("train", "test")] == [10, 2]


def test_walls_are_as_many_as_asked_for_and_the_layout_seed_draws_them() -> None:
    def passages(maze: Maze) -> int:
        return sum(len(exits) for exits in maze.exits.values()) // 2

    for walls in (0, 5, 16):
        assert passages(Maze(walls=walls)) == 40 - walls
    assert passages(Maze()) == 28
    assert Maze().drawing() == Maze(seed=5).drawing() != Maze(layout_seed=1).drawing()


def test_the_default_moves_are_enough_for_the_longest_path() -> None:
    # A maze of size 5 with one path only between any two places; of these seeds one has a path of more than 16 moves.
    found = [Maze(walls=16, layout_seed=seed).max_new_tokens for seed in range(6)]
    assert min(found) == 16 < max(found)


def test_what_cannot_be_a_maze() -> None:
    for arguments, message in (
        ({"size": 1}, "size must be from 2 to 9, got 1"),
        ({"size": 10}, "size must be from 2 to 9, got 10"),
        ({"walls": 17}, "a maze of size 5 has from 0 to 16 walls, got 17"),
        ({"walls": ["a1c1"]}, r"a wall is named by the two neighbours .* got \['a1c1'\] in a maze of size 5"),
        ({"walls": ["a1a2", "b1a1"]}, "the walls leave no way from a1 to a2"),
        (
            {"size": 3, "walls": HAND, "moves": 7},
            "moves=7 are too few: .* places in this maze that lie 8 moves apart",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            Maze(**arguments)
