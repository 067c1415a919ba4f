"""How good a model is on a task: means with intervals, pass@k, maj@k, and every text that was judged."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from decimal import Decimal, InvalidOperation
from itertools import combinations, pairwise
from math import comb
from pathlib import Path
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
from llm_env.files import write_rows
from llm_env.tasks.mixture import PART
from llm_env.tokens.episode import Episode
from rewards import final_answer

Floats = npt.NDArray[np.float64]
Row = dict[str, Any]

_SUBSETS = 2000  # of k texts that a majority is looked for in, where there are more


@dataclass(frozen=True)
class Judgement:
    """What was found.

    Attributes:
        sampled: `[prompts, samples]` rewards of sampled texts.
        greedy: `[prompts]` of those whose tokens are the likeliest.
        rows: every text, as JSON can hold it: prompt_index, prompt, sample (None: greedy), text, end, score, parts,
            and its group where there are groups.
        temperature: of the sampled texts.
        variety: of the sampled texts: "distinct_2", the share of different pairs of neighbouring tokens, and where
            there are several after a prompt "self_bleu", which is 1 when they are the same.
    """

    sampled: Floats
    greedy: Floats
    rows: list[Row]
    temperature: float
    variety: dict[str, float] = field(default_factory=dict)

    @property
    def sampled_rows(self) -> list[Row]:
        """The rows of sampled texts."""
        return [row for row in self.rows if row["sample"] is not None]

    def summary(self, right: float = 1.0, against: list[Row] | None = None) -> dict[str, Any]:
        """The figures, as JSON can hold them.

        Args:
            right: a reward from which a text counts as right, for pass@k and maj@k.
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
            **self._majorities(tries[1:], right),
            "parts": {name: float(np.mean(values)) for name, values in sorted(parts.items())},
            **self._groups(),
            **self.variety,
            **({} if against is None else {"against": win_rate(self.rows, against)}),
        }

    def _majorities(self, tries: Sequence[int], right: float) -> dict[str, dict[str, float]]:
        """maj@k, if any two texts after a prompt have the same answer: where none have, there is nothing to vote on."""
        texts: dict[int, list[tuple[str, bool]]] = {}
        for row in self.sampled_rows:
            texts.setdefault(row["prompt_index"], []).append((answer_of(row["text"]), row["score"] >= right - 1e-9))
        if all(len({answer for answer, _ in each}) == len(each) for each in texts.values()):
            return {}
        return {"majority": {str(k): float(np.mean([majority_at(k, each) for each in texts.values()])) for k in tries}}

    def _groups(self) -> dict[str, dict[str, dict[str, float]]]:
        """The mean reward of sampled texts by their group."""
        prompts: dict[str, dict[int, list[float]]] = {}
        for row in self.sampled_rows:
            if "group" in row:
                prompts.setdefault(str(row["group"]), {}).setdefault(row["prompt_index"], []).append(row["score"])
        found = {
            name: {"prompts": len(each), **mean_with_interval(np.array([np.mean(scores) for scores in each.values()]))}
            for name, each in sorted(prompts.items())
        }
        return {"groups": found} if found else {}


def judge(
    config: TrainConfig,
    model: str,
    samples: int = 1,
    told: Callable[[int, int], None] = lambda done, total: None,
    by: str | None = None,
    kept: Path | None = None,
) -> Judgement:
    """Let a model write, and score it. Its first samples, and the greedy texts, are those of a run's own evaluation.

    Args:
        config: the task, the split and how many prompts (`evaluation`), temperature, seed and engine (`rollout`).
        model: a name or a folder.
        samples: texts after each prompt.
        told: how many of the passes over the prompts are done, of how many.
        by: what of a prompt's metadata its group is; by default the part of a mixture or curriculum.
        kept: a file in which each pass is kept as soon as it is done. If it is there, and of the same settings, its
            passes are not done again.
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

        settings = {"model": model, "written": _written(model), "by": by, **asdict(config)}
        passes = _Kept(kept, json.loads(json.dumps(settings, default=str)), len(evaluator.indices))
        order: list[int | None] = [*range(samples), None]
        for number, place in enumerate(order, 1):
            if place not in passes.rows:
                passes.add(place, [_row(place, episode, by) for episode in write(place)])
            told(number, len(order))
    finally:
        parts.close()
    *sampled, greedy = ([row["score"] for row in passes.rows[place]] for place in order)
    variety = variety_of([[row["tokens"] for row in passes.rows[place]] for place in order[:-1]])
    rows = [{name: row[name] for name in row if name != "tokens"} for place in order for row in passes.rows[place]]
    return Judgement(np.array(sampled).T, np.array(greedy), rows, config.rollout.temperature, variety)


class _Kept:
    """Passes that are done, here and in a file: its first line has the settings, each other a text."""

    def __init__(self, path: Path | None, settings: dict[str, Any], prompts: int) -> None:
        self.path = path
        self.rows: dict[int | None, list[Row]] = {}
        if path is None:
            return
        if path.exists():
            first, *rest = map(_read, path.read_bytes().split(b"\n"))
            if first == settings:
                for row in rest:
                    if row is not None:
                        self.rows.setdefault(row["sample"], []).append(row)
                self.rows = {place: rows for place, rows in self.rows.items() if len(rows) == prompts}
        lines = [settings, *(row for rows in self.rows.values() for row in rows)]
        write_rows(path, lines)

    def add(self, place: int | None, rows: list[Row]) -> None:
        """Keep one."""
        self.rows[place] = rows
        if self.path is not None:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write("".join(json.dumps(row) + "\n" for row in rows))


def _written(model: str) -> float:
    """When the last file of a model's folder was written: the same folder may hold another model by now."""
    return max((file.stat().st_mtime for file in Path(model).glob("*.safetensors")), default=0.0)


def _read(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:  # a kill has torn it
        return None


def answer_of(text: str) -> str:
    """What a text votes for: its final answer, as a number if it is one, or else all of it.

    Examples:
        >>> answer_of("so she has 24.50"), answer_of(r"\\boxed{x^2}"), answer_of(" cba")
        ('24.5', 'x^2', 'cba')
    """
    answer = final_answer(text)
    try:
        return text.strip() if answer is None else f"{Decimal(answer).normalize():f}"
    except InvalidOperation:
        return str(answer)


def majority_at(k: int, texts: Sequence[tuple[str, bool]]) -> float:
    """How likely the answer that most of k texts give is right; those that are as frequent share a vote.

    Args:
        k: at most as many as there are texts.
        texts: the answer of each, and whether it is right.

    Examples:
        >>> majority_at(3, [("4", True), ("4", True), ("5", False)])
        1.0
        >>> majority_at(2, [("4", True), ("4", True), ("5", False)])  # 4 4, or twice 4 5
        0.6666666666666666
    """
    chosen: Iterable[Sequence[int]] = combinations(range(len(texts)), k)
    if comb(len(texts), k) > _SUBSETS:
        rng = np.random.default_rng(0)
        chosen = [rng.choice(len(texts), k, replace=False).tolist() for _ in range(_SUBSETS)]
    found = []
    for places in chosen:
        votes: dict[str, list[bool]] = {}
        for place in places:
            answer, right = texts[place]
            votes.setdefault(answer, []).append(right)
        most = max(map(len, votes.values()))
        found.append(np.mean([np.mean(each) for each in votes.values() if len(each) == most]))
    return float(np.mean(found))


def variety_of(texts: list[list[list[int]]]) -> dict[str, float]:
    """How much sampled texts differ; each pass has one after each prompt."""
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


def _row(place: int | None, episode: Episode, by: str | None) -> Row:
    metadata = episode.rollout.metadata
    if by is not None and by not in metadata:
        has = ", ".join(sorted(map(str, metadata))) or "none"
        raise ConfigError(f"prompt {episode.prompt_index} has no {by!r} to group by (--by), but {has}")
    row = {
        "prompt_index": episode.prompt_index,
        "prompt": episode.rollout.asked,
        "sample": place,
        "text": episode.text,
        "end": str(episode.end),
        "score": episode.total,
        "parts": dict(episode.score.parts),
        "tokens": episode.rollout.tokens.tolist(),
    }
    group = by or (PART if PART in metadata else None)
    return row if group is None else row | {"group": str(metadata[group])}
