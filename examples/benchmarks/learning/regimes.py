"""The regimes: what is to be learned, from which start, and with how many tokens. All their settings are here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Regime:
    """One kind of problem.

    Attributes:
        name: on the command line and in the report.
        what: it is, in a sentence.
        tokens: that each run may write; the iteration in which it has written as many is its last.
        threshold: the held-out sampled score that "tokens to the threshold" is about.
        changes: to TrainConfig, as in `replace`, for every algorithm: the task, the warm start, how runs are judged.
        exact_match: whether one text after a prompt gets 1 for being the answer and else 0, which TRL can do, too.
        points: how often a run is judged, at equal distances, besides at its start.
    """

    name: str
    what: str
    tokens: int
    threshold: float
    changes: Mapping[str, Any]
    exact_match: bool = False
    points: int = 6


def begin_at(score: float) -> dict[str, Any]:
    """The warm start ends at this score, sampled."""
    return {"sft__steps": 300, "sft__stop_at": score, "sft__evaluate_every": 5}


def reversing(start: float, **task: Any) -> dict[str, Any]:
    """Six of four letters are to be reversed, from a warm start that gets this score."""
    return {
        "task__name": "Reverse",
        "task__args": {"length": 6, "alphabet": "abcd", "num_test": 256, **task},
        **begin_at(start),
        "evaluation__prompts": 128,
    }


REGIMES = {
    regime.name: regime
    for regime in (
        Regime(
            "reverse",
            "Six letters are reversed, right (1) or wrong (0), from a middling start.",
            tokens=12_000,
            threshold=0.7,
            changes=reversing(0.2),
            exact_match=True,
        ),
        Regime(
            "rare",
            "The same from a start at which fewer than 5 in 100 texts are right.",
            tokens=16_000,
            threshold=0.2,
            changes=reversing(0.02),
            exact_match=True,
        ),
        Regime(
            "long",
            "Of 64 letters each follows from the one before; the one reward, the share that is right, comes last.",
            tokens=40_000,
            threshold=0.5,
            # There is no warm start: that one letter in eight is right at first is enough to begin with.
            changes={"task__name": "Chain", "task__args": {}, "evaluation__prompts": 64},
        ),
        Regime(
            "dense",
            "Six letters are reversed, and each right letter is paid where it is written.",
            tokens=16_000,
            threshold=0.4,
            # All algorithms get the bonus: without it, which letters are ever found is luck.
            changes=reversing(0.25, dense=True) | {"loss__entropy": 0.4},
        ),
        Regime(
            "maze",
            "A way through a maze is found letter by letter; the task answers each with the new place.",
            tokens=10_000,
            threshold=0.7,
            changes={
                "task__name": "Maze",
                "task__args": {"size": 4, "num_test": 48},
                **begin_at(0.45),
                "evaluation__prompts": 48,
            },
        ),
    )
}


def scaled(regime: Regime, scale: float) -> Regime:
    """The same with more or fewer tokens."""
    return dataclasses.replace(regime, tokens=max(1, round(regime.tokens * scale)))


def quick(regime: Regime) -> Regime:
    """So small that nothing is learned: an iteration, to see that everything works."""
    warm: dict[str, Any] = {"sft__steps": 2, "sft__stop_at": None, "sft__evaluate_every": 10, "sft__warmup": 1}
    tiny: dict[str, Any] = {
        "task__args": {**regime.changes["task__args"], "num_test": 8},
        **(warm if "sft__steps" in regime.changes else {}),
        "evaluation__prompts": 8,
        "rollout__batch_size": 8,
        "actor__minibatches": 1,
    }
    return dataclasses.replace(regime, tokens=50, points=1, changes={**regime.changes, **tiny})
