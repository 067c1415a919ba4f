"""Without any reward, a KL penalty leads the policy back to its reference: in every algorithm, wherever it acts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from agents.networks.network import Network
from agents.run.parts import Run
from llm_env.tasks import Task, register_task
from llm_env.tokens.prompts import Prompt
from rewards import Rollout
from tests.agents.runs import WITHOUT_CRITIC, Config, running
from tests.agents.small import gradient_loss, small_network

ALGORITHMS = ("ppo", "a2c", "reinforce", "grpo", "rloo")


@register_task
class Worthless(Task):
    """Two tokens after one of two letters, and none is worth anything."""

    max_new_tokens = 2
    max_prompt_tokens = 1

    def splits(self) -> dict[str, list[Prompt]]:
        return {"train": [Prompt("a"), Prompt("b")]}

    def score(self, rollout: Rollout) -> float:
        return 0.0


def exact_kl(network: Network, data: Any) -> float:
    """KL(policy | reference) per token, over the whole vocabulary."""
    with torch.no_grad():
        ours = network.actor.get_dist(data.select("tokens", "state_position", "mask")).logits.log_softmax(-1)
        logits = network._reference(data["tokens"]).logits
        places = data["state_position"][..., None].expand(-1, -1, logits.shape[-1])
        theirs = logits.gather(1, places).log_softmax(-1)
    return float((ours.exp() * (ours - theirs)).sum(-1)[data["mask"]].mean())


@torch.no_grad()
def stray(run: Run) -> None:
    """Away from the reference."""
    scale = run.network.model.base_model.norm.weight
    scale += torch.randn(scale.shape, generator=torch.Generator().manual_seed(0))
    run.update_engine()


@pytest.mark.parametrize("where", ["reward", "loss"])
@pytest.mark.parametrize("algo", ALGORITHMS)
def test_a_policy_that_has_strayed_comes_back(config: Config, algo: str, where: str) -> None:
    once: dict[str, object] = {"actor__epochs": 1, "actor__minibatches": 1}
    of_algorithm = {"rollout__completions_per_prompt": 8} if algo in WITHOUT_CRITIC else {"critic__epochs": 1}
    made = config(
        algo=algo,
        task__name="Worthless",
        iterations=15,
        rollout__batch_size=128,
        actor__learning_rate=5e-3,
        kl__beta=0.5,
        kl__where=where,
        **once,
        **of_algorithm,
    )
    with running(made) as run:
        stray(run)
        data = run.algorithm.collector.collect().data
        far = exact_kl(run.network, data)
        for metrics in run.algorithm:
            run.update_engine()
            assert ("policy/kl_loss" in metrics) == (where == "loss")
        assert far > 0.3
        assert exact_kl(run.network, data) < 0.6 * far


def test_which_estimator_the_loss_takes(config: Config) -> None:
    """By default the one whose gradient is that of the KL; that of k1 does not even depend on the reference."""
    log_ratio = torch.tensor([0.5], requires_grad=True)
    data = {"ref_log_prob": torch.zeros(1)}
    for estimator, slope in ((None, 0.5), ("k2", 0.5), ("k3", 1 - math.exp(-0.5))):
        with running(config(kl__beta=0.1, kl__where="loss", kl__estimator=estimator)) as run:
            cost: Any = run.algorithm.loss._kl_term
            (gradient,) = torch.autograd.grad(cost(log_ratio, None, data).sum(), log_ratio)
            assert float(gradient) == pytest.approx(slope)
    with pytest.raises(ValueError, match="k1 is no estimator for a loss, for its gradient does not depend on the ref"):
        gradient_loss(small_network(), kl_estimator="k1")
