"""Losses and terms of one's own, by their names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDictBase

from agents.config import LossConfig
from agents.losses import TokenLoss, loss_class, loss_names, loss_term, register_loss, register_term, term_names
from agents.losses.base import logged_name
from agents.networks.distribution import TokenDistribution
from tests.agents.small import gradients_of, loss_of, make_loss, near_old_policy, small_batch, small_network

Tensor = torch.Tensor


@register_loss("test_squared")
class SquaredLoss(TokenLoss):
    """Pulls the log-prob of each action to its advantage."""

    def gain(self, log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Minus the squared distance."""
        distance = log_prob - advantage
        return -(distance**2), {"my/distance": distance.abs()}


@register_term("test_forget")
def forget(log_prob: Tensor, distribution: TokenDistribution, data: TensorDictBase) -> Tensor:
    """Unlikely actions cost nothing; on padding it is no number."""
    return torch.where(data["mask"], log_prob.exp(), torch.nan)


def case() -> Any:
    network = small_network()
    return network, near_old_policy(network, small_batch([3, 1, 5, 2])).exclude("importance_weight")


def test_a_loss_is_its_gain() -> None:
    network, data = case()
    out = make_loss("test_squared", network, value=None)(data)
    with torch.no_grad():
        log_prob = network.actor.get_dist(data.clone(False)).log_prob(data["action"])
    distance = (log_prob - data["advantage"][..., 0])[data["mask"]]
    torch.testing.assert_close(out["loss_objective"], (distance**2).mean())
    torch.testing.assert_close(out["my/distance"], distance.abs().mean())
    assert not out["my/distance"].requires_grad


def test_a_term_is_added_with_its_weight() -> None:
    network, data = case()
    plain = make_loss("clip", network)(data)
    loss = make_loss("clip", network, terms={"test_forget": 0.3})
    out = loss(data)
    assert set(out.keys()) - set(plain.keys()) == {"loss_test_forget"}
    with torch.no_grad():
        log_prob = network.actor.get_dist(data.clone(False)).log_prob(data["action"])
    expected = 0.3 * log_prob.exp()[data["mask"]].mean()
    torch.testing.assert_close(out["loss_test_forget"].detach(), expected)
    loss_of(out).backward()
    assert all(gradient.isfinite().all() for gradient in gradients_of(network).values())
    assert logged_name("loss_test_forget") == "policy/test_forget_loss"


def test_names() -> None:
    assert {"clip", "penalty", "policy_gradient", "test_squared"} <= set(loss_names())
    assert loss_class("test_squared") is SquaredLoss
    assert "test_forget" in term_names()
    assert loss_term("test_forget") is forget
    with pytest.raises(ValueError, match="unknown loss 'clop'; did you mean 'clip'"):
        loss_class("clop")
    with pytest.raises(ValueError, match="unknown loss term 'test_forgot'; did you mean 'test_forget'"):
        loss_term("test_forgot")


@pytest.mark.parametrize("name", ["entropy", "kl", "objective", "critic"])
def test_a_term_cannot_have_the_name_of_a_part(name: str) -> None:
    with pytest.raises(ValueError, match=f"a loss term cannot be named '{name}'"):
        register_term(name)


def test_a_loss_without_a_gain_says_so() -> None:
    network, data = case()
    with pytest.raises(NotImplementedError, match="TokenLoss has no gain"):
        TokenLoss(network, LossConfig())(data)
