"""`llm-env label`: a person says which of two texts is better."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from agents.cli.options import flag_registry
from agents.preferences.collect import read_texts
from agents.preferences.label import Labels, Question, Verdict

KEYS: dict[str, Verdict] = {"1": "first", "2": "second", "=": "equal"}
HELP = "1 or 2 is better, = neither, s ask me later, u undo, q stop: "


@dataclass(frozen=True)
class LabelOptions:
    """What the command is told."""

    texts: Annotated[Path, tyro.conf.arg(metavar="TEXTS.jsonl")]
    """Texts, several after each prompt, as llm-env eval --samples 4 --out TEXTS.jsonl writes them."""
    out: Annotated[Path, tyro.conf.arg(metavar="PAIRS.jsonl")]
    """Where to write the pairs, each as soon as it is compared. What is there is not asked for again."""
    seed: int = 0
    """Of which texts are compared."""
    traceback: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Show where in the program an error came from."""


def label(arguments: Sequence[str]) -> None:
    """Run the command."""
    options = tyro.cli(
        LabelOptions,
        args=arguments,
        default=LabelOptions(texts=tyro.MISSING, out=tyro.MISSING),
        prog="llm-env label",
        description="Say which of two texts is better, key by key. Their order is by chance; scores are not shown.",
        registry=flag_registry(),
    )
    labels = Labels(read_texts(options.texts), options.out, options.seed)
    if not labels.questions:
        raise ValueError(
            f"{options.texts} has no two different texts after a prompt: it must have several, as llm-env eval "
            "--samples 4 writes them"
        )
    with keyboard() as pressed:
        ask_all(labels, pressed)
    ties = sum("chosen" not in row for row in labels.rows)
    pairs = len(labels.rows) - ties
    said = f"{pairs} pair{'' if pairs == 1 else 's'}, {ties} without a better one, {len(labels.left())} left"
    print(f"\n{said}: {options.out}")
    right, both = labels.agreement()
    if both:
        print(f"you and the scores agree about {right} of {both}")
    if labels.left():
        print("the same command goes on where you are now")


def ask_all(labels: Labels, pressed: Callable[[], str]) -> None:
    """Ask until all is answered, or enough is enough."""
    waiting = labels.left()
    while waiting:
        show(waiting[0], len(labels.questions) - len(waiting) + 1, len(labels.questions))
        while (key := pressed()) not in {*KEYS, "s", "u", "q"}:
            pass
        print("nothing to undo" if key == "u" and not labels.rows else key)
        if key == "q":
            return
        if key == "u":
            undone = labels.undo()
            waiting = [undone, *waiting] if undone else waiting
        elif key == "s":
            waiting = [*waiting[1:], waiting[0]] if len(waiting) > 1 else []
        else:
            labels.answer(waiting.pop(0), KEYS[key])


def show(question: Question, number: int, total: int) -> None:
    """Two texts and what can be said of them."""
    prompt = question.prompt
    if not isinstance(prompt, str):
        prompt = "\n".join(f"{message['role']}: {message['content']}" for message in prompt)
    rule = "─" * 72
    print(f"\n{rule}\npair {number} of {total}\n\n{shown(prompt)}\n")
    for name, text in (("1", question.first), ("2", question.second)):
        print(f"── {name} {rule[5:]}\n{shown(text)}")
    print(rule)
    print(HELP, end="", flush=True)


def shown(text: str) -> str:
    """A text with what would move the cursor or colour the terminal made visible.

    Examples:
        >>> shown("a\\x1b[31mb")
        'a\\\\x1b[31mb'
    """
    return "".join(char if char.isprintable() or char in "\n\t" else repr(char)[1:-1] for char in text)


@contextlib.contextmanager
def keyboard() -> Iterator[Callable[[], str]]:
    """What gives the next key; without a terminal, the next line's first character. The end of it all is q."""
    if not sys.stdin.isatty():
        yield lambda: (sys.stdin.readline() or "q")[0]
        return
    import termios
    import tty

    keys = sys.stdin.fileno()
    before: list[Any] = termios.tcgetattr(keys)
    try:
        tty.setcbreak(keys, termios.TCSADRAIN)
        yield lambda: os.read(keys, 1).decode(errors="replace") or "q"
    finally:
        termios.tcsetattr(keys, termios.TCSADRAIN, before)
