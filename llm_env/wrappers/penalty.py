"""The KL penalty per token: beta times the log-ratio of the agent to a reference model, taken off the reward."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from llm_env.mdp.core import TokenMDP
from llm_env.mdp.observer import EngineObserver
from llm_env.tokens.arrays import FloatArray, IntArray

FloatLike = npt.NDArray[np.floating[Any]]


class KLPenalty:
    """Log-probs of a reference model, kept in step with the episodes of a `TokenMDP`.

    The penalty of a token is `beta * (log pi(token) - log ref(token))`, the k1 estimator: its mean over the agent's own
    tokens is the KL divergence, and its sum over an episode is the log-ratio of the whole text.

    Args:
        mdp: the episodes.
        beta: the weight of the penalty.
        reference: the reference model: an engine, or the name of one ("transformers"), which then serves `model`;
            None takes the distribution that the environment itself observes (`observe="logits"`).
        model: the reference model's name, by default the environment's.
    """

    def __init__(self, mdp: TokenMDP, beta: float, reference: Any = None, model: Any = None) -> None:
        if not (np.isfinite(beta) and beta >= 0):
            raise ValueError(f"beta must be a number, 0 or more, got {beta!r}")
        if reference is None and "logits" not in mdp.observer.arrays:
            raise ValueError(
                "the KL penalty needs a reference model: give reference='transformers' (or an engine), "
                "or make the environment with engine='transformers', observe='logits' to use the model it reads with"
            )
        if model is not None and not isinstance(reference, str):
            raise ValueError(
                f"model={model!r} says what a reference engine given by name is to serve, but reference={reference!r}: "
                "name the engine, or leave out the model"
            )
        self.beta = beta
        self._mdp = mdp
        self._observer = mdp.observer
        self._owns = reference is not None
        if reference is not None:
            served = mdp.model if model is None else model
            self._observer = EngineObserver(reference, None, served, mdp.state, mdp.vocabulary)
        mdp.followers.append(self)

    def begin(self, rows: IntArray) -> None:
        """These rows hold a new text."""
        if self._owns:
            self._observer.begin(rows)

    def advance(self, rows: IntArray) -> None:
        """These rows have taken their step."""
        if self._owns:
            self._observer.advance(rows)

    def log_ratio(self, rows: IntArray, tokens: IntArray, log_probs: FloatLike) -> FloatArray:
        """`[len(rows)]` log-ratios of tokens about to be chosen; call it before the step."""
        log_probs = np.asarray(log_probs, dtype=np.float64)
        if log_probs.shape != rows.shape or not np.isfinite(log_probs).all() or (log_probs > 1e-6).any():
            raise ValueError(
                f"log_prob must be one log-probability (finite, at most 0) for each of {len(rows)} tokens, "
                f"got {log_probs}"
            )
        logits = self._observer.arrays["logits"][rows].astype(np.float64)
        top = logits.max(axis=1)
        normalizer = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
        ratio: FloatArray = log_probs - (logits[np.arange(len(rows)), tokens] - normalizer)
        return ratio

    def save(self, rows: IntArray) -> None:
        """Nothing is saved: the reference model reads restored texts again."""

    def restore(self, rows: IntArray, saved: None) -> None:
        """These rows hold other texts."""
        self.begin(rows)

    def close(self) -> None:
        """Free the reference engine, if this penalty made it; more than once does no harm."""
        if self in self._mdp.followers:
            self._mdp.followers.remove(self)
        if self._owns:
            self._observer.close()
