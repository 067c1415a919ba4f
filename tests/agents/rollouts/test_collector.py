"""Batches: the two ways to write them give the same, and they go on after a stop."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from agents.networks.network import Network
from agents.rollouts.collector import Collector, not_cut
from agents.rollouts.writers import EngineWriter, PolicyWriter
from agents.run.parts import build
from llm_env import TorchRLTokenEnv
from llm_env.engines import Engine
from llm_env.engines.transformers import TransformersEngine
from llm_env.mdp.core import TokenMDP
from llm_env.models import load_tokenizer
from llm_env.tasks import Task, register_task
from llm_env.tokens.prompts import Prompt
from rewards import Rollout, Score
from tests.agents.runs import character_model, save_small_model, small_config
from tests.agents.stepping import SteppingWriter
from tests.masked import Alternating

PROMPTS = ["a", "of what", "", "the longest of all prompts", "b?"]


class Letters(Task):
    """Prompts of different lengths, among them none at all; every text has a score of its own."""

    max_new_tokens = 6
    max_prompt_tokens = 30

    def splits(self) -> dict[str, list[Prompt]]:
        return {"train": [Prompt(text, {"index": index}) for index, text in enumerate(PROMPTS)]}

    def score(self, rollout: Rollout) -> Score:
        letters = sum(character.isalpha() for character in rollout.text)
        each = 0.125 * np.arange(rollout.num_actions)
        return Score(letters + 0.5 * rollout.metadata["index"], {"letters": letters}, each)


class Stopped(Letters):
    """Ends at many a string, so that random texts meet one."""

    stop = ("a", "e", "o", "th", "\n", "1", "2", "!", "Q", "Z", "x", "ab")


class Valued(Letters):
    """A text that was cut off is not scored."""

    when_cut = "bootstrap"


class Short(Valued):
    """Of few tokens."""

    max_new_tokens = 2


class Talking(Letters):
    """Answers, pays for every other token, and ends some texts by itself."""

    stop = ("e", "a")
    max_new_tokens = 5
    max_reply_tokens = 28

    def reply(self, rollout: Rollout) -> str | None:
        return "(go on)" if rollout.end == "stop" else None

    def token_reward(self, episodes: Any, rows: np.ndarray) -> np.ndarray:
        return 0.25 * (episodes.state.num_actions[rows] % 2)

    def over(self, episodes: Any, rows: np.ndarray) -> np.ndarray:
        last = episodes.state.tokens[rows, episodes.state.length[rows] - 1]
        return np.asarray(last % 7 == 3)


class Chatty(Talking):
    """Says a single letter, or a lot: what is read beside the other texts, and what takes a pass of its own."""

    stop = tuple("abcdefghijklm")
    max_new_tokens = 8

    def reply(self, rollout: Rollout) -> str | None:
        return None if rollout.num_actions > 6 else "?" * (1 + 9 * (rollout.num_actions % 2))


@register_task
class OnlySteps(Task):
    """Ends at its second token."""

    max_new_tokens = 4
    max_prompt_tokens = 8

    def sample(self, rng: np.random.Generator) -> Prompt:
        return Prompt(str(rng.integers(100)))

    def over(self, episodes: Any, rows: np.ndarray) -> np.ndarray:
        return np.asarray(episodes.state.num_actions[rows] >= 2)

    def score(self, rollout: Rollout) -> float:
        return 1.0


@pytest.fixture(scope="module")
def model() -> Any:
    model = character_model(spread=0.3)
    often = load_tokenizer("tiny").convert_tokens_to_ids(["<eos>", "e", "a"])
    with torch.no_grad():  # larger logits of either sign: now and then these are likely
        model.get_input_embeddings().weight[often] *= 3
    return model


def engine_of(model: Any, context: int, slots: int = 4) -> Engine:
    return TransformersEngine(model, load_tokenizer("tiny"), num_slots=slots, context=context)


def both(model: Any, task: Task, context: int | None = None, rows: int = 3, **options: Any) -> list[Collector]:
    """One collector that lets an engine write, and one that steps; fewer rows than episodes."""
    mdp = TokenMDP(task, model=load_tokenizer("tiny"), context=context)
    env = TorchRLTokenEnv(
        task, rows, engine=engine_of(model, mdp.context, rows), observe="logits", context=context, shuffle=True
    )
    ways: list[Any] = [EngineWriter(mdp, engine_of(model, mdp.context + 3)), SteppingWriter(env)]
    return [Collector(way, 10, **options) for way in ways]


@pytest.mark.parametrize(
    ("task", "context", "temperature", "ends"),
    [
        (Letters(), None, 1.0, {"eos", "budget"}),
        (Letters(), None, 0.0, {"budget"}),
        (Letters(), 28, 0.7, {"eos", "budget", "context"}),
        (Stopped(), None, 1.0, {"eos", "stop", "budget"}),
        (Valued(), None, 1.0, {"eos", "budget"}),
        (Short(), 27, 1.3, {"budget", "context"}),
        (Talking(), 44, 1.0, {"eos", "budget", "task", "context"}),
        (Talking(), 44, 0.0, {"budget"}),
        (Chatty(), 90, 1.0, {"stop", "task", "budget"}),
        (Alternating(), None, 1.0, {"eos", "budget"}),
        (Alternating(), None, 0.0, {"budget"}),
    ],
    ids=[
        "eos", "greedy", "context", "stop strings", "bootstrap", "bootstrap at the context", "replies",
        "greedy replies",
        "short and long replies", "masks", "greedy masks",
    ],
)  # fmt: skip
def test_stepping_and_writing_give_the_same_batches(
    model: Any, task: Task, context: int | None, temperature: float, ends: set[str]
) -> None:
    generating, stepping = both(model, task, context, temperature=temperature, seed=5)
    seen: Counter[str] = Counter()
    for _ in range(4):
        one, other = generating.collect(), stepping.collect()
        seen.update(episode.rollout.end for episode in one.episodes)
        assert_same(one.data, other.data)
        assert [e.rollout.end for e in one.episodes] == [e.rollout.end for e in other.episodes]
        assert [e.rollout.text for e in one.episodes] == [e.rollout.text for e in other.episodes]
        assert [e.score.parts for e in one.episodes] == [e.score.parts for e in other.episodes]
        assert (one.written, one.written_tokens) == (10, int(one.data["mask"].sum()))
        assert (other.written, other.written_tokens) == (10, one.written_tokens)
    assert set(seen) >= ends, seen
    for collector in (generating, stepping):  # a text's length, its prompt's and its score are not all the same
        assert len(set(collector.collect().data["length"].tolist())) > 1


def assert_same(one: TensorDict, other: TensorDict, tolerance: float = 1e-5) -> None:
    names = set(one.keys(include_nested=True, leaves_only=True))
    assert names == set(other.keys(include_nested=True, leaves_only=True))
    for name in names:
        if name in ("behaviour_log_prob", "action_log_prob"):
            torch.testing.assert_close(one[name], other[name], atol=tolerance, rtol=0)
        else:
            assert torch.equal(one[name], other[name]), name


def test_what_is_cut_off_is_scored_or_valued_but_never_both(model: Any) -> None:
    for collector in (*both(model, Letters()), *both(model, Valued())):
        data = collector.collect().data
        final = collector.writer.mdp.state.cut_is_final
        cut, truncated = data["cut"], data["next", "truncated"][..., 0].any(1)
        assert cut.any()
        assert truncated.tolist() == (cut.tolist() if not final else [False] * 10)
        assert (data["next", "reward"][..., 0].abs().sum(1) > 0)[truncated].sum() == 0
        assert ((data["total"] == 0) == truncated).all() or final
        assert (data["next", "done"][..., 0].sum(1) == 1).all()
        assert ((data["next", "terminated"] | data["next", "truncated"]) == data["next", "done"]).all()


def test_log_probs_are_those_of_the_network(model: Any) -> None:
    """Under the distribution that was sampled from: of the same temperature, over whole texts at once."""
    network = Network(model, temperature=0.7)
    for collector in both(model, Stopped(), temperature=0.7):
        data = collector.collect().data
        with torch.no_grad():
            ours = network.actor.get_dist(data.clone(False)).log_prob(data["action"])
        torch.testing.assert_close(
            torch.where(data["mask"], ours, 0.0), data["behaviour_log_prob"], atol=1e-5, rtol=1e-5
        )
        assert data["behaviour_log_prob"].std() > 0.5


def test_any_torchrl_policy_can_write(model: Any) -> None:
    network = Network(model)
    torch.manual_seed(0)
    writer = PolicyWriter(TokenMDP(Talking()), network.policy(), 4)  # no engine: the policy reads the tokens itself
    data = Collector(writer, 10).collect().data
    with torch.no_grad():
        ours = network.actor.get_dist(data.clone(False)).log_prob(data["action"])
    torch.testing.assert_close(torch.where(data["mask"], ours, 0.0), data["behaviour_log_prob"], atol=1e-5, rtol=1e-5)
    mask = data["mask"]
    assert (data["tokens"].gather(1, data["action_position"])[mask] == data["action"][mask]).all()
    assert not data["behaviour_log_prob"].requires_grad


def test_a_policy_must_say_how_likely_its_choices_were() -> None:
    def silent(data: Any) -> Any:
        return data.set("action", torch.zeros(len(data), dtype=torch.int64))

    with pytest.raises(KeyError, match="return_log_prob=True"):
        Collector(PolicyWriter(TokenMDP("Copy"), silent, 2), 2).collect()


# Tasks that act while a text is being written.


def test_a_task_may_talk_and_pay_while_a_text_is_written(model: Any) -> None:
    mdp = TokenMDP(Talking(), context=44)
    batch = Collector(EngineWriter(mdp, engine_of(model, 44)), 30, seed=1).collect()
    data, replies = batch.data, 0
    for row, episode in enumerate(batch.episodes):
        rollout, count = episode.rollout, episode.rollout.num_actions
        assert rollout.is_action is not None
        replies += int((~rollout.is_action).any())
        each = 0.125 * np.arange(count) + 0.25 * (np.arange(1, count + 1) % 2)
        each[-1] += episode.score.value
        assert data["next", "reward"][row, :count, 0].numpy() == pytest.approx(each, abs=1e-5)
        assert data["mask"][row].sum() == count
        assert data["tokens"][row, : data["length"][row]].tolist() == [*rollout.prompt_tokens, *rollout.tokens]
    assert replies > 5


@pytest.mark.parametrize("slots", [1, 3, 20])
def test_replies_do_not_depend_on_what_is_written_beside_them(model: Any, slots: int) -> None:
    """Few slots: replies take a pass of their own. Many: they are read a token at a time beside the other texts."""
    expected = Collector(EngineWriter(TokenMDP(Chatty(), context=90), engine_of(model, 90, 7)), 20, seed=2).collect()
    writer = EngineWriter(TokenMDP(Chatty(), context=90), engine_of(model, 90, slots))
    assert_same(expected.data, Collector(writer, 20, seed=2).collect().data)


def test_an_engine_that_is_too_small_is_refused(model: Any) -> None:
    mdp = TokenMDP(Letters())
    with pytest.raises(ValueError, match=r"slots hold 20 tokens, the task's texts may have 36"):
        EngineWriter(mdp, engine_of(model, 20))


def test_a_run_learns_from_a_task_that_ends_its_texts(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = save_small_model(tmp_path_factory.mktemp("model"))
    run = build(small_config(folder, folder, rollout__slots=4, task__name="OnlySteps", task__args={}))
    assert run.evaluator is not None
    metrics = run.algorithm.step()
    assert metrics["text/length"] <= 2
    assert run.evaluator.evaluate().metrics["eval/length"] <= 2
    run.close()


# The same again, and going on.


@pytest.fixture
def fresh(model: Any) -> Any:
    def make(seed: int = 0, slots: int = 4) -> Collector:
        mdp = TokenMDP(Stopped(), completions_per_prompt=2)
        return Collector(
            EngineWriter(mdp, engine_of(model, mdp.context, slots)), 6, seed=seed, over_sample=1.5, filters=[not_cut]
        )

    return make


def first(collector: Collector, count: int) -> list[TensorDict]:
    return [data for data, _ in zip(collector, range(count), strict=False)]


def test_a_collector_goes_on_where_another_was(fresh: Any) -> None:
    whole = fresh()
    batches = [whole.collect().data for _ in range(4)]
    stopped = fresh()
    for _ in range(2):
        stopped.collect()
    other = fresh(seed=0)
    other.collect()  # it may be anywhere
    other.load_state_dict(stopped.state_dict())
    for expected in batches[2:]:
        assert_same(other.collect().data, expected, tolerance=0)


def test_a_seed_decides_everything(fresh: Any) -> None:
    same = [first(fresh(seed), 2) for seed in (3, 3, 4)]
    for one, other in zip(same[0], same[1], strict=True):
        assert_same(one, other, tolerance=0)
    assert not torch.equal(same[0][0]["prompt_index"], same[2][0]["prompt_index"]) or not torch.equal(
        same[0][0]["action"], same[2][0]["action"]
    )
    assert not torch.equal(same[0][0]["action"], same[0][1]["action"])


def test_how_many_texts_are_written_side_by_side_changes_nothing(fresh: Any) -> None:
    for one, other in zip(first(fresh(slots=9), 2), first(fresh(slots=2), 2), strict=True):
        assert_same(one, other)


def test_texts_that_belong_together_differ(fresh: Any) -> None:
    """Two texts after one prompt have random numbers of their own."""
    data = fresh().collect().data
    pairs: Sequence[TensorDict] = [data[row : row + 2] for row in range(0, 6, 2)]
    assert all(len(set(pair["prompt_index"].tolist())) == 1 for pair in pairs)
    assert any(not torch.equal(pair["action"][0], pair["action"][1]) for pair in pairs)


def test_an_episode_is_not_changed_by_packing(fresh: Any) -> None:
    batch = fresh().collect()
    batch.data["next", "reward"] += 1
    batch.data["tokens"] += 1
    again = [dataclasses.replace(episode).rewards for episode in batch.episodes]
    assert [float(rewards.sum()) for rewards in again] == pytest.approx([e.score.total for e in batch.episodes])
