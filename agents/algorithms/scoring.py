"""One pass over a batch before it is learned from: values, the trainer's own log-probs, the reference's."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from tensordict import TensorDict

from agents.networks.network import Network
from agents.networks.value import features
from agents.rollouts.hints import HINTS, LAST_HINTS
from agents.rollouts.masks import INDEX, TABLE
from agents.rollouts.packing import trim

Tensor = torch.Tensor

HIDDEN = ("hidden", "critic_hidden")
GRAPH = (*HIDDEN, "distribution")  # what a pass with `keep_graph` leaves for the first optimizer step
FEATURES, LAST_FEATURES = "value_features", "last_value_features"  # what a critic that is fitted reads


def by_length(data: TensorDict, size: int) -> list[Tensor]:
    """Indices of rows in portions of at most `size`, texts of similar length together: the least padding."""
    return list(data["length"].argsort(stable=True).split(size))


def score(
    network: Network, data: TensorDict, *, size: int, actor: bool, critic: bool, reference: bool, keep_graph: bool
) -> TensorDict:
    """Add what the present weights make of a batch.

    Args:
        network: actor, critic, reference.
        data: see `agents.rollouts.packing.pack`.
        size: texts in one forward pass.
        actor: add `trainer_log_prob` `[B, T]`.
        critic: add `state_value` `[B, T, 1]` and `last_value` `[B]`, that of the state after the last step; and, for a
            critic that is fitted, what it reads in them.
        reference: add `ref_log_prob` `[B, T]`.
        keep_graph: all in one pass, which also serves the first optimizer step: its hidden states and its distribution
            are added, with their graph.

    Returns:
        The batch; with `keep_graph` a copy in another order.
    """
    if keep_graph:
        [everything] = by_length(data, len(data))
        data = trim(data[everything])
        return data.update(_score(network, data, actor=True, critic=critic, reference=reference))
    rows, steps = data["mask"].shape
    found: dict[str, Tensor] = {}
    with torch.no_grad(), network.reference_at_hand() if reference else nullcontext():
        for part in by_length(data, size):
            scores = _score(network, trim(data[part]), actor=actor, critic=critic, reference=reference)
            for name, value in scores.items():
                of_text = value.ndim == 1 or name == LAST_FEATURES
                whole = (rows, *value.shape[1:]) if of_text else (rows, steps, *value.shape[2:])
                into = found.setdefault(name, value.new_zeros(whole))
                into[part if of_text else (part, slice(0, value.shape[1]))] = value
    return data.update(found)


def _score(network: Network, data: TensorDict, *, actor: bool, critic: bool, reference: bool) -> TensorDict:
    steps = data["mask"].shape[1]
    keep = torch.is_grad_enabled()
    found = TensorDict(batch_size=data.batch_size)
    # All states in which the agent chose, and the last one, whose value counts if the text was cut off.
    position = torch.cat([data["state_position"], data["length"][:, None] - 1], 1)
    states = TensorDict({"tokens": data["tokens"], "state_position": position}, batch_size=data.batch_size)
    network.encode(states, actor=actor, critic=critic)
    if critic:
        if network.num_hints:
            states[HINTS] = torch.cat([data[HINTS], data[LAST_HINTS][:, None]], 1)
        value = network.value_of(states)
        found["state_value"], found["last_value"] = value[:, :steps], value[:, steps, 0]
        if network.fits_values:
            read = features(states["hidden"].detach(), states.get(HINTS, None))
            found[FEATURES], found[LAST_FEATURES] = read[:, :steps], read[:, steps]
    if actor:
        here = data.select("mask", INDEX, TABLE, strict=False).set("hidden", states["hidden"][:, :steps])
        distribution = network.actor_head.get_dist(here)
        found["trainer_log_prob"] = distribution.log_prob(data["action"]).detach()
        if keep:
            found.set_non_tensor("distribution", distribution)
    if keep:
        found.update({name: states[name][:, :steps] for name in HIDDEN if name in states})
    if reference:
        found["ref_log_prob"] = network.reference_log_prob(data)
    return found
