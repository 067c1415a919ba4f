"""Over-optimisation: the reward that a policy learns from rises, and what it stands for falls. Shown, and prevented.

    python examples/benchmarks/overoptimisation.py --json

People's true liking (the gold reward) is known here, see `examples/rlhf_end_to_end.py`. Reward models learn it from
pairs of which a quarter is labelled the wrong way round; then texts are chosen by them, in two ways:

    best of n    of n texts of the first policy the one that the reward model likes best
    PPO          the policy learns from the reward model, without a penalty on leaving the first policy behind

once with one reward model of all the pairs, once with an ensemble of the same pairs as `llm-env reward-model` and
`RewardModel` make one by default: a fifth of the pairs for each of five, and the mean of what they say less twice their
standard deviation.

A reward model is a small network here that counts which letter follows which. It can say what people like, knows next
to nothing of what it has seldom seen, and has learned its pairs by heart, errors included; so members that have
seen other pairs are wrong about other texts (their values correlate by 0.1). That is what an ensemble lives on. Where
members share their errors it is of no use: language models as small as the policy, fine-tuned from the same weights,
correlated by 0.5, told 57 of 100 of 16,384 such pairs right where counting tells 71, and PPO wrote what they agreed
about.

A policy that nothing holds back ends in a word or two, and which is luck. So a curve is the mean of several policies,
each with reward models of its own, of the same pairs.

A stage that is done is not done again: kill it whenever you like. Forty minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from rlhf_end_to_end import Words, run

from agents import best_of_n
from agents.preferences.pairs import Pair, folds_of, read_pairs
from agents.preferences.reward import pair_loss
from rewards import Ensemble, Reward, Rollout, Score, register_reward

WAYS = {"single": 1, "ensemble": 5}
COUNTS = (1, 2, 4, 8, 16, 32, 64)
SIZE = {"length": 16, "letters": 20}
TASK = ("--task.name", "Words", "--task.args", *(word for argument in SIZE.items() for word in argument))
GOLD = Words(**SIZE)
WINDOW = 8
"""Iterations in a mean of gold rewards, so that a lucky batch is no peak."""


class Counting(Reward):
    """A reward model that sees of a text how often each letter follows each other.

    Args:
        seed: of its weights.
    """

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.network = nn.Sequential(nn.Linear(len(GOLD.alphabet) ** 2, 64), nn.Tanh(), nn.Linear(64, 1))
        self.mean, self.deviation = 0.0, 1.0

    def learn(self, pairs: Sequence[Pair], reference: Sequence[str]) -> None:
        """Learn from pairs, by Bradley and Terry; then let its values of reference texts be around 0."""
        optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-2, weight_decay=0.0)
        chosen, rejected = steps_in([pair.chosen for pair in pairs]), steps_in([pair.rejected for pair in pairs])
        for _ in range(30):
            for part in torch.randperm(len(pairs)).split(64):
                values = [self.network(counts[part])[:, 0] for counts in (chosen, rejected)]
                optimizer.zero_grad()
                pair_loss(*values, torch.zeros(len(part)), center=0.0).mean().backward()
                optimizer.step()
        values = self.values(reference)
        self.mean, self.deviation = float(values.mean()), float(values.std())

    @torch.no_grad()
    def values(self, texts: Sequence[str]) -> np.ndarray:
        """Its values of texts."""
        found: np.ndarray = (self.network(steps_in(texts))[:, 0].numpy() - self.mean) / self.deviation
        return found

    def score_batch(self, rollouts: Sequence[Rollout]) -> list[Score]:
        """Those values, less what a text costs that is no word of this length."""
        values = self.values([rollout.text for rollout in rollouts])
        odd = [abs(len(rollout.text) - GOLD.length) for rollout in rollouts]
        return [Score(float(value) - 0.5 * more) for value, more in zip(values, odd, strict=True)]


def steps_in(texts: Sequence[str]) -> Tensor:
    """`[len(texts), letters ** 2]` how often which letter follows which."""
    size = len(GOLD.alphabet)
    counts = torch.zeros(len(texts), size * size)
    for row, text in enumerate(texts):
        letters = [GOLD.alphabet.index(letter) for letter in text if letter in GOLD.alphabet]
        for one, other in pairwise(letters):
            counts[row, one * size + other] += 1
    return counts


@register_reward("counting")
class Watched(Ensemble):
    """Reward models of pairs that are their own, with the gold reward of the same texts for us to look at.

    They learn when this is made, which takes seconds.

    Args:
        pairs: a file.
        members: how many there are.
        seed: of their weights.
    """

    def __init__(self, pairs: str, members: int, seed: int) -> None:
        known = read_pairs(pairs).pairs
        reference = [pair.rejected for pair in known[:512]]
        each = [Counting(seed * 10 + number) for number in range(members)]
        for member, fold in zip(each, folds_of(known, members), strict=True):
            member.learn(fold, reference)
        super().__init__(each, "mean-std", k=2.0)

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


def curves(out: Path, seed: int, pairs: int, iterations: int, policies: int) -> dict[str, dict[str, list[float]]]:
    """All stages with one seed. Of each way: gold and proxy rewards of PPO by iterations, and of the best of n."""
    how = (*TASK, "--rollout.batch-size", 128, "--reward.no-eos-penalty", 1)
    model = out / "sft" / "model"
    resumable(model, out / "sft", "sft", *how, "--seed", seed, "--sft.steps", 400, "--sft.learning-rate", 1e-3)
    texts, chosen, test = (out / f"{name}.jsonl" for name in ("texts", "pairs", "test"))
    many = ("--split", "train", "--prompts", 512, "--samples", math.ceil(pairs / 256))
    once(texts, "eval", model, *TASK, *many, "--seed", seed, "--out", texts)
    once(chosen, "pairs", "--texts", texts, "--out", chosen, "--noise", 0.25, "--seed", seed)
    once(test, "eval", model, *TASK, "--prompts", 64, "--samples", max(COUNTS), "--seed", seed, "--out", test)

    found: dict[str, dict[str, list[float]]] = {}
    for name, members in WAYS.items():
        each = []
        for number in range(policies):
            own = 100 * seed + number
            policy = out / f"ppo-{name}-{number}"
            reward = ("--task.reward-args", "pairs", chosen, "members", members, "seed", own)
            rest = ("--model.name", model, "--iterations", iterations, "--evaluation.every", iterations)
            words = (*how, "--task.reward", "counting", *reward, *rest, "--seed", own)
            resumable(policy / "model", policy, "train", *words)
            each.append(by_iterations(policy) | of_n(Watched(str(chosen), members, own), test))
        found[name] = {of: np.mean([one[of] for one in each], axis=0).tolist() for of in each[0]}
    return found


def by_iterations(policy: Path) -> dict[str, list[float]]:
    """What a policy's texts were worth."""
    rows = [json.loads(line) for line in (policy / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "reward/gold" in row]
    parts = {"gold": "reward/gold", "proxy": "reward/watched"}
    return {of: [row[metric] for row in rows] for of, metric in parts.items()}


def of_n(judge: Reward, texts: Path) -> dict[str, list[float]]:
    """The expected gold and proxy rewards of the best of n, by what the reward model makes of the texts."""
    rows = [json.loads(line) for line in texts.read_text().splitlines()]
    rows = sorted((row for row in rows if row["sample"] is not None), key=lambda row: row["prompt_index"])
    proxy = [score.value for score in judge([Rollout.of(row["text"], row["prompt"]) for row in rows])]
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
    """Gold and proxy rewards of PPO by iterations, and gold rewards of the best of n."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    for name, color in (("single", "#db2777"), ("ensemble", "#2563eb")):
        title = {"single": "one reward model", "ensemble": "five, on a fifth of the pairs each"}[name]
        for number, ways in enumerate(found.values()):
            label = {} if number else {"label": title}
            left.plot(smooth(ways[name]["gold"]), color=color, linewidth=1.8, **label)
            middle.plot(smooth(ways[name]["proxy"]), color=color, linewidth=1.8)
            right.plot(COUNTS, ways[name]["gold of n"], color=color, marker="o", markersize=3)
    left.set(title="PPO: what people like", xlabel="iterations", ylabel="reward")
    middle.set(title="PPO: what is learned from", xlabel="iterations")
    right.set(title="the best of n texts: what people like", xlabel="n", xscale="log", xticks=COUNTS)
    right.set_xticklabels([str(count) for count in COUNTS])
    right.minorticks_off()
    left.legend(frameon=False, fontsize=8)
    for panel in (left, middle, right):
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
    parser.add_argument("--pairs", type=int, default=2048, help="that are compared, a quarter of them wrongly")
    parser.add_argument("--iterations", type=int, default=60, help="of PPO")
    parser.add_argument("--policies", type=int, default=3, help="that a curve is the mean of")
    parser.add_argument("--json", action="store_true", help="one flat object instead of the table")
    options = parser.parse_args()
    found = {
        seed: curves(options.out / f"seed-{seed}", seed, options.pairs, options.iterations, options.policies)
        for seed in options.seeds
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
