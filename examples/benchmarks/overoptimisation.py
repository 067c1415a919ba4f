"""Over-optimisation: the reward that a policy learns from rises, and what it stands for falls. Shown, and prevented.

    python examples/benchmarks/overoptimisation.py --json

People's true liking (the gold reward) is known here, see `examples/rlhf_end_to_end.py`. Reward models learn it from
pairs of which a quarter is labelled the wrong way round; then texts are chosen by them, in two ways:

    best of n    of n texts of the first policy the one that the reward model likes best
    PPO          the policy learns from the reward model, without a penalty on leaving the first policy behind

once with one reward model of all the pairs, once with an ensemble of the same pairs (a fifth for each member; the mean
of what they say less twice their standard deviation), as `llm-env reward-model` and `RewardModel` have it by default.

A stage that is done is not done again: kill it whenever you like. Half an hour on two cores.

What it showed (peak and end of the gold reward in PPO, from -0.15; seeds 0, 1, 2): with one reward model 1.08 and
1.07, 0.58 and 0.20, -0.13 and -1.09, which is luck; with five 0.75 and 0.73, 0.34 and 0.33, 0.36 and -0.67, which is
steadier, and not safe either. The best of 64 is the same with five on every seed, and anything with one. With 1,024
pairs the five know nothing (half of the held-out pairs are right), and PPO leads nowhere; an entropy bonus of 0.1
made both worse (seed 0). With 8 letters in place of 12 and 200 iterations, seed 0: one 1.14 and 0.92, the mean of
five 1.18 and 0.74, their mean less half a standard deviation 0.69 and 0.12, less two 0.10 and -0.11: the policy writes
what they agree about. With members that begin with language models of their own (`--models`) the mean came to 1.18 and
1.17 twice, and to -0.04 and -0.53 with seed 1, where a single model had 1.17 and 0.83. Without a penalty PPO comes down
to one letter again and again, and which one is luck. What helps more is to compare the texts of what the policy has
become: `llm-env rlhf`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

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


def resumable(done: Path, folder: Path, *command: object) -> None:
    """The same for one that goes on where it was killed."""
    if not done.exists():
        run(*command, "--out", folder, *(["--resume"] if folder.exists() else []))


def curves(out: Path, seed: int, pairs: int, iterations: int) -> dict[str, dict[str, list[float]]]:
    """All stages with one seed. Of each way: gold and proxy rewards of PPO by iterations, and of the best of n."""
    how = (*TASK, "--seed", seed, "--rollout.batch-size", 128, "--reward.no-eos-penalty", 1)
    model = out / "sft" / "model"
    resumable(model, out / "sft", "sft", *how, "--sft.steps", 400, "--sft.learning-rate", 1e-3)
    texts, chosen, test = (out / f"{name}.jsonl" for name in ("texts", "pairs", "test"))
    many = ("--split", "train", "--prompts", 512, "--samples", math.ceil(pairs / 256))
    once(texts, "eval", model, *TASK, *many, "--seed", seed, "--out", texts)
    once(chosen, "pairs", "--texts", texts, "--out", chosen, "--noise", 0.25, "--seed", seed)
    once(test, "eval", model, *TASK, "--prompts", 64, "--samples", max(COUNTS), "--seed", seed, "--out", test)

    found: dict[str, dict[str, list[float]]] = {}
    for name, members in WAYS.items():
        judge, policy = out / name, out / f"ppo-{name}"
        learn = ("--pairs", chosen, "--seed", seed, "--max-length", 32, "--batch-size", 8, "--epochs", 4)
        more = ("--learning-rate", 3e-4, "--model", model, "--members", members)
        resumable(judge / f"member-{members}" / "reward-model.json", judge, "reward-model", *learn, *more)
        reward = ("--task.reward", "words_reward_model", "--task.reward-args", "path", judge)
        rest = ("--model.name", model, "--iterations", iterations, "--evaluation.every", iterations)
        resumable(policy / "model", policy, "train", *how, *reward, *rest)
        rows = [json.loads(line) for line in (policy / "metrics.jsonl").read_text().splitlines()]
        rows = [row for row in rows if "reward/gold" in row]
        parts = {"gold": "reward/gold", "proxy": "reward/watched"}
        found[name] = {of: [row[metric] for row in rows] for of, metric in parts.items()} | of_n(judge, test)
    return found


def of_n(judge: Path, texts: Path) -> dict[str, list[float]]:
    """The expected gold and proxy rewards of the best of n, by what the reward model makes of the texts."""
    rows = [json.loads(line) for line in texts.read_text().splitlines()]
    rows = sorted((row for row in rows if row["sample"] is not None), key=lambda row: row["prompt_index"])
    proxy = [score.value for score in RewardModel(str(judge))([Rollout.of(row["text"], row["prompt"]) for row in rows])]
    liked, gold = (np.array(each).reshape(-1, max(COUNTS)) for each in (proxy, [row["score"] for row in rows]))
    return {
        "gold of n": [best_of_n(liked, gold, n) for n in COUNTS],
        "proxy of n": [best_of_n(liked, liked, n) for n in COUNTS],
    }


def smooth(values: Sequence[float]) -> np.ndarray:
    """Means over some iterations."""
    window = min(WINDOW, len(values))
    return np.convolve(values, np.full(window, 1 / window), "valid")


def figures(found: dict[int, dict[str, dict[str, list[float]]]]) -> dict[str, float]:
    """How far gold rewards rise and fall."""
    flat: dict[str, float] = {}
    drops, gains = [], []
    for seed, ways in found.items():
        gold = {name: smooth(way["gold"]) for name, way in ways.items()}
        for name, values in gold.items():
            flat[f"{name}_peak_seed{seed}"], flat[f"{name}_end_seed{seed}"] = float(values.max()), float(values[-1])
        drop = {name: float(values.max() - values[-1]) for name, values in gold.items()}
        drops.append(drop["ensemble"] / max(drop["single"], 1e-9))
        gains.append(float(gold["ensemble"][-1] - gold["single"].max()))
    return {
        "seeds": len(found),
        "ensemble_drop_over_single_drop": max(drops),
        "ensemble_end_minus_single_peak": min(gains),
        **flat,
    }


def draw(found: dict[int, dict[str, dict[str, list[float]]]], path: Path) -> None:
    """Gold (full) and proxy rewards (dashed) of PPO by iterations, and of the best of n."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=False)
    for name, color in (("single", "#db2777"), ("ensemble", "#2563eb")):
        title = {"single": "one reward model", "ensemble": "five, on a fifth of the pairs each"}[name]
        for number, ways in enumerate(found.values()):
            label = {"label": f"{title}: what it stands for"} if not number else {}
            left.plot(smooth(ways[name]["gold"]), color=color, linewidth=1.8, **label)
            label = {"label": f"{title}: what is learned from"} if not number else {}
            left.plot(smooth(ways[name]["proxy"]), color=color, linewidth=1, linestyle=(0, (4, 3)), alpha=0.6, **label)
            right.plot(COUNTS, ways[name]["gold of n"], color=color, marker="o", markersize=3)
    left.set(title="PPO", xlabel="iterations", ylabel="reward")
    right.set(title="the best of n texts, by what it stands for", xlabel="n", xscale="log", xticks=COUNTS)
    right.set_xticklabels([str(count) for count in COUNTS])
    right.minorticks_off()
    left.legend(frameon=False, fontsize=8)
    for panel in (left, right):
        panel.grid(color="#e5e7eb", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=140)


def main() -> None:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--out", type=Path, default=Path("runs/overoptimisation"), help="the folder of all that is made"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pairs", type=int, default=4096, help="that are compared, a quarter of them wrongly")
    parser.add_argument("--iterations", type=int, default=80, help="of PPO")
    parser.add_argument("--json", action="store_true", help="one flat object instead of the table")
    options = parser.parse_args()
    found = {
        seed: curves(options.out / f"seed-{seed}", seed, options.pairs, options.iterations) for seed in options.seeds
    }
    flat, picture = figures(found), options.out / "overoptimisation.png"
    draw(found, picture)
    if options.json:
        print(json.dumps(flat))
        return
    print(f"\n{'gold reward':<14}{'at first':>10}{'peak':>10}{'end':>10}{'best of 64':>14}")
    for seed, ways in found.items():
        for name, way in ways.items():
            gold = smooth(way["gold"])
            each = (way["gold of n"][0], gold.max(), gold[-1], way["gold of n"][-1])
            print(f"{name:<10}{seed:>4}{each[0]:>10.2f}{each[1]:>10.2f}{each[2]:>10.2f}{each[3]:>14.2f}")
    print(f"\nlargest drop of the ensemble over that of one model: {flat['ensemble_drop_over_single_drop']:.2f}")
    print(f"least end of the ensemble above the peak of one model: {flat['ensemble_end_minus_single_peak']:.2f}")
    print(f"picture: {picture}")


if __name__ == "__main__":
    main()
