"""What a task tells the critic: which states it is asked about, what a batch holds, and what a critic makes of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from agents import TrainConfig, build
from agents.algorithms.scoring import score
from agents.config import ModelConfig
from agents.networks.network import Network
from agents.rollouts.hints import pack_hints
from agents.rollouts.packing import trim
from llm_env import Prompt, TokenMDP
from llm_env.tasks import Task, register_task
from llm_env.tasks.base import TaskError
from llm_env.tokens.episode import Episode
from rewards import Rollout, Score
from tests.agents.small import small_model


def episode(turns: list[str], **facts: Any) -> Episode:
    return Episode(Rollout.of(turns, metadata=facts), Score(0.0), None, None, False, prompt_index=0, group=0)


class Told(Task):
    """Tells how many of the agent's letters there are, how many of the task's, and a number of the prompt's."""

    hint_names = ("own", "replied", "fact")

    def splits(self) -> dict[str, list[Prompt]]:
        return {"train": [Prompt("?")]}

    def score(self, rollout: Rollout) -> float:
        return 0.0

    def hints(self, rollout: Rollout) -> tuple[float, ...]:
        count = rollout.num_actions
        return count, len(rollout.tokens) - count, rollout.metadata["fact"]


def test_each_state_is_as_it_stood_before_the_action_with_the_reply_before_it() -> None:
    data = pack_hints(Told(), [episode(["ab", "xyz", "c"], fact=0.5), episode(["d"], fact=2.0)])
    assert data["hints"].tolist() == [
        [[0, 0, 0.5], [1, 0, 0.5], [2, 3, 0.5]],
        [[0, 0, 2.0], [0, 0, 0.0], [0, 0, 0.0]],  # padding is 0
    ]
    assert data["last_hints"].tolist() == [[3, 3, 0.5], [1, 0, 2.0]]


def test_trim_leaves_the_hints_of_the_last_state_alone() -> None:
    hints = pack_hints(Told(), [episode(["abc"], fact=1.0), episode(["d"], fact=2.0)])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    data = hints.update({"mask": mask, "length": torch.tensor([4, 2]), "tokens": torch.zeros(2, 4)})
    short = trim(data[1:])
    assert short["hints"].tolist() == [[[0, 0, 2.0]]]
    assert short["last_hints"].tolist() == [[1, 0, 2.0]]


@pytest.mark.parametrize("given", [(1.0,), (1.0, 2.0, np.nan), (1.0, 2.0, np.inf), ((1, 2, 3),)])
def test_hints_that_are_not_a_number_each_are_refused(given: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Told, "hints", lambda self, rollout: given)
    with pytest.raises(TaskError, match=r"`hints` of the task Told gave .* expected a finite number for each of its"):
        pack_hints(Told(), [episode(["a"], fact=1.0)])


def test_hints_that_raise_name_the_task_and_the_text() -> None:
    with pytest.raises(TaskError, match=r"`hints` of the task Told raised KeyError: 'fact'.*Rollout") as caught:
        pack_hints(Told(), [episode(["a"])])
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize("critic", ["fitted", "shared", "separate"])
def test_the_critic_reads_its_hints_and_those_of_the_last_state(critic: Any) -> None:
    """A head that looks at nothing but the second hint gives just that, at every step and at the end."""
    network = Network(small_model(), ModelConfig(critic=critic), hints=2)
    with torch.no_grad():
        network.value_head.linear.weight[0, 1] = 1.0
    hints = torch.arange(12.0).view(2, 3, 2)
    data = TensorDict(
        {
            "tokens": torch.ones(2, 5, dtype=torch.long),
            "length": torch.tensor([5, 3]),
            "state_position": torch.arange(3).expand(2, 3) + 1,
            "mask": torch.tensor([[True] * 3, [True, False, False]]),
            "hints": hints,
            "last_hints": torch.tensor([[0.0, 50.0], [0.0, 60.0]]),
        },
        [2],
    )
    for size in (2, 1):  # also in portions, of which each is trimmed
        found = score(network, data.clone(), size=size, actor=False, critic=True, reference=False, keep_graph=False)
        assert found["state_value"][found["mask"]][:, 0].tolist() == [1, 3, 5, 7]
        assert found["last_value"].tolist() == [50, 60]


@register_task
class Lottery(Task):
    """The score is drawn with the prompt, which does not show it: nobody can foresee it who is not told."""

    max_new_tokens = 2
    max_prompt_tokens = 8
    num_train = 512
    num_test = 0
    hint_names = ("prize",)

    def sample(self, rng: Any) -> Prompt:
        word = "".join(rng.choice(list("abcdefgh"), size=6))
        return Prompt(word, {"prize": float(rng.integers(10))})

    def score(self, rollout: Rollout) -> float:
        return float(rollout.metadata["prize"])

    def hints(self, rollout: Rollout) -> tuple[float]:
        return (float(rollout.metadata["prize"]),)


@pytest.mark.parametrize(("hints", "least", "most"), [(True, 0.99, 1.0), (False, -1.0, 0.2)])
def test_a_critic_that_is_told_explains_the_first_batch_already(hints: bool, least: float, most: float) -> None:
    config = TrainConfig(iterations=1).replace(task__name="Lottery", task__args={}, model__hints=hints)
    run = build(config)
    explained = run.algorithm.step()["value/explained_variance"]
    run.close()
    assert least <= explained <= most


def test_who_takes_part_in_what_changes_no_value() -> None:
    """The folds belong to texts, not to places: a batch in another order has the same values."""
    config = TrainConfig(iterations=1).replace(task__name="VowelShare", task__args={}, rollout__batch_size=16)
    found = []
    for order in (torch.arange(16), torch.randperm(16, generator=torch.Generator().manual_seed(0))):
        run = build(config)
        batch = run.algorithm.collector.collect()
        batch.data.update(batch.data[order])
        batch.episodes[:] = [batch.episodes[index] for index in order]
        data = run.algorithm.score(batch)
        found.append(data[order.argsort()])
        run.close()
    for name in ("state_value", "last_value", "advantage", "value_target"):
        real = found[0]["mask"] if found[0][name].ndim > 1 else torch.ones(16, dtype=torch.bool)
        torch.testing.assert_close(found[0][name][real], found[1][name][real], rtol=1e-4, atol=1e-5)


def test_a_network_with_other_hints_than_the_task_is_refused() -> None:
    config = TrainConfig(iterations=1).replace(task__name="Lottery", task__args={})
    run = build(config)
    other = Network(run.network.model, config.model, vocabulary=run.mdp.vocabulary, hints=3)
    with pytest.raises(ValueError, match=r"told 3 numbers about each state, but the task Lottery has the hints"):
        type(run.algorithm)(config, other, run.algorithm.collector)
    run.close()


def test_names_without_hints_and_hints_without_names_are_refused() -> None:
    class Nameless(Told):
        hint_names = ()

    class Silent(Lottery):
        hints = Task.hints

    with pytest.raises(ValueError, match=r"Nameless has hint_names \(\) and a method `hints`: write both"):
        TokenMDP(Nameless())
    with pytest.raises(ValueError, match=r"Silent has hint_names \('prize',\) and no method `hints`: write both"):
        TokenMDP(Silent())
