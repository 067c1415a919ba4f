"""The critic that is computed from each batch, against ridge regression as it is written down."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from agents.networks.value import MEMORY, STRENGTHS, FittedValueHead


def some_batches(count: int, size: int = 40, width: int = 5) -> list[tuple[torch.Tensor, torch.Tensor]]:
    random = np.random.default_rng(0)
    truth = random.normal(size=width)
    batches = []
    for _ in range(count):
        hidden = random.normal(size=(size, width)) * [1, 10, 0.1, 1, 1]
        target = hidden @ truth + 3 + random.normal(size=size)
        batches.append((torch.tensor(hidden, dtype=torch.float32), torch.tensor(target, dtype=torch.float32)))
    return batches


def test_it_solves_the_ridge_regression_of_all_batches_so_far() -> None:
    head, batches = FittedValueHead(5), some_batches(3)
    for batch in batches:
        head.fit(*batch)
    # All rows at once, older ones with less weight; each feature's ridge in its own unit, none for the constant.
    age = np.repeat([MEMORY**2, MEMORY, 1.0], 40)
    rows = np.concatenate(
        [np.pad(hidden.double().numpy(), ((0, 0), (0, 1)), constant_values=1) for hidden, _ in batches]
    )
    wanted = np.concatenate([target.double().numpy() for _, target in batches])
    products = (rows * age[:, None]).T @ rows
    found = {}
    for strength in STRENGTHS:
        ridge = strength * np.diag(products)
        ridge[-1] = 0
        found[strength] = np.linalg.solve(products + np.diag(ridge), (rows * age[:, None]).T @ wanted)
    weights = np.append(head.linear.weight.numpy(), head.linear.bias.numpy())
    near = [strength for strength, solution in found.items() if np.allclose(weights, solution, rtol=1e-4, atol=1e-5)]
    assert near == [STRENGTHS[int(head.errors.argmin())]]


def test_the_strength_is_the_one_that_predicted_best() -> None:
    """Where there is something to know, a weak ridge; where texts differ by chance only, and are few, a strong one."""
    clear = FittedValueHead(5)
    for batch in some_batches(6):
        clear.fit(*batch)
    assert STRENGTHS[int(clear.errors.argmin())] <= 1e-2
    chance = FittedValueHead(64)
    random = torch.Generator().manual_seed(0)
    for _ in range(6):
        chance.fit(torch.randn(80, 64, generator=random), torch.randn(80, generator=random))
    assert STRENGTHS[int(chance.errors.argmin())] == max(STRENGTHS)
    assert float(chance.linear.weight.abs().max()) < 0.05


def test_a_copy_of_its_weights_goes_on_alike() -> None:
    first, other = FittedValueHead(5), FittedValueHead(5)
    *before, last = some_batches(4)
    for batch in before:
        first.fit(*batch)
    other.load_state_dict(first.state_dict())
    for head in (first, other):
        head.fit(*last)
    assert torch.equal(first.linear.weight, other.linear.weight)


@pytest.mark.parametrize("rows", [1, 3])
def test_fewer_rows_than_features_and_features_that_are_always_zero(rows: int) -> None:
    head = FittedValueHead(8)
    hidden = torch.randn(rows, 8)
    hidden[:, 3] = 0
    for _ in range(2):
        head.fit(hidden, torch.ones(rows))
    assert head(hidden).isfinite().all()
    assert head(hidden)[:, 0].tolist() == pytest.approx([1.0] * rows, abs=1e-3)


def test_no_gradient_goes_through_it() -> None:
    hidden = torch.randn(2, 5, requires_grad=True)
    assert not FittedValueHead(5)(hidden).requires_grad


@pytest.mark.parametrize("where", ["hidden", "target"])
def test_what_is_not_finite_is_left_out(where: str) -> None:
    head = FittedValueHead(5)
    (hidden, target), (later, more) = some_batches(2)
    head.fit(hidden, target)
    before = head.linear.weight.clone()
    broken = {"hidden": later.clone(), "target": more.clone()}
    broken[where][3] = torch.nan
    head.fit(broken["hidden"], broken["target"])
    assert torch.equal(head.linear.weight, before)
