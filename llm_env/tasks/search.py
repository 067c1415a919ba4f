"""A search over a few documents, by words: the tool `search`."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

from llm_env.tokens.prompts import read_prompts

_WORD = re.compile(r"\w+")
_SATURATION, _LENGTH = 1.5, 0.75  # of BM25, as most use it


class Search:
    """The document that fits a query best, by BM25: rare words count more, long documents less.

    Args:
        documents: what is searched.

    Examples:
        >>> search = Search(["Paris is in France.", "Rome is in Italy.", "Rome was not built in a day."])
        >>> search("In which country is Rome?")
        'Rome is in Italy.'
    """

    def __init__(self, documents: Sequence[str]) -> None:
        if not documents:
            raise ValueError("there are no documents to search: expected at least one")
        self.documents = list(documents)
        self._counts = [Counter(_words(text)) for text in self.documents]
        self._lengths = [counts.total() for counts in self._counts]
        self._mean = max(1.0, sum(self._lengths) / len(self._lengths))
        found_in = Counter(word for counts in self._counts for word in counts)
        total = len(self.documents)
        self._rarity = {word: math.log(1 + (total - n + 0.5) / (n + 0.5)) for word, n in found_in.items()}

    @classmethod
    def of_file(cls, path: str) -> Search:
        """Search a JSONL file: each line a string, or an object with a "text"."""
        return cls([str(row.text) for row in read_prompts(path, "text")])

    def __call__(self, query: str) -> str:
        """The best document; a ValueError if none has any of the words."""
        words = _words(query)
        scores = [self._score(number, words) for number in range(len(self.documents))]
        best = max(range(len(scores)), key=scores.__getitem__)
        if scores[best] <= 0:
            raise ValueError("nothing found; use other words")
        return self.documents[best]

    def _score(self, number: int, words: Sequence[str]) -> float:
        counts = self._counts[number]
        norm = _SATURATION * (1 - _LENGTH + _LENGTH * self._lengths[number] / self._mean)
        return sum(
            self._rarity[word] * counts[word] * (_SATURATION + 1) / (counts[word] + norm)
            for word in words
            if word in counts
        )


def _words(text: str) -> list[str]:
    return [word.casefold() for word in _WORD.findall(text)]
