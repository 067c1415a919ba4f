"""What a batched step costs through each face, beside Gymnasium's CartPole and TorchRL's GymWrapper.

    python examples/benchmarks/env_step.py
    python examples/benchmarks/env_step.py --json

Actions are random letters that never end a text, so that every episode is as long as its budget: 32 tokens by default,
short for a language task. (CartPole's episodes under random actions last 22 steps.) The rows are out of step with each
other, as they are in use, so that episodes end and begin at nearly every step; their prompts, texts and rewards are in
the figures. All the things compared take turns in every round, and the figures are medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import torch
from torchrl.envs import GymWrapper

from llm_env import SB3TokenVecEnv, TokenEnv, TokenVectorEnv, TorchRLTokenEnv
from llm_env.tasks import Reverse

Stepper = Callable[[int], None]
FACES = ("cartpole", "single", "vector", "sb3", "torchrl", "gymwrapper")


def cartpole(num_envs: int) -> Stepper:
    envs = gymnasium.make_vec("CartPole-v1", num_envs=num_envs, vectorization_mode="vector_entry_point")
    envs.reset(seed=0)
    actions = [envs.action_space.sample() for _ in range(128)]
    return lambda step: envs.step(actions[step % 128])


def letters(mdp: Any, num_envs: int) -> np.ndarray:
    """[128, num_envs] random letters; in the second half, one in twenty is the end of the text."""
    rng = np.random.default_rng(0)
    actions = rng.choice(mdp.vocabulary.encode("abcdefghijklmnopqrstuvwxyz"), size=(128, num_envs))
    ends = rng.random((128, num_envs)) < 0.05
    ends[:64] = False
    return np.where(ends, mdp.vocabulary.eos_tokens[0], actions)


def single(task: Reverse) -> Stepper:
    env = TokenEnv(task)
    env.reset(seed=0)
    actions = letters(env.mdp, 1)[:, 0]

    def step(index: int) -> None:
        _, _, terminated, truncated, _ = env.step(actions[index % 128])
        if terminated or truncated:
            env.reset()

    return step


def vector(task: Reverse, num_envs: int) -> Stepper:
    envs = TokenVectorEnv(task, num_envs)
    envs.reset(seed=0)
    actions = letters(envs.mdp, num_envs)
    return lambda step: envs.step(actions[step % 128])


def sb3(task: Reverse, num_envs: int) -> Stepper:
    envs = SB3TokenVecEnv(task, num_envs)
    envs.reset()
    actions = letters(envs.envs.mdp, num_envs)
    return lambda step: envs.step(actions[step % 128])


def through_torchrl(env: Any, mdp: Any, num_envs: int) -> Stepper:
    """Steps as a TorchRL rollout or collector does."""
    actions = list(torch.from_numpy(letters(mdp, num_envs)))
    state = [env.reset()]

    def step(index: int) -> None:
        state[0].set("action", actions[index % 128])
        _, state[0] = env.step_and_maybe_reset(state[0])

    return step


def torchrl(task: Reverse, num_envs: int) -> Stepper:
    env = TorchRLTokenEnv(task, num_envs, seed=0)
    return through_torchrl(env, env.mdp, num_envs)


def gymwrapper(task: Reverse, num_envs: int) -> Stepper:
    envs = TokenVectorEnv(task, num_envs, autoreset_mode="Disabled")
    return through_torchrl(GymWrapper(envs, categorical_action_encoding=True), envs.mdp, num_envs)


def spread(step: Stepper) -> None:
    """Run for a while with actions that end texts, which brings the rows out of step with each other."""
    for index in range(256):
        step(64 + index % 64)


def measure(num_envs: int, episode: int, steps: int, rounds: int) -> dict[str, float]:
    """Median microseconds of a batched step, by face."""
    task = Reverse(episode - 1)
    steppers: dict[str, Stepper] = {
        "cartpole": cartpole(num_envs),
        "vector": vector(task, num_envs),
        "sb3": sb3(task, num_envs),
        "torchrl": torchrl(task, num_envs),
        "gymwrapper": gymwrapper(task, num_envs),
    }
    if num_envs == 1:
        steppers["single"] = single(task)
    times: dict[str, list[float]] = {name: [] for name in steppers}
    for step in steppers.values():
        spread(step)
    for _ in range(rounds):
        for name, step in steppers.items():
            start = time.perf_counter()
            for index in range(steps):
                step(index % 64)
            times[name].append((time.perf_counter() - start) / steps * 1e6)
    return {name: statistics.median(values) for name, values in times.items()}


def position_ratio(steps: int, rounds: int) -> float:
    """A step near the end of texts of 1024 tokens, over one near their beginning."""
    envs = TokenVectorEnv(Reverse(4), 64, context=1100, max_new_tokens=1024)
    envs.reset(seed=0)
    actions = letters(envs.mdp, 64)
    ratios = []
    for _ in range(rounds):
        envs.reset()
        took = []
        for begin in (0, 1024 - steps - 1):
            while int(envs.mdp.state.num_actions[0]) < begin:
                envs.step(actions[0])
            start = time.perf_counter()
            for index in range(steps):
                envs.step(actions[index % 64])
            took.append(time.perf_counter() - start)
        ratios.append(took[1] / took[0])
    return statistics.median(ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one flat JSON object instead of a table")
    parser.add_argument("--envs", type=int, nargs="+", default=[1, 8, 64, 512])
    parser.add_argument("--episode", type=int, default=32, help="tokens of an episode")
    parser.add_argument("--steps", type=int, default=320, help="steps of each measurement")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)  # nothing here computes; idle threads would only add noise

    results: dict[str, float] = {"episode_tokens": args.episode, "rounds": args.rounds}
    table = {n: measure(n, args.episode, args.steps, args.rounds) for n in args.envs}
    for num_envs, row in table.items():
        results |= {f"{face}_us_{num_envs}": round(row[face], 1) for face in FACES if face in row}
        results[f"vector_over_cartpole_{num_envs}"] = round(row["vector"] / row["cartpole"], 3)
        results[f"torchrl_over_gymwrapper_{num_envs}"] = round(row["torchrl"] / row["gymwrapper"], 3)
    results["late_over_early_step_64"] = round(position_ratio(min(args.steps, 400), args.rounds), 3)
    if args.json:
        print(json.dumps(results))
        return
    print(f"microseconds per batched step, episodes of {args.episode} tokens, median of {args.rounds} rounds\n")
    print(
        f"{'envs':>6}" + "".join(f"{face:>12}" for face in FACES) + f"{'vector/cartpole':>18}{'torchrl/gymwrapper':>20}"
    )
    for num_envs, row in table.items():
        cells = "".join(f"{row[face]:12.1f}" if face in row else f"{'':>12}" for face in FACES)
        ratios = (row["vector"] / row["cartpole"], row["torchrl"] / row["gymwrapper"])
        print(f"{num_envs:6d}{cells}{ratios[0]:18.2f}{ratios[1]:20.2f}")
    print(f"\nstep near token 1000 over step near token 1, 64 envs: {results['late_over_early_step_64']:.2f}")


if __name__ == "__main__":
    main()
