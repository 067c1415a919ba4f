"""A finished text together with what learning needs to know about it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llm_env.tokens.arrays import FloatArray, IntArray
from rewards import End, Rollout, Score

UNSCORED = Score(math.nan)
"""The score of an episode before anybody has scored it."""


@dataclass(slots=True, eq=False)  # not frozen: that would take longer to make than all else about it
class Episode:
    """One finished text: what was written, how likely it was, and what it earned.

    `n` is the number of tokens that the agent chose (`rollout.num_actions`).

    Attributes:
        rollout: the text, as rewards see it.
        score: what the task gave for it; `UNSCORED`, whose value is NaN, until it has been scored.
        log_probs: `[n]` of the agent's tokens, under the distribution they were drawn from; None if an agent outside
            chose them and only it knows.
        token_rewards: `[n]` what the task paid at each of them, besides the score; None: nothing.
        truncated: cut off and not scored: its last state is to be valued.
        prompt_index: which prompt of the split (or of the call to `generate`) it answers.
        group: episodes of one group are to be compared with each other.
        completion_index: which of the texts that were asked for after this prompt.
        version: of the weights that wrote it, as the engine counts them; the last, if there were several.
        versions: `[n]` of the weights that chose each of them, if there were several.
        failed_replies: how often the task's `reply` failed in it.
        action_masks: `[n]` what the task allowed at each of them, as the bits of `np.packbits`; equal ones are one
            object. None: all tokens, always.
    """

    rollout: Rollout
    score: Score
    log_probs: npt.NDArray[np.float32] | None
    token_rewards: FloatArray | None
    truncated: bool
    prompt_index: int
    group: int
    completion_index: int = 0
    version: int = 0
    versions: IntArray | None = None
    failed_replies: int = 0
    action_masks: tuple[bytes, ...] | None = None

    @property
    def tokens(self) -> IntArray:
        """The tokens after the prompt."""
        return self.rollout.tokens

    @property
    def text(self) -> str:
        """What the agent wrote; `rollout.transcript` has the replies of the task as well."""
        return self.rollout.text

    @property
    def end(self) -> End:
        """Why it ended."""
        return self.rollout.end

    @property
    def rewards(self) -> FloatArray:
        """`[n]` the reward of each of the agent's tokens: the score's value comes with the last.

        Examples:
            >>> episode = Episode(Rollout.of("ab"), Score(1.0), None, np.array([0.0, 0.5]), False, 0, 0)
            >>> episode.rewards.tolist(), episode.total
            ([0.0, 1.5], 1.5)
        """
        score, count = self.score, self.rollout.num_actions
        rewards = np.zeros(count) if score.per_token is None else score.per_token.astype(np.float64)
        rewards[-1] += score.value
        return rewards if self.token_rewards is None else rewards + self.token_rewards

    @property
    def total(self) -> float:
        """All that was paid for it, the sum of `rewards`: its reward in logs, evaluations and filters."""
        paid = 0.0 if self.token_rewards is None else float(self.token_rewards.sum())
        return paid + self.score.total
