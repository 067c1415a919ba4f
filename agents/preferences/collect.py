"""What is learned from texts that were scored: pairs, of which the better is preferred, and the best of each prompt."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple


class Collected(NamedTuple):
    """What came of scored texts.

    Attributes:
        rows: pairs, as a JSONL file has them.
        ties: how many pairs there would be more, had one of their texts been better.
        flipped: how many of the pairs have the worse text as the chosen one.
    """

    rows: list[dict[str, Any]]
    ties: int
    flipped: int


Compare = Callable[[Any, str, str], float]
"""How likely the first of two texts after a prompt is the better one; 0.5 where that cannot be said."""


def collect(
    texts: Iterable[Mapping[str, Any]],
    *,
    compare: Compare | None = None,
    workers: int = 8,
    noise: float = 0.0,
    seed: int = 0,
) -> Collected:
    """Pair the texts of each prompt: each text is in one pair at most.

    Args:
        texts: each with a "prompt", a "text" and a "score".
        compare: says which is better, such as `Judge.compare`; by default the one with the higher score is.
        workers: how many are compared at once.
        noise: the share of pairs that are labelled the wrong way round, as people do.
        seed: of who is paired with whom, and of the noise.

    Examples:
        >>> texts = [{"prompt": "1+1=", "text": text, "score": score} for text, score in (("2", 1.0), ("3", 0.0))]
        >>> collect(texts).rows
        [{'prompt': '1+1=', 'chosen': '2', 'rejected': '3'}]
    """
    rng = random.Random(seed)
    rows: list[dict[str, Any]] = []
    ties = flipped = 0
    both = list(side_by_side(texts, rng))
    with ThreadPoolExecutor(workers) as pool:
        chances = list(pool.map(lambda pair: _chance(pair[0], pair[1], compare), both))
    for (one, other), chance in zip(both, chances, strict=True):
        if chance == 0.5:
            ties += 1
            continue
        better, worse = (one, other) if chance > 0.5 else (other, one)
        if rng.random() < noise:
            better, worse = worse, better
            flipped += 1
        rows.append({"prompt": one["prompt"], "chosen": better["text"], "rejected": worse["text"]})
    return Collected(rows, ties, flipped)


def _chance(one: Mapping[str, Any], other: Mapping[str, Any], compare: Compare | None) -> float:
    if compare is not None:
        return compare(one["prompt"], one["text"], other["text"]) if one["text"] != other["text"] else 0.5
    first, second = float(one["score"]), float(other["score"])
    return 0.5 + 0.5 * ((first > second) - (first < second))


def side_by_side(
    texts: Iterable[Mapping[str, Any]], rng: random.Random
) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Two texts after the same prompt, in any order; each text is in one pair at most."""
    for group in _by_prompt(texts).values():
        rng.shuffle(group)
        yield from zip(group[::2], group[1::2], strict=False)


def best_of(
    texts: Iterable[Mapping[str, Any]], *, keep: int = 1, at_least: float | None = None
) -> list[dict[str, Any]]:
    """The best texts after each prompt, as answers to learn: what rejection sampling is fine-tuned on.

    Args:
        texts: each with a "prompt", a "text" and a "score".
        keep: how many of a prompt; of equal scores the first, and no text twice.
        at_least: leave out what has a lower score.

    Examples:
        >>> texts = [{"prompt": "1+1=", "text": text, "score": score} for text, score in (("2", 1.0), ("3", 0.0))]
        >>> best_of(texts)
        [{'prompt': '1+1=', 'answer': '2', 'score': 1.0}]
    """
    rows = []
    for group in _by_prompt(texts).values():
        distinct: dict[str, Mapping[str, Any]] = {}
        for text in group:
            distinct.setdefault(text["text"], text)
        ranked = sorted(distinct.values(), key=lambda text: -text["score"])
        rows += [
            {"prompt": text["prompt"], "answer": text["text"], "score": text["score"]}
            for text in ranked[:keep]
            if at_least is None or text["score"] >= at_least
        ]
    return rows


def read_texts(path: Path) -> list[dict[str, Any]]:
    """The sampled texts from a JSONL file that `llm-env eval --out` has written."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: expected the texts of llm-env eval --samples 4 --out {path}")
    texts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            text = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        if not isinstance(text, dict):
            raise ValueError(f"{path}, line {number}: expected an object with a prompt, a text and a score")
        if text.get("sample", 0) is not None:
            texts.append(text)
    return texts


def _by_prompt(texts: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for number, text in enumerate(texts, start=1):
        if missing := [name for name in ("prompt", "text", "score") if name not in text]:
            raise ValueError(f"text {number} has no {' and no '.join(missing)}, only {', '.join(text)}")
        found.setdefault(json.dumps(text["prompt"]), []).append(text)
    return found
