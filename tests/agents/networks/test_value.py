"""The critic that is computed from each batch, against ridge regression as it is written down."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from agents.networks.value import FOLDS, MEMORY, STRENGTHS, FittedValueHead


def some_batches(count: int, size: int = 40, width: int = 5) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Features, targets, and the part of its batch that each row belongs to."""
    random = np.random.default_rng(0)
    truth = random.normal(size=width)
    batches = []
    for _ in range(count):
        read = random.normal(size=(size, width)) * [1, 10, 0.1, 1, 1]
        target = read @ truth + 3 + random.normal(size=size)
        batches.append((torch.tensor(read, dtype=torch.float32), torch.tensor(target, dtype=torch.float32)))
    return [(*batch, torch.arange(size) % FOLDS) for batch in batches]


def solutions(rows: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> dict[float, np.ndarray]:
    """Of a weighted ridge regression, by strength: each feature's ridge in its own unit, none for the constant."""
    rows = np.pad(rows, ((0, 0), (0, 1)), constant_values=1)
    products = (rows * weights[:, None]).T @ rows
    found = {}
    for strength in STRENGTHS:
        ridge = strength * np.diag(products)
        ridge[-1] = 0
        found[strength] = np.linalg.solve(products + np.diag(ridge), (rows * weights[:, None]).T @ targets)
    return found


def test_it_solves_the_ridge_regression_of_all_batches_so_far() -> None:
    head, batches = FittedValueHead(5), some_batches(3)
    unseen = [head.fit(*batch) for batch in batches][-1]
    age = np.repeat([MEMORY**2, MEMORY, 1.0], 40)  # older ones weigh less
    rows, targets = (np.concatenate([batch[i].double().numpy() for batch in batches]) for i in (0, 1))
    best = STRENGTHS[int(head.errors.argmin())]
    weights = np.append(head.linear.weight.numpy(), head.linear.bias.numpy())
    assert np.allclose(weights, solutions(rows, targets, age)[best], rtol=1e-4, atol=1e-5)
    # Those for a part of the last batch are of all but that part.
    for part in range(FOLDS):
        others = np.concatenate([np.ones(80, dtype=bool), np.arange(40) % FOLDS != part])
        expected = solutions(rows[others], targets[others], age[others])[best]
        assert np.allclose(unseen[part].numpy(), expected, rtol=1e-4, atol=1e-5)


def test_no_row_is_predicted_from_itself() -> None:
    """Whatever becomes of a text, the weights for its own part stay as they are."""
    (before, batch), surprised = some_batches(2), 7
    changed = batch[1].clone()
    changed[surprised] += 100
    found = []
    for target in (batch[1], changed):
        head = FittedValueHead(5)
        head.fit(*before)
        head.errors.mul_(1e9)  # the strength stays as it is, too
        found.append(head.fit(batch[0], target, batch[2]))
    same = [torch.equal(one, other) for one, other in zip(*found, strict=True)]
    assert same == [part == surprised % FOLDS for part in range(FOLDS)]


def test_hints_bear_no_ridge() -> None:
    """A strong ridge silences a hundred features that say nothing, and leaves a hint as large as it is."""
    head = FittedValueHead(100, hints=1)
    random = torch.Generator().manual_seed(0)
    for _ in range(3):
        hint, noise = torch.randn(60, 1, generator=random), torch.randn(60, 100, generator=random)
        target = 3 * hint[:, 0] + 0.1 * torch.randn(60, generator=random)
        head.fit(torch.cat([hint, noise], 1), target, torch.arange(60) % FOLDS)
    told, *others = head.linear.weight[0].tolist()
    assert told == pytest.approx(3, abs=0.05)
    assert max(map(abs, others)) < 0.01


def test_the_strength_is_the_one_that_predicted_best() -> None:
    """Where there is something to know, a weak ridge; where texts differ by chance only, and are few, a strong one."""
    clear = FittedValueHead(5)
    for batch in some_batches(6):
        clear.fit(*batch)
    assert STRENGTHS[int(clear.errors.argmin())] <= 1e-2
    chance = FittedValueHead(64)
    random = torch.Generator().manual_seed(0)
    for _ in range(6):
        read, target = torch.randn(80, 64, generator=random), torch.randn(80, generator=random)
        chance.fit(read, target, torch.arange(80) % FOLDS)
    assert STRENGTHS[int(chance.errors.argmin())] >= 10
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
        head.fit(hidden, torch.ones(rows), torch.arange(rows))
    assert head(hidden).isfinite().all()
    assert head(hidden)[:, 0].tolist() == pytest.approx([1.0] * rows, abs=1e-3)


def test_no_gradient_goes_through_it() -> None:
    hidden = torch.randn(2, 5, requires_grad=True)
    assert not FittedValueHead(5)(hidden).requires_grad


@pytest.mark.parametrize("where", ["hidden", "target"])
def test_what_is_not_finite_is_left_out(where: str) -> None:
    head = FittedValueHead(5)
    (read, target, fold), (later, more, _) = some_batches(2)
    head.fit(read, target, fold)
    before = head.linear.weight.clone()
    broken = {"hidden": later.clone(), "target": more.clone()}
    broken[where][3] = torch.nan
    unseen = head.fit(broken["hidden"], broken["target"], fold)
    assert torch.equal(head.linear.weight, before)
    assert torch.equal(unseen[:, :-1], before.expand(FOLDS, -1))
