"""Where programs run in the whole of Python: processes behind the kernel's own fences, which wait for a program."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import secrets
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

from rewards import seat_driver
from rewards.fenced import Fenced, FenceMaker
from rewards.seat_driver import pack, unpack
from rewards.seats import Limits, Outside, ProgramError, SandboxUnavailable, Seat

_ENOUGH = 1 << 20  # bytes of one answer


class FullSeats:
    """Seats in the whole of Python, each a process of its own behind the kernel's fences (sandlock).

    Args:
        unsafe: run without fences where the kernel has none. A program can then do whatever this one may.
        spares: how many processes wait for a program, begun while others run.
    """

    def __init__(self, unsafe: bool = False, spares: int = os.cpu_count() or 1) -> None:
        self._fences = FenceMaker()
        self._fenced = _fences_hold(self._fences, unsafe)
        self._spares = spares
        self._begun: dict[Limits, deque[Future[Process]]] = {}
        self._lock = threading.Lock()
        self._beginner = ThreadPoolExecutor(1, "spare processes")

    @contextlib.contextmanager
    def process(self, code: str, limits: Limits) -> Iterator[Process]:
        """A Python that runs `code`, with its stdin and stdout."""
        process = self._next(limits)
        try:
            process.begin(code)
            yield process
        finally:
            process.end()

    def close(self) -> None:
        """End those that wait for a program."""
        with self._lock:
            begun = [process for queue in self._begun.values() for process in queue]
            self._begun.clear()
        self._beginner.shutdown(cancel_futures=True)
        for process in begun:
            if not process.cancelled() and process.exception() is None:
                process.result().end()
        self._fences.close()

    def _next(self, limits: Limits) -> Process:
        """The one that has waited longest, if only for its own start; others take its place."""
        for _ in range(self._spares + 1):  # more than wait: where even a new one has ended, something else is wrong
            with self._lock:
                begun = self._begun.setdefault(limits, deque())
                while len(begun) <= self._spares:
                    begun.append(self._beginner.submit(self._new, limits))
                first = begun.popleft()
            process = first.result()
            if process.waits():
                break
        return process

    def _new(self, limits: Limits) -> Process:
        return Process(self._fences.begin(_COMMAND, limits) if self._fenced else _bare(limits), limits)

    @contextlib.contextmanager
    def seat(self, limits: Limits) -> Iterator[Seat]:
        """A seat of its own."""
        with self.process(_driver(), limits) as process:
            yield _FullSeat(process)


class Process:
    """A Python with limits that runs the program it is given, and whose stdout is read no further than they allow."""

    def __init__(self, begun: Fenced | subprocess.Popen[bytes], limits: Limits) -> None:
        self.late = False
        self._process = begun
        self.stdin: Any = begun.stdin
        self.stdout: Any = io.BufferedReader(cast("io.RawIOBase", begun.stdout))
        self._alarm = threading.Timer(limits.seconds, self._too_late)
        self._alarm.daemon = True

    def waits(self) -> bool:
        """Whether it is there still: somebody may have ended it, or the process that it came from."""
        return self._process.poll() is None

    def begin(self, code: str) -> None:
        """Run a program; its time begins now."""
        self._alarm.start()
        program = code.encode(errors="replace")
        rest = memoryview(len(program).to_bytes(8, "big") + program)
        with contextlib.suppress(OSError):  # it has ended already, and says nothing
            while rest:
                rest = rest[self.stdin.write(rest) :]
            self.stdin.flush()

    def end(self) -> None:
        """Kill it, whatever it does."""
        self._alarm.cancel()
        with contextlib.suppress(OSError):
            self._process.kill()
        for pipe in (self.stdin, self.stdout):
            with contextlib.suppress(OSError):
                pipe.close()
        self._process.wait()

    def wait(self) -> int:
        """Its exit code, when it has ended."""
        return self._process.wait()

    def _too_late(self) -> None:
        self.late = True
        with contextlib.suppress(OSError):
            self._process.kill()


class _FullSeat:
    def __init__(self, process: Process) -> None:
        self._process = process

    def execute(self, code: str, outside: Mapping[str, Outside]) -> None:
        self._ask({"code": code, "outside": list(outside)}, outside)

    def call(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        return self._ask({"call": name, "given": pack([list(args), dict(kwargs)])}, {})

    def _ask(self, request: dict[str, Any], outside: Mapping[str, Outside]) -> Any:
        token = secrets.token_hex(16)
        self._send({"token": token, **request})
        while True:
            answer = self._receive(token)
            if "error" in answer:
                raise ProgramError("error", str(answer["error"])[:80], str(answer.get("message"))[:500])
            if "ask" not in answer:
                return self._unpacked(answer.get("value"))
            function = outside.get(str(answer["ask"]))
            if function is None:
                raise ProgramError("crash", "Forgery", "it asked for a function that it was not given")
            args, kwargs = self._unpacked(answer["given"])
            try:
                self._send({"value": pack(function(*args, **kwargs))})
            except ProgramError as error:
                self._send({"error": error.kind, "message": error.message})

    def _unpacked(self, value: Any) -> Any:
        try:
            return unpack(value)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ProgramError("crash", "Forgery", f"its answer cannot be read: {error}") from None

    def _send(self, what: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # if it is gone, there is no answer either
            self._process.stdin.write((json.dumps(what) + "\n").encode())
            self._process.stdin.flush()

    def _receive(self, token: str) -> dict[str, Any]:
        line = self._process.stdout.readline(_ENOUGH)
        if self._process.late:
            raise ProgramError("time", "TimeoutError", "it took longer than its limit")
        if not line:
            raise ProgramError("crash", "Crash", "its process ended without an answer")
        try:
            answer = json.loads(line)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict) or answer.get("token") != token:
            raise ProgramError("crash", "Forgery", "it answered what was not asked, or too much")
        return answer


# Reads a program from stdin, and nothing that comes after it there. At its end, nothing is taken apart that a program
# could not notice: that takes Python a fifth of its time.
_LAUNCHER = """
def _run():
    import os
    import sys
    def read(size):
        got = b""
        while len(got) < size:
            part = os.read(0, size - len(got))
            if not part:
                raise SystemExit
            got += part
        return got
    program = compile(read(int.from_bytes(read(8), "big")), "<string>", "exec")
    names = globals()
    del names["_run"]
    exec(program, names)
    import atexit
    import gc
    if "threading" not in sys.modules and not atexit._ncallbacks():
        names.clear()
        gc.collect()
        sys.stdout.flush()
        os._exit(0)
_run()
"""
_COMMAND = [
    os.path.realpath(sys.executable),
    "-P",
    "-s",
    "-S",
    "-B",
    "-c",
    _LAUNCHER,
]  # not -I: it is told where its home is


@functools.cache
def _driver() -> str:
    return Path(seat_driver.__file__).read_text(encoding="utf-8")


def _bare(limits: Limits) -> subprocess.Popen[bytes]:
    import resource

    def bound() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (limits.memory << 20,) * 2)
        resource.setrlimit(resource.RLIMIT_CPU, (int(limits.seconds) + 1,) * 2)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limits.files,) * 2)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    pipe, null = subprocess.PIPE, subprocess.DEVNULL
    return subprocess.Popen(_COMMAND, 0, stdin=pipe, stdout=pipe, stderr=null, env={}, preexec_fn=bound)


def _fences_hold(fences: FenceMaker, unsafe: bool) -> bool:
    """Whether programs run behind fences: tried out, by a program that reads what it must not."""
    try:
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as secret:
            secret.write("secret")
            secret.flush()
            code = f"print(1, flush=True); print(open({secret.name!r}).read())"
            process = Process(fences.begin(_COMMAND, Limits()), Limits())
            try:
                process.begin(code)
                seen = process.stdout.read(100)
            finally:
                process.end()
        if seen.strip() == b"1":
            return True
        problem = "a program could read a file that it must not" if b"secret" in seen else "a program would not start"
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    if unsafe:
        return False
    raise SandboxUnavailable(
        f"programs cannot be fenced in here ({problem}). The full tier of the sandbox needs the package sandlock (pip "
        "install 'llm-env[code]') and Linux 6.7 or later with Landlock. `unsafe=True` runs them without fences: a "
        "program can then do whatever this one may"
    )
