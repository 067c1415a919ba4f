"""Optimizers and random generators go on as if they had never been saved."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from agents.state.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from agents.state.saved import (
    CheckpointError,
    json_text,
    load_optimizer_state,
    optimizer_state,
    rng_state,
    set_rng_state,
)


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert tensor.shape == theirs[name].shape, name
        raw = [t.contiguous().reshape(-1).view(torch.uint8) if t.numel() else t for t in (tensor, theirs[name])]
        assert torch.equal(*raw), name


def test_json_survives_or_is_refused() -> None:
    state = {"a": [1, 2.5, None, True, "ü"], "b": {"c": {}}, "float": 0.1 + 0.2, "inf": float("inf"), "big": 2**70}
    assert json.loads(json_text(state)) == state
    assert json.loads(json_text({"a": (1, 2)})) == {"a": [1, 2]}
    with pytest.raises(TypeError, match=r"state\['a'\]\['b'\]\[1\] is a Tensor, which JSON cannot hold"):
        json_text({"a": {"b": [0, torch.zeros(1)]}})
    with pytest.raises(TypeError, match=r"state\['a'\] has the key 3"):
        json_text({"a": {3: 1}})


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any, steps: range) -> None:
    for step in steps:
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()


def new_run(**options: Any) -> tuple[torch.nn.Module, torch.optim.Optimizer, Any]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    groups = [{"params": list(model[0].parameters()), "lr": 3e-3}, {"params": list(model[2].parameters())}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), **options)
    return model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"amsgrad": True, "foreach": True}])
def test_ten_steps_are_five_and_five(tmp_path: Path, options: dict[str, Any]) -> None:
    model, optimizer, scheduler = new_run(**options)
    train(model, optimizer, scheduler, range(10))

    first, first_optimizer, first_scheduler = new_run(**options)
    train(first, first_optimizer, first_scheduler, range(5))
    tensors, state = optimizer_state(first_optimizer)
    state = {"optimizer": state, "scheduler": first_scheduler.state_dict()}
    path = save_checkpoint(tmp_path, Checkpoint(5, {"model": first.state_dict(), "optimizer": tensors}, state), keep=1)

    second, second_optimizer, second_scheduler = new_run(**options)
    for parameter in second.parameters():
        parameter.data.fill_(9.0)
    loaded = load_checkpoint(path)
    second.load_state_dict(loaded.tensors["model"])
    load_optimizer_state(second_optimizer, loaded.tensors["optimizer"], loaded.state["optimizer"])
    second_scheduler.load_state_dict(loaded.state["scheduler"])
    assert second_optimizer.state_dict()["param_groups"] == first_optimizer.state_dict()["param_groups"]
    kept = loaded.tensors["optimizer"]["state.0.exp_avg"].clone()
    train(second, second_optimizer, second_scheduler, range(5, 10))
    assert_same(model.state_dict(), second.state_dict())
    assert_same(optimizer_state(optimizer)[0], optimizer_state(second_optimizer)[0])
    assert torch.equal(loaded.tensors["optimizer"]["state.0.exp_avg"], kept), "what was loaded is not stepped"


def test_an_optimizer_before_its_first_step() -> None:
    _, optimizer, _ = new_run()
    tensors, state = optimizer_state(optimizer)
    assert tensors == {}
    _, other, _ = new_run()
    load_optimizer_state(other, tensors, json.loads(json_text(state)))
    assert other.state_dict() == optimizer.state_dict()


def test_a_learning_rate_that_is_a_tensor() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    tensors, state = optimizer_state(torch.optim.AdamW([weight], lr=torch.tensor(0.25), foreach=False))
    other = torch.optim.AdamW([weight], lr=torch.tensor(0.5), foreach=False)
    load_optimizer_state(other, tensors, json.loads(json_text(state)))
    assert torch.equal(other.param_groups[0]["lr"], torch.tensor(0.25))


def test_an_optimizer_that_does_not_fit() -> None:
    _, optimizer, _ = new_run()
    tensors, state = optimizer_state(optimizer)
    a, b = torch.nn.Parameter(torch.ones(8, 3)), torch.nn.Parameter(torch.ones(8))
    for groups, message in (
        ([a], "it has 2 parameter groups, this one 1"),
        ([{"params": [a]}, {"params": [b]}], "its group 0 has 2 parameters, this one's 1"),
        ([{"params": [a, b]}, {"params": []}], "its group 1 has 2 parameters, this one's 0"),
        ([{"params": [b, a]}, {"params": []}], r"parameter 0 of group 0 has the shape \[8, 3\], this one's \[8\]"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_optimizer_state(torch.optim.AdamW(groups), tensors, state)


@pytest.mark.parametrize("odd", [False, True])
def test_random_numbers_go_on(tmp_path: Path, odd: bool) -> None:
    def draw() -> list[Any]:
        return [torch.rand(3).tolist(), np.random.normal(), np.random.rand(), random.gauss(0, 1), random.random()]  # noqa: NPY002

    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
    draw()
    if odd:  # both keep the second of a pair of Gaussian numbers for the next call
        random.gauss(0, 1), np.random.normal()  # noqa: NPY002
    path = save_checkpoint(tmp_path, Checkpoint(0, {"rng": rng_state()}), keep=1)
    expected = [draw(), draw()]
    random.seed(2), np.random.seed(2), torch.manual_seed(2)  # noqa: NPY002
    assert draw() != expected[0]
    set_rng_state(load_checkpoint(path).tensors["rng"])
    assert [draw(), draw()] == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_random_numbers_of_a_gpu_go_on(tmp_path: Path) -> None:
    torch.rand(3, device="cuda")
    path = save_checkpoint(tmp_path, Checkpoint(0, {"rng": rng_state()}), keep=1)
    expected = torch.rand(3, device="cuda")
    torch.cuda.manual_seed(5)
    set_rng_state(load_checkpoint(path).tensors["rng"])
    assert torch.equal(torch.rand(3, device="cuda"), expected)


def test_random_numbers_of_a_gpu_that_is_not_here() -> None:
    missing = f"cuda.{torch.cuda.device_count()}"
    with pytest.warns(UserWarning, match=missing.replace(".", ":")):
        set_rng_state(rng_state() | {missing: torch.zeros(16, dtype=torch.uint8)})
