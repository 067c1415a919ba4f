"""The command line and the configuration files: what is said is what is run, and mistakes are named."""

from __future__ import annotations

import dataclasses
import os
import re
import string
import subprocess
import sys
import types
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agents import config_checks
from agents.cli import main
from agents.config import TrainConfig
from agents.config_checks import flag, flatten
from agents.config_io import ConfigError, check_config, differences, load_config, save_config
from agents.guards import TrainingDiverged
from agents.presets import PRESETS

# Strategies for every type that a field has.
WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
YAML_TRAPS = st.sampled_from(
    ["no", "yes", "on", "null", "~", "", "1e-4", "0x1f", "010", "1:30", "2024-01-01", "- a: b", "\x85"]
)
NUMBERS = st.floats(allow_nan=False)


def values_of(kind: Any) -> st.SearchStrategy[Any]:
    origin, members = get_origin(kind), get_args(kind)
    if dataclasses.is_dataclass(kind):
        return st.builds(kind, **{name: values_of(hint) for name, hint in get_type_hints(kind).items()})
    if origin is Literal:
        return st.sampled_from(members)
    if origin is dict:
        return st.dictionaries(values_of(members[0]), values_of(members[1]), max_size=3)
    if origin is tuple:
        return st.tuples(*map(values_of, members))
    if members:
        return st.one_of(*map(values_of, members))
    plain = {int: st.integers(), float: NUMBERS, bool: st.booleans(), str: WORDS | YAML_TRAPS, type(None): st.none()}
    return st.text(string.ascii_letters + "/.~ ", min_size=1).map(Path) if kind is Path else plain[kind]


@given(config=values_of(TrainConfig))
@settings(max_examples=60, deadline=None)
def test_a_file_gives_back_what_was_saved(tmp_path_factory: pytest.TempPathFactory, config: TrainConfig) -> None:
    path = tmp_path_factory.mktemp("config") / "config.yaml"
    save_config(config, path)
    loaded = load_config(path)
    assert loaded == config
    assert repr(loaded) == repr(config), "1 == 1.0 == True, but they are not the same"
    assert [file.name for file in path.parent.iterdir()] == ["config.yaml"]


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def test_a_file_may_name_some_fields(tmp_path: Path) -> None:
    path = write(
        tmp_path, "actor: {learning_rate: 1e-4}\nloss: {value_clip: none}\ntask: {args: {alphabet: no, n: 1e3}}"
    )
    base = TrainConfig().replace(seed=7, actor__epochs=9, actor__learning_rate=1.0)
    expected = base.replace(
        actor__learning_rate=1e-4, loss__value_clip=None, task__args={"alphabet": "no", "n": 1000.0}
    )
    assert load_config(path, base) == expected
    assert set(differences(base, expected)) == {"actor.learning_rate", "loss.value_clip", "task.args"}
    assert load_config(write(tmp_path, "# nothing\n")) == TrainConfig()
    assert load_config(write(tmp_path, "actor: {learning_rate: 1}")).actor.learning_rate == 1.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("iterations: many", "iterations is 'many', expected a whole number"),
        ("iterations: 1.5", "iterations is 1.5, expected a whole number"),
        ("iterations: true", "iterations is True, expected a whole number"),
        ("algo: pppo", "algo is 'pppo', expected one of ppo, reinforce, a2c, grpo; did you mean ppo?"),
        ("loss: {value_clip: some}", "loss.value_clip is 'some', expected a number or none"),
        ("log: {display: 1}", "log.display is 1, expected true or false"),
        ("out: 3", "out is 3, expected a path"),
        ("actor: {betas: [0.9]}", r"actor.betas is [0.9], expected a list of 2 values, each a number"),
        ("actor: {betas: [0.9, high]}", r"actor.betas[1] is 'high', expected a number"),
        ("task: {args: [length, 6]}", "task.args is ['length', 6], expected a mapping"),
        ("task: Reverse", "task is 'Reverse', expected a mapping of fields"),
        ("model: {lora: {rang: 8}}", "unknown field model.lora.rang; did you mean model.lora.rank"),
        ("learning_rate: 1e-4", "unknown field learning_rate; did you mean sft.learning_rate or actor.learning_rate"),
        ("zzz: 1", "unknown field zzz; known: algo, seed"),
        ("- a", "the file is ['a'], expected a mapping"),
        ("a: [", "cannot be read as YAML"),
    ],
)
def test_mistakes_in_a_file(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        load_config(path)
    assert str(path) in str(error.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no configuration file"):
        load_config(tmp_path / "nowhere.yaml")


GRPO = {"algo": "grpo", "rollout__completions_per_prompt": 8}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollout__batch_size": 0}, "--rollout.batch-size is 0, expected at least 1"),
        ({"rollout__temperature": 0.0}, "--rollout.temperature is 0.0, expected a number above 0"),
        ({"rollout__over_sample": 0.5}, "--rollout.over-sample is 0.5, expected at least 1"),
        ({"actor__learning_rate": float("nan")}, "--actor.learning-rate is nan, expected 0 or more"),
        ({"critic__epochs": 0}, "--critic.epochs is 0, expected at least 1"),
        ({"advantage__gamma": 1.5}, "--advantage.gamma is 1.5, expected a number from 0 to 1"),
        ({"advantage__actor_lambda": -0.1}, "--advantage.actor-lambda is -0.1"),
        ({"loss__dual_clip": 1.0}, "--loss.dual-clip is 1.0, expected a number above 1"),
        ({"loss__clip_low": 2.0}, "--loss.clip-low is 2.0, expected at most 1"),
        ({"actor__betas": (0.9, 1.0)}, "--actor.betas is (0.9, 1.0)"),
        ({"model__lora__dropout": 1.0}, "--model.lora.dropout is 1.0, expected a number from 0 to below 1"),
        ({"kl__beta": 0.1, "model__reference": "none"}, "--kl.beta is 0.1, but there is no model to compare with"),
        ({"model__refresh_reference": 5, "model__reference": "none"}, "--model.refresh-reference is 5"),
        ({"kl__target": 1.0}, "--kl.target is 1.0, but an adapted --kl.beta"),
        ({"kl__estimator": "k3"}, "--kl.estimator is k3, but a penalty in the reward is always k1"),
        ({"model__lora__rank": 8, "model__reference_dtype": "bfloat16"}, "but with LoRA the reference is the model"),
        ({"algo": "grpo"}, "--rollout.completions-per-prompt is 1, but --algo grpo compares"),
        ({**GRPO, "critic_warmup": 1}, "--critic-warmup is 1, but --algo grpo has no critic"),
        ({"rollout__completions_per_prompt": 5}, "--rollout.batch-size is 256, expected a multiple"),
        ({"rollout__drop_uniform_groups": True}, "--rollout.drop-uniform-groups needs groups"),
        ({"rollout__batch_size": 3}, "--critic.minibatches is 4, more than there are texts in a batch"),
        ({"loss__penalty": True, "loss__dual_clip": 3.0}, "--loss.dual-clip is 3.0, but --loss.penalty replaces"),
        ({"advantage__kind": "sequence", "advantage__length_adaptive": 0.1}, "only --advantage.kind gae has a lambda"),
        ({"critic_warmup": 100}, "--critic-warmup is 100 of --iterations 100: the policy would never learn"),
        ({"device": "gpu"}, "--device is gpu, expected cpu, cuda"),
        ({"device": "cuda:99"}, "--device is cuda:99, but torch finds"),
        ({"algo": "pppo"}, "algo is 'pppo', expected one of ppo"),
        ({"seed": 1.5}, "seed is 1.5, expected a whole number"),
    ],
)
def test_configurations_that_make_no_sense(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_config(TrainConfig().replace(**changes))


def test_all_mistakes_are_named_at_once() -> None:
    with pytest.raises(ConfigError, match=r"(?s)^2 things are wrong:.*--kl.horizon.*--seed"):
        check_config(TrainConfig().replace(seed=-1, kl__horizon=0))


def test_configurations_that_make_sense() -> None:
    check_config(TrainConfig())
    check_config(TrainConfig().replace(**GRPO))
    for preset in PRESETS.values():
        check_config(preset.config)


def test_every_number_has_a_range() -> None:
    """A field that is added to the configuration must be added to the checks."""
    ranges = [names for name, names in vars(config_checks).items() if name.isupper()]
    known = {
        name.replace("optimizer.", part, 1) if name.startswith("optimizer.") else name
        for names in ranges
        for name in names
        for part in ("actor.", "critic.")
    }
    hints: dict[str, Any] = {}

    def collect(kind: Any, prefix: str = "") -> None:
        for name, hint in get_type_hints(kind).items():
            if dataclasses.is_dataclass(hint):
                collect(hint, f"{prefix}{name}.")
            else:
                hints[prefix + name] = hint

    collect(TrainConfig)
    numbers = {name for name, hint in hints.items() if {int, float} & {hint, *get_args(hint)} and "betas" not in name}
    assert known == numbers


class Trained:
    """Stands in for the training and the warm start, and writes down what they were told."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, TrainConfig, bool]] = []
        self.error: BaseException | None = None

    @property
    def last(self) -> TrainConfig:
        return self.calls[-1][1]

    def train(self, config: TrainConfig, resume: bool) -> None:
        if self.error is not None:
            raise self.error
        self.calls.append(("train", config, resume))
        config.out.mkdir(parents=True, exist_ok=True)
        save_config(config, config.out / "config.yaml")

    def run_sft(self, config: TrainConfig) -> None:
        self.calls.append(("sft", config, False))


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Trained:
    stub = Trained()
    for name, function in (("train", stub.train), ("sft", stub.run_sft)):
        module = types.ModuleType(f"agents.{name}")
        setattr(module, function.__name__, function)
        monkeypatch.setitem(sys.modules, f"agents.{name}", module)
    monkeypatch.chdir(tmp_path)
    return stub


def test_later_ones_win(trained: Trained, tmp_path: Path) -> None:
    """Defaults, then the preset, then the file, then the flags."""
    preset = PRESETS["sentiment-smollm2"].config
    path = write(tmp_path, "seed: 3\nkl: {beta: 0.25}\nmodel: {dtype: bfloat16}")
    assert main(["train", "--preset", "sentiment-smollm2", f"--config={path}", "--kl.beta", "0.5"]) == 0
    assert trained.last == preset.replace(seed=3, model__dtype="bfloat16", kl__beta=0.5)
    assert main(["train"]) == 0
    assert trained.last == TrainConfig()
    assert main(["train", "--out", "a", "--preset=reverse-tiny"]) == 0
    assert trained.last == PRESETS["reverse-tiny"].config.replace(out=Path("a"))


def test_every_kind_of_flag(trained: Trained) -> None:
    line = (
        "--algo grpo --rollout.completions-per-prompt 4 --task.args length 5 alphabet no dense true x 1e-3"
        " --log.no-display --log.tensorboard --loss.value-clip none --loss.importance-cap None --rollout.slots 8"
        " --model.reference-dtype bfloat16 --rollout.engine-dtype none --task.module none --actor.betas 0.8 0.9"
        " --model.reference none --out runs/x --actor.learning-rate 1e-4"
    )
    assert main(["train", *line.split()]) == 0
    assert trained.last == TrainConfig().replace(
        algo="grpo",
        rollout__completions_per_prompt=4,
        task__args={"length": 5, "alphabet": "no", "dense": True, "x": 0.001},
        log__display=False,
        log__tensorboard=True,
        loss__value_clip=None,
        loss__importance_cap=None,
        rollout__slots=8,
        model__reference_dtype="bfloat16",
        actor__betas=(0.8, 0.9),
        model__reference="none",
        out=Path("runs/x"),
    )
    assert type(trained.last.task.args["length"]) is int


def test_resuming(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begun = ["train", "--preset", "reverse-tiny", "--actor.learning-rate", "0.5"]
    assert main(begun) == 0
    first = trained.last
    assert main(begun) == 2
    assert "holds a run already (config.yaml): go on with it (--resume)" in capsys.readouterr().err

    assert main([*begun, "--resume"]) == 0
    assert trained.calls[-1] == ("train", first, True)
    # The preset names the folder; what the run was told otherwise is remembered.
    assert main(["train", "--preset", "reverse-tiny", "--resume"]) == 0
    assert trained.last == first
    more = ["--iterations", "999", "--checkpoint.every", "1", "--log.no-display"]
    assert main(["train", "--out", str(first.out), "--resume", *more]) == 0
    assert trained.last == first.replace(iterations=999, checkpoint__every=1, log__display=False)
    (tmp_path / "elsewhere").mkdir()
    first.out.rename(tmp_path / "elsewhere" / "run")
    assert main(["train", "--out", "elsewhere/run", "--resume"]) == 0
    assert trained.last.out == Path("elsewhere/run")

    count = len(trained.calls)
    assert main(["train", "--out", "elsewhere/run", "--resume", "--seed", "9", "--kl.beta", "1"]) == 2
    message = capsys.readouterr().err
    assert "--seed is 9, was 0" in message
    assert "--kl.beta is 1.0, was 0.0" in message
    assert "--actor" not in message
    path = write(tmp_path, "seed: 4")
    assert main(["train", "--out", "elsewhere/run", "--resume", "--config", str(path)]) == 2
    assert "--seed is 4, was 0" in capsys.readouterr().err
    assert main(["train", "--out", "nowhere", "--resume"]) == 2
    assert "there is no run to resume in nowhere" in capsys.readouterr().err
    assert len(trained.calls) == count


def test_sft(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sft", "--sft.steps", "5", "--out", "a"]) == 0
    assert trained.calls == [("sft", TrainConfig().replace(sft__steps=5, out=Path("a")), False)]
    assert main(["sft"]) == 2
    assert "--sft.steps is 0" in capsys.readouterr().err
    assert main(["sft", "--sft.steps", "5", "--resume"]) == 2
    assert "--resume is for" in capsys.readouterr().err


def help_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as exit:
        main([*arguments, "--help"])
    assert exit.value.code == 0
    return capsys.readouterr().out


def test_help_lists_every_flag_with_its_help(
    trained: Trained, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    text = help_of(capsys, "train")
    lines = [line.strip(" │") for line in text.splitlines()]
    own = ["--preset", "--config", "--resume", "--traceback"]
    for name in [*own, *(flag(name) for name, _ in flatten(TrainConfig()))]:
        places = [place for place, line in enumerate(lines) if re.match(rf"{re.escape(name)}(,| |$)", line)]
        assert len(places) == 1, f"{name} is listed {len(places)} times"
        following = lines[places[0] + 1]
        assert following, name
        assert not following.startswith(("(default", "-")), f"{name} has no help text"
    assert all(name in text for name in PRESETS)
    assert "settings" not in text
    assert not [line for line in lines if len(line) > 100]


def test_help_shows_the_defaults_of_the_preset(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    assert "(default: Sentiment)" in help_of(capsys, "train", "--preset", "sentiment-smollm2")
    assert "(default: Reverse)" in help_of(capsys, "sft")


def test_lists(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["presets"]) == 0
    text = capsys.readouterr().out
    assert all(name in text and preset.description in text for name, preset in PRESETS.items())
    assert main(["tasks"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"Reverse +Write the word backwards\.\n +arguments: length, alphabet", text)
    assert main(["--help"]) == 0
    assert "llm-env train --preset" in capsys.readouterr().out
    assert main([]) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("trian", "unknown command 'trian'; did you mean 'train'?"),
        ("xyz", "unknown command 'xyz'; there are train, sft, presets, tasks"),
        ("presets all", "llm-env presets takes no arguments, got all"),
        ("train --preset reverse", "unknown preset 'reverse'; did you mean reverse-tiny?"),
        ("train --config none.yaml", "there is no configuration file none.yaml"),
        ("train --rollout.batch-size 0", "--rollout.batch-size is 0"),
        ("train --actor.lerning-rate 1", "--actor.learning-rate"),
        ("train --actor.learning-rate fast", "could not convert string to float: 'fast'"),
        ("train --rollout.mode foo", "Expected one of"),
        ("train --model.reference-dtype half", "Expected one of"),
        ("train --task.args length", "expected names and values by turns"),
        ("train --preset", "--preset"),
    ],
)
def test_mistakes_on_the_command_line(
    trained: Trained, capsys: pytest.CaptureFixture[str], line: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    try:
        status: Any = main(line.split())
    except SystemExit as exit:  # tyro's own
        status = exit.code
    assert status == 2
    assert trained.calls == []
    output = capsys.readouterr()
    assert message in output.err
    assert "Traceback" not in output.err
    assert "\033" not in output.err, "no colours where there is no terminal"


def test_errors_while_training(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    for error, text in (
        (ValueError("too small"), "error: too small"),
        (KeyError("no field 'a'"), "error: no field 'a'"),
        (PermissionError("runs is read-only"), "error: runs is read-only"),
        (TrainingDiverged("five steps were skipped"), "error: five steps were skipped"),
        (ValueError(), "error: ValueError"),
        (ModuleNotFoundError("No module named 'rich'", name="rich.console"), "pip install 'llm-env[train]'"),
        (ModuleNotFoundError("No module named 'mine'", name="mine"), "error: No module named 'mine'"),
    ):
        trained.error = error
        assert main(["train"]) == 2
        output = capsys.readouterr().err
        assert text in output
        assert "Traceback" not in output
        assert main(["train", "--traceback"]) == 2
        assert "Traceback" in capsys.readouterr().err
    trained.error = KeyboardInterrupt()
    assert main(["train"]) == 130
    trained.error = ZeroDivisionError("a bug of ours")
    with pytest.raises(ZeroDivisionError):
        main(["train"])


def test_a_reader_that_leaves_early() -> None:
    """As in `llm-env train --help | head -1`."""
    read, written = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "agents.cli", "train", "--help"]
    process = subprocess.run(command, stdout=written, stderr=subprocess.PIPE, text=True)
    os.close(written)
    assert (process.returncode, process.stderr) == (1, "")


def test_without_tyro(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "tyro", None)
    monkeypatch.delitem(sys.modules, "agents.cli_options", raising=False)
    assert main(["train"]) == 2
    assert "tyro is missing" in capsys.readouterr().err
    assert main(["tasks"]) == 0, "needs no tyro"
