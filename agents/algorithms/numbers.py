"""The metrics of a batch of texts; padding counts in none of them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import torch
from tensordict import TensorDict

from agents.losses.ops import deviation, explained_variance, masked_mean, zero_padding
from llm_env.tasks.replies import Replies
from llm_env.tokens.episode import Episode
from rewards import End

Tensor = torch.Tensor


def batch_metrics(data: TensorDict, episodes: Sequence[Episode]) -> dict[str, float]:
    """Rewards and their parts, lengths and ends of the texts, how varied they are, and their KL to the reference."""
    mask = data["mask"]
    task_reward = zero_padding(data["next", "reward"][..., 0], mask).sum(1)
    metrics = {
        "reward/mean": task_reward.mean(),
        "reward/std": deviation(task_reward, mask.any(1)),
        "text/length": mask.sum(1).float().mean(),
        "text/cut": data["cut"].float().mean(),
        "text/eos": torch.tensor(sum(episode.end is End.EOS for episode in episodes) / max(1, len(episodes))),
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


def reply_metrics(replies: Replies, episodes: Sequence[Episode]) -> dict[str, float]:
    """How a task's replies went: in this batch, and since the run began."""
    return {
        "reply/failures": replies.num_failures,
        "reply/failed": sum(episode.failed_replies > 0 for episode in episodes) / max(1, len(episodes)),
        "reply/left_out": replies.num_left_out,
    }


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
