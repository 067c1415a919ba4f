"""`llm-env play`: a person in the agent's place."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from agents.cli.label import shown
from agents.cli.options import flag_registry, model_of, value_of
from agents.config import TaskConfig, TrainConfig
from agents.config.files import check_config, load_config

if TYPE_CHECKING:
    from agents.run.play import Play, Said

HELP = """\
Write a line: it is your turn, and Enter ends it. Or:
  :top       the likeliest next tokens, with their probabilities; then :1 takes the first of them, and so on
  :go        let the model go on until the task replies, or the end; :go 1.0 draws at temperature 1
  :add TEXT  write without ending the turn
  :undo      take back what was written last
  :answer    what the task holds to be right, where it says so
  :next      the next prompt; :next 7 begins with prompt 7
  :help      this
  :quit      enough"""


@dataclass(frozen=True)
class PlayOptions:
    """What the command is told."""

    task: TaskConfig = field(default_factory=TaskConfig)
    model: str = "tiny"
    """Whose tokens are written, and who is asked for the likeliest: a name, a model's folder, a hub id, or the folder
    of a run (its best model, or the last), whose task is then the default."""
    split: str = "train"
    """Which of the task's prompts."""
    prompt: int = 0
    """The number of the first."""
    device: str = "cpu"
    """What the model computes on."""
    module: str | None = None
    """A Python module to import first, which may register tasks and rewards of your own."""
    traceback: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Show where in the program an error came from."""


def play(arguments: Sequence[str]) -> None:
    """Run the command."""
    options = tyro.cli(
        PlayOptions,
        args=arguments,
        default=_defaults(arguments),
        prog="llm-env play",
        description="Take the model's place in a task: read the prompt, write, see what it is worth.",
        registry=flag_registry(),
    )
    config = TrainConfig(module=options.module, task=options.task)
    check_config(config)
    from agents.run.parts import make_task_of  # imports torch: --help and slips in flags do without
    from agents.run.play import Play

    game = Play(make_task_of(config), model_of(options.model), options.split, options.device)
    print(HELP)
    ask(game, options.prompt)
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while turn(game, input("> ")):
            pass
    print()


def _defaults(arguments: Sequence[str]) -> PlayOptions:
    """The task of the run, if it is one's folder that is named as the model."""
    named = value_of(arguments, "--model")
    if named is None or not (saved := Path(named) / "config.yaml").is_file():
        return PlayOptions()
    run = load_config(saved)
    return PlayOptions(task=run.task, module=run.module)


def ask(game: Play, index: int) -> None:
    """Begin with a prompt."""
    asked = game.begin(index)
    print(f"\n── prompt {game.index} of {game.count} {'─' * 40}\n{shown(asked)}")


def turn(game: Play, line: str) -> bool:
    """Do what a line says; false: that was the last."""
    word, _, rest = line.partition(" ")
    if word == ":quit":
        return False
    if word == ":help":
        print(HELP)
    elif word == ":next":
        if rest and not rest.isdigit():
            print(f"expected the number of a prompt after :next, got {rest!r}")
        else:
            ask(game, int(rest) if rest else game.index + 1)
    elif word == ":undo":
        print("there is nothing to take back" if not game.undo() else shown(game.transcript))
    elif word == ":answer":
        print("the task does not say" if game.answer is None else shown(str(game.answer)))
    elif game.over:
        print("this episode is over: :next or :undo")
    else:
        write(game, line, word, rest)
    return True


def write(game: Play, line: str, word: str, rest: str) -> None:
    """A line that writes something."""
    if word == ":top":
        for place, (_, text, chance) in enumerate(game.likeliest(), start=1):
            print(f"  :{place}  {chance:6.1%}  {text!r}")
    elif word == ":go":
        try:
            tell(game.go_on(float(rest or 0)), written=True)
        except ValueError:
            print(f"expected a temperature after :go, such as 1.0, got {rest!r}")
    elif word == ":add":
        tell(game.write(rest))
    elif word[:1] == ":" and word[1:].isdigit():
        best = game.likeliest()
        if 1 <= int(word[1:]) <= len(best):
            tell(game.step([best[int(word[1:]) - 1][0]]), written=True)
        else:
            print(f"there are {len(best)} tokens to choose from: :1 to :{len(best)}")
    elif word[:1] == ":" and word[:2] != "::":
        print(f"unknown {word}: :help lists what there is; a line that begins with a colon is written with two")
    else:
        tell(game.write(line.removeprefix(":") if word[:2] == "::" else line, end=True))


def tell(said: Said, written: bool = False) -> None:
    """What came of it."""
    if written:
        print(shown(said.written))
    if said.reply:
        print(f"── the task replies\n{shown(said.reply)}")
    if said.reward or said.over:
        print(f"reward {said.reward:.4g}")
    if said.over:
        parts = ", ".join(f"{name} {value:.4g}" for name, value in said.parts.items())
        print(f"over: {said.over}" + (f"   ({parts})" if parts else ""))
