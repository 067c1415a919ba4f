"""Where a warm start ends: at the score that was asked for, or near it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from agents.config import SFTConfig
from agents.networks.network import Network
from agents.report.display import Display

HALVINGS = 6
"""How often the way between two judged models is halved: by then, a step of the optimizer is long past."""


class Ending:
    """Judges a model now and then, and says when it is good enough.

    A tiny model learns some things at one stroke: within five steps it goes from failing at all to succeeding at most,
    and then nothing is left for the rewards to teach. So one that has jumped past the score can be taken back on the
    line between its weights and those judged before.

    Args:
        config: the score, how often to look, and how near it is to be.
        network: whose policy learns.
        score: judges it as it is.
        display: is told what was found.
    """

    def __init__(self, config: SFTConfig, network: Network, score: Callable[[], float], display: Display) -> None:
        self.config = config
        self.network = network
        self.score = score
        self.display = display
        self.below = self._copy()
        """The weights that were judged last, if a jump is to be taken back."""

    def reached(self, step: int) -> bool:
        """Whether the warm start ends with this step."""
        wanted = self.config.stop_at
        if wanted is None or step % self.config.evaluate_every:
            return False
        score = self.score()
        if score >= wanted:
            enough = f"enough for --sft.stop-at {wanted:g}"
            self.display.message(f"supervised step {step}: held-out {score:.3g}, {enough}")
            self._take_back(score)
            return True
        if step == self.config.steps:
            self.display.warn(
                f"The warm start has come to {score:.3g} on held-out prompts in its {step} steps, not to --sft.stop-at "
                f"{wanted:g}: give it more (--sft.steps)."
            )
        self.below = self._copy()
        return False

    def _take_back(self, score: float) -> None:
        """If it jumped, find the model between that is above by as little as was asked for, or by the least found."""
        wanted, within = self.config.stop_at, self.config.stop_within
        if wanted is None or within is None or score <= wanted + within:
            return
        above, low, high = self._copy(), 0.0, 1.0
        for _ in range(HALVINGS):
            share = (low + high) / 2
            self.network.load_weights(between(self.below, above, share))
            found = self.score()
            if found < wanted:
                low = share
                continue
            high, score = share, found
            if score <= wanted + within:
                break
        self.network.load_weights(between(self.below, above, high))
        way = f"{100 * high:.0f}% of the way from the model judged before"
        self.display.message(f"that was a jump, so the warm start ends at {way}: held-out {score:.3g}")

    def _copy(self) -> dict[str, Tensor]:
        """The weights as they are now, where they may be needed."""
        if self.config.stop_within is None:
            return {}
        return {name: weight.clone() for name, weight in self.network.weights().items()}


def between(below: dict[str, Tensor], above: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """The weights so far along the line from one model to the other.

    >>> between({"w": torch.tensor([0.0, 2.0])}, {"w": torch.tensor([4.0, 2.0])}, 0.25)
    {'w': tensor([1., 2.])}
    """
    return {name: torch.lerp(weight, above[name], share) for name, weight in below.items()}
