"""Tianshou's PPO on a language task.

    pip install tianshou; python examples/tianshou_ppo.py

The ids that end in `-onehot-v0` give seen and actions that any network takes. The rest is Tianshou's own.
"""

from __future__ import annotations

import argparse
from typing import Any

import gymnasium
import torch
from tianshou.algorithm import PPO
from tianshou.algorithm.modelfree.reinforce import DiscreteActorPolicy
from tianshou.algorithm.optim import AdamOptimizerFactory
from tianshou.data import Collector, CollectStats, VectorReplayBuffer
from tianshou.env import DummyVectorEnv
from tianshou.trainer import OnPolicyTrainerParams
from tianshou.utils.net.common import Net
from tianshou.utils.net.discrete import DiscreteActor, DiscreteCritic

NUM_ENVS = 32


def train(epochs: int, seed: int, task_kwargs: dict[str, Any]) -> list[float]:
    """The mean return of a hundred sampled episodes, before training and after each epoch."""
    torch.manual_seed(seed)
    training, testing = (make_envs(task_kwargs, seed=number) for number in (seed, seed + NUM_ENVS))
    # Tianshou's batches report the spaces of what is inside of all wrappers.
    env = make(task_kwargs)
    body = Net(state_shape=env.observation_space.shape, hidden_sizes=[64, 64])
    actor = DiscreteActor(preprocess_net=body, action_shape=env.action_space.n, softmax_output=False)
    policy = DiscreteActorPolicy(actor=actor, action_space=env.action_space)
    critic = DiscreteCritic(preprocess_net=body)
    ppo = PPO(policy=policy, critic=critic, optim=AdamOptimizerFactory(lr=1e-3), gamma=1.0, ent_coef=0.01)
    returns: list[float] = []

    def watch(stats: CollectStats) -> float:
        returns.append(float(stats.returns.mean()))
        print(f"epoch {len(returns) - 1:3d}   mean return {returns[-1]:.3f}", flush=True)
        return returns[-1]

    ppo.run_training(
        OnPolicyTrainerParams(
            training_collector=Collector[CollectStats](ppo, training, VectorReplayBuffer(2048, NUM_ENVS)),
            test_collector=Collector[CollectStats](ppo, testing),
            test_step_num_episodes=100,
            compute_score_fn=watch,
            max_epochs=epochs,
            epoch_num_steps=2048,
            collection_step_num_env_steps=2048,
            update_step_num_repetitions=4,
            batch_size=256,
            show_progress=False,
        )
    )
    return returns


def make(task_kwargs: dict[str, Any]) -> gymnasium.Env[Any, Any]:
    return gymnasium.make("llm_env:llm_env/Copy-onehot-v0", task_kwargs=task_kwargs)


def make_envs(task_kwargs: dict[str, Any], seed: int) -> DummyVectorEnv:
    envs = DummyVectorEnv([lambda: make(task_kwargs)] * NUM_ENVS)
    envs.seed(seed)
    return envs


def main() -> None:
    parser = argparse.ArgumentParser(description="Tianshou's PPO on a language task.")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    train(**vars(parser.parse_args()), task_kwargs={"length": 3, "alphabet": "abcd", "dense": True})


if __name__ == "__main__":
    main()
