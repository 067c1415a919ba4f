"""The penalties, by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards import LengthPenalty, MissingEosPenalty, RepetitionPenalty, Rollout


def value(reward, rollout):
    return reward([rollout])[0].value


@pytest.mark.parametrize(("length", "expected"), [(0, 0.0), (4, 0.0), (5, -0.25), (7, -0.75), (8, -1.0), (100, -1.0)])
def test_length_penalty(length, expected):
    assert value(LengthPenalty(free=4, cost=0.25, floor=-1.0), Rollout.of("x" * length)) == expected


def test_length_penalty_counts_what_the_agent_chose():
    assert value(LengthPenalty(free=1, cost=0.5), Rollout.of(["a", "bc", "d"])) == -0.5


@pytest.mark.parametrize(
    ("end", "expected"), [("eos", 0.0), ("stop", 0.0), ("task", 0.0), ("budget", -2.0), ("context", -2.0)]
)
def test_missing_eos_penalty(end, expected):
    assert value(MissingEosPenalty(penalty=2.0), Rollout.of("x", end=end)) == expected


@pytest.mark.parametrize(
    ("text", "ngram", "expected"),
    [
        ("abcd", 1, 0.0),
        ("aaaa", 1, -0.75),  # three of the four came before
        ("aaaa", 2, -2 / 3),  # aa, aa, aa
        ("ababab", 2, -3 / 5),  # ab, ba, ab, ba, ab
        ("abab", 3, 0.0),
        ("ab", 3, 0.0),
        ("", 1, 0.0),
    ],
)
def test_repetition_penalty(text, ngram, expected):
    assert value(RepetitionPenalty(ngram), Rollout.of(text)) == pytest.approx(expected)
    assert value(RepetitionPenalty(ngram, penalty=3.0), Rollout.of(text)) == pytest.approx(3 * expected)


def test_repetition_penalty_looks_at_the_agents_turns_only():
    # The agent wrote aab and then ab; the task, which repeats itself, counts for nothing.
    rollout = Rollout.of(["aab", "abab", "ab"])
    assert value(RepetitionPenalty(ngram=1), rollout) == pytest.approx(-3 / 5)  # a, a, b, a, b
    assert value(RepetitionPenalty(ngram=2), rollout) == pytest.approx(-1 / 3)  # aa, ab, ab: none across a reply
    assert value(RepetitionPenalty(ngram=2), Rollout.of(["xy", "ab", "ab"])) == 0.0  # a tool may be quoted
    by_the_task = Rollout(np.zeros(0, np.int64), np.zeros(5, np.int64), is_action=np.zeros(5, dtype=bool))
    assert value(RepetitionPenalty(ngram=1), by_the_task) == 0.0


@given(st.text("abc", max_size=30), st.integers(1, 4))
def test_repetition_is_one_minus_the_share_of_distinct_ngrams(text, ngram):
    ngrams = [text[start : start + ngram] for start in range(len(text) - ngram + 1)]
    expected = -(1 - len(set(ngrams)) / len(ngrams)) if ngrams else 0.0
    assert value(RepetitionPenalty(ngram), Rollout.of(text)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LengthPenalty(free=-1), "free is -1; expected"),
        (lambda: LengthPenalty(free=1, cost=-0.1), "cost is -0.1; expected"),
        (lambda: LengthPenalty(free=1, floor=1.0), "floor is 1.0; expected a number <= 0"),
        (lambda: MissingEosPenalty(penalty=-1.0), "penalty is -1.0; expected a finite number >= 0"),
        (lambda: RepetitionPenalty(ngram=0), "ngram is 0; expected"),
        (lambda: RepetitionPenalty(penalty=float("inf")), "penalty is inf; expected"),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
