"""What a language model thinks of a text: `Judge`, which asks any server that speaks as OpenAI's does."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import sqlite3
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rewards.base import Reward
from rewards.named import register_reward
from rewards.reward_model import Asked
from rewards.rollout import Rollout
from rewards.score import Score

logger = logging.getLogger("rewards")

_FORM = "Think in a sentence or two. Then write on a line of its own: Score: and a number from {low:g} to {high:g}."
_BETTER = "Think in a sentence or two. Then write on a line of its own: Better: A or Better: B, or Better: same."
_SAY_AFTER = 20
_AGAIN = (408, 409, 429, 500, 502, 503, 504)


class JudgeError(RuntimeError):
    """The judge cannot be asked.

    Examples:
        >>> str(JudgeError("no answer"))
        'no answer'
    """


@register_reward("judge")
class Judge(Reward):
    """A language model's mark for a text, by a rubric, as a share of the best mark: from 0 to 1.

    It is asked through `/chat/completions` of any server that speaks as OpenAI's: vLLM's, llama.cpp's, or a company's.
    Answers are kept on disk (`cache`), so that nothing is asked twice. What does not answer in time, or says that it is
    busy, is asked again, each time after twice as long. An answer without a mark is counted (the part "unread"), and
    pays `unread`.

    Args:
        url: of the server, up to and with the version: "http://localhost:8000/v1".
        model: which model of the server.
        rubric: what makes a text good, in words; or a constitution, a principle a line.
        low: the worst mark.
        high: the best mark.
        unread: the score of a text whose mark cannot be read.
        cache: a file for answers; without, they are forgotten with the program.
        workers: questions at once.
        retries: how often to ask again.
        seconds: to wait for an answer.
        max_tokens: of an answer.
        key: the name of the environment variable with the server's key, if it wants one.

    Examples:
        >>> judge = Judge("http://localhost:8000/v1", "some-model", rubric="Is it polite?")
        >>> judge.read("It is rude.\\nScore: 2"), judge.read("It is rude.")
        (0.111..., None)
    """

    alongside = True

    def __init__(
        self,
        url: str,
        model: str,
        *,
        rubric: str = "How good is the answer: is it right, helpful, and clear?",
        low: float = 1.0,
        high: float = 10.0,
        unread: float = 0.0,
        cache: str | None = None,
        workers: int = 8,
        retries: int = 4,
        seconds: float = 60.0,
        max_tokens: int = 256,
        key: str | None = None,
    ) -> None:
        if not re.match(r"https?://", url):
            raise ValueError(f"url must be that of a server, such as http://localhost:8000/v1, got {url!r}")
        if not low < high:
            raise ValueError(f"low must be below high, got {low} and {high}")
        if workers < 1 or retries < 0 or seconds <= 0 or max_tokens < 1:
            raise ValueError(
                f"workers and max_tokens must be at least 1, retries at least 0 and seconds above 0, got {workers}, "
                f"{max_tokens}, {retries} and {seconds}"
            )
        if key is not None and key not in os.environ:
            raise ValueError(f"there is no environment variable {key} with the server's key")
        self.url, self.model, self.rubric = url.rstrip("/"), model, rubric
        self.low, self.high, self.unread = low, high, unread
        self.workers, self.retries, self.seconds, self.max_tokens, self.key = workers, retries, seconds, max_tokens, key
        self.cache = cache
        self._answers = _Answers(cache)
        self._lock = threading.Lock()
        self._read = self._unread = 0

    def __reduce__(self) -> tuple[Any, ...]:
        names = ["rubric", "low", "high", "unread", "cache", "workers", "retries", "seconds", "max_tokens", "key"]
        return _made, (self.url, self.model, {name: getattr(self, name) for name in names})

    def score_batch(self, rollouts: Sequence[Rollout]) -> list[Score]:
        """Several texts at once."""
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(self._score, rollouts))

    def compare(self, asked: Asked, one: str, other: str) -> float:
        """How much better the first of two answers is than the second: 1, 0, or 0.5 where that cannot be said.

        Both orders are asked for, as models prefer what comes first, or last.
        """
        forward, backward = (
            self.preferred(self._ask(self._question(asked, f"Answer A:\n{a}\n\nAnswer B:\n{b}", _BETTER)))
            for a, b in ((one, other), (other, one))
        )
        return (forward + 1 - backward) / 2

    def read(self, answer: str) -> float | None:
        """The mark in an answer, from 0 to 1; None if there is none, or one out of range."""
        found = re.findall(r"[Ss]core\W{0,4}(-?\d+(?:\.\d+)?)", answer)
        if not found or not self.low <= float(found[-1]) <= self.high:
            return None
        return (float(found[-1]) - self.low) / (self.high - self.low)

    def preferred(self, answer: str) -> float:
        """Whether an answer calls A better (1), or B (0), or neither (0.5)."""
        found = re.findall(r"[Bb]etter\W{0,4}(A|B)\b", answer)
        return {"A": 1.0, "B": 0.0}[found[-1]] if found else 0.5

    def close(self) -> None:
        """Close the file of answers."""
        self._answers.close()

    def _score(self, rollout: Rollout) -> Score:
        form = _FORM.format(low=self.low, high=self.high)
        answer = self._ask(self._question(rollout.asked, f"Answer:\n{rollout.text}", form))
        mark = self.read(answer)
        self._note(mark, answer)
        return Score(self.unread if mark is None else mark, {"unread": float(mark is None)})

    def _note(self, mark: float | None, answer: str) -> None:
        """Say so, once, if no answer can be read."""
        with self._lock:
            self._read += mark is not None
            self._unread += mark is None
            if self._unread == _SAY_AFTER and not self._read:
                logger.warning(
                    "None of the first %d answers of the judge %s had a mark that can be read, and each text was paid "
                    "%g: it may be too small a model, or need more max_tokens (now %d). The last one said: %.200r",
                    _SAY_AFTER, self.model, self.unread, self.max_tokens, answer,
                )  # fmt: skip

    def _question(self, asked: Asked, answers: str, form: str) -> list[dict[str, str]]:
        prompt = (
            asked if isinstance(asked, str) else "\n\n".join(f"{each['role']}: {each['content']}" for each in asked)
        )
        return [
            {"role": "system", "content": f"You judge answers.\n\n{self.rubric}\n\n{form}"},
            {"role": "user", "content": f"Prompt:\n{prompt}\n\n{answers}"},
        ]

    def _ask(self, messages: list[dict[str, str]]) -> str:
        body = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": self.max_tokens}
        sent = json.dumps(body, sort_keys=True)
        known = self._answers.get(sent)
        if known is None:
            known = self._answered(sent)
            self._answers.put(sent, known)
        return known

    def _answered(self, body: str) -> str:
        headers = {"Content-Type": "application/json"}
        if self.key is not None:
            headers["Authorization"] = f"Bearer {os.environ[self.key]}"
        request = urllib.request.Request(f"{self.url}/chat/completions", body.encode(), headers)
        for attempt in range(self.retries + 1):
            try:
                with urllib.request.urlopen(request, timeout=self.seconds) as response:
                    return str(json.load(response)["choices"][0]["message"]["content"] or "")
            except urllib.error.HTTPError as error:
                why = f"HTTP {error.code}: {error.read(300).decode(errors='replace')}"
                if error.code not in _AGAIN:
                    break
            except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
                why = f"{type(error).__name__}: {error}"
            if attempt < self.retries:
                time.sleep(min(30.0, 0.5 * 2**attempt))
        raise JudgeError(f"the judge at {self.url} does not answer: {why}")


class _Answers:
    """Answers by what was asked; in a file, if there is one, that several programs may use."""

    def __init__(self, path: str | None) -> None:
        self._lock = threading.Lock()
        self._file = sqlite3.connect(path or ":memory:", check_same_thread=False, timeout=60)
        self._file.execute("create table if not exists answers (asked text primary key, answer text)")

    def get(self, asked: str) -> str | None:
        with self._lock:
            row = self._file.execute("select answer from answers where asked = ?", (_hash(asked),)).fetchone()
        return None if row is None else str(row[0])

    def put(self, asked: str, answer: str) -> None:
        with self._lock, self._file:
            self._file.execute("insert or replace into answers values (?, ?)", (_hash(asked), answer))

    def close(self) -> None:
        with self._lock:
            self._file.close()


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _made(url: str, model: str, given: dict[str, Any]) -> Judge:
    return Judge(url, model, **given)
