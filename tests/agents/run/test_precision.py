"""`--model.autocast auto`: what is chosen and why, that a run remembers it, and that measuring leaves no trace."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict

from agents.cli.options import read_options
from agents.config import TrainConfig
from agents.config.files import ConfigError, load_config
from agents.networks.network import Network
from agents.report.display import Display
from agents.run import precision
from agents.run.parts import build_parts
from agents.run.precision import Speeds, choose_precision, random_texts
from agents.run.training import fine_tune, train
from agents.state.saved import rng_state
from tests.agents.runs import Config, learn, running, same, train_until_it_breaks, weights_of
from tests.agents.small import small_network

Fake = Callable[[float, float], list[str]]

WITH_DROPOUT: dict[str, object] = {"model__lora__rank": 2, "model__lora__dropout": 0.3}


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take most of the time of runs as short as these."""
    monkeypatch.setattr("agents.run.loop.plot_curves", lambda *_: None)


@pytest.fixture
def passes_take(monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Let a pass take so many seconds in float32 and in bfloat16; gives the list of those that were timed."""

    def fake(float32: float, bfloat16: float) -> list[str]:
        timed: list[str] = []

        def seconds_of_a_pass(network: Network, data: TensorDict) -> float:
            timed.append("bfloat16" if network.config.in_bfloat16 else "float32")
            # The first two are warm-ups, which must not count; one of those after them is disturbed by something else.
            factor = {1: 1e-9, 2: 1e-6, 4: 100.0}.get(len(timed), 1.0)
            return factor * (bfloat16 if network.config.in_bfloat16 else float32)

        monkeypatch.setattr(precision, "seconds_of_a_pass", seconds_of_a_pass)
        return timed

    return fake


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the displays of runs were told."""
    lines: list[str] = []
    monkeypatch.setattr(Display, "message", lambda self, text: lines.append(text))
    return lines


@pytest.fixture
def copying(config: Config) -> Config:
    """Runs with a warm start: every text is 2 letters and an end."""

    def make(**changes: object) -> TrainConfig:
        args = {"length": 2, "alphabet": "abcd", "dense": True}
        own: dict[str, object] = {"task__name": "Copy", "task__args": args, "sft__steps": 4, "iterations": 2}
        return config(**own | changes)

    return make


@pytest.mark.parametrize(
    ("float32", "bfloat16", "chosen"), [(1.0, 0.5, "on"), (1.0, 0.9, "on"), (1.0, 0.92, "off"), (0.5, 1.0, "off")]
)
def test_the_faster_one_is_taken_and_float32_where_they_are_close(
    config: Config, passes_take: Fake, float32: float, bfloat16: float, chosen: str
) -> None:
    """bfloat16 has to be a tenth faster: 1 / 0.9 is 1.11, 1 / 0.92 is 1.09."""
    timed = passes_take(float32, bfloat16)
    with running(config(model__autocast="auto")) as run:
        assert timed == ["float32", "bfloat16"] * 3
        assert run.network.config.autocast == run.algorithm.config.model.autocast == chosen
        assert run.algorithm.trusted == (chosen == "off")
        assert run.speeds is not None
        assert run.speeds.bfloat16 / run.speeds.float32 == pytest.approx(float32 / bfloat16)


def test_texts_are_as_long_as_those_of_the_task_and_as_many_as_in_a_micro_batch(
    copying: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, ...]] = []
    timed: list[tuple[int, ...]] = []

    def texts(network: Network, *shape: int) -> TensorDict:
        asked.append(shape)
        return random_texts(network, *shape)

    def seconds_of_a_pass(network: Network, data: TensorDict) -> float:
        timed.append((*data["tokens"].shape, data["action"].shape[1]))
        return 0.5

    monkeypatch.setattr(precision, "random_texts", texts)
    monkeypatch.setattr(precision, "seconds_of_a_pass", seconds_of_a_pass)
    build_parts(copying(model__autocast="auto", task__max_new_tokens=4)).close()
    parts = build_parts(copying(model__autocast="auto", task__max_new_tokens=4, actor__micro_batch_size=5))
    parts.close()
    prompt = len(parts.mdp.prompts.tokens[0])
    assert asked == [(prompt, 4, 8), (prompt, 4, 5)]  # a batch of 16 is learned from in 2 mini-batches
    assert timed[-6:] == [(1, prompt + 4, 4)] * 2 + [(5, prompt + 4, 4)] * 4
    assert parts.speeds == Speeds(float32=10 * (prompt + 4), bfloat16=10 * (prompt + 4))


@pytest.mark.parametrize(
    ("prompt", "reply", "rows", "expected"),
    [
        (12, 20, 4, (4, 32, 20)),
        (12, 20, 999, (12, 32, 20)),  # 384 tokens
        (3, 7, 999, (39, 10, 7)),  # the first number of rows that has as many
        (192, 576, 8, (1, 384, 288)),  # half of a text
        (9999, 1, 8, (1, 383 + 1, 1)),
    ],
)
def test_no_more_than_is_enough_is_measured(prompt: int, reply: int, rows: int, expected: tuple[int, int, int]) -> None:
    data = random_texts(small_network(), prompt, reply, rows)
    assert (*data["tokens"].shape, data["action"].shape[1]) == expected
    position = data["state_position"]
    assert torch.equal(data["action"], data["tokens"].gather(1, position + 1))
    assert int(position.max()) == expected[1] - 2, "the last token is learned, and nothing is chosen after it"


@pytest.mark.parametrize("changes", [{}, {"model__critic": "separate", "kl__beta": 0.1}, WITH_DROPOUT])
def test_measuring_leaves_no_trace(config: Config, changes: dict[str, object]) -> None:
    parts = build_parts(config(**changes))
    network = parts.network
    weights = {name: weight.clone() for name, weight in network.state_dict().items()}
    random = rng_state()
    speeds = choose_precision(config(), network, parts.mdp)
    parts.close()
    assert min(speeds.float32, speeds.bfloat16) > 0
    assert network.config.autocast == speeds.autocast
    assert [name for name, weight in network.named_parameters() if weight.grad is not None] == []
    assert not any(module.training for module in network.modules())
    same({k: v.float() for k, v in weights.items()}, {k: v.float() for k, v in network.state_dict().items()})
    for name, state in rng_state().items():
        assert torch.equal(state, random[name]), name


@pytest.mark.parametrize("changes", [{}, WITH_DROPOUT])
def test_a_run_that_has_chosen_is_the_run_that_was_told(
    config: Config, passes_take: Fake, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object]
) -> None:
    """To the last bit. The passes are real ones, only their times are not."""
    honest = precision.seconds_of_a_pass

    def run(choice: str) -> tuple[dict[str, torch.Tensor], float]:
        run, rows = learn(config(model__autocast=choice, iterations=2, **changes))
        return weights_of(run), rows[-1]["policy/loss"]

    told = run("on")
    passes_take(1.0, 0.5)
    faked = precision.seconds_of_a_pass

    def both(network: Network, data: TensorDict) -> float:
        assert honest(network, data) > 0
        return faked(network, data)

    monkeypatch.setattr(precision, "seconds_of_a_pass", both)
    chosen = run("auto")
    same(told[0], chosen[0])
    assert told[1] == chosen[1]


@pytest.mark.parametrize("begin", [train, fine_tune])
def test_a_run_says_what_it_has_chosen_and_measures_once(
    copying: Config, passes_take: Fake, said: list[str], begin: Callable[[TrainConfig], object]
) -> None:
    """Its warm start and its iterations compute in the same."""
    timed = passes_take(1.0, 0.5)
    made = copying(model__autocast="auto")
    begin(made)
    assert len(timed) == 6
    lines = [line for line in said if line.startswith("computing in ")]
    assert len(lines) == 1
    assert lines[0].startswith("computing in bfloat16: this machine runs forward and backward at ")
    assert load_config(made.out / "config.yaml") == made.replace(model__autocast="on")


@pytest.mark.parametrize(("steps", "iteration"), [(0, 1), (4, 0)])
def test_a_resumed_run_goes_on_with_what_it_has_chosen(
    copying: Config, passes_take: Fake, monkeypatch: pytest.MonkeyPatch, steps: int, iteration: int
) -> None:
    """Though the machine would now be faster with the other."""
    passes_take(1.0, 0.5)
    made = copying(model__autocast="auto", sft__steps=steps)
    train_until_it_breaks(made, monkeypatch, iteration)
    timed = passes_take(0.5, 1.0)
    settings = read_options(["--resume", "--out", str(made.out), "--model.autocast", "auto"]).settings
    result = train(settings if iteration else made, resume=True)
    assert timed == []
    whole = train(made.replace(model__autocast="on", out=made.out.with_name("whole")))
    assert result.after == whole.after
    with pytest.raises(ConfigError, match=r"--model.autocast is off, was on"):
        train(made.replace(model__autocast="off"), resume=True)


def test_a_run_that_was_killed_before_it_had_chosen_chooses_then(
    copying: Config, passes_take: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing was computed before."""
    made = copying(model__autocast="auto")

    def killed(*_: object) -> None:
        (made.out / "checkpoints").mkdir()  # so that the folder is not cleared away, as a kill would not
        raise RuntimeError("the power is gone")

    with monkeypatch.context() as patched:
        patched.setattr(precision, "measure", killed)
        with pytest.raises(RuntimeError, match="power"):
            train(made)
    assert load_config(made.out / "config.yaml") == made
    timed = passes_take(1.0, 0.5)
    train(made, resume=True)
    assert len(timed) == 6
    assert load_config(made.out / "config.yaml").model.autocast == "on"


def test_nothing_is_measured_where_nothing_is_to_be_chosen(config: Config, passes_take: Fake) -> None:
    timed = passes_take(1.0, 0.5)
    for changes in ({}, {"model__autocast": "on"}, {"model__autocast": "auto", "model__dtype": "bfloat16"}):
        with running(config(**changes)) as run:
            assert run.speeds is None
            assert run.algorithm.config.model.autocast == changes.get("model__autocast", "off").replace("auto", "off")
    assert timed == []


def test_the_flag(tmp_path: Path) -> None:
    for words, expected in (([], "off"), (["--model.autocast", "on"], "on"), (["--model.autocast=auto"], "auto")):
        settings = read_options(["--out", str(tmp_path / "run"), *words]).settings
        assert settings.model.autocast == expected
    path = tmp_path / "own.yaml"
    path.write_text("model: {autocast: on}")  # a word, as in YAML 1.2
    assert load_config(path).model.autocast == "on"
    path.write_text("model: {autocast: true}")
    with pytest.raises(ConfigError, match=r"model.autocast is True, expected one of off, on, auto"):
        load_config(path)
