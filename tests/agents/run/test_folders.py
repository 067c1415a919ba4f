"""A folder holds one run: another neither takes what is there for its own, nor harms it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agents.config import TrainConfig
from agents.config.files import RUN_FILES, ConfigError, load_config
from agents.run.loop import Training
from agents.run.sft import SFT
from agents.run.training import fine_tune, train
from agents.run.warm_start import SFT_CHECKPOINTS
from tests.agents.runs import small_config

Config = Callable[..., TrainConfig]
COMMANDS = pytest.mark.parametrize("begin", [train, fine_tune])


@pytest.fixture
def config(random_model: Path, tmp_path: Path) -> Config:
    return lambda **changes: small_config(tmp_path / "run", random_model, **{"sft__steps": 4} | changes)


def stop(monkeypatch: pytest.MonkeyPatch, what: type, method: str, calls: int) -> None:
    """An error when a method is called after so many times."""
    honest, called = getattr(what, method), []

    def breaks(self: Any) -> Any:
        called.append(self)
        if len(called) > calls:
            raise RuntimeError("the power is gone")
        return honest(self)

    monkeypatch.setattr(what, method, breaks)


def files_of(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@COMMANDS
@pytest.mark.parametrize("name", RUN_FILES)
def test_whatever_is_left_of_a_run_is_noticed(config: Config, begin: Callable[..., Any], name: str) -> None:
    """Checkpoints would be resumed from, a warm start's model taken for the new one, others replaced."""
    made = config()
    (made.out / name).mkdir(parents=True)
    with pytest.raises(ConfigError, match=rf"holds a run already \({name}\)"):
        begin(made)
    assert list(made.out.iterdir()) == [made.out / name]


def test_a_killed_run_is_not_gone_on_with_as_another(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither begun anew in its folder, to be resumed from its checkpoints later, nor resumed with other settings."""
    made = config(sft__steps=0, iterations=4)
    stop(monkeypatch, Training, "iterate", 2)
    with pytest.raises(RuntimeError, match="power"):
        train(made)
    monkeypatch.undo()
    before = files_of(made.out)
    other = made.replace(seed=1, actor__learning_rate=0.5)
    with pytest.raises(ConfigError, match="holds a run already"):
        train(other)
    with pytest.raises(ConfigError, match=r"(?s)goes on as it was told .*--actor.learning-rate is 0\.5, was 0\.003"):
        train(other, resume=True)
    assert files_of(made.out) == before
    # What does not decide what it learns may change, and is remembered.
    changed = made.replace(iterations=5, log__samples_every=1)
    assert train(changed, resume=True).finished
    assert load_config(made.out / "config.yaml") == changed


@COMMANDS
def test_a_killed_warm_start_is_not_gone_on_with_as_another(
    config: Config, monkeypatch: pytest.MonkeyPatch, begin: Callable[..., Any]
) -> None:
    made = config(sft__checkpoint_every=1, iterations=1)
    stop(monkeypatch, SFT, "step", 2)
    with pytest.raises(RuntimeError, match="power"):
        begin(made)
    monkeypatch.undo()
    before = files_of(made.out)
    assert (made.out / SFT_CHECKPOINTS / "step-00000002").exists()
    other = made.replace(sft__learning_rate=0.5)
    with pytest.raises(ConfigError, match="holds a run already"):
        begin(other)
    with pytest.raises(ConfigError, match=r"sft\.learning-rate is 0\.5, was 0\.001"):
        begin(other, resume=True)
    assert files_of(made.out) == before
    begin(made, resume=True)
    assert (made.out / "model" / "model.safetensors").exists()
