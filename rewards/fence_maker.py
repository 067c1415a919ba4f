"""The process behind `rewards.fenced`: it begins Pythons behind the kernel's fences (sandlock), and ends them.

It is one of its own for two reasons. To begin a process takes the longer the more memory one has, and a program that
trains has much. And the kernel ends a fenced process together with the thread that began it: the one here stays.

Like `rewards/worker.py` this file is run by its path, and is told the program's `sys.path`. Messages are packets of
JSON, one answer for each request:

    program -> here    {"command": [...], "sandbox": what sandlock's Sandbox takes}
    here -> program    {} and three file descriptors: its stdin, its stdout, and a socket; or {"error": why not}

The socket is for the end of that one: once it has ended, its exit code comes out of it; and it is killed as soon as the
program closes its side for writing. When the program is gone, everything is.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import sys
from typing import Any

MOST = 1 << 16  # bytes of one message


class _Running:
    """One that has begun, until it has ended."""

    def __init__(self, process: Any, control: socket.socket, selector: selectors.BaseSelector) -> None:
        self.process = process
        self.control = control
        self.selector = selector
        self.ended = os.pidfd_open(process.pid)
        selector.register(self.ended, selectors.EVENT_READ, self.end)
        selector.register(control, selectors.EVENT_READ, self.kill)

    def kill(self) -> None:
        if self.ended < 0:  # it has ended at this moment
            return
        self.selector.unregister(self.control)
        with contextlib.suppress(Exception):  # it has just ended
            self.process.kill()

    def end(self) -> None:
        self.selector.unregister(self.ended)
        os.close(self.ended)
        self.ended = -1
        with contextlib.suppress(KeyError):  # it was killed
            self.selector.unregister(self.control)
        code = self.process.wait().exit_code
        with self.control, contextlib.suppress(OSError):
            self.control.send(json.dumps(code).encode())


def _begin(request: dict[str, Any], selector: selectors.BaseSelector) -> list[int]:
    from sandlock import Sandbox, StdioMode

    piped = StdioMode.PIPED
    process = Sandbox(**request["sandbox"]).popen(request["command"], stdin=piped, stdout=piped, stderr=StdioMode.NULL)
    control, theirs = socket.socketpair()
    _Running(process, control, selector)
    ends = [os.dup(process.stdin.fileno()), os.dup(process.stdout.fileno()), theirs.detach()]
    process.stdin.close()
    process.stdout.close()
    return ends


def main(line: socket.socket, program: int) -> None:
    """Answer requests until the program is gone.

    Args:
        line: where they come from.
        program: the process id of whoever started this one.
    """
    selector = selectors.DefaultSelector()
    selector.register(line, selectors.EVENT_READ)
    while os.getppid() == program:
        for key, _ in selector.select(1.0):
            if key.data is not None:
                key.data()
                continue
            request = line.recv(MOST)
            if not request:
                return
            try:
                ends = _begin(json.loads(request), selector)
            except Exception as error:
                line.send(json.dumps({"error": f"{type(error).__name__}: {error}"[:1000]}).encode())
                continue
            socket.send_fds(line, [b"{}"], ends)
            for end in ends:
                os.close(end)


if __name__ == "__main__":
    sys.path[:] = json.loads(sys.argv[3])
    main(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]))
