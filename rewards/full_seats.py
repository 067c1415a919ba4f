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
import sysconfig
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rewards import seat_driver
from rewards.seat_driver import pack, unpack
from rewards.seats import Limits, Outside, ProgramError, SandboxUnavailable, Seat

_ENOUGH = 1 << 20  # bytes of one answer

# Landlock fences in what files say and which there are, not what else is known of them, nor who one is.
_DENIED = [
    "chmod", "fchmod", "fchmodat", "chown", "lchown", "fchown", "fchownat", "utime", "utimes", "utimensat", "futimesat",
    "setxattr", "lsetxattr", "fsetxattr", "removexattr", "lremovexattr", "fremovexattr",
    "setuid", "setgid", "setreuid", "setregid", "setresuid", "setresgid", "setgroups",
]  # fmt: skip


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
