"""The state of a run as tensors and JSON: of optimizers and random generators, without pickle."""

from __future__ import annotations

import copy
import json
import random
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message says why."""


def json_text(value: Any) -> str:
    """JSON that gives the value back (tuples as lists), or an error that names the place of what JSON cannot hold."""

    def check(value: Any, place: str) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                if not isinstance(key, str):
                    raise TypeError(
                        f"{place} has the key {key!r}: JSON keeps strings only, so it would come back as one"
                    )
                check(inner, f"{place}[{key!r}]")
        elif isinstance(value, list | tuple):
            for index, inner in enumerate(value):
                check(inner, f"{place}[{index}]")
        elif not isinstance(value, str | int | float | None):
            raise TypeError(f"{place} is a {type(value).__name__}, which JSON cannot hold; tensors go into `tensors`")

    check(value, "state")
    return json.dumps(value)


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's `state_dict`, split into named tensors and what JSON can hold."""
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}

    def split(place: str, values: Mapping[str, Any]) -> dict[str, Any]:
        tensors.update({f"{place}.{name}": value for name, value in values.items() if isinstance(value, Tensor)})
        rest = {name: value for name, value in values.items() if not isinstance(value, Tensor)}
        return {
            name: split(f"{place}.{name}", value) if isinstance(value, Mapping) else value
            for name, value in rest.items()
        }

    return tensors, {
        "shapes": _shapes(optimizer),
        "groups": [split(f"group.{index}", group) for index, group in enumerate(state["param_groups"])],
        "state": {str(index): split(f"state.{index}", values) for index, values in state["state"].items()},
    }


def load_optimizer_state(
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    like: Callable[[Tensor, Tensor], Tensor] = lambda tensor, parameter: tensor,
) -> None:
    """Put back what `optimizer_state` gave, into an optimizer over parameters of the same shapes in the same groups.

    Args:
        optimizer: goes on where the other was.
        tensors: what it gave.
        state: the rest of it.
        like: makes of what is kept for a parameter, such as an average, what lies beside that parameter here.
    """
    shapes = _shapes(optimizer)
    if shapes != state["shapes"]:
        raise CheckpointError(_misfit(state["shapes"], shapes))
    groups: list[dict[str, Any]] = copy.deepcopy(state["groups"])
    values: dict[int, dict[str, Any]] = {int(index): inner for index, inner in copy.deepcopy(state["state"]).items()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for name, tensor in tensors.items():
        kind, index, key = name.split(".", 2)
        if kind == "state" and tensor.ndim:
            tensor = like(tensor, parameters[int(index)])
        inside = (groups if kind == "group" else values)[int(index)]
        *parts, last = key.split(".")
        for part in parts:
            inside = inside[part]
        inside[last] = tensor.clone()  # torch would keep these very tensors, and step them
    for group, own in zip(groups, optimizer.param_groups, strict=True):
        group.update(
            {key: tuple(group[key]) for key, value in own.items() if isinstance(value, tuple) and key in group}
        )
    optimizer.load_state_dict({"state": values, "param_groups": groups})


def rng_state() -> dict[str, Tensor]:
    """The state of all global random generators: torch's (CPU, and CUDA if it is in use), numpy's and Python's."""
    _, words, gauss = random.getstate()
    numpy_state = np.random.get_state(legacy=False)  # noqa: NPY002 - libraries may use the global generator
    assert isinstance(numpy_state, dict)
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(words),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.tensor([*numpy_state["state"]["key"].tolist(), numpy_state["state"]["pos"]]),
        "numpy_gauss": torch.tensor([numpy_state["gauss"]] * numpy_state["has_gauss"], dtype=torch.float64),
    }
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state |= {f"cuda.{index}": value for index, value in enumerate(torch.cuda.get_rng_state_all())}
    return state


def set_rng_state(state: Mapping[str, Tensor]) -> None:
    """Put back what `rng_state` gave."""
    torch.set_rng_state(state["torch"].clone())
    gauss = state["python_gauss"].tolist()
    random.setstate((3, tuple(state["python"].tolist()), gauss[0] if gauss else None))
    *key, pos = state["numpy"].tolist()
    gauss = state["numpy_gauss"].tolist()
    np.random.set_state(("MT19937", np.array(key, np.uint32), pos, len(gauss), gauss[0] if gauss else 0.0))  # noqa: NPY002
    for name in state:
        if name.startswith("cuda."):
            index = int(name.removeprefix("cuda."))
            if index < torch.cuda.device_count():
                torch.cuda.set_rng_state(state[name].clone(), index)
            else:
                warnings.warn(f"the checkpoint has a random state of cuda:{index}, which is not here", stacklevel=2)


def _shapes(optimizer: torch.optim.Optimizer) -> list[list[list[int]]]:
    return [[list(parameter.shape) for parameter in group["params"]] for group in optimizer.param_groups]


def _misfit(saved: list[list[list[int]]], own: list[list[list[int]]]) -> str:
    message = "the saved optimizer does not fit this one: "
    if len(saved) != len(own):
        return message + f"it has {len(saved)} parameter groups, this one {len(own)}"
    for index, (theirs, ours) in enumerate(zip(saved, own, strict=True)):
        if len(theirs) != len(ours):
            return message + f"its group {index} has {len(theirs)} parameters, this one's {len(ours)}"
        for place, (shape, other) in enumerate(zip(theirs, ours, strict=True)):
            if shape != other:
                return message + f"parameter {place} of group {index} has the shape {shape}, this one's {other}"
    return message
