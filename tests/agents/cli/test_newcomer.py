"""What somebody does first: from a shell, in an empty folder, with a file of prompts or a module of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agents.cli import main
from agents.report.log import read_metrics

Shell = Callable[[str, str], int]

SMALL = (
    "--model.name {model} --rollout.batch-size 4 --actor.minibatches 1 --actor.epochs 1"
    " --evaluation.prompts 2 --out out"
)

MODULE = """
from llm_env import Prompt, Task, register_task
from rewards import register_reward
from agents import register_algorithm
from agents.algorithms.grpo import GRPO


@register_task
class NewcomersTask(Task):
    '''Say something.'''

    max_new_tokens = 2
    max_prompt_tokens = 8
    max_reply_tokens = 1

    def __init__(self, works_for=10**6, **kwargs):
        super().__init__(**kwargs)
        self.left = [works_for]  # one list for all copies of the task

    def sample(self, rng):
        return Prompt(f"{rng.integers(100)}: ")

    def reply(self, rollout):
        return None

    def score(self, rollout):
        return 1.0

    def token_reward(self, episodes, rows):
        self.left[0] -= 1
        if self.left[0] < 0:
            raise ValueError("the newcomer's mistake")
        return [0.0] * len(rows)


@register_reward("newcomers_reward")
def newcomers_reward(rollout, most=4):
    '''Likes short texts.'''
    return most - rollout.num_actions


@register_algorithm("newcomers_algorithm")
class Mine(GRPO):
    '''GRPO once more.'''
"""


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, random_model: Path) -> Iterator[Shell]:
    """Gives the exit status of a command, in a folder that holds a module and a file of prompts."""
    (tmp_path / "newcomers.py").write_text(MODULE)
    rows = [{"question": f"{i}+1=", "answer": i + 1} for i in range(20)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)

    def run(command: str, line: str) -> int:
        return main([command, *SMALL.format(model=random_model).split(), *line.split()])

    yield run
    sys.modules.pop("newcomers", None)


def iterations() -> list[float]:
    return [row["iteration"] for row in read_metrics(Path("out"))]


def test_no_iterations(shell: Shell, capsys: pytest.CaptureFixture[str]) -> None:
    """The model is judged, written, and can be trained later."""
    assert shell("train", "--iterations 0 --task.args length 2 --actor.decay linear --out falling") == 0
    assert shell("train", "--iterations 0 --task.args length 2") == 0
    assert "finished, 0 iterations, 0 tokens" in capsys.readouterr().out
    assert iterations() == [0]
    assert Path("out/model/model.safetensors").exists()
    assert Path("out/curves.png").exists()
    assert shell("train", "--iterations 1 --resume") == 0
    assert iterations() == [0, 1]


def test_a_file_of_prompts_needs_no_module(shell: Shell, capsys: pytest.CaptureFixture[str]) -> None:
    line = "--iterations 1 --task.name Dataset --task.args train data.jsonl prompt question max_new_tokens 3"
    line += " max_prompt_tokens 8"
    assert shell("train", line) == 2
    message = capsys.readouterr().err
    assert "--task.reward is none, but the task Dataset has no reward of its own" in message
    assert "`llm-env rewards`" in message
    assert not Path("out").exists()
    reward = "--task.reward length_penalty --task.reward-args free 0 cost 0.25"
    assert shell("train", f"{line} {reward} --log.samples-every 1 --sft.steps 1") == 0
    begin, end = read_metrics(Path("out"))
    assert begin["eval/sampled"] == -0.25 * begin["eval/length"]
    assert -0.75 <= end["reward/mean"] <= -0.25
    rows = [json.loads(line) for line in Path("out/samples.jsonl").read_text().splitlines()]
    assert rows
    assert all(row["prompt"].endswith("+1=") for row in rows)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("train nothing.jsonl", "there is no file nothing.jsonl: expected the path of a JSONL file"),
        ("train data.jsonl", "data.jsonl, line 1: a row of prompts has no field 'prompt'; its fields are"),
        ("prompt question", "the argument 'train' is missing; it takes train, reward, test"),
        ("train data.jsonl promt question", "there is no argument 'promt'; did you mean 'prompt'? it takes train"),
    ],
)
def test_mistakes_with_a_file_of_prompts(
    shell: Shell, capsys: pytest.CaptureFixture[str], args: str, message: str
) -> None:
    assert shell("train", f"--task.name Dataset --task.args {args} --task.reward exact_match") == 2
    assert message in capsys.readouterr().err
    assert not Path("out").exists()


OWN = "--module newcomers --task.name NewcomersTask --iterations 4 --checkpoint.every 2 --evaluation.every 0"


def test_a_start_that_fails_leaves_nothing_behind(shell: Shell, capsys: pytest.CaptureFixture[str]) -> None:
    """Here in the first evaluation, when the models are loaded; mended, the same command works."""
    assert shell("train", f"{OWN} --task.args works_for 0") == 2
    assert "the newcomer's mistake" in capsys.readouterr().err
    assert not Path("out").exists()
    assert shell("sft", f"{OWN} --sft.steps 1 --task.args works_for 0") == 2
    assert not Path("out").exists()
    Path("out").mkdir()
    Path("out/notes.txt").write_text("mine")
    assert shell("train", f"{OWN} --task.args works_for 0") == 2
    assert [path.name for path in Path("out").iterdir()] == ["notes.txt"]
    assert shell("train", f"{OWN} --iterations 0") == 0


def test_a_run_that_fails_before_its_first_checkpoint_can_begin_again(
    shell: Shell, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it has logged stays to be looked at, until there is another log."""
    # Every step of the writing loop asks the task: two of an evaluation's sampled texts, two of its greedy ones, two of
    # an iteration.
    assert shell("train", f"{OWN} --task.args works_for 6") == 2
    said = capsys.readouterr().err
    assert "`token_reward` of the task NewcomersTask raised ValueError: the newcomer's mistake" in said
    assert "\nThere was no checkpoint yet: the same command may be given again" in said
    assert iterations() == [0, 1]
    assert "the newcomer's mistake" in Path("out/failed.txt").read_text()
    assert shell("train", f"{OWN} --task.args works_for 4") == 2
    assert iterations() == [0]
    assert Path("out/metrics.jsonl.old").exists()
    # From now on there is a checkpoint, and something to lose.
    capsys.readouterr()
    assert shell("train", f"{OWN} --task.args works_for 8") == 2
    assert "There was no checkpoint yet" not in capsys.readouterr().err
    assert not Path("out/failed.txt").exists()
    assert shell("train", OWN) == 2
    assert "holds a run already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "entry"),
    [
        ("tasks", "NewcomersTask       Say something.\n                        arguments: works_for, num_train"),
        ("rewards", "newcomers_reward    Likes short texts.\n                        arguments: most\n"),
        ("algorithms", "newcomers_algorithm GRPO once more.\n"),
    ],
)
def test_lists_name_what_a_module_registers(
    shell: Shell, capsys: pytest.CaptureFixture[str], command: str, entry: str
) -> None:
    assert main([command, "--module", "newcomers"]) == 0
    assert entry in capsys.readouterr().out


def test_a_module_in_the_current_folder_is_found_by_an_installed_script(tmp_path: Path) -> None:
    """The `sys.path` of such a script has no current folder in it, as with -P."""
    own = "from llm_env.tasks import Copy, register_task\n@register_task\nclass OnlyHere(Copy): ...\n"
    (tmp_path / "only_here.py").write_text(own)
    line = [sys.executable, "-P", "-m", "agents.cli", "tasks", "--module", "only_here"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    said = subprocess.run(line, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    assert "OnlyHere" in said.stdout


def test_a_model_that_is_not_there(
    shell: Shell, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(name: str, **options: object) -> None:
        raise OSError("We couldn't connect to the hub to load the files")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", unreachable)
    assert shell("train", "--model.name org/nothing") == 2
    assert "--model.name: the model 'org/nothing' could not be loaded: expected" in capsys.readouterr().err
    assert main(["eval", "org/nothing", "--task.name", "Copy"]) == 2
    assert "error: the model 'org/nothing' could not be loaded: expected" in capsys.readouterr().err
    assert not Path("out").exists()
