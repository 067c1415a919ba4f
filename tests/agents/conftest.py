"""For all tests of the agent."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from agents.config import TrainConfig
from agents.metrics import table
from tests.agents.runs import Config, save_small_model, small_config


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Models this small are not faster with two, and much slower beside another process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model whose distributions are far from uniform."""
    return save_small_model(tmp_path_factory.mktemp("model"), spread=0.2)


@pytest.fixture
def config(random_model: Path, tmp_path: Path) -> Config:
    """Makes configurations of small runs; some files have another one."""

    def make(**changes: object) -> TrainConfig:
        own: dict[str, object] = {"task__name": "VowelShare", "task__args": {}}
        return small_config(tmp_path / "run", random_model, **own | changes)

    return make


@pytest.fixture
def own_metrics() -> Iterator[None]:
    """Metrics that a test registers are forgotten when it ends."""
    before = dict(table._METRICS)
    yield
    table._METRICS.clear()
    table._METRICS.update(before)
