"""Texts that go on with new weights: each is written once, by the policies that its tokens say, and so again."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agents.config import TrainConfig
from agents.config.checks import problems
from agents.report.log import read_metrics
from agents.rollouts.stream import Stream
from agents.rollouts.writers import EngineWriter
from agents.run.training import train
from llm_env.engines import Sampling
from llm_env.engines.transformers import TransformersEngine
from llm_env.engines.writing import FEW_MASKS, _Masks
from llm_env.mdp.core import TokenMDP
from llm_env.models import load_tokenizer
from llm_env.tokens.episode import Episode
from rewards import Rollout
from tests.agents.runs import Config, VowelShare, running, same_metrics, train_until_it_breaks
from tests.agents.small_models import character_model

ROWS = 6


def parts(group: int = 1, seed: int = 0, task: Any = VowelShare, **options: Any) -> tuple[TokenMDP, Any, Stream]:
    mdp = TokenMDP(task(**options), completions_per_prompt=group)
    mdp.sampler.reseed(0)
    model = character_model(spread=0.2, seed=seed)
    engine = TransformersEngine(model, load_tokenizer("tiny"), num_slots=ROWS, context=mdp.context)
    return mdp, engine, Stream(mdp, engine, ROWS, Sampling(seed=5))


def shown(episodes: list[Episode]) -> list[tuple[Any, ...]]:
    return [(each.prompt_index, each.text, each.total, each.log_probs.tolist()) for each in episodes]  # type: ignore[union-attr]


def test_with_the_same_weights_texts_are_those_of_batches() -> None:
    """Only their order is another: what ends first comes first."""
    mdp, engine, stream = parts()
    taken = [stream.take(4, version) for version in range(6)]
    found = [episode for batch in taken for episode in batch]
    mdp, engine, _ = parts()
    indices, groups = mdp.deal(24 + ROWS)
    expected = EngineWriter(mdp, engine).episodes(indices, groups, Sampling(seed=5))
    texts = {(each.prompt_index, each.text, round(each.total, 6)) for each in expected}
    assert {(each.prompt_index, each.text, round(each.total, 6)) for each in found} <= texts
    assert len({each.group for each in found}) == 24  # none twice
    lengths = [each.rollout.num_actions for each in found]
    assert len(set(lengths)) > 2
    assert lengths != [each.rollout.num_actions for each in expected[:24]]
    assert not engine._claimed.any()  # others may have the engine in between


class Slow(VowelShare):
    """Replies come from the background, some of them when others go on already."""

    slow_replies = True
    max_reply_tokens = 8
    changed = False

    def reply(self, rollout: Rollout) -> str | None:
        if rollout.num_actions > 3:
            return None
        time.sleep(0.01 * (rollout.num_actions + ord(rollout.text[0]) % 3))
        return "xy" if self.changed else "ab"


@pytest.mark.parametrize("task", [VowelShare, Slow])
def test_every_token_has_the_log_prob_of_the_weights_that_chose_it(task: Any) -> None:
    """The weights change three times while texts are being written."""
    _, engine, stream = parts(seed=0, task=task)
    found: list[Episode] = []
    for version in range(4):
        engine.load_weights(dict(character_model(spread=0.2, seed=version).named_parameters()), version=version + 7)
        found += stream.take(3, version)
    mixed = [each for each in found if each.versions is not None]
    assert mixed
    engines = [parts(seed=version, task=task)[1] for version in range(4)]
    for each in found:
        versions = np.full(each.rollout.num_actions, each.version) if each.versions is None else each.versions
        acted = each.rollout.is_action
        where = np.arange(len(each.tokens)) if acted is None else np.flatnonzero(acted)
        assert (np.diff(versions) >= 0).all()
        text = np.concatenate([each.rollout.prompt_tokens, each.tokens])
        for place, (token, version) in enumerate(zip(where.tolist(), versions.tolist(), strict=True)):
            (theirs,) = engines[version].log_probs([text[: len(each.rollout.prompt_tokens) + token + 1]])
            assert each.log_probs is not None
            assert each.log_probs[place] == pytest.approx(theirs[-1], abs=1e-4)


@pytest.mark.parametrize("group", [1, 2, 3])
def test_groups_come_whole(group: int) -> None:
    _, _, stream = parts(group)
    found = [stream.take(6, version) for version in range(5)]
    for batch in found:
        groups = [each.group for each in batch]
        assert all(groups.count(each) == group for each in groups)
    everything = [each.group for batch in found for each in batch]
    assert len(set(everything)) == len(everything) // group


@pytest.mark.parametrize("group", [1, 3])
def test_it_goes_on_where_another_was(group: int) -> None:
    """Whatever has ended and was not taken, and whatever has not ended."""
    mdp, _, whole = parts(group)
    expected = [shown(whole.take(3, version)) for version in range(8)]
    for stop in range(1, 7):
        mdp, _, first = parts(group)
        assert [shown(first.take(3, version)) for version in range(stop)] == expected[:stop]
        state = json.loads(json.dumps([first.state_dict(), mdp.sampler.state_dict()]))
        mdp, _, second = parts(group)
        mdp.sampler.load_state_dict(state[1])
        second.load_state_dict(state[0])
        for version in range(stop, 8):
            for one, other in zip(shown(second.take(3, version)), expected[version], strict=True):
                assert one[:3] == other[:3]
                np.testing.assert_allclose(one[3], other[3], atol=1e-5)


def test_a_text_to_which_the_task_now_replies_otherwise_is_begun_anew(caplog: pytest.LogCaptureFixture) -> None:
    mdp, _, first = parts(task=Slow)
    first.take(6, 0)
    first.take(6, 0)
    state = json.loads(json.dumps([first.state_dict(), mdp.sampler.state_dict()]))
    mdp, _, second = parts(task=Slow)
    mdp.sampler.load_state_dict(state[1])
    mdp.task.changed = True  # type: ignore[attr-defined]
    second.load_state_dict(state[0])
    assert "a text is begun anew: the task Slow did not go the same way" in caplog.text
    found = [each for version in range(1, 5) for each in second.take(3, version)]
    assert len({each.group for each in found}) == 12


def test_a_run_learns_and_goes_on_exactly(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = config(iterations=5, rollout__go_on=True, rollout__slots=12, kl__beta=0.1).replace(out=tmp_path / "whole")
    train(told)
    again = told.replace(out=tmp_path / "stopped")
    train_until_it_breaks(again, monkeypatch, iteration=3)
    train(again, resume=True)
    same_metrics(told, again)
    ours = read_metrics(told.out)
    behind = [row["rollout/behind"] for row in ours if "rollout/behind" in row]
    assert behind[0] == 0 < max(behind) < 2
    assert all(0 < row["ratio/is_weight"] < 2 for row in ours if "ratio/is_weight" in row)


def test_games_go_on_too(config: Config) -> None:
    told = config(task__name="Nim", task__args={"heaps": 1}, rollout__go_on=True, rollout__slots=5)
    with running(told) as run:
        for _ in range(3):
            run.algorithm.step()
            run.update_engine()
            assert all(np.isfinite(each.total) for each in run.algorithm.batch.episodes)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"workers": 2, "rollout__ahead": 1},
            "and --rollout.ahead is 1, but texts that go on are written with",
        ),
        ({"rollout__over_sample": 2.0}, "leave --rollout.over-sample out"),
        ({"rollout__drop_cut": True}, "leave --rollout.drop-cut out"),
    ],
)
def test_what_contradicts_itself(changes: dict[str, Any], problem: str) -> None:
    assert any(problem in each for each in problems(TrainConfig().replace(rollout__go_on=True, **changes)))


def test_action_masks_of_texts_that_are_gone_are_forgotten() -> None:
    masks, rng = _Masks(1), np.random.default_rng(0)
    for _ in range(4 * FEW_MASKS):
        masks.begin(np.array([0]))
        for _ in range(3):
            masks.note(np.array([0]), rng.random((1, 64)) < 0.5)
        assert len(masks.of(0) or ()) == 3
        assert len(masks._distinct) <= FEW_MASKS + 3


def test_torch_is_left_as_it_was() -> None:
    """Texts have random numbers of their own."""
    _, _, stream = parts()
    before = torch.get_rng_state()
    stream.take(3, 0)
    assert torch.equal(before, torch.get_rng_state())
