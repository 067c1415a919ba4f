"""A maze to walk through, a letter a turn: a task of many short turns, in which all depends on the place one is at."""

from __future__ import annotations

import string
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from llm_env.tasks.base import Episodes, Splits, Task
from llm_env.tasks.registry import register_task
from llm_env.tokens.arrays import BoolArray, IntArray
from llm_env.tokens.prompts import Prompt
from llm_env.tokens.vocabulary import Vocabulary
from rewards import Rollout, Score

_LETTERS = ("n", "e", "s", "w")
_LARGEST = 9  # so that the number of a row is one character

Exits = Mapping[str, Mapping[str, str]]  # of each place: the letters before which no wall stands, and where they lead


@register_task
class Maze(Task):
    """Walk from one place of a maze to another, a letter a turn: n, e, s or w.

    A prompt says where one is and where to go: "a1>c1 ", columns by letter from the west, rows by number from the
    south. The task answers each letter with the place that one is at then, "b1 "; a wall leaves one where one is.
    Reaching the goal ends the episode with a score of 1; when the moves are used up, it is 0. Parts of the score are
    how many moves were made ("moves"), and whether the path was a shortest one ("shortest").

    The map is the same for every prompt, and none shows it: it is to be learned. How likely one is still to arrive
    depends on the place, the goal and the moves that are left, so that a value function has something to say.

    The critic is told how far the goal is, how many moves there are beyond that, and whether it can still be reached.

    The prompts are the pairs of two places, shuffled. The first `num_test` of them are held out (of few, a fifth); of
    the others `num_train` are for training, or as many as there are. Under "answer" each has the moves of a shortest
    path, for a warm start; under "start" and "goal" the places.

    Args:
        size: columns, and rows: from 2 to 9.
        walls: how many stand between neighbours, drawn so that all places stay connected; (size - 1)² at most, with
            which there is one path only between any two places, and by default three quarters of that. Or the pairs of
            places between which they stand, such as ["a1a2", "b1c1"].
        moves: how many one has; by default 4 * (size - 1), or more if a shortest path takes more.
        layout_seed: of the walls that are drawn.

    Examples:
        >>> maze = Maze(3, walls=["a1b1", "b1b2", "a2a3"])
        >>> print(maze.drawing())
        3 o-o-o
            | |
        2 o-o-o
          |   |
        1 o o-o
          a b c
        >>> prompt = maze.prompt("a1", "b3")
        >>> prompt.text, prompt.metadata["answer"]
        ('a1>b3 ', ['n', 'e', 'n'])
        >>> maze.reply(Rollout.of(["e"], metadata=prompt.metadata))  # a wall
        'a1 '
        >>> maze.reply(Rollout.of(["e", "a1 ", "n"], metadata=prompt.metadata))
        'a2 '
        >>> arrived = Rollout.of(["n", "a2 ", "e", "b2 ", "n"], metadata=prompt.metadata)
        >>> maze.reply(arrived), maze.score(arrived)
        (None, Score(value=1.0, parts={'moves': 3.0, 'shortest': 1.0}, per_token=None))
    """

    stop = _LETTERS
    num_test = 64
    hint_names = ("distance", "moves_to_spare", "within_reach")

    def __init__(
        self,
        size: int = 5,
        *,
        walls: int | Sequence[str] | None = None,
        moves: int | None = None,
        layout_seed: int = 0,
        **kwargs: Any,
    ) -> None:
        if not 2 <= size <= _LARGEST:
            raise ValueError(f"size must be from 2 to {_LARGEST}, got {size}")
        super().__init__(**kwargs)
        self.size = size
        self.places = [column + str(row) for row in range(1, size + 1) for column in string.ascii_lowercase[:size]]
        if walls is None or isinstance(walls, int):
            walls = _drawn_walls(size, 3 * (size - 1) ** 2 // 4 if walls is None else walls, layout_seed)
        self.exits = _exits(size, walls)
        self._distances = {goal: _distances(self.exits, goal) for goal in self.places}
        longest = max(max(distances.values()) for distances in self._distances.values())
        self.max_new_tokens = max(4 * (size - 1), longest) if moves is None else moves
        if self.max_new_tokens < longest:
            raise ValueError(f"moves={moves} are too few: there are places in this maze that lie {longest} moves apart")
        self.max_prompt_tokens = len("a1>b1 ")
        self.max_reply_tokens = len("a1 ") * self.max_new_tokens

    def setup(self, vocabulary: Vocabulary) -> None:
        """Find the tokens of the letters."""
        tokens = vocabulary.tokens_that_say(_LETTERS)
        if len(tokens) < len(_LETTERS):
            raise ValueError(f"the tokenizer must have a token for each of the letters {', '.join(_LETTERS)}")
        self._allowed = np.zeros(vocabulary.size, dtype=np.bool_)
        self._allowed[tokens] = True

    def prompt(self, start: str, goal: str) -> Prompt:
        """The prompt to go from one place to another."""
        return Prompt(f"{start}>{goal} ", {"start": start, "goal": goal, "answer": self._path(start, goal)})

    def splits(self) -> Splits:
        """The pairs of places, shuffled; those held out come first, as they do in `Task.splits`."""
        pairs = [(start, goal) for start in self.places for goal in self.places if start != goal]
        order = np.random.default_rng(self.seed).permutation(len(pairs))[: self.num_test + self.num_train]
        prompts = [self.prompt(*pairs[index]) for index in order]
        held_out = min(self.num_test, len(pairs) // 5)
        return {"train": prompts[held_out:][: self.num_train], "test": prompts[:held_out]}

    def action_mask(self, episodes: Episodes, rows: IntArray) -> BoolArray:
        """The four letters."""
        return np.broadcast_to(self._allowed, (len(rows), len(self._allowed)))

    def reply(self, rollout: Rollout) -> str | None:
        """Where one is after a move; None at the goal."""
        place = self.place(rollout)
        return None if place == rollout.metadata["goal"] else f"{place} "

    def score(self, rollout: Rollout) -> Score:
        """1 at the goal, else 0; see the class for the parts."""
        reached = self.place(rollout) == rollout.metadata["goal"]
        moves = sum(turn.who == "agent" for turn in rollout.turns)
        shortest = reached and moves == len(rollout.metadata["answer"])
        return Score(float(reached), {"moves": float(moves), "shortest": float(shortest)})

    def hints(self, rollout: Rollout) -> tuple[float, float, float]:
        """See the class; numbers of moves are shares of all that one has.

        Examples:
            >>> maze = Maze(2, walls=["a1b1"], moves=4)
            >>> maze.hints(Rollout.of(["n", "a2 "], metadata=maze.prompt("a1", "b1").metadata))
            (0.5, 0.25, 1.0)
        """
        distance = self._distances[rollout.metadata["goal"]][self.place(rollout)]
        spare = self.max_new_tokens - rollout.num_actions - distance
        return distance / self.max_new_tokens, spare / self.max_new_tokens, float(spare >= 0)

    def place(self, rollout: Rollout) -> str:
        """Where one is at the end of an episode that may still be running.

        The task's own last reply says where one was, so that the moves before it need not be made again.
        """
        place: str = rollout.metadata["start"]
        for turn in reversed(rollout.turns[-2:]):
            if turn.who == "task":
                place = turn.text.strip()
        if not rollout.turns or rollout.turns[-1].who == "task":
            return place
        # Without the mask anything may have been written; the first of the letters is what ended the turn.
        letter = next((letter for letter in rollout.turns[-1].text if letter in _LETTERS), "")
        return self.exits[place].get(letter, place)

    def drawing(self) -> str:
        """The map, as text: lines are where one can go.

        Examples:
            >>> print(Maze(2).drawing())
            2 o-o
              | |
            1 o-o
              a b
        """
        lines = [f"  {' '.join(string.ascii_lowercase[: self.size])}"]
        for first in range(0, len(self.places), self.size):
            row = self.places[first : first + self.size]
            across = "".join("o-" if "e" in self.exits[place] else "o " for place in row)
            above = " ".join("|" if "n" in self.exits[place] else " " for place in row)
            lines += [f"{row[0][1]} {across}".rstrip(), f"  {above}".rstrip()]
        return "\n".join(reversed(lines[:-1]))

    def _path(self, start: str, goal: str) -> list[str]:
        distances = self._distances[goal]
        path: list[str] = []
        place = start
        while place != goal:
            letter, place = next(exit for exit in self.exits[place].items() if distances[exit[1]] < distances[place])
            path.append(letter)
        return path


def _neighbours(size: int) -> list[tuple[str, str]]:
    """Every two places that lie side by side, the western or southern one first."""
    columns = string.ascii_lowercase[:size]
    beside = [(a + str(row), b + str(row)) for row in range(1, size + 1) for a, b in pairwise(columns)]
    return beside + [(column + str(row), column + str(row + 1)) for row in range(1, size) for column in columns]


def _drawn_walls(size: int, count: int, seed: int) -> list[str]:
    """So many walls at random places: a random tree of passages joins all places, and walls stand elsewhere."""
    most = (size - 1) ** 2
    if not 0 <= count <= most:
        raise ValueError(f"a maze of size {size} has from 0 to {most} walls, got {count}")
    neighbours = _neighbours(size)
    joined = {place: {place} for pair in neighbours for place in pair}  # with which others, so far
    others = []
    for index in np.random.default_rng(seed).permutation(len(neighbours)):
        left, right = neighbours[index]
        if right in joined[left]:
            others.append(left + right)
            continue
        both = joined[left] | joined[right]
        joined.update(dict.fromkeys(both, both))
    return others[:count]


def _exits(size: int, walls: Collection[str]) -> Exits:
    """Where one can go from each place, all of which must be connected."""
    neighbours = _neighbours(size)
    unknown = sorted(set(walls) - {left + right for left, right in neighbours} - {b + a for a, b in neighbours})
    if unknown:
        raise ValueError(
            f"a wall is named by the two neighbours that it stands between, such as 'a1a2' or 'a1b1'; got {unknown} "
            f"in a maze of size {size}"
        )
    exits: dict[str, dict[str, str]] = {place: {} for pair in neighbours for place in pair}
    for left, right in neighbours:
        if left + right not in walls and right + left not in walls:
            there, back = ("e", "w") if left[1] == right[1] else ("n", "s")
            exits[left][there], exits[right][back] = right, left
    cut_off = sorted(exits.keys() - _distances(exits, "a1").keys())
    if cut_off:
        raise ValueError(f"the walls leave no way from a1 to {cut_off[0]}: take some of them away")
    return exits


def _distances(exits: Exits, goal: str) -> dict[str, int]:
    """How many moves each place is from the goal, as far as there is a path."""
    distances = {goal: 0}
    queue = deque([goal])
    while queue:
        place = queue.popleft()
        for neighbour in exits[place].values():
            if neighbour not in distances:
                distances[neighbour] = distances[place] + 1
                queue.append(neighbour)
    return distances
