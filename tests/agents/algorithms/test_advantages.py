"""What is learned from rewards, by hand; the KL controller, and the optimizer."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import nn

from agents.algorithms.advantages import advantage_estimator, advantage_names, register_advantage
from agents.algorithms.kl_control import KLController
from agents.algorithms.optimizer import Optimizer
from agents.algorithms.shaping import shape_rewards
from agents.config import AdvantageConfig, KLConfig, RewardConfig
from agents.state.saved import CheckpointError

NAN = math.nan


def batch(rewards: list[list[float]], cut: list[bool] | None = None, truncated: list[bool] | None = None) -> TensorDict:
    """Texts with these rewards; what lies under padding is NaN."""
    rows, steps = len(rewards), max(map(len, rewards))
    mask = torch.arange(steps) < torch.tensor([len(row) for row in rewards])[:, None]
    reward = torch.full((rows, steps), NAN)
    for row, values in enumerate(rewards):
        reward[row, : len(values)] = torch.tensor(values)
    last = mask & ~torch.cat([mask[:, 1:], torch.zeros(rows, 1, dtype=torch.bool)], 1)
    was_cut = torch.tensor([False] * rows if truncated is None else truncated)
    return TensorDict(
        {
            "mask": mask,
            "cut": was_cut if cut is None else torch.tensor(cut),
            "action_log_prob": torch.where(mask, -1.0, NAN),
            "next": TensorDict(
                {
                    "reward": reward[..., None],
                    "done": last[..., None],
                    "truncated": (last & was_cut[:, None])[..., None],
                },
                batch_size=[rows],
            ),
        },
        batch_size=[rows],
    )


# Rewards.


def test_rewards_as_they_are() -> None:
    data = batch([[0.5, 1.0], [2.0]])
    assert shape_rewards(data, RewardConfig()).tolist() == [[0.5, 1.0], [2.0, 0.0]]
    assert data["next", "reward"][0, :, 0].tolist() == [0.5, 1.0]


def test_scale_then_clip() -> None:
    data = batch([[0.5, -1.0], [3.0]])
    assert shape_rewards(data, RewardConfig(scale=2.0)).tolist() == [[1, -2], [6, 0]]
    assert shape_rewards(data, RewardConfig(clip=0.75)).tolist() == [[0.5, -0.75], [0.75, 0]]
    assert shape_rewards(data, RewardConfig(scale=2.0, clip=1.5)).tolist() == [[1, -1.5], [1.5, 0]]


def test_the_penalty_is_for_texts_that_were_cut_off() -> None:
    data = batch([[0.0, 1.0], [0.5], [0.25]], cut=[True, False, True])
    shaped = shape_rewards(data, RewardConfig(no_eos_penalty=0.5, scale=2.0))
    assert shaped.tolist() == [[0, 1], [1, 0], [-0.5, 0]]


def test_whitening_makes_the_sums_of_texts_white() -> None:
    shaped = shape_rewards(batch([[1.0, 1.0], [6.0]]), RewardConfig(whiten=True))  # mean 4, deviation 2
    assert shaped.flatten().tolist() == pytest.approx([0.5, -1.5, 1, 0])
    many = shape_rewards(batch([[0.5, 1.0, 3.0], [2.0], [0.0, -4.0]]), RewardConfig(whiten=True)).sum(1)
    assert many.mean().item() == pytest.approx(0, abs=1e-6)
    assert many.std(correction=0).item() == pytest.approx(1)
    same = shape_rewards(batch([[1.0], [0.5, 0.5]]), RewardConfig(whiten=True))
    assert not same.any()


def test_kl_in_the_reward_by_hand() -> None:
    data = batch([[0.0, 1.0], [2.0]])
    data["ref_log_prob"] = torch.tensor([[-1.5, -0.5], [-3.0, NAN]])
    # log-ratios: 0.5, -0.5; 2
    shaped = shape_rewards(data, RewardConfig(), beta=0.1)
    assert shaped.flatten().tolist() == pytest.approx([-0.05, 1.05, 1.8, 0])
    # It comes last: neither scaled nor clipped.
    shaped = shape_rewards(data, RewardConfig(scale=3.0, clip=1.0), beta=1.0)
    assert shaped.flatten().tolist() == pytest.approx([-0.5, 1.5, -1, 0])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=5), st.floats(0.001, 2.0), st.integers(0, 10**6))
def test_a_shaped_episode_sums_to_its_reward_minus_beta_times_its_log_ratio(
    lengths: list[int], beta: float, seed: int
) -> None:
    """Promise 5."""
    random = torch.Generator().manual_seed(seed)
    data = batch([torch.randn(length, generator=random).tolist() for length in lengths])
    data["ref_log_prob"] = torch.where(data["mask"], torch.randn(data["mask"].shape, generator=random), NAN)
    shaped = shape_rewards(data, RewardConfig(), beta).sum(1)
    for row, length in enumerate(lengths):
        task = data["next", "reward"][row, :length, 0].sum()
        ratio = (data["action_log_prob"] - data["ref_log_prob"])[row, :length].sum()
        assert shaped[row].item() == pytest.approx((task - beta * ratio).item(), abs=1e-4)


# Advantages. One text of three steps that ended, one of two that was cut off and is worth 8 from there on.

REWARD = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, NAN]])
VALUES = torch.tensor([[0.5, 0.25, 0.75], [2.0, 4.0, NAN]])


@pytest.fixture
def data() -> TensorDict:
    found = batch([[0.0, 0.0, 1.0], [1.0, 0.0]], truncated=[False, True])
    found["state_value"] = VALUES[..., None].clone()
    found["last_value"] = torch.tensor([100.0, 8.0])  # the first text has ended: its 100 must not count
    return found


def estimates(data: TensorDict, **config: Any) -> tuple[list[float], list[float]]:
    """PPO's usual ones, as they are: compared with the values, lambda 1; unless asked otherwise."""
    how = AdvantageConfig(**({"normalize": False, "baseline": "value", "actor_lambda": 1.0} | config))
    advantage, target = advantage_estimator(how.kind)(data, REWARD, how)
    assert target is not None
    return advantage.flatten().tolist(), target.flatten().tolist()


def test_gae_by_hand(data: TensorDict) -> None:
    # Temporal differences at gamma 1: -0.25, 0.5, 0.25; and 1 + 4 - 2 = 3, 8 - 4 = 4.
    advantage, target = estimates(data, actor_lambda=0.5, critic_lambda=0.5)
    assert advantage == [-0.25 + 0.5 * 0.625, 0.5 + 0.5 * 0.25, 0.25, 3 + 0.5 * 4, 4, 0]
    assert target == [0.5625, 0.875, 1, 7, 8, 0]
    # At gamma 0.5: -0.375, 0.125, 0.25; and 1 + 2 - 2 = 1, 4 - 4 = 0; gamma * lambda is 0.25.
    advantage, _ = estimates(data, gamma=0.5, actor_lambda=0.5, critic_lambda=0.5)
    assert advantage == [-0.375 + 0.25 * 0.1875, 0.1875, 0.25, 1, 0, 0]


def test_a_text_that_was_cut_off_is_valued_where_it_ends(data: TensorDict) -> None:
    _, target = estimates(data)
    assert target == [1, 1, 1, 9, 8, 0]
    data["last_value"] = torch.tensor([-7.0, 0.0])
    assert estimates(data)[1] == [1, 1, 1, 1, 0, 0]
    data["next", "truncated"][:] = False
    data["last_value"] = torch.tensor([-7.0, 8.0])
    assert estimates(data)[1] == [1, 1, 1, 1, 0, 0]


def test_actor_and_critic_have_lambdas_of_their_own(data: TensorDict) -> None:
    advantage, target = estimates(data, actor_lambda=0.0, critic_lambda=1.0)
    assert advantage == [-0.25, 0.5, 0.25, 3, 4, 0]
    assert target == [1, 1, 1, 9, 8, 0]
    advantage, target = estimates(data, actor_lambda=1.0, critic_lambda=0.0)
    assert advantage == [0.5, 0.75, 0.25, 7, 4, 0]
    assert target == [0.25, 0.75, 1, 5, 8, 0]


def test_lambda_by_length(data: TensorDict) -> None:
    """With alpha 0.5, lambda is 1/3 for three tokens and 0 for two."""
    advantage, target = estimates(data, length_adaptive=0.5)
    second = 0.5 + 0.25 / 3
    assert advantage == pytest.approx([-0.25 + second / 3, second, 0.25, 3, 4, 0])
    assert target == [1, 1, 1, 9, 8, 0]  # the critic's lambda is what it was


def test_monte_carlo_is_the_return_minus_the_value(data: TensorDict) -> None:
    advantage, target = estimates(data, kind="monte_carlo", actor_lambda=0.0, critic_lambda=0.0)
    assert target == [1, 1, 1, 9, 8, 0]
    assert advantage == [0.5, 0.75, 0.25, 7, 4, 0]
    advantage, target = estimates(data, kind="monte_carlo", gamma=0.5)
    assert target == [0.25, 0.5, 1, 3, 4, 0]
    assert advantage == [-0.25, 0.25, 0.25, 1, 0, 0]


def test_sequence_gives_all_tokens_the_advantage_of_the_text(data: TensorDict) -> None:
    advantage, target = estimates(data, kind="sequence", actor_lambda=0.3)
    assert advantage == [0.5, 0.5, 0.5, 7, 7, 0]
    assert target == [1, 1, 1, 9, 8, 0]


def test_without_a_baseline_advantages_are_returns(data: TensorDict) -> None:
    for kind in ("gae", "monte_carlo"):
        advantage, target = estimates(data, kind=kind, baseline="none")
        assert advantage == target == [1, 1, 1, 9, 8, 0]
    advantage, target = estimates(data, kind="sequence", baseline="none")
    assert advantage == [1, 1, 1, 9, 9, 0]  # the whole text's, everywhere
    assert target == [1, 1, 1, 9, 8, 0]
    advantage, target = estimates(data, actor_lambda=0.5, baseline="none")
    assert advantage == [0.5625, 0.875, 1, 7, 8, 0]  # the lambda-return
    assert target == [1, 1, 1, 9, 8, 0]


@pytest.mark.parametrize(
    ("kind", "baseline"),
    [("gae", "value"), ("gae", "fitted"), ("gae", "none"), ("monte_carlo", "fitted"), ("sequence", "value")],
)
def test_normalized_advantages_are_of_size_one_and_keep_their_zero(data: TensorDict, kind: str, baseline: str) -> None:
    plain, targets = estimates(data, kind=kind, baseline=baseline)
    normal, same = estimates(data, kind=kind, baseline=baseline, normalize=True)
    assert same == targets
    assert normal[5] == 0
    real, expected = np.array(normal[:5]), np.array(plain[:5])
    assert (real**2).mean() == pytest.approx(1)
    assert real == pytest.approx(expected / np.sqrt((expected**2).mean()), abs=1e-6)


def test_a_lambda_of_none_goes_by_the_explained_variance(data: TensorDict) -> None:
    returns = np.array([1, 1, 1, 9, 8])
    for values in ([0.5, 0.25, 0.75, 2.0, 4.0], [1.0, 1.2, 0.8, 8.0, 8.5], [5.0, 5.0, 5.0, 1.0, 1.0]):
        data["state_value"] = torch.tensor([[values[:3], [*values[3:], NAN]]])[0][..., None]
        explained = 1 - (returns - values).var() / returns.var()
        auto, _ = estimates(data, actor_lambda=None)
        assert auto == pytest.approx(estimates(data, actor_lambda=1 - max(0.0, explained))[0], abs=1e-5)


def test_the_targets_have_no_trace_of_a_critic_that_is_not_asked(data: TensorDict) -> None:
    """Values of millions would otherwise leave their rounding in returns of 0, and pass for something to explain."""
    data["state_value"] = torch.full((2, 3, 1), 1e7 / 3)
    data["next", "truncated"][:] = False
    how = AdvantageConfig(actor_lambda=1.0, baseline="none")
    for kind in ("gae", "monte_carlo", "sequence"):
        advantage, target = advantage_estimator(kind)(data, torch.zeros(2, 3), how)
        assert target is not None
        assert not advantage.any()
        assert not target.any()


def test_estimators_by_name() -> None:
    assert {"gae", "monte_carlo", "sequence", "group", "leave_one_out"} <= set(advantage_names())
    assert [advantage_estimator(name).critic for name in ("gae", "group")] == [True, False]
    with pytest.raises(ValueError, match="unknown advantage estimator 'monte-carlo'; did you mean 'monte_carlo'"):
        advantage_estimator("monte-carlo")
    with pytest.raises(ValueError, match="named 'gae' is already registered"):
        register_advantage("gae")(lambda data, reward, config: (reward, None))


# The weight of the KL.


def test_a_fixed_beta_stays() -> None:
    controller = KLController(KLConfig(beta=0.1))
    controller.update(kl=100.0, episodes=1000)
    assert controller.beta == 0.1


@pytest.mark.parametrize(
    ("kl", "factor"), [(2.2, 1.01), (6.0, 1.02), (2.0, 1.0), (1.8, 0.99), (0.0, 0.98), (-5.0, 0.98)]
)
def test_beta_follows_the_kl(kl: float, factor: float) -> None:
    """An error is at most a fifth; it counts as much as the batch is of the horizon, here a tenth."""
    controller = KLController(KLConfig(beta=0.5, target=2.0, horizon=1000))
    controller.update(kl, episodes=100)
    assert controller.beta == pytest.approx(0.5 * factor)
    other = KLController(KLConfig(beta=0.3, target=2.0, horizon=1000))
    other.load_state_dict(json.loads(json.dumps(controller.state_dict())))
    assert other.beta == controller.beta


# The optimizer.


def quadratic(**options: Any) -> tuple[dict[str, nn.Parameter], Optimizer]:
    weights = {"matrix": nn.Parameter(torch.tensor([[3.0, 4.0]])), "bias": nn.Parameter(torch.tensor([1.0]))}
    return weights, Optimizer(weights, 0.1, total_steps=10, **options)


def take(optimizer: Optimizer, steps: int = 1) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        torch.stack([(weight**2).sum() for weight in optimizer.weights]).sum().backward()
        optimizer.clip()
        optimizer.step()


@pytest.mark.parametrize(
    ("decay", "rates"),
    [
        ("constant", [0.025, 0.05, 0.075, 0.1, 0.1, 0.1, 0.1, 0.1]),
        ("linear", [0.025, 0.05, 0.075, 0.1, 0.1, 0.05, 0, 0]),
        ("cosine", [0.025, 0.05, 0.075, 0.1, 0.1, 0.05, 0, 0]),
    ],
)
def test_the_learning_rate_rises_and_falls(decay: Any, rates: list[float]) -> None:
    _, optimizer = quadratic(warmup=4, decay=decay)
    assert [optimizer.rate_at(step) for step in (0, 1, 2, 3, 4, 7, 10, 11)] == pytest.approx(rates)
    assert optimizer.rate_at(5) == pytest.approx(
        {"constant": 0.1, "linear": 0.5 / 6, "cosine": 0.0933}[decay], abs=1e-4
    )


def test_steps_are_taken_at_that_rate() -> None:
    """The first step of Adam is as long as its learning rate."""
    weights, optimizer = quadratic(warmup=4)
    take(optimizer)
    assert weights["bias"].item() == pytest.approx(1 - 0.025, abs=1e-5)
    assert optimizer.steps == 1


def test_long_gradients_are_shortened_and_measured() -> None:
    weights, optimizer = quadratic(max_gradient_norm=1.0)
    weights["matrix"].grad = torch.tensor([[0.0, 12.0]])
    weights["bias"].grad = torch.tensor([5.0])
    assert optimizer.clip().item() == pytest.approx(13)
    assert weights["matrix"].grad.tolist()[0] == pytest.approx([0, 12 / 13], abs=1e-5)
    assert weights["bias"].grad.item() == pytest.approx(5 / 13, abs=1e-5)
    assert optimizer.clip().item() == pytest.approx(1, abs=1e-5)
    optimizer.zero_grad()
    assert weights["bias"].grad is None


def test_biases_and_norms_do_not_decay() -> None:
    weights, optimizer = quadratic(weight_decay=0.5)
    for weight in weights.values():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert weights["bias"].item() == 1
    assert weights["matrix"].tolist()[0] == pytest.approx([3 * 0.95, 4 * 0.95])


def test_an_optimizer_goes_on_where_another_was() -> None:
    options: dict[str, Any] = {"warmup": 2, "decay": "linear", "weight_decay": 0.1, "max_gradient_norm": 2.0}
    whole_weights, whole = quadratic(**options)
    take(whole, 8)
    early_weights, early = quadratic(**options)
    take(early, 5)
    tensors, state = early.state()
    late_weights, late = quadratic(**options)
    for name, weight in late_weights.items():
        weight.data.copy_(early_weights[name].data)
    late.load_state({name: tensor.clone() for name, tensor in tensors.items()}, json.loads(json.dumps(state)))
    take(late, 3)
    assert late.steps == 8
    for name, weight in whole_weights.items():
        assert torch.equal(weight, late_weights[name])
    with pytest.raises(CheckpointError, match="does not fit"):
        Optimizer({"other": nn.Parameter(torch.ones(3))}, 0.1, total_steps=1).load_state(tensors, state)
