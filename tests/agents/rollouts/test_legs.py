"""Texts that go on in other processes, which keep nothing: what they write, whoever dies on the way."""

from __future__ import annotations

import functools
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agents.config.files import ConfigError
from agents.report.log import read_metrics
from agents.rollouts.stream import Stream
from agents.rollouts.workers import Workers
from agents.rollouts.workers.legs import written_on
from agents.rollouts.workers.shards import Leg, Shard
from agents.rollouts.workers.worker import Scribe
from agents.run.training import train
from llm_env.engines import Job, Sampling
from llm_env.engines.transformers import TransformersEngine
from llm_env.engines.writing import Part
from llm_env.mdp.core import TokenMDP
from llm_env.models import load_tokenizer
from llm_env.tokens.prompts import TokenizedPrompts
from tests.agents.runs import Config, VowelShare, running, same_metrics, train_until_it_breaks
from tests.agents.small_models import character_model

ROWS = 12


def engine(seed: int = 0, rows: int = ROWS) -> TransformersEngine:
    mdp = TokenMDP(VowelShare())
    model = character_model(spread=0.2, seed=seed)
    return TransformersEngine(model, load_tokenizer("tiny"), num_slots=rows, context=mdp.context)


def scribe() -> Scribe:
    made = engine()
    return Scribe(made, VowelShare().bind(made.vocabulary))


def weights(seed: int) -> dict[str, Any]:
    return dict(character_model(spread=0.2, seed=seed).named_parameters())


@pytest.fixture(scope="module", params=[1, 2])
def pool(request: pytest.FixtureRequest) -> Iterator[Workers]:
    made = Workers(functools.partial(scribe), request.param, weights(0), context=engine().context, patience=20.0)
    yield made
    made.close()


def stream(writes: Any, group: int = 1) -> Stream:
    mdp = TokenMDP(VowelShare(), completions_per_prompt=group)
    mdp.sampler.reseed(0)
    return Stream(mdp, writes, ROWS, Sampling(seed=5))


def take(writes: Any, texts: Stream, versions: range) -> list[list[Any]]:
    """Twelve texts with each of several versions of the weights."""
    found = []
    for version in versions:
        writes.load_weights(weights(version), version=version + 7)
        found.append(texts.take(12, version))
    return found


def shown(batches: list[list[Any]]) -> list[list[tuple[Any, ...]]]:
    return [[(each.prompt_index, each.group, each.text, each.total, each.version) for each in of] for of in batches]


@pytest.mark.parametrize("group", [1, 2, 6])
def test_one_process_writes_what_would_be_written_here(pool: Workers, group: int) -> None:
    if pool.count > 1:
        pytest.skip("several end other texts first")
    here = engine()
    ours = take(here, stream(here, group), range(4))
    theirs = take(pool, stream(pool, group), range(4))
    assert shown(theirs) == shown(ours)
    assert any(each.versions is not None for batch in theirs for each in batch)
    for one, other in zip((e for b in ours for e in b), (e for b in theirs for e in b), strict=True):
        np.testing.assert_allclose(one.log_probs, other.log_probs, atol=1e-5)


@pytest.mark.parametrize("group", [1, 3])
def test_texts_come_once_in_whole_groups_by_the_policies_that_they_name(pool: Workers, group: int) -> None:
    found = take(pool, stream(pool, group), range(5))
    for batch in found:
        groups = [each.group for each in batch]
        assert all(groups.count(each) == group for each in groups)
    everything = [each for batch in found for each in batch]
    assert len({each.group for each in everything}) == len(everything) // group
    engines = [engine(seed) for seed in range(5)]
    for each in everything:
        versions = np.full(each.rollout.num_actions, each.version) if each.versions is None else each.versions
        assert (np.diff(versions) >= 0).all()
        text = np.concatenate([each.rollout.prompt_tokens, each.tokens])
        for version in set(versions.tolist()):
            (of,) = engines[version].log_probs([text])
            theirs = of[len(each.rollout.prompt_tokens) - 1 :][versions == version]
            np.testing.assert_allclose(each.log_probs[versions == version], theirs, atol=1e-4)


def test_all_have_their_turn(pool: Workers) -> None:
    """Three groups for two processes: one is asked for two of them, and then the other."""
    texts = stream(pool)
    begun: list[list[int]] = []
    for version in range(4):
        pool.load_weights(weights(version), version=version + 7)
        texts.take(3, version)
        begun.append([len(jobs) for jobs in texts.state_dict()["pen"]["parts"]])
    assert all(all(counts) for counts in begun)


@pytest.mark.parametrize("group", [1, 3])
def test_another_goes_on_with_them(pool: Workers, group: int) -> None:
    expected = shown(take(pool, stream(pool, group), range(5)))
    for stop in (1, 3):
        first = stream(pool, group)
        assert shown(take(pool, first, range(stop))) == expected[:stop]
        state = json.loads(json.dumps([first.state_dict(), first.mdp.sampler.state_dict()]))
        second = stream(pool, group)
        second.mdp.sampler.load_state_dict(state[1])
        second.load_state_dict(state[0])
        assert shown(take(pool, second, range(stop, 5))) == expected[stop:]


def test_who_dies_is_replaced_and_nothing_is_lost(pool: Workers) -> None:
    if pool.count == 1:
        pytest.skip("until another is there, nobody writes: seconds, for the same")
    expected = shown(take(pool, stream(pool), range(4)))
    texts, found, lost = stream(pool), [], pool.lost
    for version in range(4):
        if version in (1, 3):
            process = pool._crew.processes[0]
            assert process is not None
            os.kill(process.link.popen.pid, signal.SIGKILL)  # type: ignore[attr-defined]
        found += take(pool, texts, range(version, version + 1))
    assert shown(found) == expected
    assert pool.lost > lost


def test_what_fails_is_given_up(pool: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written again it would fail again; what had ended before is there all the same."""
    for writes in (pool, engine()):
        texts = stream(writes, 2)
        first = take(writes, texts, range(1))
        score = texts.mdp.score_written
        monkeypatch.setattr(texts.mdp, "score_written", lambda ended, score=score: score(failing(ended)))
        with pytest.raises(RuntimeError, match="in the middle"):
            take(writes, texts, range(1, 2))
        monkeypatch.setattr(texts.mdp, "score_written", score)
        others = take(writes, texts, range(2, 6))
        groups = [each.group for batch in (*first, *others) for each in batch]
        assert all(groups.count(each) == 2 for each in groups)
        lacking = {group for group, of in texts._written.items() if len(of) < 2}
        assert len(lacking) <= ROWS  # none of those that were given up


def failing(ended: Iterator[Any]) -> Iterator[Any]:
    yield next(ended)
    raise RuntimeError("in the middle")


def part(request: int) -> Part:
    return Part(Job(0, request, request), 0, [4], [-1.0], [0], [4])


@pytest.mark.parametrize(
    ("ended", "rest", "allowed"),
    [
        ([1], [2], True),
        ([1, 3], [2, 4], True),
        ([1, 2], [], True),
        ([1], [], False),  # the second is gone
        ([1, 1], [2], False),
        ([1], [1, 2], False),
        ([1], [2, 4], False),  # 3 was to begin before
        ([1], [2, 9], False),
    ],
)
def test_what_can_have_become_of_texts(ended: list[int], rest: list[int], allowed: bool) -> None:
    leg = Leg(rows=4, groups=1, size=1, lacking={}, begun=[part(1), part(2)], called=0)
    assert leg.allows([Job(0, n, n) for n in (3, 4, 5)], ended, [part(n) for n in rest]) == allowed


def test_a_run_learns_from_them(config: Config) -> None:
    told = config(iterations=2, rollout__go_on=True, rollout__slots=12, workers=1)
    train(told)
    rows = read_metrics(told.out)
    assert [row["rollout/lost"] for row in rows[1:]] == [0, 0]
    assert rows[-1]["rollout/behind"] > 0


@pytest.mark.slow
def test_a_run_goes_on_exactly(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = config(iterations=5, rollout__go_on=True, rollout__slots=12, workers=2).replace(out=tmp_path / "whole")
    train(told)
    again = told.replace(out=tmp_path / "stopped")
    train_until_it_breaks(again, monkeypatch, iteration=3)
    train(again, resume=True)
    same_metrics(told, again)


def test_games_do_not_go_from_process_to_process(config: Config) -> None:
    told = config(task__name="Nim", task__args={"heaps": 1}, rollout__go_on=True, workers=1)
    with pytest.raises(ConfigError, match="a text of Nim cannot go on in another process"), running(told):
        pass


def test_what_does_not_go_the_same_way_comes_back() -> None:
    """A text that has met a consonant, and is said to go on."""
    writes, task = engine(), VowelShare()
    task = task.bind(writes.vocabulary)
    prompts = TokenizedPrompts.encode(task.prompts("train"), task.vocabulary)
    (end,), (vowel,) = (writes.vocabulary.encode(letter).tolist() for letter in "ba")
    wrong, right = (
        Part(Job(0, row, row), row, tokens, [-1.0] * len(tokens), [0] * len(tokens), tokens)
        for row, tokens in enumerate(([end, vowel, vowel], [vowel]))
    )
    leg = Leg(rows=2, groups=1, size=1, lacking={}, begun=[wrong, right], called=3)
    shard = Shard(0, 0, 0, [], [], Sampling(seed=1), None, None, leg)
    rest, changed = [], []  # type: ignore[var-annotated]
    (ended,) = written_on(shard, leg, writes, task, prompts, rest, changed)
    assert changed == [wrong]
    assert ended[0].job == right.job
    assert ended[0].actions[0] == vowel
    assert not rest
    assert not writes._claimed.any()
