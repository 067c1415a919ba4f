"""Where no text is better than another there is nothing to learn: a policy without advantages stays where it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from agents.config import TrainConfig
from agents.networks.network import Network, ValueHead
from agents.report.display import Display
from agents.run.warm_start import warm_start
from llm_env.tasks import register_task
from rewards import Rollout
from tests.agents.runs import Config, VowelShare, moved, running, weights_of
from tests.agents.small import LORA


@register_task
class Nothing(VowelShare):
    """No text is worth anything, and those that were cut off are valued where they were."""

    def score(self, rollout: Rollout) -> float:
        return 0.0


def probabilities(network: Network, data: Any) -> torch.Tensor:
    """Of every token at every step."""
    states = data.select("tokens", "state_position", "mask")
    with torch.no_grad():
        logits: torch.Tensor = network.actor.get_dist(states).logits
    return logits.softmax(-1)[data["mask"]]


def how_far_it_moves(config: TrainConfig) -> tuple[float, set[str]]:
    """By how much the probability of any token changes in a run, and which parts of the network do."""
    with running(config) as run:
        data = run.algorithm.collector.collect().data
        before, weights = probabilities(run.network, data), weights_of(run)
        assert before.std() > 0.005  # it is not uniform, where a change of the scale would not be seen
        for metrics in run.algorithm:
            assert metrics["reward/mean"] == 0
            run.update_engine()
        return float((probabilities(run.network, data) - before).abs().max()), moved(run, weights)


WAYS: dict[str, dict[str, object]] = {
    "default": {},
    "separate critic": {"model__critic": "separate"},
    "fitted critic": {"model__critic": "fitted"},
    "LoRA": {"model__lora": LORA},
    "LoRA, separate critic": {"model__lora": LORA, "model__critic": "separate"},
    "engine with a copy": {"rollout__engine_dtype": "float32"},
    "discounted": {"advantage__gamma": 0.9, "advantage__actor_lambda": 0.9, "advantage__critic_lambda": 0.8},
    "sequence, not normalized": {"advantage__kind": "sequence", "advantage__normalize": False},
    "a2c": {"algo": "a2c"},
    "reinforce": {"algo": "reinforce"},
    "grpo": {"algo": "grpo", "rollout__completions_per_prompt": 4},
    "rloo": {"algo": "rloo", "rollout__completions_per_prompt": 4},
}


@pytest.mark.parametrize("changes", WAYS.values(), ids=WAYS)
def test_without_any_reward_nothing_moves(config: Config, changes: dict[str, object]) -> None:
    made = config(task__name="Nothing", iterations=3, actor__learning_rate=1e-2, **changes)
    fitted = changes.get("model__critic") == "fitted"  # it counts the texts that it has seen
    assert how_far_it_moves(made) == (0.0, {"head"} if fitted else set())


def test_nothing_moves_after_a_warm_start(config: Config) -> None:
    made = config(task__name="Copy", task__args={"length": 2}, sft__steps=2, sft__batch_size=4, evaluation__prompts=1)
    with Display(1, "", enabled=False) as display:
        warm_start(made, made.out / "sft", display)
    made = config(task__name="Nothing", actor__learning_rate=1e-2, model__name=str(made.out / "sft"))
    assert how_far_it_moves(made) == (0.0, set())


def test_a_critic_that_guesses_at_random_moves_the_policy(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the zeros are for: guesses are made into advantages, and unlearned through the backbone."""

    class RandomHead(ValueHead):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            nn.init.normal_(self.linear.weight, std=0.02)

    monkeypatch.setattr("agents.networks.network.ValueHead", RandomHead)
    own: dict[str, object] = {"advantage__baseline": "value", "advantage__actor_lambda": 1.0, "loss__target_kl": None}
    made = config(task__name="Nothing", iterations=3, actor__learning_rate=1e-2, model__critic="shared", **own)
    change, parts = how_far_it_moves(made)
    assert change > 0.05
    assert parts == {"actor", "head"}
