"""Games and conversations written as generators: yield what the agent is told, receive what it says, return a score."""

from __future__ import annotations

import random
from collections.abc import Generator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from llm_env.tasks.answers import without_thoughts
from llm_env.tasks.base import Splits, Task
from llm_env.tokens.chat import Message
from llm_env.tokens.prompts import Prompt
from rewards import Rollout, Score

Told: TypeAlias = "str | Sequence[Message]"
"""What an agent is told: a text, which a chat template makes the user's turn, or messages."""

Play: TypeAlias = "Generator[Told | tuple[Told, float], str, float | Score]"
"""An episode: yields what the agent is told (or that and a reward), receives what it says, returns its score."""


class OwnRandom:
    """The global random generators of Python and numpy, as one episode sees them.

    Code that draws from the global generators gives each of several episodes side by side what the others have left
    over. Inside `with`, an episode finds them as it left them, and outside they are as they were.

    Args:
        seed: of both.

    Examples:
        >>> one, other = OwnRandom(0), OwnRandom(0)
        >>> with one:
        ...     first = random.random()
        >>> with other:
        ...     random.random() == first
        True
    """

    def __init__(self, seed: int) -> None:
        self._inside = (random.Random(seed).getstate(), np.random.RandomState(seed % 2**32).get_state())

    def __enter__(self) -> None:
        self._outside = (random.getstate(), np.random.get_state())
        self._set(self._inside)

    def __exit__(self, *error: object) -> None:
        self._inside = (random.getstate(), np.random.get_state())
        self._set(self._outside)

    def _set(self, states: tuple[Any, Any]) -> None:
        random.setstate(states[0])
        np.random.set_state(states[1])


class TurnTask(Task):
    """A task of several turns. Write `play`, a generator: each of its episodes is one run of it.

    It yields what the agent is told: first the prompt, then the answers to its turns. Each `yield` receives what the
    agent said in its turn, without what ended it. What is returned is the score; a turn may be rewarded on the way by
    yielding a pair, the answer and the reward of the turn before, which is paid with the turn's last token.

    A prompt is a seed: `play` is given a generator of random numbers made from it, and the global ones of `random` and
    numpy are seeded by it as well, for the episode alone. So an episode is the same game whoever plays it, beside
    whichever others.

    Where the tokenizer has a chat template, what is yielded goes through it as the user's turns; a list of messages
    may be yielded as well, and then there must be one.

    Episodes that are about something (the rows of a data set, say) have it from `rows`, and are played by `play_row`.

    Attributes:
        keeps_stop: whether `play` is told the stop sequence that ended a turn, too.
        keeps_thoughts: whether it is told what stands between `<think>` and `</think>`, too.
        unfinished: the score of an episode that was cut off before `play` has returned.

    Args:
        num_train: how many episodes there are to train on.
        num_test: how many are held out.
        seed: of all of them.

    Examples:
        >>> class HigherOrLower(TurnTask):
        ...     stop = ("\\n",)
        ...     def play(self, rng):
        ...         secret = int(rng.integers(1, 10))
        ...         said = yield "Guess a number from 1 to 9: "
        ...         for guesses in range(1, 5):
        ...             if said == str(secret):
        ...                 return 1 / guesses
        ...             said = yield "higher: " if said < str(secret) else "lower: "
        ...         return 0.0
        >>> task = HigherOrLower(num_train=8, num_test=2)
        >>> prompt = task.prompts("train")[0]
        >>> game = task.session(prompt)
        >>> prompt.text, game.told("0"), game.told("99")
        ('Guess a number from 1 to 9: ', 'higher: ', 'lower: ')
    """

    num_train = 1024
    num_test = 128
    max_new_tokens = 64
    max_prompt_tokens = 256
    max_reply_tokens = 512
    chat = None
    keeps_stop: bool = False
    keeps_thoughts: bool = False
    unfinished: float = 0.0

    def play(self, rng: np.random.Generator) -> Play:
        """One episode."""
        raise NotImplementedError(f"the task {self.name} has no `play`: write it, see TurnTask")

    def rows(self) -> Mapping[str, Sequence[Any]]:
        """What the episodes of each split are about; by default nothing, `num_test` and `num_train` times."""
        return {"test": [None] * self.num_test, "train": [None] * self.num_train}

    def play_row(self, row: Any, rng: np.random.Generator) -> Play:
        """One episode about one of the `rows`; by default `play`, which is about nothing."""
        return self.play(rng)

    def splits(self) -> Splits:
        """The beginnings of all episodes."""
        rows = self.rows()
        total = sum(len(about) for about in rows.values())
        seeds = iter(np.random.SeedSequence(self.seed).generate_state(total, np.uint64))
        return {split: [self._beginning(int(next(seeds)) >> 1, row) for row in about] for split, about in rows.items()}

    def session(self, prompt: Prompt) -> Game:
        """Begin to play."""
        return Game(self, prompt.metadata["seed"], prompt.metadata.get("row"))

    def reply(self, rollout: Rollout) -> str | Sequence[Message] | None:
        """Tell `play` what the agent said, and the agent what `play` yields."""
        said = rollout.turns[-1].text
        for stop in () if self.keeps_stop else self.stop:
            if isinstance(stop, str):
                said = said.removesuffix(stop)
        if not self.keeps_thoughts:
            said = without_thoughts(said)
        answer = rollout.session.told(said, rollout.num_actions)
        if isinstance(answer, str) and self._chats:
            return [{"role": "user", "content": answer}]
        return answer  # type: ignore[no-any-return]

    def score(self, rollout: Rollout) -> Score:
        """What `play` returned, and the rewards of single turns."""
        game: Game = rollout.session
        score = game.score if isinstance(game.score, Score) else Score(game.score)
        parts = {**score.parts, "finished": float(game.over), "turns": float(game.turns)}
        if not game.paid:
            return Score(score.value, parts, score.per_token)
        per_token = np.zeros(rollout.num_actions)
        for actions, reward in game.paid:
            per_token[actions - 1] += reward
        return Score(score.value, {**parts, "by_turn": float(per_token.sum())}, per_token)

    def _beginning(self, seed: int, row: Any) -> Prompt:
        game = Game(self, seed, row)
        game.close()
        return Prompt(game.first, {"seed": seed} | ({} if row is None else {"row": row}), key=str(seed))

    @property
    def _chats(self) -> bool:
        return self.vocabulary.has_chat_template if self.chat is None else self.chat


class Game:
    """One episode of a `TurnTask`.

    Attributes:
        first: what the agent is told first.
        score: what `play` has returned; until then, what an unfinished episode is worth.
        over: whether it has returned.
        turns: how many turns the agent has taken.
        paid: after how many of the agent's tokens which reward was paid.
    """

    def __init__(self, task: TurnTask, seed: int, row: Any = None) -> None:
        self.score: float | Score = task.unfinished
        self.over = False
        self.turns = 0
        self.paid: list[tuple[int, float]] = []
        self._random = OwnRandom(seed)
        with self._random:
            self._play = task.play_row(row, np.random.default_rng(seed))
            if not isinstance(self._play, Generator):
                raise TypeError(f"`play` of the task {task.name} must `yield` what the agent is told")
            self.first, _ = _told(next(self._play))

    def told(self, said: str, actions: int = 0) -> Told | None:
        """What the agent is told when it has said something; None when the game is over."""
        self.turns += 1
        with self._random:
            try:
                answer, reward = _told(self._play.send(said))
            except StopIteration as end:
                if not isinstance(end.value, float | int | Score):
                    raise TypeError(f"`play` returned {end.value!r}; expected a number or a Score") from None
                self.score, self.over = end.value, True
                return None
        if reward:
            self.paid.append((actions, reward))
        return answer

    def close(self) -> None:
        """Stop playing; `finally` clauses of `play` run now."""
        with self._random:
            self._play.close()


def _told(given: Any) -> tuple[Told, float]:
    told, reward = given if isinstance(given, tuple) else (given, 0.0)
    messages = isinstance(told, Sequence) and all(isinstance(message, Mapping) for message in told)
    if not (isinstance(told, str) or messages) or not isinstance(reward, float | int):
        raise TypeError(f"`play` yielded {given!r}; expected a text or chat messages, or a pair of them and a number")
    return told, float(reward)
