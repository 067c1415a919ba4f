"""Reward models and DPO beside TRL 1.12, in an environment of its own: one loss, one gradient."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

BENCHMARKS = Path(__file__).parents[1] / "examples" / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import preferences  # noqa: E402
import trl_side  # noqa: E402

from agents.preferences.dpo import DPOTrainer  # noqa: E402
from agents.preferences.pairs import Pair  # noqa: E402
from llm_env.models import load_tokenizer, model_folder  # noqa: E402

PAIRS = [Pair(f"say {n % 3}: ", "a" * (1 + n % 5) + "b", "a" * (n % 3) + "c") for n in range(8)]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def python() -> Path:
    try:
        return trl_side.trl_python()
    except RuntimeError as error:
        pytest.skip(str(error))


def moved(model: torch.nn.Module) -> None:
    """Another policy, so that the loss is not where it is flat."""
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.02 * torch.randn_like(weight))


@pytest.mark.parametrize("kind", ["reward-model", "dpo"])
def test_one_loss_and_one_gradient(kind: str, python: Path, tmp_path: Path) -> None:
    side = preferences.Side("tiny", PAIRS, batch=8, micro=8, max_length=64)
    trainer = side.trainer(kind)
    model: Any = trainer.model.engine_model() if isinstance(trainer, DPOTrainer) else trainer.model
    if isinstance(trainer, DPOTrainer):
        trainer.config = replace(trainer.config, beta=0.3, smoothing=0.0)
    moved(model)
    model.save_pretrained(tmp_path / "model")
    load_tokenizer("tiny").save_pretrained(tmp_path / "model")
    found = preferences.beside(
        python,
        {
            "kind": kind, "model": str(tmp_path / "model"), "reference": str(model_folder("tiny")),
            "rows": preferences.rows_of(trainer), "batch_size": 8, "micro_batch_size": 8, "learning_rate": 1e-9,
            "center": 0.01, "beta": 0.3, "gradients": str(tmp_path / "gradients.safetensors"), "threads": 1,
        },
    )  # fmt: skip
    model.zero_grad()
    loss = trainer.losses(range(8)).mean()
    loss.backward()
    assert float(loss.detach()) == pytest.approx(found["losses"][0], rel=1e-4)
    theirs = load_file(tmp_path / "gradients.safetensors")
    ours = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    assert ours.keys() == theirs.keys()
    largest = max(float(each.abs().max()) for each in theirs.values())
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-5 * largest, msg=name)
