"""How good a model is on a task: means with intervals, pass@k, and every text that was judged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from math import comb
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers.utils.logging import disable_progress_bar

from agents.config import TrainConfig
from agents.config.files import ConfigError
from agents.run.intervals import mean_with_interval
from agents.run.parts import build_parts, without_learning
from agents.run.versus import self_bleu, win_rate
from llm_env.engines import Sampling
from llm_env.tokens.episode import Episode

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Judgement:
    """What was found.

    Attributes:
        sampled: `[prompts, samples]` rewards of sampled texts.
        greedy: `[prompts]` of those whose tokens are the likeliest.
        rows: every text, as JSON can hold it: prompt_index, sample (None: greedy), text, end, score, parts.
        temperature: of the sampled texts.
        variety: of the sampled texts: "distinct_2", the share of different pairs of neighbouring tokens, and where
            there are several after a prompt "self_bleu", which is 1 when they are the same.
    """

    sampled: Floats
    greedy: Floats
    rows: list[dict[str, Any]]
    temperature: float
    variety: dict[str, float] = field(default_factory=dict)

    @property
    def sampled_rows(self) -> list[dict[str, Any]]:
        """The rows of sampled texts."""
        return [row for row in self.rows if row["sample"] is not None]

    def summary(self, right: float = 1.0, against: list[dict[str, Any]] | None = None) -> dict[str, Any]:
        """The figures, as JSON can hold them.

        Args:
            right: a reward from which a text counts as right, for pass@k.
            against: rows of another model's texts, for the share of ours that are better.
        """
        count = self.sampled.shape[1]
        correct = (self.sampled >= right - 1e-9).sum(1)
        tries = [k for k in (1, 2, 4, 8, 16, 32, 64, 128, 256) if k <= count]
        parts: dict[str, list[float]] = {}
        for row in self.sampled_rows:
            for name, value in row["parts"].items():
                if name != "score" and (name != "reward_failed" or value):  # the whole, and what hardly ever is
                    parts.setdefault(name, []).append(value)
        return {
            "prompts": len(self.sampled),
            "samples": count,
            "temperature": self.temperature,
            "sampled": mean_with_interval(self.sampled.mean(1)),
            "greedy": mean_with_interval(self.greedy),
            "right": right,
            "pass": {str(k): float(np.mean([pass_at(k, count, int(c)) for c in correct])) for k in tries},
            "parts": {name: float(np.mean(values)) for name, values in sorted(parts.items())},
            **self.variety,
            **({} if against is None else {"against": win_rate(self.rows, against)}),
        }


def judge(
    config: TrainConfig, model: str, samples: int = 1, told: Callable[[int, int], None] = lambda done, total: None
) -> Judgement:
    """Let a model write, and score it. Its first samples, and the greedy texts, are those of a run's own evaluation.

    Args:
        config: the task, the split and how many prompts (`evaluation`), temperature, seed and engine (`rollout`).
        model: a name or a folder.
        samples: texts after each prompt.
        told: how many of the passes over the prompts are done, of how many.
    """
    disable_progress_bar()  # of transformers, for every file of weights
    parts = build_parts(without_learning(config), model)
    try:
        evaluator = parts.evaluator
        if evaluator is None:
            raise ConfigError(f"the task {config.task.name} has no prompts in its split {config.evaluation.split!r}")

        def write(place: int | None) -> list[Episode]:
            if place is None:
                return evaluator.write(Sampling(temperature=0.0, seed=evaluator.seed))
            seed = evaluator.seed
            if place:  # the first are those of a run's own evaluation
                seed = int(np.random.SeedSequence([seed, place]).generate_state(1, np.uint64)[0])
            return evaluator.write(Sampling(temperature=evaluator.temperature, seed=seed))

        passes: list[list[Episode]] = []
        order: list[int | None] = [*range(samples), None]
        for place in order:
            passes.append(write(place))
            told(len(passes), len(order))
    finally:
        parts.close()
    *sampled, greedy = ([episode.total for episode in episodes] for episodes in passes)
    rows = [row for place, episodes in zip(order, passes, strict=True) for row in _rows(place, episodes)]
    variety = variety_of(passes[:-1])
    return Judgement(np.array(sampled).T, np.array(greedy), rows, config.rollout.temperature, variety)


def variety_of(passes: list[list[Episode]]) -> dict[str, float]:
    """How much sampled texts differ; each pass has one after each prompt."""
    texts = [[episode.rollout.tokens.tolist() for episode in episodes] for episodes in passes]
    pairs = [pair for each in texts for tokens in each for pair in pairwise(tokens)]
    found = {"distinct_2": len(set(pairs)) / max(1, len(pairs))}
    return found if len(texts) == 1 else found | {"self_bleu": self_bleu(zip(*texts, strict=True))}


def pass_at(k: int, count: int, right: int) -> float:
    """How likely at least one of k texts is right, if `right` of `count` were: without bias, whatever k.

    Examples:
        >>> pass_at(1, 4, 1), pass_at(2, 4, 1), pass_at(4, 4, 1), pass_at(2, 4, 0)
        (0.25, 0.5, 1.0, 0.0)
    """
    return 1.0 - comb(count - right, k) / comb(count, k)


def _rows(place: int | None, episodes: list[Episode]) -> Iterator[dict[str, Any]]:
    for episode in episodes:
        yield {
            "prompt_index": episode.prompt_index,
            "prompt": episode.rollout.asked,
            "sample": place,
            "text": episode.text,
            "end": str(episode.end),
            "score": episode.total,
            "parts": dict(episode.score.parts),
        }
