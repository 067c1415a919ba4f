"""How far a language model gets without training: sampled answers to a task's held-out prompts, and their mean score.

    python examples/rollout.py
    python examples/rollout.py --task Countdown --model smollm2-135m --episodes 16

The environment carries an engine, so every observation holds the model's next-token distribution; this script only
samples from it.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

from llm_env import TokenVectorEnv
from llm_env.engines.sampling import Sampling, choose
from llm_env.wrappers.vector import EpisodeStatistics


def rollout(task: str, model: str, episodes: int, num_envs: int, temperature: float, seed: int) -> list[dict]:
    """Play `episodes` episodes; what `EpisodeStatistics` says of each."""
    envs = EpisodeStatistics(
        TokenVectorEnv(
            task,
            num_envs,
            model=model,
            split="test",
            engine="transformers",
            observe="logits",
            autoreset_mode="SameStep",
        )
    )
    sampling = Sampling(temperature=temperature)
    rng = np.random.default_rng(seed)
    observation, _ = envs.reset(seed=seed)
    finished: dict[int, dict] = {}
    while len(finished) < episodes:
        tokens, _ = choose(torch.from_numpy(observation["logits"]), sampling, rng.random(num_envs))
        observation, _, _, _, info = envs.step(tokens.numpy())
        # Those that began first, not those that ended first: these would be the short ones.
        for episode in info.get("rollout", ()):
            if episode is not None and episode["group"] < episodes:
                finished[episode["group"]] = episode
    envs.close()
    return [finished[group] for group in sorted(finished)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="Reverse")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--episodes", type=int, default=256)
    parser.add_argument("--num-envs", type=int, default=32)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    print(f"{args.model} on llm_env/{args.task}-v0: {args.episodes} sampled episodes, no training")
    episodes = rollout(**vars(args))

    for episode in episodes[:3]:
        print(f"  {episode['prompt']!r} -> {episode['transcript']!r}  (return {episode['r']:g}, {episode['end']})")
    returns = np.array([episode["r"] for episode in episodes])
    lengths = np.array([episode["l"] for episode in episodes])
    ends = {str(end): sum(e["end"] == end for e in episodes) for end in sorted({e["end"] for e in episodes})}
    print(
        f"mean return {returns.mean():.3f} +- {returns.std() / np.sqrt(len(returns)):.3f} over {len(returns)} episodes"
    )
    print(f"mean length {lengths.mean():.1f} tokens; ended by {ends}")


if __name__ == "__main__":
    main()
