"""Engines in forked processes, whose parent's torch has computed in several threads."""

from __future__ import annotations

import multiprocessing
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from llm_env import TokenEnv
from llm_env.engines.transformers import TransformersEngine
from llm_env.models import load_model, load_tokenizer

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="nothing is forked here")


def compute() -> float:
    return float((torch.arange(10.0**6) * 1e-6).exp().sum())


@pytest.fixture(autouse=True)
def several_threads() -> Iterator[None]:
    """What a learner in the parent has done: the pool of this process has threads now, which a child will not have."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    compute()
    yield
    torch.set_num_threads(before)


def in_a_fork(action: Callable[[], Any], seconds: float) -> Any:
    """What an action gives in a forked process; None if it takes longer."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    child = context.Process(target=lambda: theirs.send(action()))
    child.start()
    try:
        return ours.recv() if ours.poll(seconds) else None
    finally:
        child.kill()
        child.join()


def test_torch_itself_waits_for_ever() -> None:
    """What all this is about; should it fail, a newer torch has no need of `forks`."""
    assert in_a_fork(compute, seconds=1) is None


def by_name() -> tuple[np.ndarray, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        env = TokenEnv("Copy", engine="transformers", observe="logits")
        env.reset(seed=0)
        return env.step(70)[0]["logits"], [str(warning.message) for warning in caught]


def test_an_engine_made_in_the_child() -> None:
    logits, messages = in_a_fork(by_name, seconds=60)
    np.testing.assert_allclose(logits, by_name()[0], atol=1e-4)
    (message,) = messages  # said once
    assert "it computes in one thread here" in message
    assert "AsyncVectorEnv(..., context='spawn') or 'forkserver'" in message
    assert torch.get_num_threads() == 2  # here
    assert by_name()[1] == []


@pytest.mark.parametrize("use", ["step", "log_probs", "generate"])
def test_an_engine_made_in_the_parent(use: str) -> None:
    engine = TransformersEngine(load_model("tiny"), load_tokenizer("tiny"), num_slots=2, context=2000)
    text = np.arange(3, 99).repeat(20)  # long enough for torch to share the work out

    def act() -> float:
        if use == "step":
            return float(engine.start([0], [text])[0, 5])
        if use == "log_probs":
            return float(engine.log_probs([text])[0].sum())
        return float(next(iter(engine.stream([text]))).log_probs.sum())

    found = in_a_fork(act, seconds=60)
    assert found is not None
    if use != "generate":
        assert found == pytest.approx(act(), abs=1e-2)
