"""Over-optimisation: the reward that a policy learns from rises, and what it stands for falls. Shown, and prevented.

    python examples/benchmarks/overoptimisation.py --json

People's true liking (the gold reward) is known here, see `examples/rlhf_end_to_end.py`. Reward models learn it from
pairs of which a quarter is labelled the wrong way round; then texts are chosen by them, in two ways:

    best of n    of n texts of the first policy the one that the reward model likes best
    PPO          the policy learns from the reward model, without a penalty on leaving the first policy behind

once with one reward model of all the pairs, once with an ensemble of the same pairs (a fifth for each member; the mean
of what they say less twice their standard deviation), as `llm-env reward-model` and `RewardModel` have it by default.

A stage that is done is not done again: kill it whenever you like. Half an hour on two cores.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from rlhf_end_to_end import Words, run

from agents import best_of_n
from rewards import RewardModel, Rollout, Score, register_reward

WAYS = {"single": 1, "ensemble": 5}
COUNTS = (1, 2, 4, 8, 16, 32, 64)
SIZE = {"length": 12, "letters": 12}
TASK = ("--task.name", "Words", "--task.args", *(word for argument in SIZE.items() for word in argument))
GOLD = Words(**SIZE)
WINDOW = 8
"""Iterations in a mean of gold rewards, so that a lucky batch is no peak."""


@register_reward("words_reward_model")
class Watched(RewardModel):
    """A reward model, with the gold reward of the same texts for us to look at."""

    def score_batch(self, rollouts: Sequence[Rollout]) -> list[Score]:
        """What is learned from, and beside it "gold"."""
        scores = super().score_batch(rollouts)
        gold = [GOLD.score(rollout) for rollout in rollouts]
        return [Score(score.value, {**score.parts, "gold": each}) for score, each in zip(scores, gold, strict=True)]


def once(done: Path, *command: object) -> None:
    """A command of `llm-env`, if what it makes is not there."""
    if not done.exists():
        run(*command)


def trained(done: Path, folder: Path, *command: object) -> None:
    """The same for one that goes on where it was killed."""
    if not done.exists():
        run(*command, "--out", folder, *(["--resume"] if folder.exists() else []))


def seed_of(out: Path, seed: int, pairs: int, iterations: int, samples: int) -> dict[str, Any]:
    """All stages with one seed: the curves."""
    how = (*TASK, "--seed", seed, "--rollout.batch-size", 128, "--reward.no-eos-penalty", 1)
    model = out / "sft" / "model"
    warm = ("--sft.steps", 400, "--sft.learning-rate", 1e-3)
    trained(model, out / "sft", "sft", *how, *warm)
    texts, chosen = out / "texts.jsonl", out / "pairs.jsonl"
    many = ("--split", "train", "--prompts", 512, "--samples", max(2, 2 * pairs // 512))
    once(texts, "eval", model, *TASK, *many, "--seed", seed, "--out", texts)
    once(chosen, "pairs", "--texts", texts, "--out", chosen, "--noise", 0.25, "--seed", seed)
    test = out / "test.jsonl"
    once(test, "eval", model, *TASK, "--prompts", 64, "--samples", samples, "--seed", seed, "--out", test)

    found: dict[str, Any] = {}
    for name, members in WAYS.items():
        judge = out / name
        learn = ("--pairs", chosen, "--seed", seed, "--max-length", 32, "--batch-size", 8, "--epochs", 4)
        more = ("--learning-rate", 3e-4, "--model", model, "--members", members)
        trained(judge / "reward-model.json", judge, "reward-model", *learn, *more)
        found[name] = {"best_of_n": chosen_by(judge, test)}
        policy = out / f"ppo-{name}"
        reward = ("--task.reward", "words_reward_model", "--task.reward-args", "path", judge)
        rest = ("--model.name", model, "--iterations", iterations, "--evaluation.every", iterations)
        trained(policy / "model", policy, "train", *how, *reward, *rest)
        found[name]["ppo"] = [json.loads(line) for line in (policy / "metrics.jsonl").read_text().splitlines()]
    return found


def chosen_by(judge: Path, texts: Path) -> dict[str, list[float]]:
    """The expected gold and proxy rewards of the best of n, by what the reward model makes of the texts."""
    rows = [json.loads(line) for line in texts.read_text().splitlines()]
    rows = [row for row in rows if row["sample"] is not None]
    proxy = np.array([s.value for s in RewardModel(str(judge))([Rollout.of(r["text"], r["prompt"]) for r in rows])])
    gold = np.array([row["score"] for row in rows])
    prompts = {row["prompt_index"] for row in rows}
    shape = (len(prompts), len(rows) // len(prompts))
    each = proxy.reshape(shape), gold.reshape(shape)
    return {
        name: [best_of_n(each[0], value, n) for n in COUNTS]
        for name, value in zip(("proxy", "gold"), each, strict=True)
    }


if __name__ == "__main__":
    out = Path(sys.argv[1])
    print(json.dumps(seed_of(out, 0, 1024, int(sys.argv[2]), 64))[:300])
