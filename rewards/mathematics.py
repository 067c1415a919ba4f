r"""The answer to a mathematical problem, however it is written: `Math`."""

from __future__ import annotations

import importlib.util
import logging
import re
from decimal import Decimal

from rewards.base import Reward
from rewards.isolated import Isolated, IsolationError
from rewards.match import last_number, look_up
from rewards.named import register_reward
from rewards.rollout import Rollout
from rewards.score import Score

logger = logging.getLogger("rewards")

_LONGEST = 1000  # characters; no answer has as many, and a longer text takes the parser minutes
_FORMULA = re.compile(r"[\\^*/+=(){}\[\]|<>]")
_PHRASE = re.compile(r"[A-Za-z][A-Za-z\s.,'-]+")
_LONG_WORD = re.compile(r"(?<![\\A-Za-z])(?!sqrt|arcsin|arccos|arctan)[A-Za-z]{4,}")


def final_answer(text: str) -> str | None:
    r"""What a text gives as its answer: the last \boxed{...}, else the line after the last ####, else the last number.

    Examples:
        >>> final_answer(r"3 of 4, so it is \boxed{\frac{3}{4}}, not 2.")
        '\\frac{3}{4}'
        >>> final_answer("48 / 2 = 24\n#### 24"), final_answer("She has 24 clips left."), final_answer("none")
        ('24', '24', None)
    """
    marked = _marked(text)
    if marked is not None:
        return marked
    number = last_number(text)
    return None if number is None else f"{number:f}"


def _marked(text: str) -> str | None:
    """The answer of a text that says which it is."""
    place = text.rfind(r"\boxed{")
    if place >= 0:
        begin, depth = place + len(r"\boxed{"), 1
        for end in range(begin, len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if not depth:
                return text[begin:end].strip()
        return None  # it was cut off
    _, mark, after = text.rpartition("####")
    return after.strip().split("\n")[0].strip() if mark and after.strip() else None


@register_reward("math")
class Math(Reward):
    r"""1 if the answer that a text gives is equal to the expected one, else 0.

    The answer is the last `\boxed{...}`, or the line after the last `####`, or else the last number of the text; an
    expected answer may be marked in the same ways, or stand alone. Numbers are compared as numbers, so that units make
    no difference ("$1,200.00" is 1200); words as words; and all else by math-verify, for which `1/2`, `0.5` and
    `\frac{1}{2}` are equal, or `(x+1)^2` and `x^2+2x+1`.

    Some formulas keep any verifier busy for ever, such as `9^{9^{9^9}}`. So math-verify works in a process of its own,
    which is killed when an answer takes too long; the answer is wrong then.

    Parts of the score: whether there was an answer ("answered"), and whether verifying it failed ("unverified").

    Args:
        key: where the rollout's metadata has the expected answer.
        timeout: seconds that verifying one answer may take.

    Raises:
        ImportError: if math-verify is not installed.

    Examples:
        >>> math = Math()
        >>> [score] = math([Rollout.of("Half of them: so it is \\boxed{1/2}.", metadata={"answer": "0.5"})])
        >>> score.value, score.parts["answered"]
        (1.0, 1.0)
        >>> math.close()
    """

    def __init__(self, key: str = "answer", timeout: float = 5.0) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise ImportError(
                "Math needs the package math-verify, which is not installed: pip install 'llm-env[tasks]'"
            )
        self.key = key
        self.timeout = timeout
        self._symbolic = Isolated(
            _Symbolic(), timeout, seed=0
        )  # a seed, or it would draw from the program's own numbers

    def score(self, rollout: Rollout) -> Score:
        """Score one rollout."""
        expected = str(look_up(rollout, self.key, self.name)).strip()
        marked = _marked(expected)
        found = final_answer(rollout.text)
        if found is None:
            return Score(0.0, {"answered": 0.0, "unverified": 0.0})
        try:
            equal = self._equal(found, expected if marked is None else marked)
        except IsolationError as error:
            logger.warning(
                "reward %r: the answer %.80r could not be verified, and is wrong: %s", self.name, found, error
            )
            return Score(0.0, {"answered": 1.0, "unverified": 1.0})
        return Score(float(equal), {"answered": 1.0, "unverified": 0.0})

    def close(self) -> None:
        """End the process that verifies; another one starts when there is something to verify."""
        self._symbolic.close()

    def _equal(self, found: str, expected: str) -> bool:
        if found == expected:
            return True
        number, said = _number(expected), _unwrapped(found)
        if number is not None and not _FORMULA.search(said):
            return last_number(said) == number
        if _is_words(found) or _is_words(expected):
            return _plain(found) == _plain(expected)
        if max(len(found), len(expected)) > _LONGEST:
            return False
        return self._symbolic.score(Rollout.of(found, metadata={"expected": expected})).value > 0

    def __repr__(self) -> str:
        return f"Math(key={self.key!r}, timeout={self.timeout})"


class _Symbolic(Reward):
    """Whether the text is equal to metadata["expected"], both formulas; in a process that may be killed."""

    def score(self, rollout: Rollout) -> float:
        from math_verify import parse, verify

        logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that somebody else has to watch the time
        expected, found = (
            parse(rf"\boxed{{{formula}}}", parsing_timeout=None)
            for formula in (rollout.metadata["expected"], rollout.text)
        )
        return float(verify(expected, found, timeout_seconds=None))


def _number(text: str) -> Decimal | None:
    """The number that a text consists of, with its unit; None of a formula, or of a text without one."""
    return None if _FORMULA.search(text) else last_number(text)


def _is_words(text: str) -> bool:
    """Whether it says something in words, which a verifier would take for products of letters: "now" and "won"."""
    bare = _unwrapped(text).strip()
    return bool(_PHRASE.fullmatch(bare) or _LONG_WORD.search(bare))


def _plain(text: str) -> str:
    return " ".join(re.sub(r"[^\w]+", " ", _unwrapped(text)).casefold().split())


def _unwrapped(text: str) -> str:
    r"""Without \text{...} around it."""
    return re.sub(r"\\(?:text|mathrm|textbf|mbox)\s*\{([^{}]*)\}", r" \1 ", text)
