"""The processes behind `rewards.isolated`: a worker that scores with one reward, and a supervisor that outlives it.

The program starts the supervisor, which forks the worker and waits. When the worker has ended, however that came
about, or the program wants it to end or is gone, the supervisor kills the worker and every process that came from it,
and ends as the worker did: with its exit code, or by the same signal.

This file is run by its path and not with `python -m`, since it does not know yet where packages are installed: the
first message brings the program's `sys.path`. Until then it can import the standard library only. (Setting PYTHONPATH
would be simpler, but every program that a reward runs would inherit it.)

A message is its length in eight bytes and then a pickle. Messages go over a socket, not over standard output, so that
a reward may print. Requests are numbered, and an answer has the number of its request.

    program -> worker    (0, sys.path, the pickled reward)
    worker -> program    (0, "ready") or (0, "failed", summary, traceback)
    program -> worker    (number, seed, a pickled Rollout), again and again
    worker -> program    (number, "score", Score), (number, "invalid", message of a RewardError), or (number, "failed",
                         summary, traceback)

A second socket is the supervisor's: the program closes its side of it for writing to have everything ended. Back come
single bytes, one for each process that a reward forked and that came back from scoring as if it were the worker.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import random
import select
import signal
import socket
import sys
import threading
import time
import traceback

# From the Linux header <sys/prctl.h>: processes whose parent has ended become children of this one.
_PR_SET_CHILD_SUBREAPER = 36

# Processes that are still there after so many attempts at killing them are left, with a word about it.
_KILL_SECONDS = 5.0


def send(connection: socket.socket, message: bytes, deadline: float | None = None) -> None:
    """Send one message; past the deadline (by `time.monotonic()`) raise a TimeoutError."""
    _set_timeout(connection, deadline)
    connection.sendall(len(message).to_bytes(8, "big") + message)


def receive(connection: socket.socket, deadline: float | None = None) -> bytes:
    """Receive one message; past the deadline raise a TimeoutError, and an EOFError if the other side has closed."""
    size = int.from_bytes(_receive_exactly(connection, 8, deadline), "big")
    return bytes(_receive_exactly(connection, size, deadline))


def _receive_exactly(connection: socket.socket, size: int, deadline: float | None) -> bytearray:
    buffer = bytearray(size)
    view = memoryview(buffer)
    while view:
        _set_timeout(connection, deadline)
        count = connection.recv_into(view)
        if count == 0:
            raise EOFError("the other side closed the connection")
        view = view[count:]
    return buffer


def _set_timeout(connection: socket.socket, deadline: float | None) -> None:
    remaining = None if deadline is None else deadline - time.monotonic()
    if remaining is not None and remaining <= 0:
        raise TimeoutError("timed out")
    connection.settimeout(remaining)


# The worker.


class _Worker:
    """Answers requests until the program closes the connection."""

    def __init__(self, connection: socket.socket, control: socket.socket) -> None:
        self.connection = connection
        self.control = control
        self.pid = os.getpid()

    def run(self) -> None:
        number, sys.path[:], payload = pickle.loads(receive(self.connection))
        try:
            from rewards.score import RewardError

            reward = pickle.loads(payload)
        except Exception as error:
            self._answer(number, _failed(error))
            return
        self._answer(number, ("ready",))
        while True:
            try:
                number, seed, request = pickle.loads(receive(self.connection))
            except (EOFError, ConnectionError):
                return
            answer: tuple[object, ...]
            try:
                _seed_everything(seed)
                answer = ("score", reward([pickle.loads(request)])[0])
            except RewardError as error:
                answer = ("invalid", str(error))
            except Exception as error:
                answer = _failed(error)
            self._answer(number, answer)

    def _answer(self, number: int, answer: tuple[object, ...]) -> None:
        if os.getpid() != self.pid:
            # The reward has forked, and this is the child, which came back here as well. Its answer would be one too
            # many, and as a second reader of the connection it would take requests away from the worker.
            with contextlib.suppress(OSError):
                self.control.send(b"!")
            os._exit(1)
        send(self.connection, pickle.dumps((number, *answer)))


def _seed_everything(seed: int) -> None:
    import numpy as np  # it is loaded by now: `rewards` needs it

    # One number for all would not do: with the same one, `random` and numpy give the same draws.
    seeds = random.Random(seed)
    random.seed(seeds.getrandbits(64))
    np.random.seed([seeds.getrandbits(32), seeds.getrandbits(32)])  # noqa: NPY002 - rewards may use the global one
    if torch := sys.modules.get("torch"):  # before it is imported, its generator is as in every new process
        torch.manual_seed(seeds.getrandbits(63))


def _failed(error: BaseException) -> tuple[str, str, str]:
    summary = "".join(traceback.format_exception_only(error)).strip()
    return "failed", summary, "".join(traceback.format_exception(error))


def _end_with(parent: int) -> None:
    """End this process and its group once the parent is gone, even in the middle of a hang."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os.killpg(os.getpgrp(), signal.SIGKILL)


# The supervisor.


def _adopt_orphans() -> None:
    """Become the parent of those descendants whose own parents end: without it, nobody could find them again."""
    if sys.platform == "linux":
        import ctypes

        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _supervise(worker: int, control: socket.socket, program: int) -> int:
    """Wait until the worker has ended, or end it when the program says so or is gone; gives its wait status."""
    woken, waker = socket.socketpair()
    for end in (woken, waker):
        end.setblocking(False)
    signal.set_wakeup_fd(waker.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)  # without a handler nobody would be woken
    while True:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == worker:
            return status
        if pid:
            continue  # one that was adopted has ended, and needed somebody to wait for it
        ready, _, _ = select.select([control, woken], [], [], 1.0)
        if woken in ready:
            woken.recv(4096)
        if control in ready or os.getppid() != program:
            os.kill(worker, signal.SIGKILL)  # it was not waited for, so its id is still its own
            return os.waitpid(worker, 0)[1]


def _end_descendants(worker: int) -> None:
    """Kill what the worker has left behind, the worker being dead."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(worker, signal.SIGKILL)
    deadline = time.monotonic() + _KILL_SECONDS
    while True:
        # Only children: nobody else can have their ids, since only we can wait for them. Once they are dead, their own
        # children are ours, and next.
        children = _children()
        for child in children:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(child, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return  # none is left
        if time.monotonic() > deadline:
            print(f"rewards: processes that a reward started could not be killed: {children}", file=sys.stderr)
            return
        time.sleep(0.002)


def _children() -> list[int]:
    """The processes whose parent is this one; none where the system does not tell."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        for name in filter(str.isdecimal, os.listdir("/proc")):
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
                # pid (name) state parent ..., where a name may hold spaces and parentheses
                if int(file.read().rpartition(b")")[2].split()[1]) == os.getpid():
                    found.append(int(name))
    return found


def _end_as(status: int) -> None:
    """End this process as another one did."""
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # one dump of memory, the worker's, is enough
        with contextlib.suppress(OSError):  # of SIGKILL, nothing can be set
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def main(connection: socket.socket, control: socket.socket, program: int) -> None:
    """Become the supervisor, with a worker below.

    Args:
        connection: the worker's, for requests and answers.
        control: the supervisor's.
        program: the process id of whoever started this one.
    """
    for end in (connection, control):
        end.set_inheritable(False)  # programs that a reward starts have no business with them
    _adopt_orphans()
    supervisor = os.getpid()
    worker = os.fork()
    if worker == 0:
        os.setsid()
        threading.Thread(target=_end_with, args=(supervisor,), daemon=True).start()
        _Worker(connection, control).run()
        return
    connection.close()
    status = _supervise(worker, control, program)
    _end_descendants(worker)
    _end_as(status)


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])), socket.socket(fileno=int(sys.argv[2])), int(sys.argv[3]))
