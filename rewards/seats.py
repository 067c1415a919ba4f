"""Where programs run: what all such places share, and a fast interpreter of a part of Python."""

from __future__ import annotations

import builtins
import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from rewards.seat_driver import pack, unpack

Outside = Callable[..., Any]
Why = Literal["error", "time", "output", "crash", "unsupported"]
# What the fast interpreter says of what it lacks, and of what no Python would run either.
_LACKING = {
    "NotImplementedError", "ModuleNotFoundError", "ImportError", "NameError", "AttributeError", "TypeError",
    "SyntaxError", "MemoryError", "UnboundLocalError",
}  # fmt: skip


class SandboxUnavailable(RuntimeError):
    """Programs cannot be run safely here.

    Examples:
        >>> str(SandboxUnavailable("the kernel has no Landlock"))
        'the kernel has no Landlock'
    """


class ProgramError(Exception):
    """A program has failed.

    Attributes:
        why: by an "error" of its own; for "time" or "output" over the limit; by a "crash"; or because the
            fast interpreter does not support what it does.
        kind: the name of its error's type.
    """

    def __init__(self, why: Why, kind: str, message: str) -> None:
        self.why: Why = why
        self.kind = kind
        super().__init__(f"{kind}: {message}" if message else kind)
        self.message = message


@dataclass(frozen=True, slots=True)
class Limits:
    """What a program may use. It has one process, so that nothing of it stays behind, and as many threads as it likes.

    Attributes:
        seconds: of the clock, all its calls together.
        memory: megabytes.
        output: characters that it may print; more ends it.
        files: that it may have open at once.

    Examples:
        >>> Limits(seconds=1).memory
        256
    """

    seconds: float = 5.0
    memory: int = 256
    output: int = 1 << 16
    files: int = 32

    def __post_init__(self) -> None:
        for name in ("seconds", "memory", "output", "files"):
            if not getattr(self, name) > 0:
                raise ValueError(f"limits must be above 0, got {name}={getattr(self, name)!r}")


class Seat(Protocol):
    """A namespace in which code runs, one after the other."""

    def execute(self, code: str, outside: Mapping[str, Outside]) -> None:
        """Run a program; it may call functions that are outside."""

    def call(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Call what a program has defined; plain data come and go."""


class FastSeats:
    """Seats in pydantic-monty: an interpreter of a part of Python without files, network or environment."""

    MEMORY = 32  # megabytes; what needs more goes to the full interpreter

    def __init__(self) -> None:
        try:
            import pydantic_monty
        except ImportError as error:
            raise ImportError("code needs the package pydantic-monty: pip install 'llm-env[code]'") from error
        self._monty = pydantic_monty
        self._stack = contextlib.ExitStack()
        self._pool = self._stack.enter_context(pydantic_monty.Monty(min_processes=1))

    @contextlib.contextmanager
    def seat(self, limits: Limits, printed: Callable[[str], None] | None = None) -> Iterator[FastSeat]:
        """A seat of its own."""
        bounds: Any = {
            "max_feed_duration_secs": limits.seconds,
            "max_memory": min(limits.memory, self.MEMORY) << 20,
            "max_recursion_depth": 900,
        }
        with contextlib.ExitStack() as stack:
            try:
                session = stack.enter_context(self._pool.checkout(limits=bounds))
            except self._monty.MontyError as error:
                raise ProgramError("crash", type(error).__name__, str(error)) from None
            yield FastSeat(self._monty, session, limits, printed)

    def close(self) -> None:
        """End its processes."""
        self._stack.close()


class FastSeat:
    """A seat in the fast interpreter."""

    def __init__(self, monty: Any, session: Any, limits: Limits, printed: Callable[[str], None] | None) -> None:
        self._monty = monty
        self._session = session
        self._left = limits.output
        self._printed = printed

    def execute(self, code: str, outside: Mapping[str, Outside]) -> None:
        """See `Seat`."""
        self._run(code, external_lookup={name: _by_its_name(function) for name, function in outside.items()})

    def call(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """See `Seat`."""
        given = {"_args": list(args), "_kwargs": dict(kwargs)}
        value = self._run(f"{name}(*_args, **_kwargs)", inputs=given)
        try:
            return unpack(pack(value))
        except TypeError as error:
            raise ProgramError("error", "TypeError", str(error)) from None

    def _run(self, code: str, **options: Any) -> Any:
        try:
            value = self._session.feed_run(code, print_callback=self.print, **options)
        except self._monty.MontyCrashedError as error:
            raise ProgramError("crash", "Crash", str(error)[:500]) from None
        except self._monty.MontySyntaxError as error:
            raise ProgramError("unsupported", "SyntaxError", str(error)[:500]) from None
        except self._monty.MontyError as error:
            if self._left < 0:
                raise ProgramError("output", "OutputError", "it printed more than its limit") from None
            kind, _, message = str(error).partition(": ")
            why: Why = "unsupported" if kind in _LACKING or message.startswith("Internal error") else "error"
            if kind == "TimeoutError" and "limit exceeded" in message:
                why = "time"
            raise ProgramError(why, kind, message[:500]) from None
        except (TypeError, ValueError) as error:  # a value that cannot come out
            raise ProgramError("unsupported", type(error).__name__, str(error)[:500]) from None
        if self._left < 0:  # it has passed over the error that said so
            raise ProgramError("output", "OutputError", "it printed more than its limit")
        return value

    def print(self, stream: str, text: str) -> None:
        """Take note of what is printed, up to the limit."""
        self._left -= len(text)
        if self._left < 0:
            raise ValueError("it printed more than its limit")
        if self._printed is not None and stream == "stdout":
            self._printed(text)


def _by_its_name(function: Outside) -> Outside:
    """The same, but what a program raises is raised as the built-in error of that name."""

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except ProgramError as error:
            kind = getattr(builtins, error.kind, None)
            usable = isinstance(kind, type) and issubclass(kind, Exception)
            raise (kind if usable else RuntimeError)(error.message) from None  # type: ignore[misc]

    return call
