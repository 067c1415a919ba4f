"""Two models' texts after the same prompts: how often one's are better; and how much a model's texts are alike."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from agents.run.intervals import mean_with_interval

Row = Mapping[str, Any]
Floats = npt.NDArray[np.float64]


def win_rate(ours: Iterable[Row], theirs: Iterable[Row]) -> dict[str, Any]:
    """How often our text has the higher score, each with each after the same prompt; a tie is half a win.

    Args:
        ours: rows of `llm-env eval`: prompt_index, prompt, sample (None: greedy, left out), text, score.
        theirs: the same of another model.

    Returns:
        "wins" with its 95% interval over prompts; "wins_at_equal_length", what a logistic regression of wins on the
        difference of lengths foresees where there is none: texts that win by being longer do not there; "prompts".

    Examples:
        >>> def rows(*scores): return [
        ...     {"prompt_index": i, "prompt": "", "sample": 0, "text": "ab", "score": s} for i, s in enumerate(scores)]
        >>> win_rate(rows(1, 1, 0, 1), rows(0, 1, 1, 0))["wins"]["mean"]
        0.625
    """
    mine, others = _by_prompt(ours), _by_prompt(theirs)
    shared = [index for index in mine if index in others]
    if not shared:
        raise ValueError("the two have no prompt in common: let both write after the same prompts of the same split")
    wins, longer, each = [], [], []
    for index in shared:
        if mine[index][0]["prompt"] != others[index][0]["prompt"]:
            raise ValueError(
                f"prompt {index} is {mine[index][0]['prompt']!r} for one and {others[index][0]['prompt']!r} for the "
                "other: let both write after the same prompts of the same split"
            )
        pairs = [(one, other) for one in mine[index] for other in others[index]]
        here = [0.5 + 0.5 * float(np.sign(one["score"] - other["score"])) for one, other in pairs]
        longer += [len(one["text"]) - len(other["text"]) for one, other in pairs]
        wins += here
        each.append(sum(here) / len(here))
    equal = at_zero(np.array(wins), np.array(longer, dtype=np.float64))
    return {"wins": mean_with_interval(each), "wins_at_equal_length": equal, "prompts": len(shared)}


def at_zero(wins: Floats, difference: Floats) -> float:
    """The chance to win where the difference is 0, by logistic regression (Newton's method, a trace of a penalty on the
    slope, so that it stays finite where the longer always wins).

    Examples:
        >>> round(at_zero(np.array([1.0, 1.0, 0.0, 0.0]), np.array([2.0, 1.0, -1.0, -2.0])), 3)
        0.5
    """
    spread = float(difference.std())
    features = np.stack([np.ones_like(difference), difference / spread if spread else difference], 1)
    ridge, weights = np.diag([1e-6, 1e-2]), np.zeros(2)
    for _ in range(50):
        chance = 1 / (1 + np.exp(-np.clip(features @ weights, -30, 30)))
        slope = features.T @ (wins - chance) - ridge @ weights
        weights += np.linalg.solve((features * (chance * (1 - chance))[:, None]).T @ features + ridge, slope)
        weights = np.clip(weights, -15, 15)
    return float(1 / (1 + np.exp(-weights[0])))


def self_bleu(groups: Iterable[Sequence[Sequence[int]]], longest: int = 4) -> float:
    """How much texts after one prompt are alike: the mean BLEU of each with the others of its group as references. 1
    means that they are the same, 0 that they share no n-gram.

    Args:
        groups: the texts of each prompt, as tokens.
        longest: n-grams of up to so many tokens; of fewer, where a text is shorter.

    Examples:
        >>> self_bleu([[[1, 2, 3, 4], [1, 2, 3, 4]]]), self_bleu([[[1, 2, 3, 4], [5, 6, 7, 8]]])
        (1.0, 0.0)
    """
    found = []
    for texts in groups:
        grams = [[_grams(text, n) for n in range(1, longest + 1)] for text in texts]
        for place, text in enumerate(texts):
            others = [other for other in range(len(texts)) if other != place]
            if others and len(text):
                lengths = [len(texts[other]) for other in others]
                found.append(_bleu(grams[place], [grams[other] for other in others], len(text), lengths))
    return float(np.mean(found)) if found else 0.0


def _bleu(ours: list[Counter[Any]], others: list[list[Counter[Any]]], length: int, lengths: list[int]) -> float:
    logs = []
    for n, counts in enumerate(ours):
        if not counts:
            break
        most: Counter[Any] = Counter()
        for other in others:
            most |= other[n]
        matched = sum((counts & most).values())
        if not matched:
            return 0.0
        logs.append(math.log(matched / sum(counts.values())))
    nearest = min(lengths, key=lambda other: (abs(other - length), other))
    return math.exp(sum(logs) / len(logs) + min(0.0, 1 - nearest / length))


def _grams(text: Sequence[int], n: int) -> Counter[Any]:
    return Counter(tuple(text[at : at + n]) for at in range(len(text) - n + 1))


def _by_prompt(rows: Iterable[Row]) -> dict[int, list[Row]]:
    found: dict[int, list[Row]] = {}
    for row in rows:
        if row["sample"] is not None:
            found.setdefault(row["prompt_index"], []).append(row)
    return found
