"""Stop sequences as automata over tokens: one table look-up a step, for any number of sequences and rows.

A stop string may begin inside one token and end inside another ("</answer>" is often three tokens, and the last one
may carry text beyond it). Decoding every row at every step would find it, at a cost that grows with the text.
Instead the strings become one Aho-Corasick automaton over bytes, and since each token is a fixed string of bytes,
that automaton becomes a table `next_state[state, token]`, built once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class StopMatcher:
    """A deterministic automaton over token ids; state 0 is the start and the last state means "found".

    Attributes:
        next_state: `[num_states, vocab_size]`, the state after reading a token.
    """

    next_state: npt.NDArray[np.int16]

    @property
    def found(self) -> int:
        """The state that means that a stop sequence has been written."""
        return len(self.next_state) - 1


def match_strings(strings: Sequence[str], token_bytes: Sequence[bytes]) -> StopMatcher:
    """A matcher that finds any of `strings` in the text of the tokens, also across their borders.

    Args:
        strings: what to look for.
        token_bytes: the text of each token of the vocabulary, as UTF-8 bytes.

    Examples:
        >>> matcher = match_strings(["ab"], [b"a", b"xa", b"bc", b"c"])
        >>> state = matcher.next_state[0, 1]       # "xa": half of it
        >>> bool(matcher.next_state[state, 2] == matcher.found)     # "bc" brings the rest
        True
    """
    if isinstance(strings, str) or not all(isinstance(text, str) and text for text in strings):
        raise ValueError(f"stop strings must be a list of non-empty strings, got {strings!r}")
    return _match([list(text.encode()) for text in strings], [list(text) for text in token_bytes], 256)


def match_tokens(sequences: Sequence[Sequence[int]], vocab_size: int) -> StopMatcher:
    """A matcher that finds any of the given sequences of token ids.

    Examples:
        >>> matcher = match_tokens([[3, 1]], vocab_size=5)
        >>> bool(matcher.next_state[matcher.next_state[0, 3], 1] == matcher.found)
        True
    """
    for sequence in sequences:
        if not len(sequence) or not all(0 <= int(token) < vocab_size for token in sequence):
            raise ValueError(
                f"a stop sequence needs at least one token id, each from 0 to {vocab_size - 1}, got {list(sequence)!r}"
            )
    # All tokens that occur in no sequence behave alike: they share one symbol, the last.
    symbols = {token: symbol for symbol, token in enumerate(sorted({int(t) for s in sequences for t in s}))}
    pieces = [[symbols.get(token, len(symbols))] for token in range(vocab_size)]
    return _match([[symbols[int(t)] for t in s] for s in sequences], pieces, len(symbols) + 1)


def _match(patterns: list[list[int]], pieces: list[list[int]], num_symbols: int) -> StopMatcher:
    """Compile the patterns into an automaton over symbols; run every token's symbols through it from every state."""
    step = _aho_corasick(patterns, num_symbols)
    found = len(step) - 1
    if found > np.iinfo(np.int16).max:
        raise ValueError(f"the stop sequences have {found} positions in all; at most {np.iinfo(np.int16).max} fit")
    lengths = np.array([len(piece) for piece in pieces])
    symbols = np.zeros((len(pieces), lengths.max(initial=0)), dtype=np.int64)
    for token, piece in enumerate(pieces):
        symbols[token, : len(piece)] = piece
    next_state = np.repeat(np.arange(len(step), dtype=np.int16)[:, None], len(pieces), axis=1)
    for position in range(symbols.shape[1]):
        longer = np.flatnonzero(lengths > position)
        next_state[:, longer] = step[next_state[:, longer], symbols[longer, position]]
    return StopMatcher(next_state)


def _aho_corasick(patterns: list[list[int]], num_symbols: int) -> npt.NDArray[np.int16]:
    """`[num_states, num_symbols]` transitions; all accepting states are merged into the last one, which absorbs."""
    children: list[dict[int, int]] = [{}]
    accepting = [False]
    for pattern in patterns:
        node = 0
        for symbol in pattern:
            if symbol not in children[node]:
                children[node][symbol] = len(children)
                children.append({})
                accepting.append(False)
            node = children[node][symbol]
        accepting[node] = True

    step = np.zeros((len(children) + 1, num_symbols), dtype=np.int64)
    failure = [0] * len(children)
    queue = deque([0])
    while queue:
        node = queue.popleft()
        accepting[node] |= accepting[failure[node]]
        if node:
            step[node] = step[failure[node]]
        for symbol, child in children[node].items():
            failure[child] = int(step[node, symbol]) if node else 0
            step[node, symbol] = child
            queue.append(child)
    found = len(children)
    is_accepting = np.array([*accepting, True])
    step[is_accepting] = found
    return np.where(is_accepting[step], found, step).astype(np.int16)
