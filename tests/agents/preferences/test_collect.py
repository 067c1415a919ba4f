"""Pairs from scored texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from agents.cli import main
from agents.preferences.collect import best_of, collect
from agents.preferences.pairs import read_pairs


def texts(scores: dict[str, list[float]]) -> list[dict[str, Any]]:
    return [
        {"prompt": prompt, "text": f"{prompt}{number}:{score}", "score": score}
        for prompt, given in scores.items()
        for number, score in enumerate(given)
    ]


def test_texts_of_one_prompt_are_compared_once() -> None:
    given = texts({"a": [1.0, 2.0, 3.0, 4.0, 5.0], "b": [1.0, 1.0], "c": [1.0]})
    found = collect(given, seed=1)
    assert (len(found.rows), found.ties, found.flipped) == (2, 1, 0)
    used = [row[name] for row in found.rows for name in ("chosen", "rejected")]
    assert len(set(used)) == 4
    assert {row["prompt"] for row in found.rows} == {"a"}
    assert all(float(row["chosen"][3:]) > float(row["rejected"][3:]) for row in found.rows)
    assert collect(given, seed=1) == found


def test_noise_turns_some_round() -> None:
    given = texts({str(n): [0.0, 1.0] for n in range(1000)})
    found = collect(given, noise=0.25)
    wrong = sum(row["chosen"].endswith("0.0") for row in found.rows)
    assert wrong == found.flipped
    assert 200 < wrong < 300


def test_texts_without_scores() -> None:
    with pytest.raises(ValueError, match="text 1 has no score, only prompt, text"):
        collect([{"prompt": "a", "text": "b"}])


def test_the_best_of_each_prompt() -> None:
    given = [
        {"prompt": "a", "text": text, "score": score}
        for text, score in (("x", 0.5), ("y", 1.0), ("y", 1.0), ("z", 1.0), ("w", 0.0))
    ] + [{"prompt": "b", "text": "v", "score": -1.0}]
    assert [(row["prompt"], row["answer"]) for row in best_of(given)] == [("a", "y"), ("b", "v")]
    assert [row["answer"] for row in best_of(given, keep=3)] == ["y", "z", "x", "v"]
    assert [row["answer"] for row in best_of(given, keep=3, at_least=0.5)] == ["y", "z", "x"]
    assert best_of(given, at_least=2.0) == []


def test_rejection_sampling(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = ["--task.name", "Copy", "--task.args", "length", "2", "alphabet", "ab", "dense", "true"]
    texts, best = tmp_path / "texts.jsonl", tmp_path / "best.jsonl"
    assert main(["eval", "tiny", *task, "--split", "train", "--samples", "32", "--out", str(texts)]) == 0
    assert main(["best", "--texts", str(texts), "--out", str(best), "--at-least", "0.3"]) == 0
    assert "llm-env sft --task.name Dataset" in capsys.readouterr().out
    learn = ["--task.name", "Dataset", "--task.args", "train", str(best), "--task.reward", "exact_match"]
    assert main(["sft", *learn, "--sft.steps", "5", "--out", str(tmp_path / "sft")]) == 0
    assert main(["best", "--texts", str(texts), "--out", str(best), "--at-least", "7"]) == 2
    assert "no text with a score of 7.0 or more" in " ".join(capsys.readouterr().err.split())


def test_from_a_model_s_own_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scored, out = tmp_path / "texts.jsonl", tmp_path / "pairs.jsonl"
    task = ["--task.name", "Copy", "--task.args", "length", "3", "alphabet", "ab", "dense", "true"]
    assert main(["eval", "tiny", *task, "--split", "train", "--samples", "8", "--out", str(scored)]) == 0
    assert main(["pairs", "--texts", str(scored), "--out", str(out)]) == 0
    assert "pairs, 0 of them the wrong way round" in capsys.readouterr().out
    pairs = read_pairs(out)
    assert pairs.pairs
    assert all(str(pair.prompt).startswith("copy ") for pair in pairs.pairs)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "gives no pairs (0 of texts of which neither"),
        (
            [{"prompt": "a", "text": "b", "score": 1.0}, {"prompt": "a", "text": "c", "score": 1.0}],
            "(1 of texts of which neither",
        ),
        ([[1]], "line 1: expected an object"),
    ],
)
def test_files_without_pairs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], lines: list[Any], message: str
) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["pairs", "--texts", str(path), "--out", str(tmp_path / "pairs.jsonl")]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "pairs.jsonl").exists()
