"""ExactMatch, NumericMatch, Format and VaderSentiment."""

import re
import sys
import time
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards import ExactMatch, Format, NumericMatch, Rollout, VaderSentiment
from rewards.match import last_number
from rewards.vader import _analyzer


def value(reward, text, **metadata):
    return reward([Rollout.of(text, metadata=metadata)])[0].value


class TestExactMatch:
    @pytest.mark.parametrize(
        ("options", "text", "answer", "expected"),
        [
            ({}, "42", "42", 1.0),
            ({}, " 42\n", "42", 1.0),
            ({}, "42", 42, 1.0),
            ({}, "the 42", "42", 0.0),
            ({}, "Yes", "yes", 0.0),
            ({"strip": False}, "42 ", "42", 0.0),
            ({"ignore_case": True}, "STRASSE", "straße", 1.0),
        ],
    )
    def test_hand_computed(self, options, text, answer, expected):
        assert value(ExactMatch(**options), text, answer=answer) == expected

    def test_another_key(self):
        assert value(ExactMatch("solution"), "a", solution="a", answer="b") == 1.0

    @pytest.mark.parametrize("reward", [ExactMatch(), NumericMatch()])
    def test_a_missing_key_lists_those_there_are(self, reward):
        with pytest.raises(LookupError, match=r"looks for 'answer'.*keys are: 'solution', 'level'"):
            value(reward, "1", solution="1", level=3)
        with pytest.raises(LookupError, match="keys are: none"):
            value(reward, "1")


class TestNumbers:
    @pytest.mark.parametrize(
        ("text", "number"),
        [
            ("42", "42"),
            ("The answer is 42.", "42"),
            ("first 3, then 4", "4"),
            ("1,234,567.5 in all", "1234567.5"),
            ("1,2,3", "3"),
            ("12,34", "34"),
            ("1234,567", "567"),
            ("-7", "-7"),
            ("−7", "-7"),
            ("x=-7", "-7"),
            ("10-7", "7"),
            ("(10)-7", "7"),
            ("GPT-4", "4"),
            ("+7", "7"),
            ("- 7", "7"),
            (".5", "0.5"),
            ("-.5", "-0.5"),
            ("1.2.3", "3"),
            ("3.14", "3.14"),
            ("6e-3", "0.006"),
            ("1.5E2", "150"),
            ("3/4", "0.75"),
            ("3 / 4", "0.75"),
            ("-3/4", "-0.75"),
            ("6 / 2 = 3", "3"),
            ("$5", "5"),
            ("50%", "50"),
            ("42km", "42"),
            (r"\boxed{42}", "42"),
            ("2024-05-01", "1"),
            ("007", "7"),
        ],
    )
    def test_last_number(self, text, number):
        assert last_number(text) == Decimal(number)

    @pytest.mark.parametrize("text", ["", "none", "1/0", "one half", "-", "²"])
    def test_no_number(self, text):
        assert last_number(text) is None

    @given(st.decimals(allow_nan=False, allow_infinity=False, places=3), st.text("ab ,.", max_size=5))
    def test_reads_what_was_written(self, number, before):
        assert last_number(f"{before} {number:f}") == number
        assert last_number(f"{before} {number:,f} {before}") == number

    @given(st.text(max_size=60))
    def test_any_text_will_do(self, text):
        last_number(text)

    @given(st.text("0123456789,./-+eE ", max_size=60))
    def test_any_soup_of_digits_will_do(self, text):
        last_number(text)

    def test_absurd_numbers_are_read_quickly(self):
        start = time.perf_counter()
        for text in (
            "9" * 20_000,
            "1e999999999",
            "1," * 20_000,
            "1,234" * 20_000,
            "1/" * 20_000,
            "-" * 20_000,
        ):
            last_number(text)
        assert time.perf_counter() - start < 2.0


class TestNumericMatch:
    @pytest.mark.parametrize(
        ("tolerance", "text", "answer", "expected"),
        [
            (1e-6, "so 42.0", "42", 1.0),
            (1e-6, "1,000", 1000, 1.0),
            (1e-6, "0.3333333", "1/3", 1.0),
            (1e-6, "0.333", "1/3", 0.0),
            (1e-6, "no idea", "42", 0.0),
            (1e-6, "12345678901234567890123456789012", "12345678901234567890123456789013", 0.0),
            (1e-6, "-12345678901234567890123456789012", "-12345678901234567890123456789013", 0.0),
            (1e-6, "42", "6 * 7 = 42 #### 42", 1.0),
            (0.3, "1.3", 1.0, 1.0),
            (0.3, "1.30001", 1.0, 0.0),
            (0, "0.1", 0.1, 1.0),
            (0, "0.10000001", 0.1, 0.0),
            (1e-6, "0.0000001", 1e-07, 1.0),
        ],
    )
    def test_hand_computed(self, tolerance, text, answer, expected):
        assert value(NumericMatch(tolerance=tolerance), text, answer=answer) == expected

    @given(st.integers(), st.integers())
    def test_integers_match_only_themselves(self, one, other):
        assert value(NumericMatch(), f"It is {one}.", answer=other) == float(one == other)

    def test_an_answer_that_is_no_number(self):
        with pytest.raises(ValueError, match="'answer' = 'Paris'; expected a number"):
            value(NumericMatch(), "4", answer="Paris")

    def test_wrong_tolerance(self):
        with pytest.raises(ValueError, match="tolerance is -1; expected"):
            NumericMatch(tolerance=-1)


class TestFormat:
    @pytest.mark.parametrize(
        ("pattern", "full", "text", "expected"),
        [
            ("b+", False, "abbc", 1.0),
            ("b+", True, "abbc", 0.0),
            ("b+", True, "bb", 1.0),
            ("b+", True, "bb\n", 0.0),
            ("a.c", False, "a\nc", 0.0),
            ("(?s)a.c", False, "a\nc", 1.0),
        ],
    )
    def test_hand_computed(self, pattern, full, text, expected):
        assert value(Format(pattern, full), text) == expected

    def test_a_bad_pattern_raises_at_construction(self):
        with pytest.raises(re.error, match="unterminated") as error:
            Format("(a")
        assert "Format got '(a'" in error.value.__notes__[0]


class TestVaderSentiment:
    def test_compound_and_range(self):
        # VADER's README: "VADER is smart, handsome, and funny." has compound 0.8316.
        text = "VADER is smart, handsome, and funny."
        assert value(VaderSentiment(-1, 1), text) == pytest.approx(0.8316)
        assert value(VaderSentiment(), text) == pytest.approx((1 + 0.8316) / 2)
        assert value(VaderSentiment(low=0, high=10), text) == pytest.approx(10 * (1 + 0.8316) / 2)
        assert value(VaderSentiment(), "") == 0.5

    def test_wrong_range(self):
        with pytest.raises(ValueError, match="low is 1 and high is 0"):
            VaderSentiment(1, 0)

    def test_without_vader_it_says_what_to_install(self, monkeypatch):
        _analyzer.cache_clear()
        monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
        with pytest.raises(ImportError, match=r"pip install 'llm-env\[tasks\]'"):
            VaderSentiment()
