"""What the collector does with episodes, whoever writes them: over-sampling, filters, groups."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from agents.rollouts.collector import MAX_ROUNDS, Collector, not_cut, not_uniform, part_below
from llm_env.engines import Sampling
from llm_env.mdp.core import TokenMDP
from llm_env.tasks import Task
from llm_env.tokens.episode import Episode
from llm_env.tokens.prompts import Prompt
from rewards import Rollout, Score


class Written:
    """Episodes without a model: each is one token, and its score the number of its round plus its place in it."""

    def __init__(self, group: int = 1, prompts: int = 40) -> None:
        class Many(Task):
            max_new_tokens = 1

            def splits(self) -> dict[str, list[Prompt]]:
                return {"train": [Prompt(str(index)) for index in range(prompts)]}

            def score(self, rollout: Rollout) -> float:
                return 0.0

        self.mdp = TokenMDP(Many(), completions_per_prompt=group)
        self.rounds: list[int] = []
        self.seeds: list[int | None] = []

    def episodes(self, indices: np.ndarray, groups: np.ndarray, sampling: Sampling) -> list[Episode]:
        self.seeds.append(sampling.seed)
        self.rounds.append(len(indices))
        return [
            Episode(
                Rollout(self.mdp.prompts.tokens[index], np.array([3 + place]), end="eos" if place % 2 else "budget"),
                Score(100.0 * len(self.rounds) + place),
                np.zeros(1, np.float32),
                None,
                False,
                int(index),
                int(group),
            )
            for place, (index, group) in enumerate(zip(indices, groups, strict=True))
        ]


def places(data: TensorDict) -> list[int]:
    return [int(total) for total in data["total"]]


def scores_in(wanted: set[int]) -> Any:
    return lambda data: torch.tensor([int(total) % 100 in wanted for total in data["total"]])


def test_over_sampling_keeps_the_first_that_filters_leave() -> None:
    written = Written()
    collector = Collector(written, 4, over_sample=2.0, filters=[not_cut, scores_in({1, 2, 3, 5, 7})])
    batch = collector.collect()
    assert written.rounds == [8]
    assert places(batch.data) == [101, 103, 105, 107]
    assert (batch.written, batch.written_tokens, batch.refilled) == (8, 8, 0)
    assert [int(e.score.total) for e in batch.episodes] == [101, 103, 105, 107]


def test_over_sampling_without_a_filter_wastes_but_works() -> None:
    written = Written()
    batch = Collector(written, 4, over_sample=1.3).collect()
    assert (written.rounds, batch.written, places(batch.data)) == ([6], 6, [100, 101, 102, 103])


def test_more_is_written_until_there_is_enough() -> None:
    written = Written()
    batch = Collector(written, 4, filters=[scores_in({1, 3})]).collect()
    assert written.rounds == [4, 4]
    assert places(batch.data) == [101, 103, 201, 203]
    assert (batch.written, batch.refilled) == (8, 0)
    assert len({*written.seeds}) == 2
    assert sorted(batch.data["prompt_index"].tolist()) != sorted(set(range(4)))


def test_in_the_end_what_was_left_out_fills_the_batch() -> None:
    written = Written()
    batch = Collector(written, 4, filters=[lambda data: data["total"] == 303.0]).collect()
    assert written.rounds == [4] * MAX_ROUNDS
    assert places(batch.data) == [303, 100, 101, 102]
    assert (batch.written, batch.refilled) == (16, 3)


def test_groups_are_kept_whole() -> None:
    written = Written(group=2)
    batch = Collector(written, 4, over_sample=1.75, filters=[scores_in({0, 2, 3, 6, 7})]).collect()
    assert written.rounds == [8]  # seven would split a group
    assert places(batch.data) == [102, 103, 106, 107]  # the second of group 0 was left out, and with it the first
    groups = batch.data["group"].tolist()
    assert groups[0] == groups[1] != groups[2] == groups[3]
    indices = batch.data["prompt_index"].tolist()
    assert indices[0] == indices[1] != indices[2] == indices[3]


def test_groups_are_whole_even_where_they_fill_up() -> None:
    batch = Collector(Written(group=2), 6, filters=[scores_in({0, 2, 3})]).collect()
    assert Counter(Counter(batch.data["group"].tolist()).values()) == {2: 3}


def test_a_filter_must_answer_for_each_episode() -> None:
    for wrong in (lambda data: data["total"], lambda data: torch.ones(3, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"a filter must return a bool for each of 4 episodes, got shape"):
            Collector(Written(), 4, filters=[wrong]).collect()


def test_what_is_refused_is_counted_and_written_again() -> None:
    """Of four a round those at even places are refused: two rounds are written, and their odd ones learned from."""
    collector = Collector(Written(), 4, refuses=lambda episode: int(episode.total) % 2 == 0)
    batch = collector.collect()
    assert places(batch.data) == [101, 103, 201, 203]
    assert (batch.written, batch.refused, batch.refilled) == (8, 4, 0)


def test_parts_of_a_score() -> None:
    def scored(**parts: float) -> Episode:
        return Episode(Rollout.of("a"), Score(1.0, parts), np.zeros(1, np.float32), None, False, 0, 0)

    refuses = part_below("safe", 0.5)
    assert [refuses(scored(safe=value)) for value in (0.4, 0.5, 0.6)] == [True, False, False]
    with pytest.raises(ValueError, match="drop-part is 'safe', but the scores of this task's texts have kind, long"):
        refuses(scored(long=1.0, kind=0.0))


def test_the_filters_that_come_with_it() -> None:
    data = TensorDict(
        {
            "cut": torch.tensor([True, False, False, True, False]),
            "group": torch.tensor([8, -3, 8, -3, 5]),
            "total": torch.tensor([1.0, 2.0, 0.0, 2.0, 1.0]),
        },
        batch_size=[5],
    )
    assert not_cut(data).tolist() == [False, True, True, False, True]
    assert not_uniform(data).tolist() == [True, False, True, False, False]


@pytest.mark.parametrize(
    ("size", "over_sample", "message"),
    [
        (0, 1.0, r"positive multiple of the 2 texts.*got 0"),
        (3, 1.0, r"positive multiple of the 2 texts.*got 3"),
        (4, 0.5, r"over_sample must be at least 1, got 0.5"),
    ],
)
def test_bad_arguments(size: int, over_sample: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Collector(Written(group=2), size, over_sample=over_sample)
