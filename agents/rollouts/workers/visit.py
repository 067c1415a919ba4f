"""A process that goes to a program, wherever that is, and writes texts for it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import socket
import time
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge

from agents.config.address import KEY, Address
from agents.rollouts.workers import worker
from agents.rollouts.workers.here import UNBOUND

BETWEEN_TRIES_SECONDS = 1.0


class RefusedError(RuntimeError):
    """The program does not let this process in."""


def visit(address: Address, key: bytes, *, ticket: str = "", patience: float = 600.0) -> None:
    """Go to a program and write texts for it until it ends.

    Args:
        address: where it waits.
        key: the secret.
        ticket: says who this is, if the program has sent for it.
        patience: seconds to wait until there is a program.

    Raises:
        RefusedError: the key is another one, or the program does not fit to what is installed here.
        TimeoutError: there is no program.
    """
    for name, value in UNBOUND.items():
        os.environ.setdefault(name, value)
    connection = _reach(address, patience)
    try:
        answer_challenge(connection, key)
        deliver_challenge(connection, key)
        connection.send_bytes(json.dumps({**about_me(), "ticket": ticket}).encode())
        refused = json.loads(connection.recv_bytes(4096))["refused"]
    except (AuthenticationError, EOFError, ConnectionError) as error:
        raise RefusedError(
            f"the program at {address} does not let this process in: is {KEY} the same as there? "
            f"({error or 'it hung up'})"
        ) from error
    if refused:
        raise RefusedError(f"the program at {address} does not let this process in: {refused}")
    worker.serve(connection, is_here=False)


def about_me() -> dict[str, str]:
    """What program and process must agree about, as objects go from one to the other; and where this is.

    Examples:
        >>> sorted(about_me())
        ['llm_env', 'python', 'where']
    """
    return {
        "llm_env": _version(),
        "python": ".".join(platform.python_version_tuple()[:2]),
        "where": f"{socket.gethostname()} ({os.getpid()})",
    }


def _version() -> str:
    try:
        return importlib.metadata.version("llm-env")
    except importlib.metadata.PackageNotFoundError:  # it is used where its sources lie
        return "of its sources"


def _reach(address: Address, patience: float) -> Connection:
    until = time.monotonic() + patience
    while True:
        try:
            found = socket.create_connection(address, timeout=10.0)
        except socket.gaierror as error:
            raise ConnectionError(f"there is no machine named {address.host!r} ({error})") from error
        except OSError as error:
            if time.monotonic() > until:
                raise TimeoutError(
                    f"nobody waits at {address} ({error}): is the program begun, with --listen, and can this machine "
                    "reach it?"
                ) from error
            time.sleep(BETWEEN_TRIES_SECONDS)
            continue
        found.settimeout(None)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        with contextlib.suppress(OSError):
            found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return Connection(found.detach())
