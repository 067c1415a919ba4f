"""`llm-env worker`: write texts for a run on another machine."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from agents.cli.options import flag_registry
from agents.config.address import KEY, Address
from agents.config.files import ConfigError


@dataclass(frozen=True)
class WorkerOptions:
    """What the command is told."""

    address: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="HOST:PORT")]
    """Where the run waits: its --listen, by a name or address that this machine reaches it by."""
    patience: float = 600.0
    """Seconds to wait for the run to begin."""
    traceback: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Show where in the program an error came from."""


def worker(arguments: Sequence[str]) -> None:
    """Write texts for a run until it ends."""
    options = tyro.cli(
        WorkerOptions,
        args=arguments,
        prog="llm-env worker",
        description=f"Write texts for a run on this or another machine (llm-env train --workers 1 --listen HOST:PORT) "
        f"until it ends. Both need the same secret in {KEY}, and the same software. OMP_NUM_THREADS says with how many "
        f"threads to compute, CUDA_VISIBLE_DEVICES on which GPUs.",
        registry=flag_registry(),
    )
    try:
        address = Address.read(options.address)
    except ValueError as error:
        raise ConfigError(f"{options.address!r} is no address: {error}") from error
    key = os.environ.get(KEY)
    if not key:
        raise ConfigError(f"the environment variable {KEY} is empty: it must hold the secret that the run has there")
    from agents.rollouts.workers.visit import visit  # takes seconds to import

    print(f"going to write texts for the run at {address}", flush=True)
    visit(address, key.encode(), patience=options.patience)
    print("the run has ended")
