"""The learning suite: its statistics by hand, what its runs measure, and that it never does a thing twice."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agents.algorithms.registry import check_algorithm
from agents.config import TrainConfig
from agents.run.parts import build
from llm_env.mdp.core import TokenMDP

BENCHMARKS = Path(__file__).parents[1] / "examples" / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from learning import report  # noqa: E402
from learning.algorithms import ALGORITHMS, Algorithm, configuration  # noqa: E402
from learning.command import main  # noqa: E402
from learning.jobs import Job, Start  # noqa: E402
from learning.learn import learn, question_ids  # noqa: E402
from learning.regimes import REGIMES, quick  # noqa: E402
from learning.statistics import area, bootstrap, iqm, ratio_of_iqms, reached_at  # noqa: E402
from learning.suite import Suite  # noqa: E402
from learning.tasks import FOLLOWS  # noqa: E402

NEVER = math.inf
REVERSE = REGIMES["reverse"]


# Statistics.


def test_the_interquartile_mean_leaves_out_a_quarter_at_each_end() -> None:
    assert iqm([100, 3, 1, 2, 4]) == 3  # 2, 3 and 4 are left
    assert iqm([8, 7, 6, 5, 40, 3, 2, 1]) == 5.25  # of eight, 3, 5, 6 and 7 are left
    assert iqm([5, 1]) == 3
    assert iqm([[1, 2, 3, 4], [40, 0, 10, 20]]).tolist() == [2.5, 15]


def test_one_seed_of_five_that_never_gets_there_is_left_out_and_two_are_not() -> None:
    assert iqm([NEVER, 3, 1, 2, 4]) == 3
    assert iqm([NEVER, NEVER, 1, 2, 4]) == NEVER


def test_the_bootstrap_interval_is_that_of_all_samples_one_could_draw() -> None:
    values = [0.0, 1.0, 5.0]
    means = sorted(sum(drawn) / 3 for drawn in itertools.product(values, repeat=3))  # 27 of them, equally likely
    assert bootstrap(iqm, values) == (means[0], means[-1])  # 1 of 27 is more than 2.5% at either end
    assert bootstrap(iqm, [2.0, NEVER]) == (2.0, NEVER)
    assert bootstrap(iqm, [7.0]) == (7.0, 7.0)


def test_the_bootstrap_leaves_out_five_in_a_hundred() -> None:
    values = np.arange(100.0)  # 2 in 100 are below 2, 3 in 100 are not above it

    def first(drawn: Any) -> Any:
        return drawn[:, 0]

    assert bootstrap(first, values, resamples=20_000) == (2, 97)
    assert bootstrap(first, values, seed=1, resamples=10) != bootstrap(first, values, seed=2, resamples=10)
    assert bootstrap(first, values, seed=1) == bootstrap(first, values, seed=1)


def test_ratios_and_their_interval() -> None:
    assert ratio_of_iqms([2, 4], [6, 6]) == 0.5
    assert ratio_of_iqms([2, 4], [NEVER, 6]) == 0
    assert math.isnan(ratio_of_iqms([NEVER], [NEVER]))
    # Each sample is drawn from by itself: 1/2 and 3/1 can happen only then.
    assert bootstrap(ratio_of_iqms, [1.0, 3.0], [1.0, 2.0]) == (0.5, 3.0)
    assert all(map(math.isnan, bootstrap(ratio_of_iqms, [1.0, NEVER], [1.0, NEVER])))


def test_where_a_curve_reaches_a_score() -> None:
    xs, scores = [0, 100, 200, 300], [0.2, 0.4, 0.3, 0.8]
    assert reached_at(xs, scores, 0.3) == pytest.approx(50)
    assert reached_at(xs, scores, 0.6) == pytest.approx(260)
    assert reached_at(xs, scores, 0.2) == 0
    assert reached_at(xs, scores, 0.9) == NEVER


def test_the_area_is_that_up_to_the_end_of_the_budget() -> None:
    xs, scores = [0, 100], [0.2, 0.6]
    assert area(xs, scores, 100) == pytest.approx(0.4)
    assert area(xs, scores, 200) == pytest.approx(0.5)  # level after the last point
    assert area(xs, scores, 50) == pytest.approx(0.3)  # the last iteration writes more than it should


# What is learned, and how.


def test_a_chain_is_worth_the_share_that_is_right_at_its_end() -> None:
    mdp = TokenMDP("Chain", num_envs=2)
    mdp.reset(seed=0)
    before = [mdp.episodes.prompt(row).text[-1] for row in range(2)]
    paid = []
    for place in range(64):
        right = [FOLLOWS[letter] for letter in before]
        wrong = next(letter for letter in FOLLOWS if letter != right[1])
        before = [right[0], wrong if place % 4 == 0 else right[1]]
        told = [mdp.task.hints(mdp.episodes.rollout(row)) for row in range(2)]
        assert told == [(place / 64, 1 - place / 64), ((place - (place + 3) // 4) / 64, 1 - place / 64)]
        paid.append(mdp.step([int(mdp.vocabulary.encode(letter)[0]) for letter in before]).tolist())
    assert paid[:-1] == [[0, 0]] * 63
    assert paid[-1] == [1, 0.75]


def test_every_algorithm_can_be_told_every_regime() -> None:
    for regime, algorithm in itertools.product(REGIMES.values(), ALGORITHMS.values()):
        check_algorithm(configuration(regime, algorithm, seed=3, rate=1e-3))
        assert regime.tokens > 0
        assert 0 < regime.threshold < 1


def test_ppo_is_the_default_configuration() -> None:
    config = configuration(REVERSE, ALGORITHMS["ppo"], seed=3)
    assert config == TrainConfig(seed=3).replace(iterations=10**6, log__display=False, **REVERSE.changes)
    assert Job(REVERSE, ALGORITHMS["ppo"], 0).learning_rate == TrainConfig().actor.learning_rate


@pytest.mark.parametrize("name", ["ppo-no-baseline", "reinforce"])
def test_without_a_critic_the_advantage_is_the_return(name: str) -> None:
    config = configuration(quick(REGIMES["dense"]), ALGORITHMS[name], seed=0)
    run = build(config)
    batch = run.algorithm.collector.collect()
    data = run.algorithm.score(batch)
    reward, mask = data["reward" if "reward" in data.keys() else ("next", "reward")], data["mask"]  # noqa: SIM118
    reward = reward.reshape(mask.shape) * mask
    to_come = reward.flip(1).cumsum(1).flip(1)[mask]
    to_come = to_come / to_come.square().mean().sqrt()
    assert to_come.abs().sum() > 0
    np.testing.assert_allclose(data["advantage"][..., 0][mask], to_come, rtol=1e-4, atol=1e-5)
    run.close()


def test_which_algorithms_have_a_critic() -> None:
    assert [name for name, algorithm in ALGORITHMS.items() if algorithm.critic] == ["ppo", "ppo-no-hints", "a2c", "trl"]


def test_trl_runs_where_one_text_gets_one_or_zero() -> None:
    assert [name for name, regime in REGIMES.items() if ALGORITHMS["trl"].can_run(regime)] == [
        "reverse",
        "rare",
    ]


def test_trl_is_given_the_prompts_and_answers_of_the_task() -> None:
    mdp = TokenMDP("Reverse")
    prompts, answers = question_ids(mdp, 3)
    words = [mdp.vocabulary.decode(ids).removeprefix("reverse ").removesuffix(": ") for ids in prompts]
    assert [mdp.vocabulary.decode(ids) for ids in answers] == [word[::-1] for word in words]


class Fake:
    """Writes 30 tokens an iteration, and is as good as it has written."""

    def __init__(self, explained: Sequence[float | None]) -> None:
        self.tokens, self.seconds, self.explained = 0, 0.0, iter(explained)

    def iterate(self) -> float | None:
        self.tokens += 30
        self.seconds += 1.5
        return next(self.explained)

    def judge(self) -> tuple[float, float]:
        return self.tokens / 1000, self.tokens / 500


def test_a_run_is_judged_at_its_start_and_whenever_another_share_is_written() -> None:
    curve = learn(Fake([0.1, 0.3, math.nan, 0.5, None]), tokens=125, points=3)  # a share is 41.7 tokens
    assert [point["tokens"] for point in curve] == [0, 60, 90, 150]
    assert [point["seconds"] for point in curve] == [0, 3, 4.5, 7.5]
    assert [point["sampled"] for point in curve] == [0, 0.06, 0.09, 0.15]
    assert [point["explained_variance"] for point in curve] == [None, pytest.approx(0.2), None, 0.5]


# What a result depends on.


def job(**changes: Any) -> Job:
    return Job(dataclasses.replace(REVERSE, **changes), ALGORITHMS["ppo"], 0)


def test_settings_are_all_that_decides_a_runs_numbers() -> None:
    same = job(what="other words", threshold=0.3)
    assert same.settings == job().settings
    more = {**REVERSE.changes, "sft__steps": 171}
    assert all(other.settings != job().settings for other in (job(tokens=7), job(points=7), job(changes=more)))
    assert job().settings == json.loads(json.dumps(job().settings))


def test_a_start_depends_on_no_algorithm_but_on_the_seed_and_the_warm_start(tmp_path: Path) -> None:
    def path(seed: int = 0, **changes: Any) -> Path:
        return Start(dataclasses.replace(REVERSE, **changes), seed).path(tmp_path)

    assert path() == path(tokens=3, changes={**REVERSE.changes, "loss__clip_high": 0.9})
    assert len({path(), path(1), path(changes={**REVERSE.changes, "sft__steps": 171})}) == 3


def test_trls_results_do_not_depend_on_our_defaults() -> None:
    trl = Job(REVERSE, ALGORITHMS["trl"], 0, 1e-4).settings
    assert not any(name.startswith(("actor.", "critic.", "loss.", "advantage.")) for name in trl)
    assert trl["trl.learning_rate"] == 1e-4
    assert trl["task.args"] == {"length": 6, "alphabet": "abcd", "num_test": 256}


def test_the_learning_rate_is_that_with_the_largest_area(tmp_path: Path) -> None:
    algorithm = dataclasses.replace(ALGORITHMS["grpo"], rates=(1e-4, 3e-4, 1e-3))
    suite = Suite([REVERSE], [algorithm], [0, 1], 100, tmp_path)
    assert suite.runs(REVERSE, algorithm) == []  # before there is anything to choose by
    for each, scores in zip(suite.sweep(REVERSE, algorithm), ([0.1, 0.5], [0.2, 0.6], [0.0, 0.7]), strict=True):
        path = each.path(tmp_path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"settings": each.settings, **a_run(scores, REVERSE.tokens)}))
    assert suite.best_rate(REVERSE, algorithm) == algorithm.rates[1]
    assert [(each.seed, each.rate) for each in suite.runs(REVERSE, algorithm)] == [(0, 3e-4), (1, 3e-4)]
    untuned = ALGORITHMS["ppo"]
    assert suite.sweep(REVERSE, untuned) == []
    assert suite.best_rate(REVERSE, untuned) is None


# The report.


def a_run(scores: Sequence[float], tokens: float = 100, seed: int = 0, explained: float | None = None) -> report.Run:
    """Points at equal distances; a second is ten tokens."""
    at = np.linspace(0, tokens, len(scores)).tolist()
    points = [
        {"tokens": x, "seconds": x / 10, "sampled": y, "greedy": 1.0, "explained_variance": explained if x else None}
        for x, y in zip(at, scores, strict=True)
    ]
    return {"seed": seed, "learning_rate": 3e-4, "points": points}


def figures(**runs: list[report.Run]) -> report.Figures:
    regime = dataclasses.replace(REVERSE, tokens=100, threshold=0.5)
    named = {name.replace("_", "-"): done for name, done in runs.items()}
    found: report.Figures = report.summarize([regime], {"reverse": named})["reverse"]
    return found


def test_the_figures_of_five_seeds() -> None:
    scores = ([0, 0.5, 1.0], [0, 1.0, 1.0], [0, 0.25, 0.5], [0, 0, 0.1], [0, 0, 1.0])  # at 50, 25, 100, never, 75
    ppo = [a_run(of_seed, seed=seed, explained=seed / 10) for seed, of_seed in enumerate(scores)]
    found = figures(ppo=ppo)["algorithms"]["ppo"]
    assert found["reached"] == 4
    assert found["tokens"]["iqm"] == 75  # of 50, 75 and 100
    assert found["seconds"]["iqm"] == 7.5
    assert found["final_sampled"]["iqm"] == pytest.approx(2.5 / 3)  # of 0.5, 1 and 1
    assert found["explained_variance"]["iqm"] == pytest.approx(0.2)
    assert found["tokens"]["low"] <= 75 <= found["tokens"]["high"]
    assert not found["tuned"]


def test_ppo_is_compared_with_the_best_that_has_no_critic_and_with_trl() -> None:
    fast, slow, never = [0, 1.0], [0, 0.5], [0, 0.4]
    found = figures(ppo=[a_run(fast)], grpo=[a_run(slow)], rloo=[a_run(never)], a2c=[a_run(fast)], trl=[a_run(slow)])
    ratios = found["ratios"]
    assert ratios["best_critic_free"] == "grpo"
    assert ratios["tokens_over_best_critic_free"] == {"ratio": 0.5, "low": 0.5, "high": 0.5}
    assert ratios["tokens_over_trl"]["ratio"] == ratios["seconds_over_trl"]["ratio"] == 0.5
    assert "tokens_over_trl" not in figures(ppo=[a_run(fast)])["ratios"]


def test_the_table_says_who_never_got_there() -> None:
    fast, never = [0, 1.0], [0, 0.4]

    def lines(**runs: list[report.Run]) -> str:
        return report.table({"reverse": figures(**runs)})

    assert "only ppo got there" in lines(ppo=[a_run(fast)], grpo=[a_run(never)])
    assert "ppo did not get there" in lines(ppo=[a_run(never)], grpo=[a_run(fast)])
    assert "neither got there" in lines(ppo=[a_run(never)], grpo=[a_run(never)])
    assert "3 of 5" in lines(ppo=[a_run(fast if seed < 3 else never, seed=seed) for seed in range(5)])
    assert "no runs yet" in report.table(report.summarize([REVERSE], {}))


def test_json_has_none_for_what_it_cannot_say() -> None:
    found = report.plain({"a": [NEVER, 1.0], "b": {"c": math.nan}})
    assert found == {"a": [None, 1.0], "b": {"c": None}}


# The whole.

QUICK = ["--quick", "--regimes", "dense", "--algorithms", "ppo", "grpo", "--seeds", "0", "--processes", "1"]


def test_a_run_that_is_there_is_not_done_again_and_none_of_other_settings_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(ALGORITHMS, "grpo", dataclasses.replace(ALGORITHMS["grpo"], rates=(1e-4, 3e-4)))
    call = [*QUICK, "--json", "--out", str(tmp_path)]
    assert main(call) == 0
    first = capsys.readouterr()
    assert "learning rates: 3 of 3 to do" in first.err  # two of grpo, and the run of ppo, which has none to choose
    runs = json.loads(first.out)["regimes"]["dense"]["algorithms"]
    assert set(runs) == {"ppo", "grpo"}
    assert (tmp_path / "suite.png").read_bytes()[:4] == b"\x89PNG"
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("dense/*/*.json")}
    assert len(written) == 4

    assert main(call) == 0
    again = capsys.readouterr()
    assert [line for line in again.err.splitlines() if "to do" in line] == [
        "warm starts: 0 of 2 to do",
        "learning rates: 0 of 3 to do",
        "runs: 0 of 2 to do",
    ]
    assert again.out == first.out
    assert {path: path.stat().st_mtime_ns for path in written} == written

    assert main([*call, "--tokens-scale", "0.5"]) == 2
    assert "suite.tokens is now 25, was 50" in capsys.readouterr().err
    assert main([*call, "--tokens-scale", "0.5", "--redo", "--algorithms", "ppo"]) == 0
    assert len(list(tmp_path.glob("dense/ppo/*.json"))) == 1


def test_learning_rates_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("learning.command.ALGORITHMS", dict(ALGORITHMS))
    monkeypatch.setattr("learning.report.ALGORITHMS", sys.modules["learning.command"].ALGORITHMS)
    assert main([*QUICK, "--out", str(tmp_path), "--algorithms", "ppo", "--rates", "1e-4", "1e-3", "--json"]) == 0
    runs = json.loads(capsys.readouterr().out)["regimes"]["dense"]["algorithms"]
    assert {name: run["learning_rate"] for name, run in runs.items()} == {"ppo-0.0001": 1e-4, "ppo-0.001": 1e-3}


def test_a_run_that_fails_is_told_of_and_the_others_are_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = Algorithm("grpo", "cannot work", {"algo": "grpo"}, rates=(1e-4,))  # one text a prompt
    monkeypatch.setitem(ALGORITHMS, "grpo", broken)
    assert main([*QUICK, "--out", str(tmp_path)]) == 1
    told = capsys.readouterr()
    assert "1 jobs failed" in told.err
    assert "--rollout.completions-per-prompt is 1" in told.err
    assert "ppo" in told.out


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(tmp_path: Path) -> None:
    curves = []
    for processes in ("1", "2"):
        out = tmp_path / processes
        command = [sys.executable, str(BENCHMARKS / "learning" / "run.py"), "--quick", "--out", str(out)]
        done = subprocess.run([*command, "--processes", processes], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        runs = {str(path.relative_to(out)): json.loads(path.read_text()) for path in out.glob("*/*/*.json")}
        assert {(run["processes"], run["threads"]) for run in runs.values()} == {(int(processes), 1)}
        curves.append({name: [(p["tokens"], p["sampled"]) for p in run["points"]] for name, run in runs.items()})
    assert len(curves[0]) == 2 * (2 + 2 + 2)
    assert curves[0] == curves[1]
