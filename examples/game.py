"""A game: a task of several turns that keeps a state, written as a generator.

    python examples/game.py

Somebody thinks of a number from 1 to 9, and there are three guesses; a wrong one is answered "<" or ">". Who guesses at
random wins 3 games of 10; who always halves what is left wins 7 of 9. A tiny model, which has never seen anything,
learns by PPO to ask well and to listen.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np

from agents import TrainConfig, build
from llm_env import register_task
from llm_env.tasks import TurnTask
from llm_env.tasks.base import Episodes
from llm_env.tasks.turns import Play
from llm_env.tokens.arrays import BoolArray, IntArray
from llm_env.tokens.vocabulary import Vocabulary


@register_task
class HigherOrLower(TurnTask):
    """Guess a number from 1 to 9; 1 if it is found in three guesses."""

    stop, keeps_stop = tuple("123456789"), True  # a digit is a turn
    max_new_tokens, max_prompt_tokens, max_reply_tokens = 3, 2, 3

    def play(self, rng: np.random.Generator) -> Play:
        secret = int(rng.integers(1, 10))
        guess = yield "?"
        for _ in range(2):
            if int(guess) == secret:
                break
            guess = yield "<" if secret < int(guess) else ">"
        return float(int(guess) == secret)

    def setup(self, vocabulary: Vocabulary) -> None:
        self.digits = np.isin(vocabulary.token_bytes, [digit.encode() for digit in self.stop])

    def action_mask(self, episodes: Episodes, rows: IntArray) -> BoolArray:
        return np.broadcast_to(self.digits, (len(rows), len(self.digits)))


def score_of(player: Callable[[int, int], int], games: int = 900) -> float:
    """How often a player wins that is told between which numbers the secret lies."""
    task, wins = HigherOrLower(num_train=1, num_test=games), 0.0
    for prompt in task.prompts("test"):
        game, low, high = task.session(prompt), 1, 9
        while not game.over:
            guess = player(low, high)
            answer = game.told(str(guess))
            low, high = (low, guess - 1) if answer == "<" else (guess + 1, high)
        wins += float(game.score)
    return wins / games


def train(iterations: int, seed: int) -> float:
    """The share of games won in the end."""
    config = TrainConfig(seed=seed, iterations=iterations).replace(
        task__name="HigherOrLower",
        task__args={},
        rollout__batch_size=256,
        actor__learning_rate=1e-3,
        loss__entropy=0.02,
        evaluation__every=0,
    )
    run = build(config)
    won = 0.0
    for metrics in run.algorithm:
        run.update_engine()
        won = 0.8 * won + 0.2 * metrics["reward/mean"]
        if metrics["iteration"] % 10 == 0:
            print(f"{metrics['iteration']:4} iterations   {metrics['tokens']:7,} tokens   wins {won:.2f}", flush=True)
    run.close()
    return won


def main() -> None:
    """Compare the trained model with a player who guesses at random, and with one who counts up."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--iterations", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    won = train(options.iterations, options.seed)
    rng = np.random.default_rng(options.seed)
    print(f"guesses at random: {score_of(lambda low, high: int(rng.integers(1, 10))):.2f}")
    print(f"counts up:         {score_of(lambda low, high: low):.2f}")
    print(f"halves:            {score_of(lambda low, high: (low + high) // 2):.2f}")
    print(f"the trained model: {won:.2f}")


if __name__ == "__main__":
    main()
