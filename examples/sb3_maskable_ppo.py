"""MaskablePPO of sb3-contrib, which sees the task's action mask, in a task of several turns.

    pip install sb3-contrib
    python examples/sb3_maskable_ppo.py

A maze is walked a letter at a time; each turn is answered with the place. The mask leaves four of a hundred tokens to
choose from, so nothing has to be wrapped.
"""

from __future__ import annotations

import argparse
from typing import Any

from sb3_contrib import MaskablePPO
from sb3_ppo import LastTokens, learn

from llm_env import SB3TokenVecEnv


def train(steps: int, seed: int, task_kwargs: dict[str, Any]) -> list[float]:
    """The mean returns of a new policy, see `learn`."""
    envs = SB3TokenVecEnv("Maze", num_envs=64, task_kwargs=task_kwargs)
    model = MaskablePPO(
        "MultiInputPolicy",
        envs,
        n_steps=16,
        batch_size=256,
        n_epochs=4,
        learning_rate=1e-3,
        gamma=1.0,
        ent_coef=0.01,
        policy_kwargs={"features_extractor_class": LastTokens, "features_extractor_kwargs": {"window": 8}},
        seed=seed,
    )
    return learn(model, steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    train(args.steps, args.seed, {"size": 3})


if __name__ == "__main__":
    main()
