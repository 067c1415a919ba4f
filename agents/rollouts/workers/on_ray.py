"""Processes that write texts where Ray has room for them."""

from __future__ import annotations

import contextlib
import logging
import secrets
from collections.abc import Sequence
from typing import Any

from agents.config.address import Address, new_key
from agents.rollouts.workers.gate import Gate, Visitor
from agents.rollouts.workers.link import Links, WorkerLostError
from agents.rollouts.workers.visit import visit

NEW = "local"


class OnRay(Links):
    """Processes that a Ray cluster starts, on machines that are free. Texts and weights do not go through Ray.

    Args:
        cluster: "auto" for the one that this machine belongs to, "local" for one of this machine alone that ends with
            the program, or the address of one.
        cpus: that each process has for itself, and as many threads to compute with.
        gpus: that each process has for itself.
        patience: seconds that a process may take to accept what it is sent.
    """

    def __init__(self, cluster: str = "auto", *, cpus: int = 1, gpus: int = 0, patience: float = 600.0) -> None:
        self._ray = _ray()
        self._is_mine = not self._ray.is_initialized()
        if self._is_mine:
            _connect(self._ray, cluster)
        self.gate = Gate(Address(self._ray.util.get_node_ip_address(), 0), new_key().encode(), patience)
        self.needs = f"{cpus} CPU" + f" and {gpus} GPU" * (gpus > 0)
        self._actor = self._ray.remote(
            num_cpus=cpus, num_gpus=gpus, max_restarts=0, max_concurrency=1, scheduling_strategy="SPREAD"
        )(Writer)

    def begin(self, place: int, inherits: Sequence[int]) -> RayVisitor:
        """Have Ray start one."""
        ticket = secrets.token_hex(8)
        actor = self._actor.remote()
        return RayVisitor(self, actor, actor.work.remote(self.gate.address, self.gate.key, ticket), ticket)

    def close(self) -> None:
        """Begin no more, and end a cluster that was started for this."""
        self.gate.close()
        if self._is_mine:
            self._ray.shutdown()


class Writer:
    """What Ray runs."""

    def work(self, address: Address, key: bytes, ticket: str) -> None:
        """Write texts until the program ends."""
        visit(address, key, ticket=ticket)


class RayVisitor(Visitor):
    """A process that Ray starts.

    Args:
        links: where it comes from.
        actor: the handle of what Ray runs.
        work: what comes when that ends.
        ticket: that it comes with.
    """

    def __init__(self, links: OnRay, actor: Any, work: Any, ticket: str) -> None:
        missing = (
            f"Ray has not begun a process to write texts: it needs {links.needs}, which may not be free "
            "(`ray status` says); ask for fewer --workers, or for less of --worker-cpus and --worker-gpus"
        )
        super().__init__(links.gate, ticket, missing)
        self._ray = links._ray
        self._actor = actor
        self._work = work
        self._why = ""

    def look(self) -> None:
        """Raise if Ray has lost it."""
        if self._has_ended():
            raise WorkerLostError("could not begin")

    def kill(self) -> None:
        """Let Ray end it."""
        super().kill()
        with contextlib.suppress(Exception):  # Ray may be gone
            self._ray.kill(self._actor, no_restart=True)

    def how_it_ended(self) -> str:
        """As Ray says."""
        return self._why if self._has_ended(seconds=1.0) else "it was ended"

    def _has_ended(self, seconds: float = 0.0) -> bool:
        if not self._why:
            try:
                if self._ray.wait([self._work], timeout=seconds)[0]:
                    self._ray.get(self._work)
                    self._why = "it has ended"
            except Exception as error:  # what it raised, or Ray of itself
                self._why = " ".join(str(error).split())[:300]
        return bool(self._why)


def check_cluster(cluster: str) -> None:
    """Raise if there is no such Ray cluster, as far as that can be said before one is needed."""
    ray = _ray()
    if cluster != NEW and not ray.is_initialized():
        _connect(ray, cluster)
        ray.shutdown()


def _connect(ray: Any, cluster: str) -> None:
    try:
        ray.init(address=cluster, logging_level=logging.WARNING)
    except (ConnectionError, ValueError) as error:
        raise ConnectionError(
            f"there is no Ray cluster {cluster!r} ({error}): start one by `ray start --head`, or use "
            f"--ray {NEW}, one of this machine alone"
        ) from error


def _ray() -> Any:
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("Ray is missing: pip install 'llm-env[ray]'", name="ray") from error
    return ray
