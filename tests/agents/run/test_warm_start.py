"""The warm start as a part of a run: what it needs, what it leaves, and that a stop is only a pause."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from agents.config import SFTConfig, TrainConfig
from agents.config.files import ConfigError
from agents.networks.network import Network
from agents.report.display import Display
from agents.run.ending import Ending
from agents.run.evaluate import Evaluation, Evaluator
from agents.run.interruption import Interruption
from agents.run.parts import build_parts
from agents.run.sft import SFT
from agents.run.training import fine_tune, train
from agents.run.warm_start import SFT_CHECKPOINTS, WarmStart, warm_start
from llm_env.models import load_tokenizer
from tests.agents.runs import save_small_model, small_config

Config = Callable[..., TrainConfig]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("model"), spread=0.1)


@pytest.fixture
def config(folder: Path, tmp_path: Path) -> Config:
    def make(name: str = "run", **changes: object) -> TrainConfig:
        own: dict[str, object] = {"sft__steps": 12, "sft__learning_rate": 1e-2, "sft__checkpoint_every": 5}
        return small_config(tmp_path / name, folder, **own | changes)

    return make


class Said(Display):
    """A display that remembers its messages and warnings."""

    def __init__(self) -> None:
        super().__init__(1, "a test", enabled=False)
        self.lines: list[str] = []

    def message(self, text: str) -> None:
        self.lines.append(text)

    def warn(self, text: str) -> None:
        self.lines.append(f"warning: {text}")


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> list[Evaluation]:
    """Every evaluation, in order."""
    found: list[Evaluation] = []
    honest = Evaluator.evaluate

    def evaluate(self: Evaluator) -> Evaluation:
        found.append(honest(self))
        return found[-1]

    monkeypatch.setattr(Evaluator, "evaluate", evaluate)
    return found


def break_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """An error after so many steps, once."""
    honest = SFT.step

    def breaks(self: SFT) -> float:
        if self.steps == step:
            monkeypatch.setattr(SFT, "step", honest)
            raise RuntimeError("the power is gone")
        return honest(self)

    monkeypatch.setattr(SFT, "step", breaks)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def same(one: Path, other: Path) -> None:
    ours, theirs = (load_file(path / "model.safetensors") for path in (one, other))
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert torch.equal(weight, theirs[name]), name


def start(config: TrainConfig, display: Display | None = None, **more: Any) -> WarmStart:
    config.out.mkdir(exist_ok=True)
    return warm_start(config, config.out / "sft", display or Said(), **more)


def test_it_has_no_critic_no_reference_and_no_algorithm(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    built = []

    def record(*arguments: Any, **more: Any) -> Any:
        built.append(build_parts(*arguments, **more))
        return built[-1]

    monkeypatch.setattr("agents.run.warm_start.build_parts", record)
    monkeypatch.setattr("agents.run.parts.algorithm_class", None)  # none could be made
    start(config(model__critic="separate", model__reference="always", kl__beta=0.1))
    (parts,) = built
    assert parts.network.shared
    assert not parts.network.has_reference


@pytest.mark.parametrize("lora", [0, 4])
@pytest.mark.parametrize(("broken", "taken_up"), [(0, 0), (4, 0), (5, 5), (11, 10)])
def test_it_goes_on_to_the_same_end(
    config: Config,
    monkeypatch: pytest.MonkeyPatch,
    judged: list[Evaluation],
    broken: int,
    taken_up: int,
    lora: int,
) -> None:
    """Weights, optimizer, order of prompts, random numbers of the adapters' dropout; judged once before it."""
    more: dict[str, Any] = {"model__lora__rank": lora, "model__lora__dropout": 0.3} if lora else {}
    whole, stopped = config("whole", **more), config("stopped", **more)
    expected = start(whole)
    judged.clear()
    break_at(monkeypatch, broken)
    with pytest.raises(RuntimeError, match="power"):
        start(stopped)
    assert len(judged) == 1
    assert not (stopped.out / "sft").exists()
    torch.manual_seed(99)  # a new process's random numbers are others
    said = Said()
    result = start(stopped, said, resume=True)
    assert f"going on from supervised step {taken_up}" in said.lines
    assert (len(judged), judged[0].metrics) == (2, expected.before)
    assert result == expected
    same(whole.out / "sft", stopped.out / "sft")
    assert names(stopped.out) == ["sft"]


def test_the_comparison_can_fail(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its random state, a resumed warm start ends elsewhere."""
    more: dict[str, Any] = {"model__lora__rank": 4, "model__lora__dropout": 0.3}
    whole, stopped = config("whole", **more), config("stopped", **more)
    start(whole)
    break_at(monkeypatch, 7)
    with pytest.raises(RuntimeError, match="power"):
        start(stopped)
    monkeypatch.setattr("agents.run.warm_start.set_rng_state", lambda state: None)
    start(stopped, resume=True)
    with pytest.raises(AssertionError):
        same(whole.out / "sft", stopped.out / "sft")


def test_a_torn_checkpoint_is_refused_and_the_one_before_it_is_used(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, stopped = config("whole"), config("stopped")
    start(whole)
    break_at(monkeypatch, 11)
    with pytest.raises(RuntimeError, match="power"):
        start(stopped)
    assert names(stopped.out / SFT_CHECKPOINTS) == ["step-00000005", "step-00000010"]
    (stopped.out / SFT_CHECKPOINTS / "step-00000010" / "weights.safetensors").write_bytes(b"")
    said = Said()
    start(stopped, said, resume=True)
    assert "step-00000010 is torn" in said.lines[0]
    assert "going on from supervised step 5" in said.lines
    same(whole.out / "sft", stopped.out / "sft")


def test_begun_anew_it_does_not_take_up_what_another_left(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither with the function nor with a whole run: the configuration may have changed since."""
    for begin in (start, train, fine_tune):
        made = config()
        made = made.replace(out=made.out.with_name(begin.__name__))
        break_at(monkeypatch, 7)
        with pytest.raises(RuntimeError, match="power"):
            start(made)
        said: list[str] = []
        monkeypatch.setattr(Display, "message", lambda self, text, said=said: said.append(text))
        begin(made.replace(iterations=1))
        assert not [line for line in said if "going on" in line]
        assert SFT_CHECKPOINTS not in names(made.out)


@pytest.mark.parametrize("begin", [train, fine_tune])
def test_a_folder_that_holds_a_run_is_left_alone(config: Config, begin: Callable[..., Any]) -> None:
    """Nothing of it is deleted, nor taken for a part of the new run."""
    made = config(iterations=1)
    train(made)
    before = {path: path.stat().st_mtime_ns for path in made.out.rglob("*")}
    with pytest.raises(ConfigError, match=r"run holds a run already \(config.yaml, metrics.jsonl, checkpoints, sft,"):
        begin(made.replace(seed=1))
    assert before == {path: path.stat().st_mtime_ns for path in made.out.rglob("*")}


def test_a_finished_one_is_found_again(config: Config, judged: list[Evaluation]) -> None:
    """Also if the process was killed before it could delete the checkpoints."""
    made = config(iterations=1)
    train(made)
    when = (made.out / "sft" / "model.safetensors").stat().st_mtime_ns
    count = len(judged)
    (made.out / SFT_CHECKPOINTS / "step-00000010").mkdir(parents=True)
    train(made.replace(iterations=2), resume=True)
    assert (made.out / "sft" / "model.safetensors").stat().st_mtime_ns == when
    assert SFT_CHECKPOINTS not in names(made.out)
    assert len(judged) == count + 1, "after the second iteration"


def test_ctrl_c_writes_a_checkpoint_and_stops(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where none is written otherwise."""
    whole, stopped = config("whole", sft__checkpoint_every=0), config("stopped", sft__checkpoint_every=0)
    start(whole)
    asked, honest = Interruption(), SFT.step

    def interrupted(self: SFT) -> float:
        asked.stop = self.steps == 7
        return honest(self)

    monkeypatch.setattr(SFT, "step", interrupted)
    said = Said()
    with pytest.raises(KeyboardInterrupt):
        start(stopped, said, asked=asked)
    assert said.lines[-1] == "stopped by Ctrl-C after supervised step 8 (go on with --resume)"
    assert names(stopped.out / SFT_CHECKPOINTS) == ["step-00000008"]
    monkeypatch.setattr(SFT, "step", honest)
    start(stopped, said, resume=True)
    assert "going on from supervised step 8" in said.lines
    same(whole.out / "sft", stopped.out / "sft")


def test_a_real_signal_stops_a_run_in_its_warm_start(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, stopped = config("whole"), config("stopped")
    train(whole)
    honest = SFT.step

    def interrupted(self: SFT) -> float:
        if self.steps == 6:
            signal.raise_signal(signal.SIGINT)
        return honest(self)

    monkeypatch.setattr(SFT, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(stopped)
    assert names(stopped.out) == ["config.yaml", SFT_CHECKPOINTS]
    monkeypatch.setattr(SFT, "step", honest)
    assert train(stopped, resume=True).finished
    for name in ("sft", "model"):
        same(whole.out / name, stopped.out / name)


def test_the_warm_start_alone_goes_on_and_says_when_it_is_finished(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = config()
    said: list[str] = []
    monkeypatch.setattr(Display, "message", lambda self, text: said.append(text))
    break_at(monkeypatch, 7)
    with pytest.raises(RuntimeError, match="power"):
        fine_tune(made)
    model = fine_tune(made, resume=True)
    assert "going on from supervised step 5" in said
    assert names(made.out) == ["config.yaml", "model"]
    assert fine_tune(made, resume=True) == model
    assert said[-1] == f"the warm start in {made.out} is finished already; its model is {model}"


def test_the_warm_start_alone_leaves_training_runs_alone(config: Config) -> None:
    made = config(iterations=1)
    train(made)
    with pytest.raises(ConfigError, match="holds a run of `llm-env train`"):
        fine_tune(made, resume=True)


def test_how_it_goes_is_said(config: Config) -> None:
    said = Said()
    start(config(sft__steps=16), said)
    assert len(said.lines) == 8
    assert said.lines[0].startswith("supervised step     2 of 16   loss ")
    assert all(line.endswith(" left") and "nats per token   about " in line for line in said.lines[:-1])
    assert said.lines[-1].startswith("supervised step    16 of 16   loss ")
    assert said.lines[-1].endswith("nats per token")


def test_the_model_is_an_ordinary_folder(config: Config) -> None:
    made = config()
    start(made)
    assert "model.safetensors" in names(made.out / "sft")
    assert len(load_tokenizer(str(made.out / "sft"))) == 100


def test_it_ends_at_a_score(config: Config, judged: list[Evaluation], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is judged before the first step, after every second one, and at last; the third look is good enough."""
    scores = iter([0.9, 0.1, 0.3, 0.6, 0.7])
    honest = Evaluator.evaluate

    def evaluate(self: Evaluator) -> Evaluation:
        found = honest(self)
        return dataclasses.replace(found, metrics=found.metrics | {"eval/sampled": next(scores)})

    monkeypatch.setattr(Evaluator, "evaluate", evaluate)
    said = Said()
    ended = start(config(sft__steps=12, sft__stop_at=0.5, sft__evaluate_every=2), said)
    assert (ended.before["eval/sampled"], ended.after["eval/sampled"]) == (0.9, 0.7)
    assert "supervised step 6: held-out 0.6, enough for --sft.stop-at 0.5" in "\n".join(said.lines)
    assert len(judged) == 5


def test_a_jump_is_taken_back(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """A score that is the share of the way from the model judged after two steps to that after four, which is what the
    halving sees: 1, 0.5, 0.25, 0.375; the last is within 0.1 of 0.3.
    """
    path: list[dict[str, Tensor]] = []
    looks: list[float] = []

    def score(self: Ending) -> float:
        here = {name: weight.clone() for name, weight in self.network.weights().items()}
        if len(path) < 2:
            path.append(here)
            looks.append(float(len(path) - 1))
        else:
            name = max(here, key=lambda each: float((path[1][each] - path[0][each]).norm()))
            whole = path[1][name] - path[0][name]
            looks.append(float((here[name] - path[0][name]).flatten() @ whole.flatten() / whole.norm() ** 2))
        return looks[-1]

    made = Ending.__init__

    def begin(self: Ending, config: SFTConfig, network: Network, _: Callable[[], float], display: Display) -> None:
        made(self, config, network, lambda: score(self), display)

    monkeypatch.setattr(Ending, "__init__", begin)
    said = Said()
    jumped = config(sft__steps=6, sft__stop_at=0.3, sft__evaluate_every=2, sft__stop_within=0.1)
    start(jumped, said)
    assert looks == pytest.approx([0, 1, 0.5, 0.25, 0.375], abs=1e-3)
    assert "ends at 38% of the way from the model judged before: held-out 0.375" in "\n".join(said.lines)
    written = load_file(jumped.out / "sft" / "model.safetensors")
    actor = {name.removeprefix("actor."): weight for name, weight in path[0].items() if name.startswith("actor.")}
    assert written.keys() >= actor.keys()
    for name, weight in actor.items():
        torch.testing.assert_close(written[name], torch.lerp(weight, path[1][f"actor.{name}"], 0.375))


def test_being_judged_changes_no_step(config: Config) -> None:
    often, never = config("often", sft__stop_at=2.0, sft__evaluate_every=1), config("never")
    said = Said()
    start(often, said)
    start(never)
    same(often.out / "sft", never.out / "sft")
    assert "not to --sft.stop-at 2: give it more (--sft.steps)" in "\n".join(said.lines)
