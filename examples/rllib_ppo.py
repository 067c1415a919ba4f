"""RLlib's PPO (its new API stack) on a language task.

    pip install 'ray[rllib]'
    python examples/rllib_ppo.py

The ids that end in `-onehot-v0` give observations and actions that any network of RLlib's takes. The environment is
made in a function, as RLlib's workers are processes of their own, in which nothing has imported this library yet.
"""

from __future__ import annotations

import argparse
from typing import Any

import gymnasium
import ray
from ray.rllib.algorithms.ppo import PPOConfig
from ray.tune.registry import register_env


def make(task_kwargs: dict[str, Any]) -> gymnasium.Env[Any, Any]:
    """A task, in the process of a worker."""
    return gymnasium.make("llm_env:llm_env/Copy-onehot-v0", task_kwargs=dict(task_kwargs))


def train(iterations: int, seed: int, task_kwargs: dict[str, Any], workers: int = 1) -> list[float]:
    """The mean return of each iteration's episodes."""
    register_env("copy", make)
    config = (
        PPOConfig()
        .environment("copy", env_config=task_kwargs)
        .env_runners(num_env_runners=workers, num_envs_per_env_runner=32)
        .training(
            train_batch_size_per_learner=2048, minibatch_size=256, num_epochs=4, lr=1e-3, gamma=1.0, entropy_coeff=0.01
        )
        .debugging(seed=seed, log_level="ERROR")
    )
    algorithm = config.build_algo()
    returns = []
    for iteration in range(iterations):
        result = algorithm.train()
        returns.append(float(result["env_runners"]["episode_return_mean"]))
        print(f"iteration {iteration + 1:3d}   mean return {returns[-1]:.3f}", flush=True)
    algorithm.stop()
    return returns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()
    ray.init(include_dashboard=False, configure_logging=False)
    train(args.iterations, args.seed, {"length": 3, "alphabet": "abcd", "dense": True}, args.workers)
    ray.shutdown()


if __name__ == "__main__":
    main()
