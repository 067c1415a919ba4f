"""Promises 3 and 4: padding cannot matter, and the size of micro-batches cannot matter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tensordict import TensorDict

from agents.losses.ops import Aggregate, token_weights
from agents.metrics import Average
from agents.networks.network import Network
from tests.agents.small import (
    NETWORKS,
    VOCAB,
    clip_loss,
    gradient_loss,
    gradients_of,
    loss_of,
    near_old_policy,
    penalty_loss,
    small_batch,
    small_network,
)

LOSSES: dict[str, Callable[[Network], Any]] = {
    "clip": lambda n: clip_loss(n, dual_clip=1.5, entropy=0.1, value_clip=0.5),
    "clip, k2": lambda n: clip_loss(n, kl=0.2, kl_estimator="k2"),
    "clip, k3": lambda n: clip_loss(n, kl=0.2, kl_estimator="k3"),
    "no critic": lambda n: clip_loss(n, value=None),
    "penalty": penalty_loss,
    "policy gradient": lambda n: gradient_loss(n, entropy=0.1, kl=0.2),
}
AGGREGATES: list[Aggregate] = ["token", "sequence", "fixed"]

for_all = [
    pytest.mark.parametrize("kind", LOSSES),
    pytest.mark.parametrize("name", NETWORKS),
    # The network is the same for all examples, and no example changes it.
    settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow]),
]
lengths_of_texts = st.lists(st.integers(1, 5), min_size=1, max_size=5)
seeds = st.integers(0, 10**6)


def marked(test: Any) -> Any:
    for mark in for_all:
        test = mark(test)
    return test


def computed(network: Network, loss: Any, data: TensorDict) -> tuple[TensorDict, dict[str, torch.Tensor]]:
    out: TensorDict = loss(data)
    loss_of(out).backward()
    return out.detach(), gradients_of(network)


def assert_same(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> None:
    assert set(ours.keys()) == set(theirs.keys())
    for key, value in theirs.items():
        assert value.isfinite().all(), key
        # Texts that are read without padding are added up in another order: sums of numbers as large as 250 are then
        # rounded by more than 2e-5, small ones among them, too.
        near = max(2e-5, 1e-6 * float(value.abs().max()))
        torch.testing.assert_close(ours[key], value, rtol=1e-3, atol=near, msg=lambda m, key=key: f"{key}: {m}")


def widen(data: TensorDict, steps: int, tokens: int, generator: torch.Generator) -> TensorDict:
    """More columns of junk: NaN in all numbers, any token, any position there is."""
    rows = len(data)
    length = data["tokens"].shape[1] + tokens

    def junk(key: str, value: torch.Tensor) -> torch.Tensor:
        more = (rows, tokens if key == "tokens" else steps, *value.shape[2:])
        if value.dtype == torch.bool:
            return torch.zeros(more, dtype=torch.bool)
        if value.is_floating_point():
            return torch.full(more, torch.nan)
        return torch.randint(0, length if key == "state_position" else VOCAB, more, generator=generator)

    wide = {key: torch.cat([value, junk(key, value)], 1) for key, value in data.items()}
    return TensorDict(wide, batch_size=[rows])


def add_rows(data: TensorDict, rows: int, generator: torch.Generator) -> TensorDict:
    """More rows, that are no texts."""
    steps, tokens = data["mask"].shape[1], data["tokens"].shape[1]
    empty = TensorDict({key: value.new_zeros((rows, *value.shape[1:])) for key, value in data.items()}, [rows])
    for value in empty.values():
        if value.is_floating_point():
            value.fill_(torch.nan)
    empty["tokens"] = torch.randint(0, VOCAB, (rows, tokens), generator=generator)
    empty["action"] = torch.randint(0, VOCAB, (rows, steps), generator=generator)
    return torch.cat([data, empty])


@marked
@given(
    lengths=lengths_of_texts,
    steps=st.integers(0, 3),
    tokens=st.integers(0, 3),
    rows=st.integers(0, 3),
    aggregate=st.sampled_from([None, *AGGREGATES]),
    seed=seeds,
)
def test_padding_and_order_cannot_matter(
    name: str,
    kind: str,
    lengths: list[int],
    steps: int,
    tokens: int,
    rows: int,
    aggregate: Aggregate | None,
    seed: int,
) -> None:
    """More columns, more rows, another order: the same losses, gradients and metrics."""
    network = small_network(NETWORKS[name])
    loss = LOSSES[kind](network)
    data = near_old_policy(network, small_batch(lengths, seed))
    generator = torch.Generator().manual_seed(seed)
    padded = add_rows(widen(data, steps, tokens, generator), rows, generator)
    padded = padded[torch.randperm(len(padded), generator=generator)]
    if aggregate is not None:
        for batch in (data, padded):
            batch["weight"] = token_weights(batch["mask"], aggregate, fixed_length=6)
    out, gradients = computed(network, loss, data)
    padded_out, padded_gradients = computed(network, loss, padded)
    assert_same(padded_out, out)
    assert_same(padded_gradients, gradients)


@marked
@given(
    lengths=lengths_of_texts,
    cuts=st.lists(st.integers(1, 4)),
    aggregate=st.sampled_from(AGGREGATES),
    seed=seeds,
)
def test_micro_batches_cannot_matter(
    name: str, kind: str, lengths: list[int], cuts: list[int], aggregate: Aggregate, seed: int
) -> None:
    """Cut the batch anywhere: the gradients add up to that of the whole, the losses to its loss, the means average."""
    network = small_network(NETWORKS[name])
    loss = LOSSES[kind](network)
    data = near_old_policy(network, small_batch(lengths, seed))
    data["weight"] = token_weights(data["mask"], aggregate, fixed_length=6)
    out, gradients = computed(network, loss, data)
    total: dict[str, torch.Tensor] = {}
    average, start = Average(), 0
    for size in [*cuts, len(data)]:
        if start < len(data):
            micro = data[start : start + size]
            # Its own padding goes with it.
            longest = int(micro["mask"].sum(1).max())
            micro = TensorDict({k: v if k == "tokens" else v[:, :longest] for k, v in micro.items()}, micro.batch_size)
            part = loss(micro)
            loss_of(part).backward()  # gradients accumulate
            for key, value in part.items():
                if key.startswith("loss_"):
                    total[key] = total.get(key, torch.zeros(())) + value.detach()
            average.add({k: v for k, v in part.items() if k not in total}, tokens=int(micro["mask"].sum()))
        start += size
    assert_same(gradients_of(network), gradients)
    assert_same(total, {key: value for key, value in out.items() if key.startswith("loss_")})
    means = {key: torch.tensor(value) for key, value in average.means().items()}
    assert set(means) | set(total) == set(out.keys())
    assert_same(means, {key: out[key] for key in means})


@pytest.mark.parametrize("name", NETWORKS)
def test_scores_do_not_see_padding(name: str) -> None:
    """Old log-probs, those of the reference, and values."""
    network, data = small_network(NETWORKS[name]), small_batch([3, 1, 5])
    generator = torch.Generator().manual_seed(0)
    padded = add_rows(widen(data, 2, 3, generator), 2, generator)
    for score in (
        lambda batch: network.actor.get_dist(batch.clone(False)).log_prob(batch["action"]),
        lambda batch: network.actor.get_dist(batch.clone(False)).entropy(),
        lambda batch: network.critic(batch.clone(False))["state_value"][..., 0],
        network.reference_log_prob,
    ):
        torch.testing.assert_close(score(padded)[padded["mask"]], score(data)[data["mask"]])
