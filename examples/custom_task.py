"""A task of your own, end to end: define it, look at it, train on it.

    python examples/custom_task.py

The class below is all that a new task needs. Registering it makes it known to Gymnasium, TorchRL and
Stable-Baselines3; here the last of them trains on it.
"""

from __future__ import annotations

import argparse

import gymnasium
import numpy as np
from stable_baselines3 import PPO

from llm_env import Prompt, SB3TokenVecEnv, Task, register_task
from rewards import Rollout


@register_task
class Vowels(Task):
    """Write vowels, and only vowels."""

    max_new_tokens = 8
    max_prompt_tokens = 32

    def sample(self, rng: np.random.Generator) -> Prompt:
        return Prompt(f"{rng.integers(1000)} vowels, please: ")

    def score(self, rollout: Rollout) -> float:
        return sum(character in "aeiou" for character in rollout.text) / self.max_new_tokens


def look(model: PPO | None, seed: int) -> None:
    """Play one episode in a single Gymnasium environment, and show it."""
    env = gymnasium.make("llm_env/Vowels-v0", split="test", render_mode="ansi")
    env.action_space.seed(seed)
    observation, _ = env.reset(seed=seed)
    done = False
    while not done:
        action = env.action_space.sample() if model is None else model.predict(observation)[0]
        observation, _, terminated, truncated, _ = env.step(action)
        done = terminated or truncated
    print(env.render(), "\n")


def train(steps: int, seed: int) -> tuple[PPO, list[float]]:
    """Train for a number of steps; the mean return of the last 100 episodes, five times on the way."""
    envs = SB3TokenVecEnv("Vowels", num_envs=32)
    model = PPO("MultiInputPolicy", envs, n_steps=64, batch_size=512, learning_rate=1e-3, seed=seed)
    returns: list[float] = []
    for _ in range(5):
        model.learn(steps // 5, reset_num_timesteps=not returns)
        returns.append(float(np.mean([episode["r"] for episode in model.ep_info_buffer])))
        print(f"{model.num_timesteps:7d} tokens   mean return {returns[-1]:.3f}", flush=True)
    return model, returns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print("before:")
    look(None, args.seed)
    model, _ = train(args.steps, args.seed)
    print("\nafter:")
    look(model, args.seed)


if __name__ == "__main__":
    main()
