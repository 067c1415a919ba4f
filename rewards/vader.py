"""How positive a text sounds: `VaderSentiment`."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

from rewards.base import Reward
from rewards.named import register_reward
from rewards.rollout import Rollout


@register_reward("vader_sentiment")
class VaderSentiment(Reward):
    """How positive the text is by VADER, a lexicon of rated English words with rules for their context.

    VADER's compound score (Hutto & Gilbert 2014) runs from -1 to 1; here it is mapped to `low` to `high`,
    so that a neutral text is half-way between them.

    Args:
        low: The score of the most negative text.
        high: The score of the most positive one. `VaderSentiment(-1, 1)` is the compound score itself.

    Raises:
        ImportError: If vaderSentiment is not installed.

    Example:
        >>> good, neutral, bad = VaderSentiment()([Rollout.of(text) for text in ("A joy!", "A film.", "Awful.")])
        >>> good.value > neutral.value == 0.5 > bad.value
        True
    """

    def __init__(self, low: float = 0.0, high: float = 1.0) -> None:
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError(f"VaderSentiment: low is {low} and high is {high}; expected finite low < high.")
        self.low = low
        self.high = high
        _analyzer()  # so that a missing package shows now, not at the end of the first rollout

    def score(self, rollout: Rollout) -> float:
        """Score one rollout."""
        compound: float = _analyzer().polarity_scores(rollout.text)["compound"]
        return self.low + (self.high - self.low) * (compound + 1) / 2

    def __repr__(self) -> str:
        return f"VaderSentiment(low={self.low}, high={self.high})"


# Kept, because making one reads a lexicon of 7500 words; and kept here rather than by the reward, so that a pickled
# reward does not contain it.
@cache
def _analyzer() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise ImportError(
            "VaderSentiment needs the package vaderSentiment, which is not installed: pip install 'llm-env[tasks]'"
        ) from error
    return SentimentIntensityAnalyzer()
