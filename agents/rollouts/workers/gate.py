"""Processes that write texts and come by themselves, from any machine: the program waits for them at an address."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import socket
import struct
import threading
import time
from collections.abc import Sequence
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from typing import Any

from agents.config.address import KEY, Address
from agents.rollouts.workers.link import Link, Links, NobodyCameError
from agents.rollouts.workers.visit import about_me

logger = logging.getLogger("agents")

GREETING_SECONDS = 10.0


class Gate:
    """Lets processes in that know the key, and are of the same version as the program.

    What they send is unpickled: who knows the key can do here what this program can, and the other way round. Nothing
    is encrypted, so let the network between them be one that you trust.

    Args:
        address: where to wait; with port 0 the system chooses one.
        key: the secret.
        patience: seconds that a process may take to accept what it is sent.

    Attributes:
        address: where it waits.
    """

    def __init__(self, address: Address, key: bytes, patience: float = 600.0) -> None:
        self.key = key
        self.patience = patience
        self._socket = listening_at(address)
        self._socket.settimeout(0.5)
        self.address = address._replace(port=self._socket.getsockname()[1])
        self._waiting: list[tuple[str, Connection]] = []
        self._changed = threading.Condition()
        self._is_open = True
        self._thread = threading.Thread(target=self._stand, daemon=True)
        self._thread.start()

    def take(self, ticket: str, seconds: float) -> Connection | None:
        """One that has come with this ticket; None if none does in this time."""
        with self._changed:
            self._changed.wait_for(lambda: any(each == ticket for each, _ in self._waiting), seconds)
            for each, connection in [one for one in self._waiting if one[0] == ticket]:
                self._waiting.remove((each, connection))
                if not connection.poll(0):  # nobody speaks before he is asked: he has gone
                    return connection
                connection.close()
        return None

    def close(self) -> None:
        """Let nobody in any more, and send those away that wait."""
        self._is_open = False
        self._thread.join()
        self._socket.close()
        for _, connection in self._waiting:
            connection.close()

    def _stand(self) -> None:
        while self._is_open:
            try:
                found, (host, *_) = self._socket.accept()
            except TimeoutError:
                continue
            except OSError as error:  # such as too many open files
                logger.warning("somebody could not be let in: %s", error)
                time.sleep(1.0)
                continue
            threading.Thread(target=self._greet, args=(found, host), daemon=True).start()

    def _greet(self, found: socket.socket, host: str) -> None:
        """Let one in, or say why not."""
        _wait_at_most(found, GREETING_SECONDS, GREETING_SECONDS)
        connection = Connection(found.detach())
        try:
            deliver_challenge(connection, self.key)
            answer_challenge(connection, self.key)
            said = json.loads(connection.recv_bytes(4096))
            why = _refusal(said)
            connection.send_bytes(json.dumps({"refused": why}).encode())
        except AuthenticationError:
            logger.warning("somebody on %s was not let in, who has another %s", host, KEY)
            connection.close()
            return
        except (OSError, EOFError, ValueError) as error:
            logger.warning("somebody on %s was not let in: %s", host, error or type(error).__name__)
            connection.close()
            return
        if why:
            logger.warning("a process on %s was not let in: %s", said.get("where"), why)
            connection.close()
            return
        with socket.socket(fileno=connection.fileno()) as own:
            _wait_at_most(own, self.patience, self.patience)
            own.detach()
        with self._changed:
            self._waiting.append((str(said["ticket"]), connection))
            self._changed.notify_all()
        if not self._is_open:
            connection.close()
        if not said["ticket"]:
            logger.warning("a process on %s has come to write texts", said["where"])  # so that it is seen


class Visitors(Links):
    """Processes that come by themselves: `llm-env worker HOST:PORT`. Those who are too many wait for a place.

    Args:
        gate: where they come.
    """

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self.announcement = f"waiting for processes to write texts: llm-env worker {_reached_by(gate.address)}"

    def begin(self, place: int, inherits: Sequence[int]) -> Visitor:
        """Wait for one from now on."""
        return Visitor(self.gate, "", _nobody(_reached_by(self.gate.address)))

    def close(self) -> None:
        """Let nobody in any more."""
        self.gate.close()


class Visitor(Link):
    """A process that comes by itself, and ends when the connection does.

    Args:
        gate: where it comes.
        ticket: that it comes with.
        missing: what to say if it does not.
        seconds: how long to wait before that is said.
    """

    def __init__(self, gate: Gate, ticket: str, missing: str, seconds: float = 600.0) -> None:
        self.gate = gate
        self.ticket = ticket
        self.missing = missing
        self._until = time.monotonic() + seconds
        self._seconds = seconds
        self._connection: Connection | None = None
        self._is_wanted = True

    def connect(self) -> Connection:
        """Wait for it."""
        while self._is_wanted and (left := self._until - time.monotonic()) > 0:
            self._connection = self.gate.take(self.ticket, min(0.5, left))
            if self._connection is not None:
                return self._connection
            self.look()
        self._until = time.monotonic() + self._seconds
        raise NobodyCameError(self.missing)

    def look(self) -> None:
        """Raise a `WorkerLostError` if it will not come any more."""

    def kill(self) -> None:
        """Close the connection, which it ends with."""
        self._is_wanted = False
        if self._connection is not None and not self._connection.closed:
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self._connection.fileno())) as own:
                own.shutdown(socket.SHUT_RDWR)  # who reads from it is told
            self._connection.close()

    def how_it_ended(self) -> str:
        """Of another machine nothing is known."""
        return "the connection is closed"


def listening_at(address: Address) -> socket.socket:
    """A socket that waits there."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    return socket.create_server(address, family=family)


def _nobody(address: Address) -> str:
    return (
        f"no process has come to write texts: start some, with the same {KEY}, by `llm-env worker {address}`, or by "
        "whatever name or address they reach this machine"
    )


def _reached_by(address: Address) -> Address:
    """The name of this machine in place of the address that stands for all of its own."""
    return address._replace(host=socket.gethostname()) if address.host in ("0.0.0.0", "::") else address


def _refusal(said: dict[str, Any]) -> str | None:
    mine = about_me()
    odd = [
        f"{name} {said.get(name)}, not {mine[name]}" for name in ("llm_env", "python") if said.get(name) != mine[name]
    ]
    return f"it has {' and '.join(odd)}: install there what is installed here" if odd else None


def _wait_at_most(found: socket.socket, writing: float, reading: float) -> None:
    """Let writing and reading fail that take longer; and let it be noticed when the other machine is gone."""
    for option, seconds in ((socket.SO_SNDTIMEO, writing), (socket.SO_RCVTIMEO, reading)):
        found.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", math.ceil(seconds), 0))
    found.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
