"""Pairs of texts of which one is preferred: how they are read, what is left out, and what a set of them is like."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rewards.reward_model import Asked

TIE = "equal"
"""Under this name a row has two texts of which whoever compared them found neither better."""

_SPEAKER = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


class TieError(ValueError):
    """A row that says that neither of two texts is better."""


class UnlikeConversationsError(ValueError):
    """Two conversations that are not alike up to one last answer."""


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt.

    Attributes:
        prompt: a text, or chat messages.
        chosen: the answer that is preferred.
        rejected: the other one.
        margin: by how much, where that is known.

    Examples:
        >>> Pair("1+1=", chosen="2", rejected="3").margin
        0.0
    """

    prompt: Asked
    chosen: str
    rejected: str
    margin: float = 0.0

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Pair:
        """A pair from a row of a data set.

        It has "chosen" and "rejected", and mostly a "prompt": texts, or lists of chat messages. Without a prompt, it is
        what the two lists of messages begin with alike, or what two transcripts in the manner of HH ("\\n\\nHuman: ...
        \\n\\nAssistant: ...") do.

        Examples:
            >>> hi = "\\n\\nHuman: Hi\\n\\nAssistant:"
            >>> Pair.of({"chosen": f"{hi} Hello!", "rejected": f"{hi} No."})
            Pair(prompt=[{'role': 'user', 'content': 'Hi'}], chosen='Hello!', rejected='No.', margin=0.0)
        """
        if TIE in row:
            raise TieError("neither of these texts is better: there is no chosen one")
        for name in ("chosen", "rejected"):
            if not isinstance(row.get(name), str | list):
                raise ValueError(f"expected a text or chat messages under {name!r}, got {row.get(name)!r:.80}")
        prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
        if prompt is None and isinstance(chosen, str) and isinstance(rejected, str):
            chosen, rejected = _messages(chosen), _messages(rejected)
        if not isinstance(prompt, str) or isinstance(chosen, list) or isinstance(rejected, list):
            prompt, chosen, rejected = _conversation(prompt, chosen, rejected)
        margin = row.get("margin", 0.0)
        if not isinstance(margin, int | float) or not math.isfinite(margin):
            raise ValueError(f"expected a number under 'margin', got {margin!r}")
        return cls(prompt, chosen, rejected, float(margin))


@dataclass
class Pairs:
    """A set of pairs that can be learned from.

    Attributes:
        pairs: those that are left.
        left_out: how many are not, by the reason.

    Examples:
        >>> len(Pairs.of([Pair("1+1=", "2", "3"), Pair("1+1=", "2", "3")]))
        1
    """

    pairs: list[Pair]
    left_out: Counter[str] = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.pairs)

    @classmethod
    def of(cls, pairs: Iterable[Pair]) -> Pairs:
        """Leave out what teaches nothing: empty or equal answers, repetitions, and pairs that contradict each other.

        Examples:
            >>> Pairs.of([Pair("?", "a", "b"), Pair("?", "a", "b"), Pair("!", "c", "c")]).left_out
            Counter({'repeated': 1, 'equal answers': 1})
        """
        left_out: Counter[str] = Counter()
        distinct: dict[str, Pair] = {}
        for pair in pairs:
            if not pair.chosen.strip() or not pair.rejected.strip():
                left_out["an empty answer"] += 1
            elif pair.chosen == pair.rejected:
                left_out["equal answers"] += 1
            elif _key(pair.prompt, pair.chosen, pair.rejected) in distinct:
                left_out["repeated"] += 1
            else:
                distinct[_key(pair.prompt, pair.chosen, pair.rejected)] = pair
        kept = [pair for pair in distinct.values() if _key(pair.prompt, pair.rejected, pair.chosen) not in distinct]
        if contradicting := len(distinct) - len(kept):
            left_out["contradicted by another"] = contradicting
        return cls(kept, left_out)

    def longer_chosen(self) -> tuple[float, float]:
        """The share of the pairs whose longer answer is the chosen one, and half of its 95% interval."""
        longer = [
            len(pair.chosen) > len(pair.rejected) for pair in self.pairs if len(pair.chosen) != len(pair.rejected)
        ]
        share = sum(longer) / len(longer) if longer else 0.5
        return share, 1.96 * math.sqrt(share * (1 - share) / max(1, len(longer)))

    def warnings(self) -> list[str]:
        """What is wrong with the set as a whole, in words."""
        found = []
        share, half = self.longer_chosen()
        if abs(share - 0.5) > max(0.1, half):
            which = "longer" if share > 0.5 else "shorter"
            found.append(
                f"The {which} answer is the preferred one in {max(share, 1 - share):.0%} of the pairs: a reward model "
                f"can be right as often by length alone, and a policy will write {which} texts to please it."
            )
        if many := self.left_out["contradicted by another"]:
            found.append(f"{many} pairs contradict each other and are left out: whoever labelled them does not agree.")
        return found

    def split(self, held_out: float, seed: int) -> tuple[list[Pair], list[Pair]]:
        """Those to train on and those held out. Pairs of one prompt stay together.

        Examples:
            >>> train, test = Pairs([Pair(str(n // 2), "a", "b") for n in range(20)]).split(0.2, seed=0)
            >>> len(train), len(test), {pair.prompt for pair in train} & {pair.prompt for pair in test}
            (16, 4, set())
        """
        import random

        by_prompt: dict[str, list[Pair]] = {}
        for pair in self.pairs:
            by_prompt.setdefault(_key(pair.prompt), []).append(pair)
        groups = list(by_prompt.values())
        random.Random(seed).shuffle(groups)
        test: list[Pair] = []
        while groups and len(test) < round(held_out * len(self.pairs)):
            test += groups.pop()
        return [pair for group in groups for pair in group], test


def folds_of(pairs: Sequence[Pair], count: int) -> list[list[Pair]]:
    """Disjoint parts of about the same size; pairs of one prompt stay together.

    Examples:
        >>> [len(fold) for fold in folds_of([Pair(str(n), "a", "b") for n in range(5)], 2)]
        [3, 2]
    """
    places: dict[str, int] = {}
    folds: list[list[Pair]] = [[] for _ in range(count)]
    for pair in pairs:
        fold = places.setdefault(_key(pair.prompt), len(places) % count)
        folds[fold].append(pair)
    return folds


def read_pairs(source: str | Path | Iterable[Mapping[str, Any]]) -> Pairs:
    """Pairs from a JSONL file (by its path) or from any iterable of rows, a Hugging Face data set included.

    Examples:
        >>> read_pairs([{"prompt": "1+1=", "chosen": "2", "rejected": "3"}]).pairs
        [Pair(prompt='1+1=', chosen='2', rejected='3', margin=0.0)]
    """
    if isinstance(source, str | Path):
        if not Path(source).is_file():
            raise FileNotFoundError(f"there is no file {source}: expected a JSONL file, a pair on each line")
        with open(source, encoding="utf-8") as file:
            lines = [(number, line) for number, line in enumerate(file, start=1) if line.strip()]
        parsed = [_parsed(source, number, line) for number, line in lines]
    else:
        parsed = [_of_row(row) for row in source]
    found = Pairs.of(pair for pair in parsed if isinstance(pair, Pair))
    found.left_out.update(reason for reason in parsed if isinstance(reason, str))
    if not found.pairs:
        why = ", ".join(f"{count} for {reason}" for reason, count in found.left_out.items())
        raise ValueError(f"{source!s:.80} has no pairs to learn from" + (f"; left out: {why}" if why else ""))
    return found


def _of_row(row: Mapping[str, Any]) -> Pair | str:
    """A pair, or why there is none."""
    try:
        return Pair.of(row)
    except TieError:
        return "neither is better"
    except UnlikeConversationsError:
        return "not alike up to one last answer"


def _parsed(source: str | Path, number: int, line: str) -> Pair | str:
    try:
        row = json.loads(line)
        if not isinstance(row, dict):
            raise ValueError('expected an object, such as {"prompt": "...", "chosen": "...", "rejected": "..."}')
        return _of_row(row)
    except ValueError as error:
        raise ValueError(f"{source}, line {number}: {error}") from error


def _key(prompt: Asked, *answers: str) -> str:
    return json.dumps([prompt if isinstance(prompt, str) else [dict(message) for message in prompt], *answers])


def _messages(transcript: str) -> list[dict[str, str]]:
    """A transcript in the manner of HH as chat messages."""
    before, *parts = _SPEAKER.split(transcript)
    if before.strip() or not parts:
        raise ValueError(
            'expected a \'prompt\', or transcripts that begin with a line "Human: ..." or "Assistant: ..." after an '
            f"empty one, got {transcript[:60]!r}"
        )
    messages: list[dict[str, str]] = []
    for who, what in zip(parts[::2], parts[1::2], strict=True):
        if messages and messages[-1]["role"] == _ROLES[who]:  # as HH has it here and there, in the middle of an answer
            messages[-1]["content"] += f"\n\n{what.strip()}"
        else:
            messages.append({"role": _ROLES[who], "content": what.strip()})
    return messages


def _conversation(prompt: Any, chosen: Any, rejected: Any) -> tuple[list[Any], str, str]:
    """The prompt and the two answers, of which at least one is a list of messages."""
    both = [[{"role": "assistant", "content": one}] if isinstance(one, str) else one for one in (chosen, rejected)]
    for one in both:
        if not all(isinstance(message, Mapping) and {"role", "content"} <= message.keys() for message in one):
            raise ValueError(f"expected chat messages with a role and a content, got {one!r:.80}")
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt or ())
    if prompt is None:
        while both[0] and both[1] and both[0][0] == both[1][0]:
            asked.append(both[0].pop(0))
            both[1].pop(0)
    if not asked or any(len(one) != 1 or one[0]["role"] != "assistant" for one in both):
        raise UnlikeConversationsError(
            "expected two conversations that are alike up to one last answer of the assistant; after what is alike "
            f"there are {[[message['role'] for message in one] for one in both]}"
        )
    return asked, str(both[0][0]["content"]), str(both[1][0]["content"])
