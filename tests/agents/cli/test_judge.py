"""`llm-env eval`: the numbers of the run's own evaluation, intervals, pass@k by counting."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agents.cli import main
from agents.report.log import read_metrics
from agents.run.evaluate import Evaluator
from agents.run.intervals import mean_with_interval
from agents.run.judge import Judgement, majority_at, pass_at
from agents.run.training import train
from tests.agents.runs import save_small_model, small_config


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    task = {"length": 3, "alphabet": "abcd", "dense": True}
    model = save_small_model(folder / "model", spread=0.1)
    config = small_config(folder / "out", model, iterations=2, seed=3, task__args=task)
    train(config)
    return config.out


def figures(capsys: pytest.CaptureFixture[str], *line: object) -> dict[str, Any]:
    assert main(["eval", *map(str, line), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_runs_own_numbers(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With its task, prompts, temperature and seed, of its best model; and of its last, named by its folder."""
    judged = [row for row in read_metrics(run) if "eval/sampled" in row]
    best = max(judged, key=lambda row: row["eval/sampled"])
    found = figures(capsys, run)
    assert (found["prompts"], found["samples"], found["task"]) == (8, 1, "Copy")
    assert found["sampled"]["mean"] == pytest.approx(best["eval/sampled"], abs=1e-6)
    assert found["greedy"]["mean"] == pytest.approx(best["eval/greedy"], abs=1e-6)
    task = ["--task.name", "Copy", "--task.args", "length", 3, "alphabet", "abcd", "dense", "true"]
    last = figures(capsys, run / "model", *task, "--prompts", 8, "--seed", 3)
    assert last["sampled"]["mean"] == pytest.approx(judged[-1]["eval/sampled"], abs=1e-6)


def test_more_samples_keep_the_first_and_are_written_down(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "texts.jsonl"
    one, three = figures(capsys, run), figures(capsys, run, "--samples", 3, "--out", out, "--right", 0.3)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["sample"] for row in rows] == [0] * 8 + [1] * 8 + [2] * 8 + [None] * 8
    first, second, _, greedy = (rows[place : place + 8] for place in range(0, 32, 8))
    assert np.mean([row["score"] for row in first]) == pytest.approx(one["sampled"]["mean"])
    assert np.mean([row["score"] for row in greedy]) == pytest.approx(three["greedy"]["mean"])
    assert [row["text"] for row in first] != [row["text"] for row in second]
    right = np.array([row["score"] >= 0.3 - 1e-9 for row in rows[:24]]).reshape(3, 8)
    assert three["pass"]["1"] == pytest.approx(right.mean())
    assert three["parts"]["exact"] == pytest.approx(np.mean([row["parts"]["exact"] for row in rows[:24]]))


def test_pass_at_k_by_trying_all_choices() -> None:
    for count, right, k in [(5, 2, 1), (5, 2, 3), (6, 1, 4), (4, 0, 2), (4, 4, 3)]:
        texts = [True] * right + [False] * (count - right)
        chosen = [any(pick) for pick in itertools.combinations(texts, k)]
        assert pass_at(k, count, right) == pytest.approx(np.mean(chosen))


def test_majorities_by_counting_votes() -> None:
    right = ("4", True)
    assert majority_at(1, [right, ("5", False), ("6", False), ("5", False)]) == 0.25
    # Of four: 5 5 wins wherever both are; else all of two or three answers have a vote each.
    # {4 5 6} twice: 1/3. {4 5 5}, {5 6 5}: 0.
    assert majority_at(3, [right, ("5", False), ("6", False), ("5", False)]) == pytest.approx((1 / 3 + 1 / 3) / 4)
    assert majority_at(4, [right, right, ("5", False), ("5", False)]) == 0.5
    many = [right] * 12 + [("5", False)] * 8 + [(str(number), False) for number in range(6, 10)]
    exact = np.mean(
        [
            np.mean([answer == "4" for answer in tied])
            for votes in itertools.combinations([answer for answer, _ in many], 3)
            for tied in [[answer for answer in set(votes) if votes.count(answer) == max(map(votes.count, votes))]]
        ]
    )
    assert majority_at(3, many) == pytest.approx(exact, abs=0.03)  # by 2,000 of 2,024 subsets
    assert majority_at(1, many) == pytest.approx(0.5)


def test_majorities_and_groups_of_a_judgement() -> None:
    def row(prompt: int, text: str, score: float, group: str) -> dict[str, Any]:
        return {"prompt_index": prompt, "sample": 0, "text": text, "score": score, "parts": {}, "group": group}

    rows = [
        *(row(0, text, score, "easy") for text, score in (("so it is 4", 1.0), ("4", 1.0), ("5", 0.0))),
        *(row(1, text, score, "hard") for text, score in (("7", 0.0), ("8", 1.0), ("it is 7.0", 0.0))),
        {**row(0, "5", 0.0, "easy"), "sample": None},
    ]
    found = Judgement(np.array([[1.0, 1.0, 0.0], [0.0, 1.0, 0.0]]), np.zeros(2), rows, 1.0).summary()
    assert found["majority"] == {"2": pytest.approx((2 / 3 + 1 / 3) / 2)}
    assert {name: (of["prompts"], of["mean"]) for name, of in found["groups"].items()} == {
        "easy": (1, pytest.approx(2 / 3)),
        "hard": (1, pytest.approx(1 / 3)),
    }
    different = [row(0, "a", 1.0, "easy"), row(0, "b", 0.0, "easy")]
    assert "majority" not in Judgement(np.ones((1, 2)), np.zeros(1), different, 1.0).summary()


def test_it_goes_on_where_it_was_killed(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Passes that are done are not done again, and the texts are those of an undisturbed evaluation."""
    whole, out = tmp_path / "whole.jsonl", tmp_path / "texts.jsonl"
    undisturbed = figures(capsys, run, "--samples", 3, "--out", whole)
    write, begun = Evaluator.write, []

    def killed(self: Evaluator, *args: Any) -> Any:
        begun.append(args)
        if len(begun) == 3:
            raise KeyboardInterrupt
        return write(self, *args)

    monkeypatch.setattr(Evaluator, "write", killed)
    assert main(["eval", str(run), "--samples", "3", "--out", str(out)]) == 130
    part = tmp_path / "texts.jsonl.part"
    with open(part, "a") as file:
        file.write('{"sample": 2, "torn')
    assert not out.exists()
    assert figures(capsys, run, "--samples", 3, "--out", out) == undisturbed
    assert len(begun) == 3 + 2
    assert out.read_text() == whole.read_text()
    assert not part.exists()

    part.write_text('{"another": "model"}\n' + whole.read_text())  # other settings: nothing of it counts
    assert figures(capsys, run, "--samples", 3, "--out", out) == undisturbed
    assert len(begun) == 3 + 2 + 4


def test_broken_down(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("eval", "tiny", "--task.name", "Mixture", "--task.args", "tasks", "Copy, Reverse", "--prompts", "12")
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["groups"]
    assert sum(of["prompts"] for of in found.values()) == 12
    assert set(found) == {"Copy", "Reverse"}
    assert main(list(words)) == 0
    assert re.search(r"^Reverse +0\.\d+ .* prompts$", capsys.readouterr().out, re.M)
    assert main(["eval", str(run), "--by", "level"]) == 2
    assert "prompt 0 has no 'level' to group by (--by), but answer" in capsys.readouterr().err


def test_an_interval_covers_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        of = mean_with_interval(rng.normal(3.0, 2.0, size=60))
        covered += of["low"] <= 3.0 <= of["high"]
    assert 180 <= covered <= 200


def test_which_rewards_count_as_right() -> None:
    found = Judgement(np.array([[1.0, 0.5], [0.0, 0.5]]), np.zeros(2), [], 1.0)
    assert found.summary()["pass"] == {"1": 0.25, "2": 0.5}
    assert found.summary(right=0.5)["pass"] == {"1": 0.75, "2": 1.0}


def test_against_other_texts(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Against itself a model wins half of the time; against the same texts with worse scores, always."""
    same, worse, other = (tmp_path / f"{name}.jsonl" for name in ("same", "worse", "other"))
    figures(capsys, run, "--samples", 2, "--out", same)
    rows = [json.loads(line) for line in same.read_text().splitlines()]
    worse.write_text("".join(json.dumps(row | {"score": row["score"] - 9}) + "\n" for row in rows))
    other.write_text("".join(json.dumps(row | {"prompt": "another"}) + "\n" for row in rows))
    found = figures(capsys, run, "--samples", 2, "--against", same)
    assert found["against"]["wins"]["mean"] == pytest.approx(0.5)
    assert found["against"]["prompts"] == 8
    assert 0 <= found["self_bleu"] <= 1
    assert 0 < found["distinct_2"] <= 1
    assert main(["eval", str(run), "--against", str(worse)]) == 0
    assert "wins           1.000   1.000 to 1.000   against" in capsys.readouterr().out
    assert main(["eval", str(run), "--against", str(other)]) == 2
    assert "and 'another' for the other: let both write after the same prompts" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("tiny --against no/such.jsonl", "there is no file no/such.jsonl"),
        ("tiny --samples 0", "--samples is 0, expected 1 or more"),
        ("tiny --split dev", "no split 'dev'"),
        ("tiny --task.name Copie", "did you mean 'Copy'"),
        ("no/such/model", "no/such/model"),
    ],
)
def test_mistakes(capsys: pytest.CaptureFixture[str], line: str, message: str) -> None:
    assert main(["eval", *line.split()]) == 2
    assert message in capsys.readouterr().err


def test_a_run_without_a_model(tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text())
    assert main(["eval", str(tmp_path)]) == 2
    assert "holds a run, but no model yet" in capsys.readouterr().err
