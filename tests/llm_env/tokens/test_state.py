"""The transition function against hand-written arrays, and against a slow reference under random use."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import llm_env
from llm_env.tokens.state import BUDGET, CONTEXT, END_OF_CODE, EOS, IDLE, RUNNING, STOP, TASK, TokenState
from llm_env.tokens.stopping import match_strings, match_tokens
from rewards import End, Rollout

LETTERS = [b"", b"a", b"b", b"ab", b"ba", b"c"]  # token 0 is the end of sequence, and the padding too


def labels(state: TokenState) -> list[str]:
    return [END_OF_CODE[code] for code in state.end]


def test_every_code_has_its_end() -> None:
    assert [END_OF_CODE[code] for code in (RUNNING, EOS, STOP, TASK, BUDGET, CONTEXT)] == list(End)
    assert END_OF_CODE[IDLE] is End.RUNNING
    assert llm_env.End is End


@pytest.mark.parametrize("cut_is_final", [False, True])
def test_the_codes_agree_with_their_ends_on_what_is_cut(cut_is_final: bool) -> None:
    codes = [IDLE, RUNNING, EOS, STOP, TASK, BUDGET, CONTEXT]
    state = TokenState(len(codes), context=4, vocab_size=10, cut_is_final=cut_is_final)
    state.end[:] = codes
    ends = [END_OF_CODE[code] for code in codes]
    assert [end.is_cut for end in ends] == [False, False, False, False, False, True, True]
    assert state.running.tolist() == [False, True, False, False, False, False, False]
    assert state.truncated.tolist() == [end.is_cut and not cut_is_final for end in ends]
    finished = [Rollout.of("x", end=end).terminated or (end.is_cut and cut_is_final) for end in ends]
    assert state.terminated.tolist() == finished


def test_steps_of_three_rows_spelled_out() -> None:
    state = TokenState(3, context=5, vocab_size=10, pad_token=9, eos_tokens=[0], budget=3)
    state.reset([0, 1, 2], [[1, 2], [], [4, 4, 4]])
    state.step([5, 6, 7])
    assert state.tokens.tolist() == [[1, 2, 5, 9, 9], [6, 9, 9, 9, 9], [4, 4, 4, 7, 9]]
    assert labels(state) == ["running"] * 3
    state.step([0, 6, 7])
    assert state.tokens.tolist() == [[1, 2, 5, 0, 9], [6, 6, 9, 9, 9], [4, 4, 4, 7, 7]]
    assert labels(state) == ["eos", "running", "context"]
    assert state.terminated.tolist() == [True, False, False]
    assert state.truncated.tolist() == [False, False, True]
    state.step([6], rows=[1])
    assert labels(state) == ["eos", "budget", "context"]
    state.reset([2], [[8]])
    assert state.tokens.tolist() == [[1, 2, 5, 0, 9], [6, 6, 6, 9, 9], [8, 9, 9, 9, 9]]
    assert state.length.tolist() == [4, 3, 1]
    assert state.prompt_length.tolist() == [2, 0, 1]
    assert state.num_actions.tolist() == [2, 3, 0]


def test_the_end_of_sequence_on_the_last_allowed_token_is_a_termination() -> None:
    state = TokenState(2, context=3, vocab_size=10, eos_tokens=[0], budget=1)
    state.reset([0, 1], [[1], [1, 1]])
    state.step([0, 0])
    assert labels(state) == ["eos", "eos"]


def test_padding_may_be_the_end_of_sequence() -> None:
    state = TokenState(1, context=4, vocab_size=10, pad_token=0, eos_tokens=[0])
    state.reset([0], [[0, 0]])  # even in the prompt, where it ends nothing
    assert labels(state) == ["running"]
    state.step([3])
    assert state.length.tolist() == [3]
    state.step([0])
    assert labels(state) == ["eos"]
    assert state.length.tolist() == [4]


def test_a_completion_of_one_token_and_a_prompt_that_fills_the_context() -> None:
    state = TokenState(1, context=3, vocab_size=10)
    state.reset([0], [[1, 2]])
    state.step([3])
    assert labels(state) == ["context"]
    assert state.is_action.tolist() == [[False, False, True]]
    with pytest.raises(
        ValueError, match="3 tokens leaves no room to act in a context of 3: use a context of at least 4"
    ):
        state.reset([0], [[1, 2, 3]])
    assert labels(state) == ["context"]  # a refused reset changes nothing


def test_budgets_may_differ_between_rows() -> None:
    state = TokenState(2, context=9, vocab_size=10, budget=5)
    state.reset([0, 1], [[1], [1]], budgets=[1, 2])
    state.step([2, 2])
    assert labels(state) == ["budget", "running"]


def test_stop_sequences_do_not_see_the_prompt() -> None:
    stop = [match_strings(["ab"], LETTERS), match_tokens([[5, 5]], vocab_size=6)]
    state = TokenState(3, context=9, vocab_size=6, stop=stop)
    state.reset([0, 1, 2], [[1], [5], [3]])  # "a", "c", "ab"
    state.step([2, 5, 1])
    assert labels(state) == ["running"] * 3
    state.step([1, 5, 4])  # written: "b a", "c c", "a ba"
    assert labels(state) == ["running", "stop", "stop"]
    state.step([2], rows=[0])
    assert labels(state) == ["stop", "stop", "stop"]


def test_a_reply_is_appended_and_is_no_action() -> None:
    replies = iter([[7, 8], [], None])
    state = TokenState(1, context=9, vocab_size=10, eos_tokens=[0], budget=9, reply=lambda state, row: next(replies))
    state.reset([0], [[1]])
    state.step([0])
    assert state.tokens[0].tolist() == [1, 0, 7, 8, 0, 0, 0, 0, 0]
    assert state.is_action[0].tolist() == [False, True, False, False, False, False, False, False, False]
    assert labels(state) == ["running"]
    state.step([0])
    assert labels(state) == ["running"]
    state.step([0])
    assert labels(state) == ["eos"]
    assert state.num_actions.tolist() == [3]


def test_a_reply_that_leaves_no_room_truncates() -> None:
    state = TokenState(1, context=4, vocab_size=10, eos_tokens=[0], reply=lambda state, row: [7, 8])
    state.reset([0], [[1]])
    state.step([0])
    assert labels(state) == ["context"]
    assert state.tokens[0].tolist() == [1, 0, 0, 0]
    assert state.length.tolist() == [2]


def test_the_task_may_end_rows_that_run() -> None:
    state = TokenState(2, context=4, vocab_size=10, eos_tokens=[0], over=lambda state, rows: state.length[rows] >= 3)
    state.reset([0, 1], [[1, 1], [1]])
    state.step([5, 5])
    assert labels(state) == ["task", "running"]


def test_bad_input_is_named() -> None:
    state = TokenState(2, context=4, vocab_size=10, eos_tokens=[0])
    with pytest.raises(ValueError, match="row 0 was given action 1, but its episode has not begun: reset it first"):
        state.step([1, 1])
    state.reset([0, 1], [[1], [1]])
    for wrong, message in (
        ([1, 10], "an action has token id 10; this vocabulary has ids 0 to 9"),
        ([-1, 1], "an action has token id -1"),
        ([1], r"expected 2 actions, shape \(2,\), one per row; got shape \(1,\)"),
        ([[1], [1]], r"got shape \(2, 1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            state.step(wrong)
    with pytest.raises(TypeError, match="an action must be integer token ids, got dtype float64"):
        state.step([1.0, 2.0])
    assert state.length.tolist() == [1, 1]  # none of these did anything
    state.step([0, 1])
    with pytest.raises(ValueError, match=r"row 0 was given action 3, but its episode has ended \(eos\)"):
        state.step([3, 3])
    with pytest.raises(ValueError, match="reset of 2 rows needs as many prompts, got 1"):
        state.reset([0, 1], [[1]])
    with pytest.raises(ValueError, match="a prompt has token id 12"):
        state.reset([0], [[12]])
    with pytest.raises(ValueError, match="cannot restore 2 saved rows into 1 rows"):
        state.restore([0], state.save([0, 1]))
    with pytest.raises(ValueError, match="context 4 and 0 stop matchers, this state has 5 and 0"):
        TokenState(1, context=5, vocab_size=10).restore([0], state.save([0]))
    for arguments, message in (
        ({"num_rows": 0, "context": 4, "vocab_size": 3}, "num_rows must be at least 1, got 0"),
        ({"num_rows": 1, "context": 4, "vocab_size": 3, "budget": 0}, "budget must be at least 1 token, got 0"),
        ({"num_rows": 1, "context": 4, "vocab_size": 3, "pad_token": 3}, "ids from 0 to 2, got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            TokenState(**arguments)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), context=st.integers(2, 9), budget=st.integers(1, 9), num_rows=st.integers(1, 4))
def test_random_use_equals_lists(data: st.DataObject, context: int, budget: int, num_rows: int) -> None:
    """Random subsets step, reset, and are saved and restored across rows; each row is a plain list beside it."""
    strings, ids = ["abb", "ca"], [[5, 5], [3]]
    stop = [match_strings(strings, LETTERS), match_tokens(ids, vocab_size=6)]
    state = TokenState(num_rows, context, vocab_size=6, eos_tokens=[0], stop=stop, budget=budget)
    rows: list[dict | None] = [None] * num_rows

    def reason(row: dict) -> str:
        text = b"".join(LETTERS[t] for t in row["chosen"])
        if row["chosen"] and row["chosen"][-1] == 0:
            return "eos"
        if any(s.encode() in text for s in strings) or any(row["chosen"][-len(s) :] == s for s in ids):
            return "stop"
        if len(row["chosen"]) >= budget:
            return "budget"
        return "context" if len(row["prompt"]) + len(row["chosen"]) >= context else "running"

    for _ in range(data.draw(st.integers(1, 12))):
        subset = data.draw(st.lists(st.integers(0, num_rows - 1), unique=True, min_size=1))
        what = data.draw(st.sampled_from(["reset", "step", "step", "step", "copy"]))
        if what == "reset":
            prompts = [data.draw(st.lists(st.integers(0, 5), max_size=context - 1)) for _ in subset]
            state.reset(subset, prompts)
            for row, prompt in zip(subset, prompts, strict=True):
                rows[row] = {"prompt": prompt, "chosen": [], "end": "running"}
        elif what == "copy":
            source = data.draw(st.integers(0, num_rows - 1))
            state.restore(subset, state.save([source]))
            copied = rows[source]
            for row in subset:
                rows[row] = None if copied is None else {**copied, "chosen": list(copied["chosen"])}
        else:
            acting = [row for row in subset if rows[row] and rows[row]["end"] == "running"]
            if not acting:
                continue
            actions = [data.draw(st.integers(0, 5)) for _ in acting]
            state.step(actions, acting)
            for row, action in zip(acting, actions, strict=True):
                rows[row]["chosen"].append(action)
                rows[row]["end"] = reason(rows[row])
        for index, row in enumerate(rows):
            if row is None:
                assert state.end[index] == IDLE
                continue
            tokens = row["prompt"] + row["chosen"]
            assert state.tokens[index].tolist() == tokens + [0] * (context - len(tokens))
            assert state.length[index] == len(tokens)
            assert state.prompt_length[index] == len(row["prompt"])
            assert state.num_actions[index] == len(row["chosen"])
            assert np.flatnonzero(state.is_action[index]).tolist() == list(range(len(row["prompt"]), len(tokens)))
            assert END_OF_CODE[state.end[index]] == row["end"]
