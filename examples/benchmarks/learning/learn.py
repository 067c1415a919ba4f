"""One run: our trainer or TRL's learns from a start, and is judged now and then on held-out prompts."""

from __future__ import annotations

import atexit
import functools
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from trl_side import TRLWorker

from agents.config import TrainConfig
from agents.run.evaluate import Evaluator
from agents.run.parts import build
from llm_env.mdp.core import TokenMDP

Point = dict[str, float | None]
EXPLAINED = "value/explained_variance"


class Side(Protocol):
    """A trainer.

    Attributes:
        tokens: that it has written, ends included.
        seconds: of its iterations.
    """

    tokens: int
    seconds: float

    def iterate(self) -> float | None:
        """One iteration; gives the critic's explained variance, if there is a critic and it is known."""

    def judge(self) -> tuple[float, float]:
        """The held-out score, sampled and greedy."""


class Ours:
    """Our side."""

    def __init__(self, config: TrainConfig, start: Path, critic: bool) -> None:
        self.run = build(config, start)
        self.critic = critic
        self.tokens, self.seconds = 0, 0.0

    def __enter__(self) -> Ours:
        return self

    def __exit__(self, *_: object) -> None:
        self.run.close()

    def iterate(self) -> float | None:
        begun = time.perf_counter()
        metrics = self.run.algorithm.step()
        self.run.update_engine()
        self.seconds += time.perf_counter() - begun
        self.tokens = self.run.algorithm.tokens
        return metrics.get(EXPLAINED) if self.critic else None

    def judge(self) -> tuple[float, float]:
        if self.run.evaluator is None:
            raise RuntimeError("the task has no held-out prompts to judge by: give it some (num_test)")
        evaluation = self.run.evaluator.evaluate()
        if evaluation.failure:
            raise RuntimeError(evaluation.failure)
        return evaluation.metrics["eval/sampled"], evaluation.metrics["eval/greedy"]


class TRL:
    """TRL's PPO. Prompts, answers and what it is judged on are those of our side, which is built to ask it for them."""

    def __init__(self, config: TrainConfig, start: Path, settings: Mapping[str, Any]) -> None:
        run = build(config, start)
        mdp, held_out = run.mdp, held_out_of(run.evaluator)
        (prompts, answers), self.held_out = question_ids(mdp, len(mdp.prompts)), held_out
        run.close()
        self.worker = trl_worker()
        self.worker.setup(
            model=str(start), prompts=prompts, answers=answers, response_length=mdp.max_new_tokens, seed=config.seed,
            threads=torch.get_num_threads(), temperature=config.rollout.temperature, **settings,
        )  # fmt: skip
        self.tokens, self.seconds = 0, 0.0

    def __enter__(self) -> TRL:
        return self

    def __exit__(self, *_: object) -> None:
        """The process stays for the next run."""

    def iterate(self) -> None:
        answer = self.worker.iterate()
        self.seconds += answer["seconds"]
        self.tokens = answer["tokens"]

    def judge(self) -> tuple[float, float]:
        prompts, answers = self.held_out
        sampled, greedy = (self.worker.evaluate(prompts, answers, greedy=greedy) for greedy in (False, True))
        return sampled, greedy


@functools.cache
def trl_worker() -> TRLWorker:
    """This process's own."""
    worker = TRLWorker()
    atexit.register(worker.close)
    return worker


def open_side(config: TrainConfig, start: Path, *, trl: Mapping[str, Any] | None, critic: bool) -> Ours | TRL:
    """The trainer that a run is about."""
    return Ours(config, start, critic) if trl is None else TRL(config, start, trl)


def held_out_of(evaluator: Evaluator | None) -> tuple[list[list[int]], list[list[int]]]:
    """The prompts that our side is judged on, and their answers."""
    assert evaluator
    return question_ids(evaluator.writer.mdp, len(evaluator.indices))


def question_ids(mdp: TokenMDP, count: int) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and answers as token ids."""
    answers = [mdp.vocabulary.encode(prompt.metadata["answer"]).tolist() for prompt in mdp.prompts.prompts[:count]]
    return [tokens.tolist() for tokens in mdp.prompts.tokens[:count]], answers


def learn(side: Side, tokens: int, points: int) -> list[Point]:
    """Let it learn until it has written so many tokens; judged at the start, and whenever another share is written."""
    curve, explained, judged = [_point(side, [])], [], 0
    while side.tokens < tokens:
        explained.append(side.iterate())
        due = math.floor(side.tokens * points / tokens)
        if due > judged or side.tokens >= tokens:
            curve.append(_point(side, explained))
            explained, judged = [], due
    return curve


def _point(side: Side, explained: list[float | None]) -> Point:
    """What is known now; the explained variance is the mean since the last point."""
    # It is NaN where all returns of a batch were the same.
    known = [value for value in explained if value is not None and math.isfinite(value)]
    sampled, greedy = side.judge()
    return {
        "tokens": float(side.tokens),
        "seconds": side.seconds,
        "sampled": sampled,
        "greedy": greedy,
        "explained_variance": float(np.mean(known)) if known else None,
    }
