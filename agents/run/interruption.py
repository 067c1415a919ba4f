"""Ctrl-C as a question: stop at the next good moment."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass
class Interruption:
    """Whether Ctrl-C was pressed."""

    stop: bool = False


@contextlib.contextmanager
def interruptible() -> Iterator[Interruption]:
    """The first Ctrl-C only sets `stop`, for the loop inside to look at; a second one stops at once."""
    asked = Interruption()
    previous = signal.getsignal(signal.SIGINT)

    def ask(number: int, frame: Any) -> None:
        asked.stop = True
        signal.signal(signal.SIGINT, previous)

    try:
        signal.signal(signal.SIGINT, ask)
    except ValueError:  # not in the main thread, where there is nothing to catch
        yield asked
        return
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, previous)
