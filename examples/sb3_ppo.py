"""Stable-Baselines3's PPO on a language task, with a policy that embeds tokens.

    python examples/sb3_ppo.py

Two things Stable-Baselines3 needs help with. It hands observations to its policy as floats, which mean nothing as token
ids: the features extractor turns them back into ids and embeds the last few, which is enough to copy a short word. And
it knows no action masks: the wrapper offers it the tokens that the task allows, numbered from 0.
"""

from __future__ import annotations

import argparse
from typing import Any

import gymnasium
import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from torch import nn

from llm_env import SB3TokenVecEnv


class AllowedTokens(VecEnvWrapper):
    """Actions are numbers into the tokens that the task's action mask allows."""

    def __init__(self, venv: VecEnv) -> None:
        venv.reset()
        self.tokens = np.flatnonzero(venv.reset_infos[0]["action_mask"])
        super().__init__(venv, action_space=gymnasium.spaces.Discrete(len(self.tokens)))

    def reset(self) -> Any:
        return self.venv.reset()

    def step_async(self, actions: np.ndarray) -> None:
        self.venv.step_async(self.tokens[actions])

    def step_wait(self) -> Any:
        return self.venv.step_wait()


class LastTokens(BaseFeaturesExtractor):
    """Embeds the last `window` tokens of the text."""

    def __init__(self, observation_space: gymnasium.spaces.Dict, window: int = 12, width: int = 32) -> None:
        super().__init__(observation_space, features_dim=window * width)
        self.window = window
        self.embedding = nn.Embedding(int(observation_space["tokens"].high.max()) + 1, width)

    def forward(self, observation: dict[str, torch.Tensor]) -> torch.Tensor:
        """`[B, features_dim]` from `tokens` `[B, context]` and `length` `[B, 1]`."""
        places = observation["length"].long() - torch.arange(self.window, 0, -1, device=observation["length"].device)
        tokens = observation["tokens"].long().gather(1, places.clamp(min=0))
        return self.embedding(tokens).flatten(1)


def learn(model: BaseAlgorithm, steps: int) -> list[float]:
    """Train; the mean return of the last 100 episodes, ten times on the way."""
    returns: list[float] = []
    for _ in range(10):
        model.learn(steps // 10, reset_num_timesteps=not returns)
        returns.append(float(np.mean([episode["r"] for episode in model.ep_info_buffer])))
        print(f"{model.num_timesteps:7d} tokens   mean return {returns[-1]:.3f}", flush=True)
    return returns


def train(steps: int, seed: int, task_kwargs: dict[str, Any]) -> list[float]:
    """The mean returns of a new policy, see `learn`."""
    envs = AllowedTokens(SB3TokenVecEnv("Copy", num_envs=64, task_kwargs=task_kwargs))
    model = PPO(
        "MultiInputPolicy",
        envs,
        n_steps=16,
        batch_size=512,
        n_epochs=4,
        learning_rate=1e-3,
        gamma=1.0,
        ent_coef=0.01,
        policy_kwargs={"features_extractor_class": LastTokens},
        seed=seed,
    )
    return learn(model, steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    train(args.steps, args.seed, {"length": 3, "alphabet": "abcd", "dense": True})


if __name__ == "__main__":
    main()
