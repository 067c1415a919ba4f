"""Pairs: the forms they come in, what is left out, and what is said about a set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from agents.preferences.pairs import Pair, Pairs, folds_of, read_pairs

USER = {"role": "user", "content": "Hi"}
SAID = {"role": "assistant", "content": "Yes?"}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "Hi", "chosen": "a", "rejected": "b"}, "Hi"),
        ({"prompt": "Hi", "chosen": [assistant("a")], "rejected": [assistant("b")]}, [USER]),
        ({"prompt": [USER], "chosen": [assistant("a")], "rejected": [assistant("b")]}, [USER]),
        ({"prompt": [USER, SAID, USER], "chosen": "a", "rejected": "b"}, [USER, SAID, USER]),
        ({"chosen": [USER, assistant("a")], "rejected": [USER, assistant("b")]}, [USER]),
        ({"chosen": "\n\nHuman: Hi\n\nAssistant: a", "rejected": "\n\nHuman: Hi\n\nAssistant: b"}, [USER]),
    ],
)
def test_all_forms(row: dict[str, Any], prompt: Any) -> None:
    assert Pair.of(row) == Pair(prompt, "a", "b")


def test_an_answer_of_two_turns_is_one_answer() -> None:
    hi = "\n\nHuman: Hi\n\nAssistant: "
    pair = Pair.of({"chosen": f"{hi}a\n\nAssistant: and more", "rejected": f"{hi}b"})
    assert pair == Pair([USER], "a\n\nand more", "b")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "Hi", "chosen": "a"}, "expected a text or chat messages under 'rejected', got None"),
        ({"prompt": "Hi", "chosen": 3, "rejected": "b"}, "under 'chosen', got 3"),
        ({"chosen": "a", "rejected": "b"}, "expected a 'prompt', or transcripts"),
        ({"chosen": [USER, SAID], "rejected": [USER, USER, SAID]}, "alike up to one last answer"),
        ({"chosen": [USER, SAID], "rejected": [USER]}, "alike up to one last answer"),
        ({"prompt": "Hi", "chosen": [{"role": "assistant"}], "rejected": "b"}, "a role and a content"),
        ({"prompt": "Hi", "chosen": "a", "rejected": "b", "margin": "much"}, "a number under 'margin', got 'much'"),
    ],
)
def test_what_is_no_pair(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pair.of(row)


def test_a_file(tmp_path: Path) -> None:
    rows = [
        {"prompt": "1", "chosen": "aa", "rejected": "bb"},
        {"prompt": "1", "chosen": "aa", "rejected": "bb"},
        {"prompt": "2", "chosen": "a", "rejected": "b"},
        {"prompt": "2", "chosen": "b", "rejected": "a"},
        {"prompt": "3", "chosen": " ", "rejected": "a"},
        {"prompt": "4", "chosen": "a", "rejected": "a"},
        {"chosen": [USER, SAID], "rejected": [USER]},
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    pairs = read_pairs(path)
    assert pairs.pairs == [Pair("1", "aa", "bb")]
    assert pairs.left_out == {
        "repeated": 1,
        "contradicted by another": 2,
        "an empty answer": 1,
        "equal answers": 1,
        "not alike up to one last answer": 1,
    }
    assert pairs.warnings() == ["2 pairs contradict each other and are left out: whoever labelled them does not agree."]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no pairs to learn from$"),
        ('{"prompt": "1", "chosen": "a", "rejected": "a"}', "no pairs to learn from; left out: 1 for equal answers"),
        ('\n{"prompt": ', "line 2: "),
        ("[]", "line 1: expected an object"),
    ],
)
def test_a_file_of_nothing(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_pairs(path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected a JSONL file, a pair on each line"):
        read_pairs(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    ("longer", "words"), [(90, "longer answer is the preferred one in 90%"), (10, "The shorter"), (55, "")]
)
def test_a_set_that_length_decides(longer: int, words: str) -> None:
    pairs = [Pair(str(n), "aa" if n < longer else "a", "a" if n < longer else "aa") for n in range(100)]
    found = " ".join(Pairs.of(pairs).warnings())
    assert words in found
    assert bool(found) == bool(words)


def test_pairs_of_one_prompt_stay_together() -> None:
    pairs = [Pair(str(n // 3), f"a{n}", "b") for n in range(90)]
    train, test = Pairs(pairs).split(0.2, seed=1)
    folds = [*folds_of(train, 3), test]
    assert sorted(pair.chosen for fold in folds for pair in fold) == sorted(pair.chosen for pair in pairs)
    prompts = [{pair.prompt for pair in fold} for fold in folds]
    assert sum(map(len, prompts)) == len(set().union(*prompts)) == 30
    assert [len(fold) for fold in folds] == [24, 24, 24, 18]
    assert Pairs(pairs).split(0.2, seed=1) == (train, test)
    assert Pairs(pairs).split(0.2, seed=2) != (train, test)
    assert Pairs(pairs).split(0.0, seed=1)[1] == []
