"""The way to a process that writes texts, wherever it is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import ClassVar


class WorkerLostError(RuntimeError):
    """A process that writes texts has died, hangs, or says what makes no sense."""


class NobodyCameError(RuntimeError):
    """No process has come to write texts; it may still come."""


class Link(ABC):
    """One process that writes texts, or will."""

    @abstractmethod
    def connect(self) -> Connection:
        """Wait for the process, and give what it is talked to by.

        Raises:
            NobodyCameError: it is not there yet; ask again.
            WorkerLostError: it will not come; another may.
        """

    @abstractmethod
    def kill(self) -> None:
        """End it at once; once more does no harm."""

    @abstractmethod
    def how_it_ended(self) -> str:
        """In words; of one that lives, that it was ended."""


class Links(ABC):
    """Where processes that write texts come from."""

    shares_memory: ClassVar[bool] = False
    """They are on this machine, and have the memory that weights lie in. Else weights are sent."""

    announcement: str = ""
    """What somebody has to know, or to do, so that there are any."""

    @abstractmethod
    def begin(self, place: int, inherits: Sequence[int]) -> Link:
        """Have a process started, or wait for one from now on.

        Args:
            place: which of the processes it is, counted from 0.
            inherits: handles that it is to have, if it shares memory.
        """

    def close(self) -> None:
        """Begin no more."""
        return
