"""MaskablePPO of sb3-contrib, which sees the task's action mask, in a task of several turns.

    pip install sb3-contrib
    python examples/sb3_maskable_ppo.py

A maze is walked a letter at a time; each turn is answered with the place. The mask leaves four of a hundred tokens to
choose from, so nothing has to be wrapped.
"""

from __future__ import annotations

import argparse
from typing import Any

import gymnasium
import numpy as np
import torch
from sb3_contrib import MaskablePPO
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

from llm_env import SB3TokenVecEnv


class LastTokens(BaseFeaturesExtractor):
    """Embeds the last `window` tokens of the text."""

    def __init__(self, observation_space: gymnasium.spaces.Dict, window: int = 8, width: int = 32) -> None:
        super().__init__(observation_space, features_dim=window * width)
        self.window = window
        self.embedding = nn.Embedding(int(observation_space["tokens"].high.max()) + 1, width)

    def forward(self, observation: dict[str, torch.Tensor]) -> torch.Tensor:
        """`[B, features_dim]` from `tokens` `[B, context]` and `length` `[B, 1]`."""
        places = observation["length"].long() - torch.arange(self.window, 0, -1, device=observation["length"].device)
        tokens = observation["tokens"].long().gather(1, places.clamp(min=0))
        return self.embedding(tokens).flatten(1)


def train(steps: int, seed: int, task_kwargs: dict[str, Any]) -> list[float]:
    """Train; the mean return of the last 100 episodes, ten times on the way."""
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
        policy_kwargs={"features_extractor_class": LastTokens},
        seed=seed,
    )
    returns: list[float] = []
    for _ in range(10):
        model.learn(steps // 10, reset_num_timesteps=not returns)
        returns.append(float(np.mean([episode["r"] for episode in model.ep_info_buffer])))
        print(f"{model.num_timesteps:7d} tokens   mean return {returns[-1]:.3f}", flush=True)
    return returns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    train(args.steps, args.seed, {"size": 3})


if __name__ == "__main__":
    main()
