"""Pythons behind the kernel's own fences: begun, killed and waited for through a small process of its own."""

from __future__ import annotations

import contextlib
import io
import json
import os
import select
import socket
import subprocess
import sys
import sysconfig
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rewards import fence_maker
from rewards.seats import Limits

_SECONDS = 30.0  # within which one has begun

_HOME = f"{sys.base_prefix}:{sys.base_exec_prefix}"

# Landlock fences in what files say and which there are, not what else is known of them, nor who one is.
_DENIED = [
    "chmod", "fchmod", "fchmodat", "chown", "lchown", "fchown", "fchownat", "utime", "utimes", "utimensat", "futimesat",
    "setxattr", "lsetxattr", "fsetxattr", "removexattr", "lremovexattr", "fremovexattr",
    "setuid", "setgid", "setreuid", "setregid", "setresuid", "setresgid", "setgroups",
]  # fmt: skip


class Fenced:
    """One that has begun, with its stdin and stdout; it has the methods of a `subprocess.Popen`."""

    def __init__(self, stdin: int, stdout: int, control: int) -> None:
        self.stdin = io.FileIO(stdin, "w")
        self.stdout = io.FileIO(stdout)
        self._control = socket.socket(fileno=control)
        self._code: int | None = None

    def kill(self) -> None:
        """End it, whatever it does."""
        self._control.shutdown(socket.SHUT_WR)

    def poll(self) -> int | None:
        """Its exit code if it has ended."""
        return self.wait() if self._code is not None or select.select([self._control], [], [], 0)[0] else None

    def wait(self) -> int:
        """Its exit code, when it has ended."""
        if self._code is None:
            with self._control:
                code = self._control.recv(fence_maker.MOST)
            self._code = int(json.loads(code)) if code else -1  # -1: its maker is gone, and it with it
        return self._code


class FenceMaker:
    """Begins Pythons behind fences.

    Whoever begins a process pays for its own size, and a training program is large. So it starts a small one, once, and
    has that do it (`rewards/fence_maker.py`). If it is gone, another is started.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._helper: _Helper | None = None

    def begin(self, command: Sequence[str], limits: Limits) -> Fenced:
        """Begin one.

        Raises:
            RuntimeError: if it cannot be; the message has the reason.
        """
        request = json.dumps({"command": list(command), "sandbox": _allowed(limits)}).encode()
        with self._lock:
            for _ in range(2):
                if self._helper is None or self._helper.owner != os.getpid():
                    self._helper = _Helper()
                with contextlib.suppress(EOFError, ConnectionError):  # it is gone: the next will do
                    return Fenced(*self._helper.ask(request))
                self._helper = None
        raise RuntimeError("the process that begins programs ends at once")

    def close(self) -> None:
        """End all that were begun, too."""
        with self._lock:
            helper, self._helper = self._helper, None
        if helper is not None:
            helper.end()


class _Helper:
    """The small process, and the line to it."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self._line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._line.settimeout(_SECONDS)
        with theirs:
            command = [fence_maker.__file__, str(theirs.fileno()), str(self.owner), json.dumps(sys.path)]
            popen = subprocess.Popen(
                [sys.executable, "-P", *command],
                stdin=subprocess.DEVNULL,
                stdout=2,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # so that Ctrl-C reaches the program only
            )
        self.end = weakref.finalize(self, _end, popen, self._line, self.owner)

    def ask(self, request: bytes) -> list[int]:
        """The three ends of the one that it has begun."""
        self._line.send(request)
        answer, ends, _, _ = socket.recv_fds(self._line, fence_maker.MOST, 3)
        if not answer:
            raise EOFError
        if error := json.loads(answer).get("error"):
            raise RuntimeError(error)
        return list(ends)


def _end(popen: subprocess.Popen[bytes], line: socket.socket, owner: int) -> None:
    line.close()
    if owner == os.getpid():  # in a forked copy of the program, it belongs to the original
        popen.kill()  # the kernel ends with it what it has begun
        popen.wait()


def _allowed(limits: Limits) -> dict[str, Any]:
    readable = {"/usr", "/lib", "/lib64", sys.base_prefix, os.devnull, "/dev/urandom", sysconfig.get_path("stdlib")}
    return {
        "fs_readable": sorted(path for path in readable if Path(path).exists()),
        "fs_writable": [os.devnull],
        "max_memory": f"{limits.memory}M",
        "max_processes": 1,
        "max_open_files": limits.files,
        "clean_env": True,
        # The last three spare it files that it would look for: each costs a turn through the fences.
        "env": {"PYTHONHASHSEED": "0", "PYTHONHOME": _HOME, "LC_ALL": "C", "PYTHONUTF8": "1"},
        "extra_deny_syscalls": _DENIED,
        "no_coredump": True,
    }
