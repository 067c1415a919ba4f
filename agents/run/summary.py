"""What is told of a run in words: its title, before and after, some of its texts, how long it will take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from agents.config import TrainConfig
from llm_env.tokens.episode import Episode

SAMPLES = 3
"""How many texts are shown at a time."""


def run_title(config: TrainConfig) -> str:
    """A run in one line.

    Examples:
        >>> run_title(TrainConfig())
        'ppo on Reverse with tiny, seed 0'
    """
    return f"{config.algo} on {config.task.name} with {config.model.name}, seed {config.seed}"


def before_and_after(
    config: TrainConfig, before: Mapping[str, float], after: Mapping[str, float]
) -> list[tuple[str, float, float]]:
    """The metrics of two evaluations, side by side under names that need no explanation.

    Examples:
        >>> before_and_after(TrainConfig(), {"eval/greedy": 0.25}, {"eval/greedy": 0.75})
        [('held-out reward, greedy', 0.25, 0.75)]
    """
    labels = {
        "eval/sampled": f"held-out reward, sampled at temperature {config.rollout.temperature:g}",
        "eval/greedy": "held-out reward, greedy",
        "eval/length": "length of a text",
    }
    return [(label, before[name], after[name]) for name, label in labels.items() if name in before and name in after]


def samples_of(episodes: Sequence[Episode]) -> list[dict[str, Any]]:
    """The first few texts, as they are shown and written down."""
    return [
        {
            "prompt": episode.rollout.prompt,
            "transcript": episode.rollout.transcript,
            "reward": episode.total,
            "end": episode.rollout.end,
        }
        for episode in episodes[:SAMPLES]
    ]


def rough_time(seconds: float) -> str:
    """A duration that nobody should rely on to the second.

    Examples:
        >>> rough_time(8.7), rough_time(200), rough_time(9000)
        ('9 s', '3 min', '2.5 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
