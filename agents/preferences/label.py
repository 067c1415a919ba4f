"""Pairs that a person compares: what is left to compare, and what was said, which is written down at once."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from agents.preferences.collect import side_by_side
from agents.preferences.pairs import TIE
from llm_env.files import write_rows

Verdict = Literal["first", "second", "equal"]


class Question(NamedTuple):
    """Two texts after a prompt, of which a person does not know where they come from.

    Attributes:
        prompt: a text, or chat messages.
        first: a text.
        second: the other one.
        better: which of them has the higher score, if they have scores that differ.
    """

    prompt: Any
    first: str
    second: str
    better: Verdict | None


class Labels:
    """Questions, and the file of their answers: a row of a data set of pairs for each, see `read_pairs`.

    Args:
        texts: of a model, several after each prompt; each has a "prompt", a "text" and a "score".
        path: of the answers. Those that are there already are not asked for again.
        seed: of who is compared with whom.

    Examples:
        >>> import tempfile
        >>> texts = [{"prompt": "1+1=", "text": text, "score": float(text == "2")} for text in ("2", "3")]
        >>> labels = Labels(texts, Path(tempfile.mkdtemp()) / "pairs.jsonl")
        >>> question = labels.left()[0]
        >>> labels.answer(question, question.better)
        >>> labels.path.read_text()
        '{"prompt": "1+1=", "chosen": "2", "rejected": "3"}\\n'
        >>> labels.left(), labels.agreement()
        ([], (1, 1))
    """

    def __init__(self, texts: Iterable[Mapping[str, Any]], path: Path, seed: int = 0) -> None:
        self.path = path
        self.rows = _rows_in(path)
        questions = [_question(*both) for both in side_by_side(texts, random.Random(seed))]
        distinct = {_key(*each[:3]): each for each in questions if each.first != each.second}
        self.questions = list(distinct.values())

    def left(self) -> list[Question]:
        """What was not answered."""
        done = {_key(row["prompt"], *_texts_of(row)) for row in self.rows}
        return [question for question in self.questions if _key(*question[:3]) not in done]

    def answer(self, question: Question, verdict: Verdict) -> None:
        """Write an answer down."""
        prompt, first, second, _ = question
        if verdict == "equal":
            row = {"prompt": prompt, TIE: [first, second]}
        else:
            chosen, rejected = (first, second) if verdict == "first" else (second, first)
            row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        self.rows.append(row)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def undo(self) -> Question | None:
        """Take the last answer back, if it was to one of these questions; the question."""
        if not self.rows:
            return None
        last = _key(self.rows[-1]["prompt"], *_texts_of(self.rows[-1]))
        found = next((question for question in self.questions if _key(*question[:3]) == last), None)
        if found is not None:
            self.rows.pop()
            write_rows(self.path, self.rows)
        return found

    def agreement(self) -> tuple[int, int]:
        """How often a verdict was that of the scores, of how many where both have one."""
        by_key = {_key(*question[:3]): question for question in self.questions}
        both = right = 0
        for row in self.rows:
            question = by_key.get(_key(row["prompt"], *_texts_of(row)))
            if question is None or question.better is None or TIE in row:
                continue
            both += 1
            right += row["chosen"] == (question.first if question.better == "first" else question.second)
        return right, both


def _question(one: Mapping[str, Any], other: Mapping[str, Any]) -> Question:
    better: Verdict | None = None
    if one["score"] != other["score"]:
        better = "first" if one["score"] > other["score"] else "second"
    return Question(one["prompt"], one["text"], other["text"], better)


def _rows_in(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines() if path.is_file() else [], start=1):
        try:
            row = json.loads(line)
            _texts_of(row), row["prompt"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number} is no answer of llm-env label: use another --out") from error
        rows.append(row)
    return rows


def _texts_of(row: Mapping[str, Any]) -> tuple[str, str]:
    first, second = row[TIE] if TIE in row else (row["chosen"], row["rejected"])
    return first, second


def _key(prompt: Any, first: str, second: str) -> str:
    return json.dumps([prompt, *sorted((first, second))])
