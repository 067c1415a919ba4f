"""A game of two against a scripted opponent: Nim."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from functools import reduce
from itertools import cycle, islice, product
from operator import xor
from typing import Any

import numpy as np

from llm_env.tasks.base import Episodes, Splits
from llm_env.tasks.registry import register_task
from llm_env.tasks.turns import Play, TurnTask
from llm_env.tokens.arrays import BoolArray, IntArray
from llm_env.tokens.prompts import Prompt
from llm_env.tokens.vocabulary import Vocabulary
from rewards import Rollout

Heaps = tuple[int, ...]


@register_task
class Nim(TurnTask):
    """Take sticks from one of several heaps, by turns with an opponent; whoever takes the last stick wins.

    A prompt shows the heaps: "354:". A move is a heap's letter and how many sticks to take: "b3". The task answers it
    with the heaps after the opponent's move: "214:". The score is 1 for the last stick and 0 otherwise; a move that the
    heaps do not allow loses at once. The agent begins, in positions that it can win against any opponent.

    The opponent plays the best move with a probability of `skill`, where there is a winning one, and any move
    otherwise. With one heap of one stick the game is trivial; five heaps of nine are hard.

    The critic is told whether the position can be won against any opponent, and how many sticks are left. Prompts have
    the moves of a winning game under "answer", for a warm start.

    Args:
        heaps: how many, from 1 to 5.
        largest: the most sticks of a heap, from 1 to 9.
        skill: of the opponent, from 0 to 1.

    Examples:
        >>> nim = Nim(heaps=2, largest=3, skill=1.0, num_train=8)
        >>> prompt = nim.prompts("train")[0]
        >>> prompt.text, prompt.metadata["answer"]
        ('21:', ['a1', 'b1'])
        >>> game = nim.session(prompt)
        >>> game.told("a1"), game.told("b1"), game.score
        ('01:', None, 1.0)
    """

    num_train = 512
    num_test = 64
    keeps_stop = True
    stop = tuple(string.digits[1:])
    hint_names = ("winning", "sticks")

    def __init__(self, heaps: int = 2, *, largest: int = 9, skill: float = 0.5, **kwargs: Any) -> None:
        for name, value, low, high in (("heaps", heaps, 1, 5), ("largest", largest, 1, 9), ("skill", skill, 0, 1)):
            if not low <= value <= high:
                raise ValueError(f"{name} must be from {low} to {high}, got {value}")
        super().__init__(**kwargs)
        self.heaps, self.largest, self.skill = heaps, largest, skill
        turns = heaps * largest // 2 + 1
        self.max_new_tokens = 2 * turns
        self.max_prompt_tokens = heaps + 1
        self.max_reply_tokens = (heaps + 1) * turns

    def setup(self, vocabulary: Vocabulary) -> None:
        """Find the tokens of the moves."""
        wanted = string.ascii_lowercase[: self.heaps] + string.digits[1:]
        self._allowed = np.zeros(vocabulary.size, dtype=np.bool_)
        self._allowed[vocabulary.tokens_that_say(wanted)] = True
        if self._allowed.sum() < len(wanted):
            raise ValueError("the tokenizer must have a token for each of the letters and digits of a move")

    def action_mask(self, episodes: Episodes, rows: IntArray) -> BoolArray:
        """The letters of the heaps, and digits."""
        return np.broadcast_to(self._allowed, (len(rows), len(self._allowed)))

    def rows(self) -> Mapping[str, Sequence[Heaps]]:
        """Positions that can be won, each several times: a fifth of them is held out."""
        winning = [heaps for heaps in product(range(1, self.largest + 1), repeat=self.heaps) if reduce(xor, heaps)]
        order = np.random.default_rng(self.seed).permutation(len(winning))
        positions = [winning[index] for index in order]
        held_out = len(positions) // 5
        sizes = {"test": (positions[:held_out], self.num_test), "train": (positions[held_out:], self.num_train)}
        return {split: list(islice(cycle(given), size)) for split, (given, size) in sizes.items()}

    def splits(self) -> Splits:
        """The positions, with a winning game under "answer"."""
        return {split: [self._answered(prompt) for prompt in prompts] for split, prompts in super().splits().items()}

    def play_row(self, row: Heaps, rng: np.random.Generator) -> Play:
        """One game from a position."""
        heaps = row
        while True:
            move = yield shown(heaps)
            after = moved(heaps, move)
            if after is None:
                return 0.0
            if not any(after):
                return 1.0
            best = winning_move(after) if rng.random() < self.skill else None
            heaps = moved(after, best or any_move(after, rng)) or after
            if not any(heaps):
                return 0.0

    def hints(self, rollout: Rollout) -> tuple[float, float]:
        """See the class; the sticks as a share of the most there can be."""
        told = [turn.text for turn in rollout.turns if turn.who != "agent"]
        heaps = [int(digit) for digit in (told[-1] if told else rollout.prompt).rstrip(":")]
        return float(reduce(xor, heaps) != 0), sum(heaps) / (self.heaps * self.largest)

    def _answered(self, prompt: Prompt) -> Prompt:
        game, moves = self.session(prompt), []
        told: Any = prompt.text
        while not game.over:
            moves.append(winning_move(tuple(int(digit) for digit in str(told).rstrip(":"))))
            told = game.told(str(moves[-1]))
        return Prompt(prompt.text, {**prompt.metadata, "answer": moves}, key=prompt.key)


def shown(heaps: Heaps) -> str:
    """The heaps as the agent sees them."""
    return "".join(map(str, heaps)) + ":"


def moved(heaps: Heaps, move: str) -> Heaps | None:
    """The heaps after a move such as "b3"; None if they do not allow it."""
    if len(move) != 2 or not (move[0] in string.ascii_lowercase and move[1] in string.digits[1:]):
        return None
    heap, sticks = string.ascii_lowercase.index(move[0]), int(move[1])
    if heap >= len(heaps) or heaps[heap] < sticks:
        return None
    return (*heaps[:heap], heaps[heap] - sticks, *heaps[heap + 1 :])


def winning_move(heaps: Heaps) -> str | None:
    """A move after which the other cannot win, if there is one: it leaves heaps that cancel out bit by bit."""
    total = reduce(xor, heaps)
    for letter, sticks in zip(string.ascii_lowercase, heaps, strict=False):
        if (left := sticks ^ total) < sticks:
            return f"{letter}{sticks - left}"
    return None


def any_move(heaps: Heaps, rng: np.random.Generator) -> str:
    """One of all the moves there are, each as likely."""
    letters = zip(string.ascii_lowercase, heaps, strict=False)
    moves = [f"{letter}{sticks}" for letter, heap in letters for sticks in range(1, heap + 1)]
    return moves[int(rng.integers(len(moves)))]
