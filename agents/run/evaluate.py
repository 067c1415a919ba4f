"""How good a policy is on held-out prompts: sampled, as it was trained, and greedy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from agents.rollouts.writers import Writer
from llm_env.engines import Sampling
from llm_env.tokens.episode import Episode
from rewards import RewardError


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What is known of a policy.

    Attributes:
        metrics: by their logged names; only "eval/failed" if it has failed.
        episodes: the sampled texts behind them.
        failure: what to warn of, if a reward was no number, so that there are no metrics; else None.
    """

    metrics: dict[str, float]
    episodes: list[Episode]
    failure: str | None = None


class Evaluator:
    """Scores the policy on the same prompts with the same random numbers every time, so that only it can differ.

    Args:
        writer: over a held-out split.
        prompts: how many prompts, at most.
        temperature: of the sampled texts.
        seed: of the sampled texts.
    """

    def __init__(self, writer: Writer, prompts: int, temperature: float = 1.0, seed: int = 0) -> None:
        self.writer = writer
        self.indices = np.arange(min(prompts, len(writer.mdp.prompts)))
        self.temperature = temperature
        self.seed = int(np.random.SeedSequence([seed, 0xE7A1]).generate_state(1, np.uint64)[0])

    def evaluate(self) -> Evaluation:
        """Write and score every prompt twice.

        An error in a reward fails the evaluation, not the run: what was learned so far would be lost, and a resumed run
        would meet the same error again.
        """
        try:
            sampled = self.write(Sampling(temperature=self.temperature, seed=self.seed))
            greedy = self.write(Sampling(temperature=0.0, seed=self.seed))
        except RewardError as error:
            why = "The policy could not be judged; this evaluation counts as failed, and the run goes on. The reason: "
            return Evaluation({"eval/failed": 1.0}, [], f"{why}{error}")
        metrics = {
            "eval/sampled": _mean_reward(sampled),
            "eval/greedy": _mean_reward(greedy),
            "eval/length": float(np.mean([episode.rollout.num_actions for episode in sampled])),
            "eval/prompts": float(len(self.indices)),
            "eval/failed": 0.0,
        }
        return Evaluation(metrics, sampled)

    def some(self, count: int) -> list[Episode]:
        """A few sampled texts; none if their reward is no number."""
        try:
            return self.write(Sampling(temperature=self.temperature, seed=self.seed), count)
        except RewardError:
            return []

    def write(self, sampling: Sampling, count: int | None = None) -> list[Episode]:
        """A scored text for each prompt, or for the first few."""
        indices = self.indices[:count]
        self.writer.mdp.reward.reseed(self.seed)  # what one with a timeout draws: the same each time
        return self.writer.episodes(indices, indices, sampling)


def _mean_reward(episodes: list[Episode]) -> float:
    return float(np.mean([episode.total for episode in episodes]))
