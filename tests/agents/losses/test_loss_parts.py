"""What a loss does besides: its parts, hidden states that are there already, batches without a text."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict

from agents.networks.network import Network
from tests.agents.small import (
    NETWORKS,
    clip_loss,
    gradient_loss,
    gradients_of,
    loss_of,
    near_old_policy,
    penalty_loss,
    small_batch,
    small_network,
)

networks = pytest.mark.parametrize("name", NETWORKS)


def case(name: str = "shared") -> tuple[Network, TensorDict]:
    network = small_network(NETWORKS[name])
    return network, near_old_policy(network, small_batch([3, 1, 5, 2]))


LOSSES: dict[str, Callable[[Network], Any]] = {
    "clip": lambda n: clip_loss(n, entropy=0.1, kl=0.2, value_clip=0.3),
    "penalty": penalty_loss,
    "policy gradient": lambda n: gradient_loss(n, entropy=0.1, kl=0.2),
}
losses = pytest.mark.parametrize("kind", LOSSES)


@networks
@losses
def test_the_two_parts_make_the_whole(name: str, kind: str) -> None:
    network, data = case(name)
    loss = LOSSES[kind](network)
    whole, actor, critic = loss(data), loss(data, critic=False), loss(data, actor=False)
    assert not set(actor.keys()) & set(critic.keys())
    together = actor.clone().update(critic)
    assert set(together.keys()) == set(whole.keys())
    for key, value in whole.items():
        torch.testing.assert_close(together[key], value)
    assert "loss_critic" in critic
    assert "loss_objective" in actor


@networks
@losses
def test_states_that_are_there_already(name: str, kind: str) -> None:
    """Hidden states of an earlier pass, graph and all, serve as well as new ones."""
    network, data = case(name)
    loss = LOSSES[kind](network)
    loss_of(loss(data)).backward()
    expected = gradients_of(network)
    encoded = network.encode(data.clone(False))
    passes: list[int] = []
    network.backbone.register_forward_hook(lambda *_: passes.append(1))
    loss_of(loss(encoded, encoded=True)).backward()
    assert not passes
    for weight, gradient in gradients_of(network).items():
        torch.testing.assert_close(gradient, expected.pop(weight))
    assert not expected
    loss(data)
    assert len(passes) == 1  # actor and critic that share a backbone share the pass


@losses
def test_the_input_stays_as_it_is(kind: str) -> None:
    network, data = case()
    before = data.clone()
    LOSSES[kind](network)(data)
    assert set(data.keys()) == set(before.keys())
    for key, value in before.items():
        torch.testing.assert_close(data[key], value, rtol=0, atol=0, equal_nan=True)


@networks
@losses
def test_a_batch_of_padding_is_worth_nothing(name: str, kind: str) -> None:
    network, data = case(name)
    data = data[:2].clone()
    data["mask"] = torch.zeros_like(data["mask"])
    for key, value in data.items():
        if value.is_floating_point():
            data[key] = torch.full_like(value, math.nan)
    out = LOSSES[kind](network)(data)
    assert all(value.isfinite() for value in out.values())
    total = loss_of(out)
    assert total == 0
    total.backward()
    assert not any(gradient.any() for gradient in gradients_of(network).values())


def test_a_loss_without_a_critic() -> None:
    network, data = case()
    out = clip_loss(network, value=None)(data.exclude("value_target", "state_value"))
    assert "loss_critic" not in out
    assert not [name for name in out.keys() if name.startswith("value/")]  # noqa: SIM118
