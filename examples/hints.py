"""Hints: what a task tells the critic, and what that is worth.

    python examples/hints.py

A text of 32 letters is paid once, at its end: the share of letters that rightly follow the one before. Nothing says
which of them were right, so a policy that learns from the reward alone learns slowly. The task knows, though, and tells
the critic at every state how many are right so far. PPO learns it twice here, without hints and with them; the rewards
are the same.
"""

from __future__ import annotations

import argparse
from itertools import pairwise

import numpy as np

from agents import TrainConfig, build
from llm_env import Prompt, Task, register_task
from llm_env.tasks.base import Episodes
from llm_env.tokens.arrays import BoolArray, IntArray
from llm_env.tokens.vocabulary import Vocabulary
from rewards import Rollout

FOLLOWS = dict(zip("abcdefgh", "dgahfbec", strict=True))


@register_task
class Follow(Task):
    """Write 32 letters, each the one that follows the letter before it by a rule that nobody says."""

    max_new_tokens = 32
    max_prompt_tokens = 3
    hint_names = ("right", "to_come")

    def sample(self, rng: np.random.Generator) -> Prompt:
        return Prompt("".join(rng.choice(list(FOLLOWS), size=3)))

    def score(self, rollout: Rollout) -> float:
        text = rollout.prompt[-1] + rollout.text
        return sum(FOLLOWS[one] == other for one, other in pairwise(text)) / self.max_new_tokens

    def hints(self, rollout: Rollout) -> tuple[float, float]:
        return self.score(rollout), 1 - rollout.num_actions / self.max_new_tokens

    def setup(self, vocabulary: Vocabulary) -> None:
        self.letters = np.isin(vocabulary.token_bytes, [letter.encode() for letter in FOLLOWS])

    def action_mask(self, episodes: Episodes, rows: IntArray) -> BoolArray:
        return np.broadcast_to(self.letters, (len(rows), len(self.letters)))


def train(hints: bool, iterations: int, seed: int) -> list[float]:
    """The mean return of each iteration."""
    config = TrainConfig(seed=seed, iterations=iterations).replace(
        task__name="Follow", task__args={}, model__hints=hints, actor__learning_rate=1e-3
    )
    run = build(config)
    returns = []
    for metrics in run.algorithm:
        run.update_engine()
        returns.append(metrics["reward/mean"])
        if metrics["iteration"] % 5 == 0:
            explained = metrics["value/explained_variance"]
            print(
                f"{'with' if hints else 'without'} hints   {metrics['tokens']:6,} tokens   "
                f"mean return {returns[-1]:.3f}   the critic explains {explained:.2f}",
                flush=True,
            )
    run.close()
    return returns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for hints in (False, True):
        train(hints, args.iterations, args.seed)


if __name__ == "__main__":
    main()
