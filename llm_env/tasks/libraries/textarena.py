"""The games of TextArena, one for each seed: as tasks of several turns."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any, cast

import numpy as np

from llm_env.tasks.registry import register_task
from llm_env.tasks.turns import Play, TurnTask

Opponent = Callable[[str], str]
"""From what a player has been shown so far to what it says."""


@register_task
class TextArena(TurnTask):
    """A game of the package textarena, by its name: "GuessTheNumber-v0", "Mastermind-v0", "TicTacToe-v0" and others.

    The agent is shown each message of the game once. The score is the game's own reward of the agent, mostly between
    -1 and 1. Games draw their random numbers from the global generators; here each has its own.

    Games that need lists of words (Wordle, Hangman) download them when they are made, and fail where they cannot.

    Args:
        game: its name.
        opponent: plays the second player's part, in a game of two; it sees what that player sees.
        arguments: of the game, as `textarena.make` takes them.
        **kwargs: of `TurnTask`.

    Examples:
        >>> task = TextArena("GuessTheNumber-v0", num_train=2, num_test=1)
        >>> "between 1 and 20" in task.prompts("train")[0].text
        True
    """

    max_new_tokens = 128
    max_prompt_tokens = 512
    max_reply_tokens = 1024

    def __init__(
        self,
        game: str = "GuessTheNumber-v0",
        *,
        opponent: Opponent | None = None,
        arguments: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        try:
            from textarena.envs.registration import ENV_REGISTRY
        except ImportError as error:
            raise ImportError("the task TextArena needs the package textarena: pip install textarena") from error
        if game not in ENV_REGISTRY:
            similar = difflib.get_close_matches(game, ENV_REGISTRY, cutoff=0.5)
            raise ValueError(f"textarena has no game {game!r}; it has {', '.join(similar or sorted(ENV_REGISTRY))}")
        super().__init__(**kwargs)
        self.game = game
        self.opponent = opponent
        self.arguments = arguments or {}

    def play(self, rng: np.random.Generator) -> Play:
        """One game; made anew each time, as one that is used twice shows the first game's messages in the second."""
        import textarena

        env = cast("Any", textarena.make(self.game, **self.arguments))
        env.reset(num_players=1 if self.opponent is None else 2, seed=int(rng.integers(2**31)))
        shown = ["", ""]
        over = False
        while not over:
            player, text = env.get_observation()
            if player == 0:
                said = yield text.removeprefix(shown[0]).strip() + "\n"
            else:
                assert self.opponent is not None
                said = self.opponent(text)
            shown[player] = text
            over, _ = env.step(said)
        rewards, _ = env.close()
        return float(rewards[0])
