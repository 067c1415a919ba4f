"""Every loss against a slow loop over single tokens, written from its formula, and against TorchRL's own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torchrl.objectives import A2CLoss, ClipPPOLoss, ReinforceLoss

from agents.config import LossConfig
from agents.losses.ops import token_weights
from agents.losses.penalty import PenaltyLoss
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

networks = pytest.mark.parametrize("name", [name for name in NETWORKS if name != "fitted"])  # which follows no loss
LENGTHS = [3, 1, 5, 2]


class Token:
    """One choice of the agent, all its numbers, and what the network says of it now."""

    def __init__(self, data: TensorDict, row: int, step: int, log_probs: torch.Tensor, value: torch.Tensor) -> None:
        def number(key: str, default: float = math.nan) -> float:
            return float(data[key].view(*data["mask"].shape)[row, step]) if key in data else default

        self.old, self.reference = number("action_log_prob"), number("ref_log_prob")
        self.advantage = number("advantage") * number("importance_weight", 1.0)
        self.target, self.old_value = number("value_target"), number("state_value")
        self.weight = number("weight", 1 / int(data["mask"].sum()))
        self.log_prob = log_probs[int(data["action"][row, step])]
        self.ratio = torch.exp(self.log_prob - self.old)
        self.entropy = -sum((p.exp() * p for p in log_probs), torch.zeros(()))
        self.value = value


def tokens_of(network: Network, data: TensorDict) -> list[Token]:
    """One text after the other, without padding, all logits by the model itself."""
    found = []
    for row in range(len(data)):
        text = data["tokens"][row][None]
        log_probs = network.model(text).logits[0].log_softmax(-1)
        steps = int(data["mask"][row].sum())
        positions = data["state_position"][row, :steps]
        one = TensorDict({"tokens": text, "state_position": positions[None]}, batch_size=[1])
        values = network.critic(one)["state_value"][0, :, 0]
        found += [Token(data, row, t, log_probs[int(positions[t])], values[t]) for t in range(steps)]
    return found


def assert_is_the_slow_loop(
    network: Network, loss: Any, data: TensorDict, formulas: dict[str, Callable[[Token], torch.Tensor]]
) -> TensorDict:
    """The losses named, with their gradients, are these sums over tokens; and there are no other losses."""
    out: TensorDict = loss(data)
    assert {name for name in out.keys() if name.startswith("loss_")} == set(formulas)  # noqa: SIM118
    for name, formula in formulas.items():
        network.zero_grad()
        out[name].backward(retain_graph=True)
        ours = gradients_of(network)
        slow = sum((token.weight * formula(token) for token in tokens_of(network, data)), torch.zeros(()))
        slow.backward()
        torch.testing.assert_close(out[name], slow, rtol=1e-4, atol=1e-5)
        assert slow.abs() > 1e-3
        theirs = gradients_of(network)
        for weight, gradient in theirs.items():
            torch.testing.assert_close(ours.pop(weight), gradient, rtol=1e-3, atol=1e-4)
        assert not any(gradient.any() for gradient in ours.values())
        if name != "loss_critic":
            assert any(gradient.any() for gradient in theirs.values())
    return out


def clipped_loss(low: float, high: float, dual: float = math.inf) -> Callable[[Token], torch.Tensor]:
    def formula(token: Token) -> torch.Tensor:
        ratio, advantage = token.ratio, token.advantage
        if advantage >= 0:
            return -ratio * advantage if ratio < 1 + high else torch.tensor(-(1 + high) * advantage)
        if ratio > dual:
            return torch.tensor(-dual * advantage)
        return -ratio * advantage if ratio > 1 - low else torch.tensor(-(1 - low) * advantage)

    return formula


def value_loss(weight: float, clip: float = math.inf) -> Callable[[Token], torch.Tensor]:
    def formula(token: Token) -> torch.Tensor:
        moved = token.value - token.old_value
        clipped = token.old_value + (moved if abs(moved) <= clip else torch.tensor(math.copysign(clip, moved.item())))
        free, bounded = (token.value - token.target) ** 2, (clipped - token.target) ** 2
        return weight * (free if free > bounded else bounded)

    return formula


def case(name: str = "shared", spread: float = 0.3) -> tuple[Network, TensorDict]:
    network = small_network(NETWORKS[name])
    data = near_old_policy(network, small_batch(LENGTHS), spread)
    return network, data


@networks
def test_ppo(name: str) -> None:
    network, data = case(name)
    loss = clip_loss(network, clip=(0.1, 0.4), value=0.7)
    formulas = {"loss_objective": clipped_loss(0.1, 0.4), "loss_critic": value_loss(0.7)}
    out = assert_is_the_slow_loop(network, loss, data, formulas)
    ratios = [token.ratio.item() for token in tokens_of(network, data)]
    assert min(ratios) < 0.9  # both clips are at work, on both sides of their reach
    assert max(ratios) > 1.4
    assert out["policy/clip_fraction"].item() == pytest.approx(sum(not 0.9 <= r <= 1.4 for r in ratios) / len(ratios))
    assert 0 < out["policy/clip_fraction"] < 1


def test_ppo_without_importance_weights() -> None:
    network, data = case()
    data = data.exclude("importance_weight")
    loss = clip_loss(network)
    formulas = {"loss_objective": clipped_loss(0.2, 0.2), "loss_critic": value_loss(0.5)}
    assert_is_the_slow_loop(network, loss, data, formulas)


def test_dual_clip() -> None:
    network, data = case(spread=1.0)
    loss = clip_loss(network, dual_clip=1.5, value=None)
    assert any(token.ratio > 1.5 and token.advantage < 0 for token in tokens_of(network, data))
    assert_is_the_slow_loop(network, loss, data, {"loss_objective": clipped_loss(0.2, 0.2, dual=1.5)})
    with pytest.raises(ValueError, match="dual_clip must be more than 1"):
        clip_loss(network, dual_clip=1.0)


@networks
def test_value_clip(name: str) -> None:
    network, data = case(name)
    loss = clip_loss(network, value_clip=0.8)
    formulas = {"loss_objective": clipped_loss(0.2, 0.2), "loss_critic": value_loss(0.5, clip=0.8)}
    out = assert_is_the_slow_loop(network, loss, data, formulas)
    moved = [abs(token.value - token.old_value).item() for token in tokens_of(network, data)]
    assert out["value/clip_fraction"].item() == pytest.approx(sum(m > 0.8 for m in moved) / len(moved))
    assert 0 < out["value/clip_fraction"] < 1


def test_value_clip_knows_no_unit() -> None:
    """A hundred times the rewards: the same tokens are clipped, and the error is a hundred times as large."""
    found = []
    for unit in (1.0, 100.0):
        network, data = case("separate")
        with torch.no_grad():
            for weight in network.value_head.parameters():
                weight *= unit
        data["state_value"], data["value_target"] = unit * data["state_value"], unit * data["value_target"]
        data["value_scale"] = torch.full((len(data),), 1.3 * unit)
        loss = clip_loss(network, value_clip=0.5)
        formulas = {"loss_critic": value_loss(0.5, clip=0.5 * 1.3 * unit)}
        slow = sum(token.weight * formulas["loss_critic"](token) for token in tokens_of(network, data))
        out = loss(data, actor=False)
        torch.testing.assert_close(out["loss_critic"], slow)
        found.append((out["loss_critic"].item() / unit**2, float(out["value/clip_fraction"])))
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert 0 < found[0][1] < 1


def test_entropy_bonus() -> None:
    network, data = case()
    loss = clip_loss(network, entropy=0.3, value=None)
    formulas = {"loss_objective": clipped_loss(0.2, 0.2), "loss_entropy": lambda token: -0.3 * token.entropy}
    assert_is_the_slow_loop(network, loss, data, formulas)


@pytest.mark.parametrize(
    ("estimator", "formula"),
    [
        ("k2", lambda log_ratio: 0.5 * log_ratio * log_ratio),
        ("k3", lambda log_ratio: torch.exp(-log_ratio) - 1 + log_ratio),
    ],
)
def test_kl_to_the_reference(estimator: Any, formula: Callable[[torch.Tensor], torch.Tensor]) -> None:
    network, data = case()
    loss = clip_loss(network, value=None, kl=0.4, kl_estimator=estimator)
    formulas = {
        "loss_objective": clipped_loss(0.2, 0.2),
        "loss_kl": lambda token: 0.4 * formula(token.log_prob - token.reference),
    }
    first = assert_is_the_slow_loop(network, loss, data, formulas)
    loss.kl = 0.8  # as a controller does
    torch.testing.assert_close(loss(data)["loss_kl"], 2 * first["loss_kl"])
    loss.kl = 0.0
    assert "loss_kl" not in loss(data)


@pytest.mark.parametrize("name", ["shared", "LoRA separate"])
def test_penalty(name: str) -> None:
    network, data = case(name)
    loss = penalty_loss(network)
    loss.load_state({"beta": 0.7})

    def formula(token: Token) -> torch.Tensor:
        # The tokens were drawn from the old policy, whose KL to the new one has the estimate r - 1 - log r.
        return -(token.ratio * token.advantage - 0.7 * (token.ratio - 1 - torch.log(token.ratio)))

    formulas = {"loss_objective": formula, "loss_critic": value_loss(0.5)}
    out = assert_is_the_slow_loop(network, loss, data, formulas)
    assert "policy/clip_fraction" not in out


def test_the_penalty_adapts() -> None:
    loss = PenaltyLoss(small_network(), LossConfig(penalty_target=0.3))
    for kl, beta in [(0.44, 1.0), (0.21, 1.0), (0.46, 2.0), (5.0, 4.0), (0.19, 2.0), (0.0, 1.0)]:
        loss.after_batch({"kl/old": kl})
        assert loss.state() == {"beta": beta}
    loss.after_batch({})  # no step of that batch was taken
    assert loss.beta == 1.0
    with pytest.raises(ValueError, match="must be more than 0, got 0"):
        penalty_loss(small_network(), penalty_target=0)


@networks
def test_policy_gradient(name: str) -> None:
    network, data = case(name)
    formulas = {
        "loss_objective": lambda token: -token.log_prob * token.advantage,
        "loss_entropy": lambda token: -0.2 * token.entropy,
        "loss_critic": value_loss(0.6),
    }
    assert_is_the_slow_loop(network, gradient_loss(network, entropy=0.2, value=0.6), data, formulas)
    formulas.pop("loss_entropy")
    assert_is_the_slow_loop(network, gradient_loss(network, value=0.6), data, formulas)


@pytest.mark.parametrize("make", [clip_loss, penalty_loss, gradient_loss])
def test_every_loss_has_an_entropy_bonus_and_a_kl(make: Any) -> None:
    network, data = case()
    loss = make(network, value=None, entropy=0.2, kl=0.4)
    out = loss(data)
    tokens = tokens_of(network, data)
    entropy = sum(token.entropy.item() for token in tokens) / len(tokens)
    kl = sum((token.log_prob.item() - token.reference) ** 2 / 2 for token in tokens) / len(tokens)
    assert out["loss_entropy"].item() == pytest.approx(-0.2 * entropy, rel=1e-4)
    assert out["loss_kl"].item() == pytest.approx(0.4 * kl, rel=1e-4)


@pytest.mark.parametrize("aggregate", ["token", "sequence", "fixed"])
def test_tokens_weigh_what_they_are_told(aggregate: Any) -> None:
    network, data = case()
    data["weight"] = token_weights(data["mask"], aggregate, fixed_length=7)
    formulas = {
        "loss_objective": clipped_loss(0.2, 0.2),
        "loss_entropy": lambda token: -0.3 * token.entropy,
        "loss_kl": lambda token: 0.4 * (token.log_prob - token.reference) ** 2 / 2,
        "loss_critic": value_loss(0.5),
    }
    assert_is_the_slow_loop(network, clip_loss(network, entropy=0.3, kl=0.4), data, formulas)


# TorchRL's own.

PAIRS: dict[str, tuple[Callable[[Network], Any], Callable[[Network], Any], dict[str, str]]] = {
    "clip": (
        lambda n: clip_loss(n, clip=(0.2, 0.28), entropy=0.1, value=0.6, value_clip=0.5),
        lambda n: ClipPPOLoss(
            n.actor,
            n.critic,
            clip_epsilon=(0.2, 0.28),
            entropy_coeff=0.1,
            critic_coeff=0.6,
            clip_value=0.5,
            loss_critic_type="l2",
        ),
        {
            "kl/approx": "kl_approx",
            "policy/clip_fraction": "clip_fraction",
            "value/clip_fraction": "value_clip_fraction",
            "policy/entropy": "entropy",
        },
    ),
    "a2c": (
        lambda n: gradient_loss(n, entropy=0.1, value=0.6),
        lambda n: A2CLoss(n.actor, n.critic, entropy_coeff=0.1, critic_coeff=0.6, loss_critic_type="l2"),
        {"policy/entropy": "entropy"},
    ),
    "reinforce": (
        lambda n: gradient_loss(n, value=1.0),
        lambda n: ReinforceLoss(n.actor, n.critic, loss_critic_type="l2"),
        {},
    ),
}


@networks
@pytest.mark.parametrize("pair", PAIRS)
def test_without_padding_it_is_torchrls_loss(name: str, pair: str) -> None:
    network = small_network(NETWORKS[name])
    data = near_old_policy(network, small_batch([4, 4, 4])).exclude("importance_weight")
    make_ours, make_theirs, metrics = PAIRS[pair]
    ours = make_ours(network)(data)
    loss_of(ours).backward()
    gradients = gradients_of(network)
    theirs = make_theirs(network)(data.clone())
    loss_of(theirs).backward()
    for weight, gradient in gradients_of(network).items():
        torch.testing.assert_close(gradients.pop(weight), gradient)
    assert not gradients
    torch.testing.assert_close(loss_of(ours), loss_of(theirs))
    names = {"loss_actor": "loss_objective", "loss_value": "loss_critic"}
    for key, value in theirs.items():
        if key.startswith("loss_"):
            torch.testing.assert_close(ours[names.get(key, key)], value)
    for key, their_key in metrics.items():
        torch.testing.assert_close(ours[key], theirs[their_key])


# Metrics.


def test_metrics_of_the_policy() -> None:
    network, data = case()
    out = clip_loss(network, clip=(0.1, 0.4))(data)
    tokens = tokens_of(network, data)
    ratios = torch.stack([token.ratio for token in tokens]).detach()
    expected = {
        "policy/entropy": torch.stack([token.entropy for token in tokens]).mean(),
        "kl/approx": -ratios.log().mean(),
        "kl/old": (ratios - 1 - ratios.log()).mean(),
        "ratio/mean": ratios.mean(),
        "ratio/square": (ratios**2).mean(),
        "ratio/max": ratios.max(),
        "ratio/min": ratios.min(),
    }
    for name, value in expected.items():
        torch.testing.assert_close(out[name], value.detach(), rtol=1e-4, atol=1e-5)
        assert not out[name].requires_grad
