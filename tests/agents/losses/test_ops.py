"""The arithmetic of learning, against numbers worked out by hand, slow loops and exact expectations."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torchrl.objectives.value import GAE

from agents.losses.ops import (
    Estimator,
    deviation,
    explained_variance,
    gae,
    importance_weights,
    kl_estimate,
    length_adaptive_lambda,
    masked_mean,
    token_weights,
    typical_error,
    whiten,
    zero_padding,
)

NAN = math.nan


def mask_of(lengths: list[int], width: int | None = None) -> torch.Tensor:
    return torch.arange(max(lengths) if width is None else width) < torch.tensor(lengths)[:, None]


# Masked statistics.


def test_statistics_ignore_padding() -> None:
    values = torch.tensor([[1.0, 2.0, NAN], [6.0, NAN, math.inf]])
    mask = mask_of([2, 1], 3)
    assert zero_padding(values, mask).tolist() == [[1, 2, 0], [6, 0, 0]]
    assert masked_mean(values, mask).item() == 3
    assert deviation(values, mask).item() == pytest.approx(math.sqrt((4 + 1 + 9) / 3))
    white = whiten(values, mask)
    root = math.sqrt(14 / 3)
    assert white.flatten().tolist() == pytest.approx([-2 / root, -1 / root, 0, 3 / root, 0, 0])
    assert masked_mean(white, mask).item() == pytest.approx(0, abs=1e-6)
    assert deviation(white, mask).item() == pytest.approx(1)


def test_statistics_of_next_to_nothing() -> None:
    nothing = torch.tensor([[NAN, NAN]])
    assert masked_mean(nothing, mask_of([0], 2)).item() == 0
    assert whiten(nothing, mask_of([0], 2)).tolist() == [[0, 0]]
    assert whiten(torch.tensor([[5.0, NAN]]), mask_of([1], 2)).tolist() == [[0, 0]]
    assert whiten(torch.tensor([[0.3, 0.3, 0.3]]), mask_of([3])).tolist() == [[0, 0, 0]]


def test_padding_gets_no_gradient() -> None:
    values = torch.tensor([2.0, NAN], requires_grad=True)
    zero_padding(values * values, torch.tensor([True, False])).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist()[0] == 4
    mean_of = torch.tensor([2.0, 4.0, NAN], requires_grad=True)
    masked_mean(mean_of, torch.tensor([True, True, False])).backward()
    assert mean_of.grad is not None
    assert mean_of.grad.tolist() == [0.5, 0.5, 0]


def test_the_typical_error_has_the_unit_of_the_targets() -> None:
    target, mask = torch.tensor([[3.0, 5.0, math.nan]]), torch.tensor([[True, True, False]])
    assert typical_error(torch.zeros(1, 3), target, mask).item() == pytest.approx(math.sqrt((9 + 25) / 2))
    assert typical_error(torch.zeros(1, 3), 20 * target, mask).item() == pytest.approx(20 * math.sqrt(17))
    # Targets that are all the same have no spread, and a critic that is far from them has much to learn.
    assert typical_error(torch.zeros(1, 2), torch.full((1, 2), 20.0), mask[:, :2]).item() == 20
    assert typical_error(target, target, mask).item() == 0


def test_explained_variance() -> None:
    mask = mask_of([3, 1], 4)
    target = torch.tensor([[1.0, 2.0, 3.0, NAN], [6.0, NAN, NAN, NAN]])
    assert explained_variance(target, target, mask).item() == 1
    assert explained_variance(target + 7, target, mask).item() == pytest.approx(1)  # a constant off explains as much
    assert explained_variance(torch.full_like(target, 9.0), target, mask).item() == pytest.approx(0)
    assert explained_variance(-target, target, mask).item() == pytest.approx(-3)  # 2 t is left
    assert explained_variance(target / 2, target, mask).item() == pytest.approx(0.75)
    assert explained_variance(target, torch.full_like(target, 2.0), mask).isnan()


# Generalised advantage estimates.


def estimate(
    reward: list[list[float]],
    value: list[list[float]],
    last_value: list[float],
    lengths: list[int],
    truncated: list[bool],
    gamma: float,
    lmbda: float | list[float],
) -> list[list[float]]:
    return gae(
        torch.tensor(reward, dtype=torch.float32),
        torch.tensor(value, dtype=torch.float32),
        torch.tensor(last_value, dtype=torch.float32),
        mask_of(lengths, len(reward[0])),
        torch.tensor(truncated),
        gamma,
        torch.tensor(lmbda) if isinstance(lmbda, list) else lmbda,
    ).tolist()


def test_a_terminated_text_ends_in_nothing() -> None:
    # Of the last state nothing is expected any more, whatever the critic says of it (9).
    # delta: 1 + 0.5*4 - 2 = 1; 2 + 0.5*8 - 4 = 2; 3 - 8 = -5;   A: -5; 2 + 0.25*-5 = 0.75; 1 + 0.25*0.75 = 1.1875
    advantage = estimate([[1, 2, 3]], [[2, 4, 8]], [9], [3], [False], gamma=0.5, lmbda=0.5)
    assert advantage == [[1.1875, 0.75, -5]]


def test_a_truncated_text_is_bootstrapped() -> None:
    # The last delta: 3 + 0.5*9 - 8 = -0.5;   A: -0.5; 2 + 0.25*-0.5 = 1.875; 1 + 0.25*1.875 = 1.46875
    advantage = estimate([[1, 2, 3]], [[2, 4, 8]], [9], [3], [True], gamma=0.5, lmbda=0.5)
    assert advantage == [[1.46875, 1.875, -0.5]]


def test_texts_of_different_lengths_with_junk_as_padding() -> None:
    """The same two texts, a text of one token cut off and one ended, and a row that is no text at all."""
    reward = [[1, 2, 3, NAN], [1, 2, 3, NAN], [1, NAN, NAN, NAN], [1, NAN, NAN, NAN], [NAN] * 4]
    value = [[2, 4, 8, NAN], [2, 4, 8, NAN], [0.5, NAN, NAN, NAN], [0.5, NAN, NAN, NAN], [NAN] * 4]
    advantage = estimate(
        reward,
        value,
        [NAN, 9, 6, NAN, NAN],  # unknown where it cannot count
        [3, 3, 1, 1, 0],
        [False, True, True, False, True],
        gamma=0.5,
        lmbda=0.5,
    )
    assert advantage == [
        [1.1875, 0.75, -5, 0],
        [1.46875, 1.875, -0.5, 0],
        [1 + 0.5 * 6 - 0.5, 0, 0, 0],
        [0.5, 0, 0, 0],
        [0, 0, 0, 0],
    ]


def test_injected_tokens_are_no_steps() -> None:
    """Between the second choice and the third the task wrote two tokens: they have no value, and discount nothing."""
    value_of_token = torch.tensor([2.0, 4.0, NAN, NAN, 8.0])
    action_position = torch.tensor([0, 1, 4])
    value = value_of_token[action_position][None].tolist()
    advantage = estimate([[1, 2, 3]], value, [9], [3], [False], gamma=0.5, lmbda=0.5)
    assert advantage == [[1.1875, 0.75, -5]]


def test_the_ends_of_lambda() -> None:
    reward, value = [[1.0, 2.0, 3.0]], [[0.5, 0.25, 0.125]]
    monte_carlo = estimate(reward, value, [9], [3], [False], gamma=1.0, lmbda=1.0)
    assert monte_carlo == [[6 - 0.5, 5 - 0.25, 3 - 0.125]]
    one_step = estimate(reward, value, [9], [3], [False], gamma=1.0, lmbda=0.0)
    assert one_step == [[1 + 0.25 - 0.5, 2 + 0.125 - 0.25, 3 - 0.125]]


def test_every_text_may_have_its_lambda() -> None:
    reward, value = [[1.0, 2.0, 3.0], [4.0, 5.0, NAN]], [[0.5, 0.25, 0.125], [1.0, 2.0, NAN]]
    both = estimate(reward, value, [7, 8], [3, 2], [True, True], gamma=0.9, lmbda=[0.3, 0.8])
    first = estimate(reward, value, [7, 8], [3, 2], [True, True], gamma=0.9, lmbda=0.3)
    second = estimate(reward, value, [7, 8], [3, 2], [True, True], gamma=0.9, lmbda=0.8)
    assert both[0] == pytest.approx(first[0])
    assert both[1] == pytest.approx(second[1])
    assert both[1] != pytest.approx(first[1])


def slow_gae(
    reward: list[float], value: list[float], last_value: float, truncated: bool, gamma: float, lmbda: float
) -> list[float]:
    """Straight from the definition: A_t is the sum of (gamma lambda)^k delta_(t+k)."""
    following = [*value[1:], last_value if truncated else 0.0]
    delta = [reward[t] + gamma * following[t] - value[t] for t in range(len(reward))]
    return [sum((gamma * lmbda) ** (k - t) * delta[k] for k in range(t, len(delta))) for t in range(len(delta))]


numbers = st.floats(-2, 2, width=32)
texts = st.lists(
    st.tuples(st.lists(st.tuples(numbers, numbers), max_size=5), numbers, st.booleans(), st.floats(0, 1)), min_size=1
)


@settings(deadline=None)
@given(texts=texts, padding=st.integers(0, 2), gamma=st.floats(0, 1))
def test_gae_equals_the_slow_loop(
    texts: list[tuple[list[tuple[float, float]], float, bool, float]], padding: int, gamma: float
) -> None:
    width = max(len(steps) for steps, *_ in texts) + padding
    if width == 0:
        return
    rows = [steps + [(NAN, NAN)] * (width - len(steps)) for steps, *_ in texts]
    advantage = estimate(
        [[reward for reward, _ in row] for row in rows],
        [[value for _, value in row] for row in rows],
        [last_value if truncated else NAN for _, last_value, truncated, _ in texts],
        [len(steps) for steps, *_ in texts],
        [truncated for _, _, truncated, _ in texts],
        gamma,
        [lmbda for *_, lmbda in texts],
    )
    for row, (steps, last_value, truncated, lmbda) in zip(advantage, texts, strict=True):
        expected = slow_gae([r for r, _ in steps], [v for _, v in steps], last_value, truncated, gamma, lmbda)
        assert row == pytest.approx(expected + [0] * (width - len(steps)), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("truncated", [False, True])
def test_gae_equals_torchrls_estimator_without_padding(truncated: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    reward, value = torch.randn(2, 3, 5, generator=generator)
    last_value = torch.randn(3, generator=generator)
    done = torch.zeros(3, 5, 1, dtype=torch.bool)
    done[:, -1] = True
    data = TensorDict(
        {
            "state_value": value[..., None],
            "next": {
                "state_value": torch.cat([value[:, 1:], last_value[:, None]], 1)[..., None],
                "reward": reward[..., None],
                "done": done,
                "terminated": done & (not truncated),
            },
        },
        batch_size=[3, 5],
    )
    theirs = GAE(gamma=0.97, lmbda=0.9, value_network=None)(data)["advantage"][..., 0]
    mask = torch.ones(3, 5, dtype=torch.bool)
    ours = gae(reward, value, last_value, mask, torch.tensor([truncated] * 3), gamma=0.97, lmbda=0.9)
    torch.testing.assert_close(ours, theirs)


def test_a_long_text_carries_its_reward_back() -> None:
    """What is left of the last reward at the first token is about exp(-1 / alpha), however long the text."""
    lengths = torch.tensor([50, 500, 5000])
    left = length_adaptive_lambda(lengths, alpha=0.5) ** lengths
    torch.testing.assert_close(left, torch.full((3,), math.exp(-2)), rtol=0.05, atol=0)
    assert length_adaptive_lambda(torch.tensor([0, 1, 2]), alpha=0.05).tolist() == [0, 0, 0]  # never negative


# Estimators of the KL.


def policies() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    logits, reference = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(), reference.log_softmax(-1)


def exact_kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    return (log_p.exp() * (log_p - log_q)).sum()


def expected_gradient(estimator: Estimator) -> torch.Tensor:
    """Of the estimate as a loss: tokens are drawn from the policy, and the draw itself has no gradient."""
    logits, reference = policies()
    log_prob = logits.log_softmax(-1)
    loss = (log_prob.exp().detach() * kl_estimate(log_prob, reference, estimator)).sum()
    return torch.autograd.grad(loss, logits)[0]


def test_k1_and_k3_are_unbiased() -> None:
    logits, reference = policies()
    log_prob = logits.detach().log_softmax(-1)
    kl = exact_kl(log_prob, reference)
    assert kl > 0.1
    for unbiased in ("k1", "k3"):
        torch.testing.assert_close((log_prob.exp() * kl_estimate(log_prob, reference, unbiased)).sum(), kl)
    assert (kl_estimate(log_prob, reference, "k1") < 0).any()
    assert (kl_estimate(log_prob, reference, "k3") >= 0).all()
    assert (kl_estimate(log_prob, reference, "k2") >= 0).all()
    assert (log_prob.exp() * kl_estimate(log_prob, reference, "k2")).sum() != pytest.approx(kl.item(), rel=0.01)


def test_k2_has_the_gradient_of_the_kl() -> None:
    logits, reference = policies()
    (true,) = torch.autograd.grad(exact_kl(logits.log_softmax(-1), reference), logits)
    assert true.abs().max() > 0.05
    torch.testing.assert_close(expected_gradient("k2"), true)


def test_the_traps_of_k1_and_k3_in_a_loss() -> None:
    """k1 has no gradient at all on average, and k3 that of the KL the other way round."""
    logits, reference = policies()
    torch.testing.assert_close(expected_gradient("k1"), torch.zeros(6, dtype=torch.float64))
    (other_way,) = torch.autograd.grad(exact_kl(reference, logits.log_softmax(-1)), logits)
    torch.testing.assert_close(expected_gradient("k3"), other_way)


def test_k3_is_exact_near_zero() -> None:
    """exp(x) - 1 - x of a small x would be rounding noise."""
    estimate = kl_estimate(torch.tensor([-1.0]), torch.tensor([-1.0001]), "k3").item()
    assert estimate == pytest.approx(5e-9, rel=0.1)


def test_unknown_estimators() -> None:
    with pytest.raises(ValueError, match="must be 'k1', 'k2' or 'k3', got 'k4'"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k4")  # type: ignore[arg-type]


# Weights of tokens.


def test_token_weights() -> None:
    mask = mask_of([4, 1, 0, 3], 5)  # three texts and a row of padding
    per_token, per_sequence = token_weights(mask, "token"), token_weights(mask, "sequence")
    fixed = token_weights(mask, "fixed", fixed_length=10)
    torch.testing.assert_close(per_token, mask / 8)
    torch.testing.assert_close(per_sequence, mask * torch.tensor([1 / 12, 1 / 3, 0, 1 / 9])[:, None])
    torch.testing.assert_close(fixed, mask / 30)
    assert per_token.sum().item() == pytest.approx(1)
    assert per_sequence.sum().item() == pytest.approx(1)


def test_token_weights_of_nothing_are_zero() -> None:
    mask = mask_of([0, 0], 3)
    for aggregate in ("token", "sequence", "fixed"):
        assert token_weights(mask, aggregate, fixed_length=4).tolist() == [[0, 0, 0], [0, 0, 0]]


def test_bad_aggregates() -> None:
    mask = mask_of([1])
    with pytest.raises(ValueError, match="needs a fixed_length of at least 1, got None"):
        token_weights(mask, "fixed")
    with pytest.raises(ValueError, match="needs a fixed_length of at least 1, got 0"):
        token_weights(mask, "fixed", fixed_length=0)
    with pytest.raises(ValueError, match="must be 'token', 'sequence' or 'fixed', got 'mean'"):
        token_weights(mask, "mean")  # type: ignore[arg-type]


def test_importance_weights() -> None:
    trainer = torch.tensor([[0.5, 0.4, 0.2, NAN]]).log()
    engine = torch.tensor([[0.5, 0.1, 0.4, NAN]]).log()
    weights = importance_weights(trainer, engine, mask_of([3], 4), cap=2.0)
    assert weights[0].tolist() == pytest.approx([1, 2, 0.5, 0])  # 4 is capped, 1/2 is not
