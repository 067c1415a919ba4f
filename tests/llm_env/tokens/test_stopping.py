"""Stop automata against a search in the text."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_env.tokens.stopping import match_strings, match_tokens

pieces = st.lists(st.text("abé", max_size=3).map(str.encode), min_size=1, max_size=5)


@given(
    token_bytes=pieces,
    strings=st.lists(st.text("abé", min_size=1, max_size=4), min_size=1, max_size=3),
    choices=st.lists(st.integers(0, 4), max_size=8),
)
def test_strings_are_found_as_soon_as_they_are_complete(
    token_bytes: list[bytes], strings: list[str], choices: list[int]
) -> None:
    matcher = match_strings(strings, token_bytes)
    state, text = 0, b""
    for choice in choices:
        token = choice % len(token_bytes)
        text += token_bytes[token]
        state = matcher.next_state[state, token]
        assert (state == matcher.found) == any(s.encode() in text for s in strings)


@given(
    sequences=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), min_size=1, max_size=3),
    tokens=st.lists(st.integers(0, 4), max_size=10),
)
def test_sequences_of_ids_are_found_as_soon_as_they_are_complete(sequences: list[list[int]], tokens: list[int]) -> None:
    matcher = match_tokens(sequences, vocab_size=5)
    state, found = 0, False
    for end, token in enumerate(tokens, start=1):
        state = matcher.next_state[state, token]
        found = found or any(tokens[max(0, end - len(s)) : end] == s for s in sequences)
        assert (state == matcher.found) == found


def test_a_table_for_a_large_vocabulary_is_small() -> None:
    matcher = match_strings(["</answer>", "\n\n"], [b"xy"] * 50_000)
    assert matcher.next_state.shape == (len("</answer>") + 2 + 2, 50_000)
    assert matcher.next_state.dtype == np.int16


@pytest.mark.parametrize("strings", ["ab", [""], [3]])
def test_bad_strings(strings: object) -> None:
    with pytest.raises(ValueError, match="must be a list of non-empty strings"):
        match_strings(strings, [b"a"])  # type: ignore[arg-type]


@pytest.mark.parametrize("sequences", [[[]], [[5]], [[-1]]])
def test_bad_sequences(sequences: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="each from 0 to 4"):
        match_tokens(sequences, vocab_size=5)
