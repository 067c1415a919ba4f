"""Run programs that nobody has read, and judge them from outside."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Set
from contextlib import AbstractContextManager
from typing import Any, Literal, NamedTuple, TypeAlias

from rewards.full_seats import FullSeats
from rewards.seats import FastSeats, Limits, ProgramError, Seat

_Side: TypeAlias = Literal["program", "tests"]


class Outcome(NamedTuple):
    """How a program went.

    Attributes:
        passed: whether it ran to its end, and did what its tests ask.
        stdout: what it printed; nothing where it was tested by calls.
        why: what went wrong; empty if nothing did.
        tier: which interpreter ran it, "fast" or "full".

    Examples:
        >>> Outcome(False, "", "ZeroDivisionError: division by zero", "fast").passed
        False
    """

    passed: bool
    stdout: str
    why: str
    tier: str


class Sandbox:
    """Runs programs in two tiers: most in a fast interpreter, and what that lacks in the whole of Python.

    The fast one (pydantic-monty) knows a part of Python, and has neither files nor network. The full one is this
    Python, in a process of its own behind the kernel's fences (sandlock): it reads the standard library, and nothing
    else; no files are written, no network is reached, nothing of this process or of others is seen.

    Whether a program passes is decided outside of its process. Tests run in a second one, which calls the program's
    function by its name; what is compared are plain data that came back. So nothing that a program prints, raises,
    returns or replaces can make it right, and it never sees its tests.

    Args:
        limits: what a program may use.
        unsafe: where the kernel has no fences, run the full tier without. A program can then do whatever this one may.

    Raises:
        SandboxUnavailable: when a program needs the full tier, and there are no fences.

    Examples:
        >>> sandbox = Sandbox(Limits(seconds=2))
        >>> sandbox.run("print(int(input()) + 1)", stdin="41")
        Outcome(passed=True, stdout='42\\n', why='', tier='fast')
        >>> sandbox.run("import heapq; print(heapq.nsmallest(1, [3, 2]))").tier
        'full'
        >>> sandbox.check("def double(x): return 3 * x", "assert double(1) == 2", "double").why
        'AssertionError: assert 3 == 2'
        >>> sandbox.close()
    """

    def __init__(self, limits: Limits | None = None, *, unsafe: bool = False) -> None:
        self.limits = Limits() if limits is None else limits
        self.unsafe = unsafe
        self._lock = threading.Lock()
        # One for each side: as a pool has few seats, threads that hold one and wait for another would wait for ever.
        self._fast: dict[_Side, FastSeats] = {}
        self._full: FullSeats | None = None

    def run(self, program: str, stdin: str = "") -> Outcome:
        """Run a program that reads `stdin` and prints."""
        try:
            return self._printed_fast(program, stdin)
        except ProgramError as error:
            if error.why != "unsupported":
                return Outcome(False, "", str(error), "fast")
        return self._printed_full(program, stdin)

    def check(self, program: str, tests: str, name: str, *, before: str = "") -> Outcome:
        """Run tests on a function that a program defines.

        Args:
            program: defines the function.
            tests: call it, and assert. They are trusted no more than the program is, but do not see it.
            name: of the function; the tests call it by this name, or as `candidate`.
            before: run ahead of the tests, beside them: helpers that the tests use.
        """
        full: set[_Side] = set()
        while True:
            side, why = self._judged(program, f"{before}\n{name} = candidate\n{tests}", name, full)
            if why is not None and why.why == "unsupported" and side not in full:
                full.add(side)
            else:
                return Outcome(
                    why is None, "", "" if why is None else str(why), "full" if "program" in full else "fast"
                )

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial(Sandbox, self.limits, unsafe=self.unsafe), ()

    def close(self) -> None:
        """End its processes; they begin again when they are needed."""
        with self._lock:
            while self._fast:
                self._fast.popitem()[1].close()
            full, self._full = self._full, None
        if full is not None:
            full.close()

    def _judged(self, program: str, tests: str, name: str, full: Set[_Side]) -> tuple[_Side, ProgramError | None]:
        """Which of the two has failed, and why; None if neither has."""
        with self._seat("program", full) as seat, self._seat("tests", full) as tester:
            candidate = _Candidate(seat, name, self.limits.seconds)
            try:
                candidate.begin(program)
                tester.execute(tests, {"candidate": candidate})
            except ProgramError as error:
                if candidate.failure is None:
                    return "tests", error
            return "program", candidate.failure

    def _seat(self, side: _Side, full: Set[_Side]) -> AbstractContextManager[Seat]:
        return self._full_seats().seat(self.limits) if side in full else self._fast_seats(side).seat(self.limits)

    def _fast_seats(self, side: _Side) -> FastSeats:
        with self._lock:
            if side not in self._fast:
                self._fast[side] = FastSeats()
            return self._fast[side]

    def _full_seats(self) -> FullSeats:
        with self._lock:
            if self._full is None:
                self._full = FullSeats(self.unsafe)
            return self._full

    def _printed_fast(self, program: str, stdin: str) -> Outcome:
        lines = iter(stdin.splitlines())
        printed: list[str] = []

        with self._fast_seats("program").seat(self.limits, printed.append) as seat:

            def read(prompt: str = "") -> str:
                seat.print("stdout", prompt)  # which is bounded, too
                try:
                    return next(lines)
                except StopIteration:
                    raise EOFError("EOF when reading a line") from None

            seat.execute(program, {"input": read})
        return Outcome(True, "".join(printed), "", "fast")

    def _printed_full(self, program: str, stdin: str) -> Outcome:
        limit = self.limits.output
        with self._full_seats().process(program, self.limits) as process:

            def feed() -> None:
                with contextlib.suppress(OSError, ValueError):
                    process.stdin.write(stdin.encode())
                    process.stdin.close()

            feeder = threading.Thread(target=feed, daemon=True)
            feeder.start()
            printed = process.stdout.read(limit + 1)
            why = "OutputError: it printed more than its limit" if len(printed) > limit else ""
            if not why and (code := process.wait()):
                why = f"it ended with exit code {code}"
            if process.late:
                why = "TimeoutError: it took longer than its limit"
        return Outcome(not why, printed[:limit].decode(errors="replace"), why, "full")


class _Candidate:
    """The program's function, as its tests call it. What ends the program they cannot pass over."""

    def __init__(self, seat: Seat, name: str, seconds: float) -> None:
        self.failure: ProgramError | None = None
        self._seat = seat
        self._name = name
        self._deadline = time.monotonic() + seconds  # of all calls together

    def begin(self, program: str) -> None:
        """Define the function."""
        try:
            self._seat.execute(program, {})
        except ProgramError as error:
            self.failure = error
            raise

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.failure is not None:
            raise self.failure
        try:
            if time.monotonic() > self._deadline:
                raise ProgramError("time", "TimeoutError", "it took longer than its limit")
            return self._seat.call(self._name, args, kwargs)
        except ProgramError as error:
            if error.why != "error":
                self.failure = error
            raise
