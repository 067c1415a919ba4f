"""Where programs run: a fast interpreter of a part of Python, and the whole of it behind the kernel's own fences."""

from __future__ import annotations

import builtins
import contextlib
import functools
import io
import json
import os
import secrets
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from rewards import seat_driver
from rewards.seat_driver import pack, unpack

Outside = Callable[..., Any]
Why = Literal["error", "time", "output", "crash", "unsupported"]
_ENOUGH = 1 << 20  # bytes of one answer
# What the fast interpreter says of what it lacks, and of what no Python would run either.
_LACKING = {
    "NotImplementedError", "ModuleNotFoundError", "ImportError", "NameError", "AttributeError", "TypeError",
    "SyntaxError", "MemoryError", "UnboundLocalError",
}  # fmt: skip

# Landlock fences in what files say and which there are, not what else is known of them, nor who one is.
_DENIED = [
    "chmod", "fchmod", "fchmodat", "chown", "lchown", "fchown", "fchownat", "utime", "utimes", "utimensat", "futimesat",
    "setxattr", "lsetxattr", "fsetxattr", "removexattr", "lremovexattr", "fremovexattr",
    "setuid", "setgid", "setreuid", "setregid", "setresuid", "setresgid", "setgroups",
]  # fmt: skip


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


class FullSeats:
    """Seats in the whole of Python, each a process of its own behind the kernel's fences (sandlock).

    Args:
        unsafe: run without fences where the kernel has none. A program can then do whatever this one may.
        spares: how many processes wait for a program, begun while others run.
    """

    def __init__(self, unsafe: bool = False, spares: int = os.cpu_count() or 1) -> None:
        self._fenced = _fences(unsafe)
        self._most = spares
        self._spares: dict[Limits, list[Process]] = {}
        self._lock = threading.Lock()
        self._closed = False
        # The kernel ends a process with the thread that has made it, so spares come from one that stays.
        self._maker = ThreadPoolExecutor(1, "spare processes")

    @contextlib.contextmanager
    def process(self, code: str, limits: Limits) -> Iterator[Process]:
        """A Python that runs `code`, with its stdin and stdout."""
        process = self._taken(limits)
        try:
            process.begin(code)
            yield process
        finally:
            process.end()

    def close(self) -> None:
        """End those that wait for a program."""
        with self._lock:
            self._closed = True
            spares = [spare for kept in self._spares.values() for spare in kept]
            self._spares.clear()
        self._maker.shutdown(cancel_futures=True)
        for spare in spares:
            spare.end()

    def _taken(self, limits: Limits) -> Process:
        """One that has begun already, if there is one; another takes its place."""
        with self._lock:
            spares = self._spares.setdefault(limits, [])
            spare = spares.pop() if spares else None
        with contextlib.suppress(RuntimeError):  # it is closed, or the program is ending
            self._maker.submit(self._keep_another, limits)
        return spare or Process(limits, fenced=self._fenced)

    def _keep_another(self, limits: Limits) -> None:
        with contextlib.suppress(Exception):  # if none can be made, whoever needs one will hear of it
            spare = Process(limits, fenced=self._fenced)
            with self._lock:
                kept = self._spares.setdefault(limits, [])
                if not self._closed and len(kept) < self._most:
                    kept.append(spare)
                    return
            spare.end()

    @contextlib.contextmanager
    def seat(self, limits: Limits) -> Iterator[Seat]:
        """A seat of its own."""
        with self.process(_driver(), limits) as process:
            yield _FullSeat(process)


class Process:
    """A Python with limits that runs the program it is given, and whose stdout is read no further than they allow."""

    def __init__(self, limits: Limits, fenced: bool) -> None:
        self.late = False
        command = [os.path.realpath(sys.executable), "-I", "-S", "-B", "-c", _LAUNCHER]
        self._process: Any = _confined(command, limits) if fenced else _bare(command, limits)
        self.stdin: Any = self._process.stdin
        self.stdout: Any = io.BufferedReader(self._process.stdout)
        self._alarm = threading.Timer(limits.seconds, self._too_late)
        self._alarm.daemon = True

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
        with contextlib.suppress(Exception):
            self._process.kill()
        for pipe in (self.stdin, self.stdout):
            with contextlib.suppress(OSError):
                pipe.close()
        with contextlib.suppress(Exception):
            self._process.wait()

    def wait(self) -> int:
        """Its exit code, when it has closed its stdout."""
        found = self._process.wait()
        return int(getattr(found, "exit_code", found))

    def _too_late(self) -> None:
        self.late = True
        with contextlib.suppress(Exception):
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


# Reads a program from stdin, and nothing that comes after it there.
_LAUNCHER = """
def _program():
    import os
    def read(size):
        got = b""
        while len(got) < size:
            part = os.read(0, size - len(got))
            if not part:
                raise SystemExit
            got += part
        return got
    return compile(read(int.from_bytes(read(8), "big")), "<string>", "exec")
exec(_program())
"""


@functools.cache
def _driver() -> str:
    return Path(seat_driver.__file__).read_text(encoding="utf-8")


def _confined(command: list[str], limits: Limits) -> Any:
    from sandlock import Sandbox, StdioMode

    readable = {"/usr", "/lib", "/lib64", sys.base_prefix, os.devnull, "/dev/urandom", sysconfig.get_path("stdlib")}
    sandbox = Sandbox(
        fs_readable=sorted(path for path in readable if Path(path).exists()),
        fs_writable=[os.devnull],
        max_memory=f"{limits.memory}M",
        max_processes=1,
        max_open_files=limits.files,
        clean_env=True,
        env={"PYTHONHASHSEED": "0"},
        extra_deny_syscalls=_DENIED,
        no_coredump=True,
    )
    return sandbox.popen(command, stdin=StdioMode.PIPED, stdout=StdioMode.PIPED, stderr=StdioMode.NULL)


def _bare(command: list[str], limits: Limits) -> subprocess.Popen[bytes]:
    import resource

    def bound() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (limits.memory << 20,) * 2)
        resource.setrlimit(resource.RLIMIT_CPU, (int(limits.seconds) + 1,) * 2)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limits.files,) * 2)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    pipe, null = subprocess.PIPE, subprocess.DEVNULL
    return subprocess.Popen(command, 0, stdin=pipe, stdout=pipe, stderr=null, env={}, preexec_fn=bound)


@functools.cache
def _fences(unsafe: bool) -> bool:
    """Whether programs run behind fences: tried out, by a program that reads what it must not."""
    try:
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as secret:
            secret.write("secret")
            secret.flush()
            code = f"print(1, flush=True); print(open({secret.name!r}).read())"
            process = Process(Limits(), fenced=True)
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
