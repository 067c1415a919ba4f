"""The fitted baseline, against its definition: weighted least squares, solved by somebody else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agents.algorithms.baselines import fitted_baseline, trusted_lambda
from agents.losses.ops import explained_variance

Tensor = torch.Tensor


def some_batch(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values, returns, log-probs and a mask; under padding values are 0, as the estimators make them."""
    random = np.random.default_rng(seed)
    rows, steps = int(random.integers(2, 6)), int(random.integers(2, 7))
    mask = np.arange(steps) < random.integers(1, steps + 1, size=rows)[:, None]
    returns = random.normal(size=(rows, steps)) * mask
    value = (0.5 * returns + random.normal(size=(rows, steps))) * mask
    log_prob = np.log(random.uniform(0.01, 0.99, size=(rows, steps))) * mask
    made = (torch.tensor(array, dtype=torch.float32) for array in (value, returns, log_prob))
    value, returns, log_prob = made
    return value, returns, log_prob, torch.tensor(mask)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_it_is_the_least_squares_fit_weighted_by_the_squared_gradient(seed: int) -> None:
    value, returns, log_prob, mask = some_batch(seed)
    baseline = fitted_baseline(value, returns, log_prob, mask)
    root = (1 - log_prob[mask].exp()).double().numpy()  # of the weight
    columns = [np.ones_like(root)]
    if float(explained_variance(value, returns, mask)) > 0:
        columns.append(value[mask].double().numpy())
    features, wanted = np.stack(columns, 1), returns[mask].double().numpy()
    coefficients = np.linalg.lstsq(features * root[:, None], wanted * root, rcond=None)[0]
    assert baseline[mask].numpy() == pytest.approx(features @ coefficients, abs=1e-3)
    assert not baseline[~mask].any()


def test_a_critic_that_explains_nothing_has_no_say() -> None:
    returns = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    mask, log_prob = torch.ones(1, 4, dtype=torch.bool), torch.full((1, 4), 0.5).log()
    upside_down = -returns  # a fit would turn it round, and be right about this batch
    assert fitted_baseline(upside_down, returns, log_prob, mask).tolist() == [[1.5] * 4]
    assert trusted_lambda(upside_down, returns, mask) == 1
    stretched = 1.5 * returns + 7
    assert fitted_baseline(stretched, returns, log_prob, mask)[0].tolist() == pytest.approx([0, 1, 2, 3], abs=1e-5)
    assert trusted_lambda(stretched, returns, mask) == pytest.approx(0.25)  # the errors are half of what varies


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -1e6, 1e-9])
def test_equal_returns_leave_exactly_nothing(value: float) -> None:
    returns, mask = torch.full((3, 4), value), torch.ones(3, 4, dtype=torch.bool)
    baseline = fitted_baseline(torch.randn(3, 4), returns, torch.rand(3, 4).log(), mask)
    assert not (returns - baseline).any()


def test_tokens_that_were_certain_all_of_them() -> None:
    returns, mask = torch.tensor([[1.0, 0.0]]), torch.ones(1, 2, dtype=torch.bool)
    assert fitted_baseline(torch.tensor([[1.0, 0.0]]), returns, torch.zeros(1, 2), mask).isfinite().all()


def test_it_makes_the_gradient_less_noisy_than_a_mean_does() -> None:
    """A policy of one choice in 26 states, right with probability 0.9: the gradient's variance, over many batches."""
    random = torch.Generator().manual_seed(0)
    right = torch.rand(4000, 64, generator=random) < 0.9
    returns, log_prob = right.float(), torch.where(right, 0.9, 0.1).log()
    score = torch.where(right, 0.1, -0.9)  # the gradient of the log-prob with respect to the logit of the right one
    mask = torch.ones(1, 64, dtype=torch.bool)
    fitted = torch.cat(
        [fitted_baseline(0 * r[None], r[None], p[None], mask) for r, p in zip(returns, log_prob, strict=True)]
    )
    noise = {
        "mean": (score * (returns - returns.mean(1, keepdim=True))).mean(1).std(),
        "fitted": (score * (returns - fitted)).mean(1).std(),
    }
    assert noise["fitted"] < 0.5 * noise["mean"]
