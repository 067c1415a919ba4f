"""The command line: what is said is what is run, and mistakes are named."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from agents.algorithms.advantages import advantage_estimator, advantage_names
from agents.algorithms.registry import algorithm_class, algorithm_names
from agents.algorithms.steps import TrainingDiverged
from agents.cli import main
from agents.config import AdvantageConfig, KLConfig, LossConfig, RolloutConfig, TrainConfig
from agents.config.checks import flag, flatten
from agents.config.explain import help_texts
from agents.config.files import save_config
from agents.config.presets import PRESETS, Preset
from agents.metrics import METRICS


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


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

    def fine_tune(self, config: TrainConfig, resume: bool) -> None:
        self.calls.append(("sft", config, resume))
        config.out.mkdir(parents=True, exist_ok=True)
        save_config(config, config.out / "config.yaml")


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Trained:
    stub = Trained()
    module = types.ModuleType("agents.run.training")
    module.train, module.fine_tune = stub.train, stub.fine_tune  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "agents.run.training", module)
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


OWN_PARTS = """
from agents import register_algorithm, register_term
from agents.algorithms.grpo import GRPO

for name in ("extra", "other"):
    register_term(name)(lambda log_prob, distribution, data: -log_prob)


@register_algorithm("test_flags")
class Flags(GRPO):
    def __init__(self, *parts, strength=1.0, **more):
        super().__init__(*parts, **more)
"""


def test_every_kind_of_flag(trained: Trained) -> None:
    Path("own_parts.py").write_text(OWN_PARTS)
    line = (
        "--algo test_flags --rollout.completions-per-prompt 4 --task.args length 5 alphabet no dense true x 1e-3"
        " --log.no-display --log.tensorboard --loss.dual-clip none --loss.importance-cap None --rollout.slots 8"
        " --model.reference-dtype bfloat16 --rollout.engine-dtype none --module own_parts --actor.betas 0.8 0.9"
        " --model.reference always --out runs/x --actor.learning-rate 1e-4 --loss.terms extra 1 other 1e-2"
        " --task.reward Match --task.reward-args none --algo-args strength 0.5 --evaluation.stop-at 1"
    )
    assert main(["train", *line.split()]) == 0
    assert trained.last == TrainConfig().replace(
        algo="test_flags",
        module="own_parts",
        rollout__completions_per_prompt=4,
        task__args={"length": 5, "alphabet": "no", "dense": True, "x": 0.001},
        log__display=False,
        log__tensorboard=True,
        loss__importance_cap=None,
        rollout__slots=8,
        model__reference_dtype="bfloat16",
        actor__learning_rate=1e-4,
        actor__betas=(0.8, 0.9),
        model__reference="always",
        out=Path("runs/x"),
        loss__terms={"extra": 1.0, "other": 0.01},
        task__reward="Match",
        algo_args={"strength": 0.5},
        evaluation__stop_at=1.0,
    )
    assert type(trained.last.task.args["length"]) is int
    assert type(trained.last.loss.terms["extra"]) is float
    assert type(trained.last.rollout.slots) is int


def test_another_algorithm_than_the_presets(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the preset or a file sets for its own algorithm, and another does not read, is left as by default."""
    preset = TrainConfig().replace(iterations=7, advantage__baseline="none", advantage__normalize=False)
    monkeypatch.setitem(PRESETS, "without-baseline", Preset("Only for this test.", preset))
    choice = "--preset without-baseline --algo grpo --rollout.completions-per-prompt 8"
    line = ["train", *choice.split(), "--out", "a"]
    assert main(line) == 0
    assert TrainConfig().advantage.baseline == "fitted"
    assert trained.last == preset.replace(
        algo="grpo", rollout__completions_per_prompt=8, out=Path("a"), advantage__baseline="fitted"
    )
    assert main([*line[:-1], "b", "--advantage.baseline", "none"]) == 2
    assert "--advantage.baseline is none, but --algo grpo does not read it: leave it out" in capsys.readouterr().err

    path = write(
        tmp_path,
        "loss: {kind: penalty, penalty_target: 0.1}\nmodel: {critic: shared}\ncritic_warmup: 2\ncritic: {epochs: 9}",
    )
    assert main(["train", "--config", str(path), "--algo", "a2c", "--out", "c"]) == 0
    own = TrainConfig().replace(algo="a2c", out=Path("c"), model__critic="shared")
    assert trained.last == own.replace(critic_warmup=2, critic__epochs=9)
    assert main(["train", "--config", str(path), "--algo", "a2c", "--out", "d", "--loss.penalty-target", "0.1"]) == 2
    assert "--loss.penalty-target is 0.1, but --algo a2c does not read it" in capsys.readouterr().err
    # In the file's own algorithm's name, nothing is passed over.
    path = write(tmp_path, "algo: a2c\nloss: {dual_clip: 3}")
    assert main(["train", "--config", str(path), "--algo", "a2c", "--out", "e"]) == 2
    assert "--loss.dual-clip is 3.0, but --algo a2c does not read it" in capsys.readouterr().err


def test_another_task_than_the_presets(trained: Trained, tmp_path: Path) -> None:
    """Arguments that were meant for the preset's own task, or for a file's own reward, do not reach another one."""
    preset = PRESETS["reverse-tiny"].config
    line = ["train", "--preset", "reverse-tiny", "--out"]
    assert preset.task.args
    assert main([*line, "a", "--task.name", "Addition"]) == 0
    assert trained.last == preset.replace(out=Path("a"), task__name="Addition", task__args={})
    assert main([*line, "b", "--task.name", "Addition", "--task.args", "digits", "3"]) == 0
    assert trained.last.task.args == {"digits": 3}
    assert main([*line, "c", "--task.name", "Reverse"]) == 0
    assert trained.last == preset.replace(out=Path("c"))
    assert main([*line, "d", "--task.name", "Copy", "--algo", "reinforce"]) == 0
    assert (trained.last.task.args, trained.last.loss.clip_high) == ({}, TrainConfig().loss.clip_high)

    path = write(tmp_path, "task: {reward: length_penalty, reward_args: {free: 3}, args: {length: 4}}")
    line = ["train", "--config", str(path), "--out"]
    assert main([*line, "e", "--task.reward", "exact_match"]) == 0
    assert (trained.last.task.reward_args, trained.last.task.args) == ({}, {"length": 4})
    assert main([*line, "f", "--task.reward", "none"]) == 0
    assert trained.last.task.reward_args == {}
    assert main([*line, "g", "--task.reward", "length_penalty"]) == 0
    assert trained.last.task.reward_args == {"free": 3}


def test_what_a_flag_switches_off_in_the_preset(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is left as by default, too; what has no effect in the file itself, or on the command line, is refused."""
    path = write(tmp_path, "model: {critic: shared}\ncritic: {epochs: 9, minibatches: 2}\nkl: {beta: 0.1, where: loss}")
    line = ["train", "--config", str(path), "--loss.value", "0", "--kl.beta", "0", "--out"]
    assert main([*line, "a"]) == 0
    assert trained.last == TrainConfig().replace(out=Path("a"), loss__value=0.0)
    assert main([*line, "b", "--critic.epochs", "7"]) == 2
    assert "--critic.epochs is 7, but --loss.value is 0, so no critic learns" in capsys.readouterr().err
    path = write(tmp_path, "model: {lora: {alpha: 8}}")
    assert main(["train", "--config", str(path), "--loss.value", "0", "--out", "c"]) == 2
    assert "--model.lora.alpha is 8, but --model.lora.rank is 0" in capsys.readouterr().err


def test_resuming(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begun = ["train", "--preset", "maze-tiny", "--actor.learning-rate", "0.5"]
    assert main(begun) == 0
    first = trained.last
    assert main(begun) == 2
    assert "holds a run already (config.yaml): go on with it (--resume)" in capsys.readouterr().err

    assert main([*begun, "--resume"]) == 0
    assert trained.calls[-1] == ("train", first, True)
    # The preset names the folder; what the run was told otherwise is remembered.
    assert main(["train", "--preset", "maze-tiny", "--resume"]) == 0
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
    assert main(["train", "--preset", "maze-tiny", "--actor.decay", "linear", "--out", "falling"]) == 0
    assert main(["train", "--out", "falling", "--resume", "--iterations", "999"]) == 2
    assert "--iterations is 999, was 60, but --actor.decay is linear" in capsys.readouterr().err
    count += 1
    assert main(["train", "--out", "nowhere", "--resume"]) == 2
    assert "there is no run to resume in nowhere" in capsys.readouterr().err
    assert len(trained.calls) == count


def test_sft(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sft", "--sft.steps", "5", "--out", "a"]) == 0
    assert trained.calls == [("sft", TrainConfig().replace(sft__steps=5, out=Path("a")), False)]
    assert main(["sft", "--sft.steps", "5", "--out", "a"]) == 2
    assert "go on with it (--resume)" in capsys.readouterr().err
    assert main(["sft", "--out", "a", "--resume", "--sft.checkpoint-every", "7"]) == 0
    resumed = TrainConfig().replace(sft__steps=5, sft__checkpoint_every=7, out=Path("a"))
    assert trained.calls[1:] == [("sft", resumed, True)]
    assert main(["sft", "--out", "a", "--resume", "--sft.steps", "6"]) == 2
    assert "--sft.steps is 6, was 5" in capsys.readouterr().err
    assert main(["sft", "--out", "b", "--resume", "--sft.steps", "6"]) == 2
    assert "there is no run to resume in b" in capsys.readouterr().err


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
    shown = text.splitlines()
    lines = [line.strip(" │") for line in shown]
    own = ["--preset", "--config", "--resume", "--traceback"]
    for name in [*own, *(flag(name) for name, _ in flatten(TrainConfig()))]:
        places = [place for place, line in enumerate(shown) if re.match(rf"\W {re.escape(name)}(,| |$)", line)]
        assert len(places) == 1, f"{name} is listed {len(places)} times"
        following = lines[places[0] + 1]
        assert following, name
        assert not following.startswith(("(default", "-")), f"{name} has no help text"
    assert all(name in text for name in PRESETS)
    assert "--settings" not in text
    assert "settings options" not in text
    assert not [line for line in lines if len(line) > 100]


def test_help_texts_are_not_broken_where_their_docstrings_are(
    trained: Trained, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    lines = [line.strip(" │") if re.match(r"\W {7}\S", line) else "" for line in help_of(capsys, "train").splitlines()]
    widest = max(map(len, lines))
    assert widest > 80
    for line, following in itertools.pairwise(lines):
        if line and following:
            assert len(f"{line} {following.split()[0]}") > widest, f"the line could be longer: {line}"
    whole = " ".join(lines)
    for part in (KLConfig, LossConfig, RolloutConfig):
        for name, text in help_texts(part).items():
            assert text in whole, name


def test_help_shows_the_defaults_of_the_preset(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    assert "(default: Sentiment)" in help_of(capsys, "train", "--preset", "sentiment-smollm2")
    assert "(default: Reverse)" in help_of(capsys, "sft")


def test_help_names_all_algorithms_and_estimators() -> None:
    """The texts are written by hand; whoever adds one finds them wanting here."""
    own = [name for name in algorithm_names() if algorithm_class(name).__module__.startswith("agents.")]
    assert {"ppo", "rloo"} <= set(own)
    assert [name for name in own if not re.search(rf"\b{name}\b", help_texts(TrainConfig)["algo"])] == []
    own = [name for name in advantage_names() if advantage_estimator(name).critic]
    own = [name for name in own if advantage_estimator(name).__module__.startswith("agents.")]
    assert [name for name in own if not re.search(rf"\b{name}\b", help_texts(AdvantageConfig)["kind"])] == []


def test_lists(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["presets"]) == 0
    text = capsys.readouterr().out
    assert all(name in text and preset.description in text for name, preset in PRESETS.items())
    assert main(["tasks"]) == 0
    text = capsys.readouterr().out
    assert re.search(
        r"Reverse +Write the word backwards\.\n +arguments: length, shortest, alphabet, dense, num_train", text
    )
    assert re.search(r"Dataset +Prompts from a JSONL file.*\n +arguments: train, ", text)
    assert main(["rewards"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"numeric_match +1 if the last number .*\n +arguments: key, tolerance", text)
    assert main(["algorithms", "--traceback"]) == 0
    text = capsys.readouterr().out
    assert all(re.search(rf"^  {name} +\S", text, flags=re.MULTILINE) for name in ("grpo", "ppo", "rloo"))
    assert main(["metrics"]) == 0
    text = capsys.readouterr().out
    named = re.findall(r"^  (\S+) +\S", text, flags=re.MULTILINE)
    assert [name for name in named if name not in METRICS] == ["reward/PART", "policy/TERM_loss", "time/PHASE"]
    assert sorted(name for name in named if name in METRICS) == sorted(METRICS)
    said = " ".join(text.split())
    assert all(entry.meaning in said and (entry.needs or "") in said for entry in METRICS.values())
    assert main(["--help"]) == 0
    assert "llm-env train --preset" in capsys.readouterr().out
    assert main([]) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("trian", "unknown command 'trian'; did you mean 'train'?"),
        (
            "xyz",
            "unknown command 'xyz'; there are train, sft, best, pairs, label, reward-model, dpo, rlhf, report, comp",
        ),
        ("presets all", "llm-env presets takes no arguments, got all"),
        ("tasks all", "unknown task 'all'"),
        ("rewards --module", "llm-env rewards takes --module and its name, or nothing, got --module"),
        ("algorithms --module=nothing_here", "--module is nothing_here, but Python finds no module nothing_here"),
        ("train --module own/parts.py", "expected a name as in `import own.parts`"),
        ("train --preset reverse", "unknown preset 'reverse'; did you mean 'reverse-tiny'?"),
        ("train --config none.yaml", "there is no configuration file none.yaml"),
        ("train --rollout.batch-size 0", "--rollout.batch-size is 0"),
        ("train --actor.lerning-rate 1", "--actor.learning-rate"),
        ("train --actor.learning-rate fast", "could not convert string to float: 'fast'"),
        ("train --kl.where foo", "Expected one of"),
        ("train --rollout.slots 0", "--rollout.slots is 0, expected at least 1"),
        ("train --rollout.slots many", "invalid literal for int() with base 10: 'many'"),
        ("train --loss.terms extra much", "extra is 'much', expected a number"),
        ("train --model.reference-dtype half", "Expected one of"),
        ("train --task.args length", "expected names and values by turns"),
        ("train --preset", "--preset"),
        ("train --algo pqo", "--algo: unknown algorithm 'pqo'; did you mean 'ppo'"),
        ("train --loss.terms mine", "expected names and values by turns"),
        ("train --algo-args strength 1", "for --algo ppo: there is no argument 'strength'; it takes none"),
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
    monkeypatch.delitem(sys.modules, "agents.cli.options", raising=False)
    assert main(["train"]) == 2
    assert "tyro is missing" in capsys.readouterr().err
    assert main(["tasks"]) == 0, "needs no tyro"
