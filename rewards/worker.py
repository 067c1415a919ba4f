"""The worker process of `rewards.isolated`: scores one rollout after another with one reward.

It is run by its path and not with `python -m`, since it does not know yet where packages are installed: the first
message brings the parent's `sys.path`. Until then it can import the standard library only. (Setting PYTHONPATH would
be simpler, but every program that a reward runs would inherit it.)

A message is its length in eight bytes and then a pickle. Messages go over a socket, not over standard output, so that
a reward may print.

    parent -> worker    (sys.path, the parent's process id, the pickled reward)
    worker -> parent    ("ready",) or ("failed", summary, traceback)
    parent -> worker    a pickled Rollout, again and again
    worker -> parent    ("score", Score), ("invalid", message) for a RewardError, or ("failed", ...)
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import sys
import threading
import time
import traceback


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


def _failed(error: BaseException) -> tuple[str, str, str]:
    summary = "".join(traceback.format_exception_only(error)).strip()
    return "failed", summary, "".join(traceback.format_exception(error))


def _end_with(parent: int) -> None:
    """End this process and its children once the parent is gone, even in the middle of a hang."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os.killpg(os.getpgrp(), signal.SIGKILL)


def main(connection: socket.socket) -> None:
    """Load the reward, then answer each rollout with its score until the parent closes the connection."""
    sys.path[:], parent, payload = pickle.loads(receive(connection))
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    try:
        from rewards.score import RewardError

        reward = pickle.loads(payload)
    except Exception as error:
        send(connection, pickle.dumps(_failed(error)))
        return
    send(connection, pickle.dumps(("ready",)))
    while True:
        try:
            request = receive(connection)
        except (EOFError, ConnectionError):
            return
        reply: tuple[object, ...]
        try:
            reply = ("score", reward([pickle.loads(request)])[0])
        except RewardError as error:
            reply = ("invalid", str(error))
        except Exception as error:
            reply = _failed(error)
        send(connection, pickle.dumps(reply))


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))
