"""The numbers of an iteration. Padding is in none of them; `agents.losses` gives the masked means, here they meet."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from tensordict import TensorDict

from agents.losses.ops import explained_variance, masked_mean, zero_padding
from llm_env.tokens.episode import Episode

Tensor = torch.Tensor


class Average:
    """Means over micro-batches, each weighted with its number of tokens; and sums, and extremes.

    Examples:
        >>> average = Average()
        >>> average.add({"entropy": torch.tensor(1.0), "max_ratio": torch.tensor(2.0)}, tokens=1)
        >>> average.add({"entropy": torch.tensor(4.0), "max_ratio": torch.tensor(1.0)}, tokens=2)
        >>> average.means()
        {'entropy': 3.0, 'max_ratio': 2.0}
    """

    def __init__(self) -> None:
        self._sums: dict[str, float] = defaultdict(float)
        self._tokens: dict[str, float] = defaultdict(float)
        self._extremes: dict[str, float] = {}

    def add(self, metrics: Mapping[str, Tensor | float], tokens: float) -> None:
        """The means of a micro-batch of so many tokens."""
        for name, value in metrics.items():
            number = float(value)
            if name.startswith("max_"):
                self._extremes[name] = max(number, self._extremes.get(name, -math.inf))
            elif name.startswith("min_"):
                self._extremes[name] = min(number, self._extremes.get(name, math.inf))
            else:
                self._sums[name] += number * tokens
                self._tokens[name] += tokens

    def means(self) -> dict[str, float]:
        """By name; of names that were never added, nothing."""
        return {name: total / max(self._tokens[name], 1) for name, total in self._sums.items()} | self._extremes

    def __len__(self) -> int:
        return len(self._sums)


def batch_metrics(data: TensorDict, episodes: Sequence[Episode]) -> dict[str, float]:
    """Of the texts: rewards and their parts, lengths, ends, how varied they are; and KL to the reference."""
    mask = data["mask"]
    task_reward = zero_padding(data["next", "reward"][..., 0], mask).sum(1)
    metrics = {
        "reward/mean": task_reward.mean(),
        "reward/std": task_reward.std(correction=0),
        "text/length": mask.sum(1).float().mean(),
        "text/truncated": data["cut"].float().mean(),
        "text/eos": torch.tensor(sum(episode.rollout.end == "eos" for episode in episodes) / max(1, len(episodes))),
        "text/distinct_1": distinct(data["action"], mask, 1),
        "text/distinct_2": distinct(data["action"], mask, 2),
    }
    parts: dict[str, list[float]] = defaultdict(list)
    for episode in episodes:
        for name, value in episode.score.parts.items():
            parts[name].append(value)
    metrics |= {f"reward/{name}": torch.tensor(sum(values) / len(values)) for name, values in parts.items()}
    if "ref_log_prob" in data:
        log_ratio = data["action_log_prob"] - data["ref_log_prob"]
        metrics["kl/reference"] = masked_mean(log_ratio, mask)
        metrics["kl/sequence"] = zero_padding(log_ratio, mask).sum(1).mean()
    if "shaped_reward" in data:
        metrics["return/mean"] = data["shaped_reward"].sum(1).mean()
    if "trainer_log_prob" in data:
        metrics["kl/mismatch"] = masked_mean((data["trainer_log_prob"] - data["behaviour_log_prob"]).abs(), mask)
    if "importance_weight" in data:
        metrics["ratio/is_weight"] = masked_mean(data["importance_weight"], mask)
    if "state_value" in data:
        value, target = data["state_value"][..., 0], data["value_target"][..., 0]
        metrics["value/mean"] = masked_mean(value, mask)
        metrics["value/explained_variance"] = explained_variance(value, target, mask)
    return {name: float(value) for name, value in metrics.items()}


def distinct(tokens: Tensor, mask: Tensor, n: int) -> Tensor:
    """The share of distinct runs of `n` tokens among all of a batch; NaN if there are none.

    It falls when texts grow alike.

    Examples:
        >>> tokens = torch.tensor([[1, 2, 1, 2]])
        >>> distinct(tokens, torch.ones(1, 4, dtype=torch.bool), 2).item()
        0.6666666865348816
    """
    if tokens.shape[1] < n:
        return torch.tensor(math.nan)
    runs = tokens.unfold(1, n, 1)[mask.unfold(1, n, 1).all(-1)]
    return torch.tensor(len(torch.unique(runs, dim=0)) / len(runs) if len(runs) else math.nan)


UPDATE_NAMES = {
    "loss_objective": "policy/loss",
    "loss_entropy": "policy/entropy_loss",
    "loss_kl": "policy/kl_loss",
    "loss_critic": "value/loss",
    "entropy": "policy/entropy",
    "clip_fraction": "policy/clip_fraction",
    "kl_approx": "kl/approx",
    "kl_old": "kl/old",
    "mean_ratio": "ratio/mean",
    "max_ratio": "ratio/max",
    "min_ratio": "ratio/min",
    "value_clip_fraction": "value/clip_fraction",
    "actor_norm": "policy/gradient_norm",
    "critic_norm": "value/gradient_norm",
}


def update_metrics(means: Mapping[str, float]) -> dict[str, float]:
    """The metrics of an update by the names they are logged under."""
    metrics = {UPDATE_NAMES[name]: value for name, value in means.items() if name in UPDATE_NAMES}
    if "mean_squared_ratio" in means:  # the effective share of the samples, were they weighted by their ratios
        metrics["ratio/ess"] = means["mean_ratio"] ** 2 / means["mean_squared_ratio"]
    return metrics
