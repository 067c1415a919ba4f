"""A run in several processes that `torchrun` has started."""

from __future__ import annotations

import contextlib
import signal
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from agents.config import TrainConfig
from agents.config.files import ConfigError
from agents.networks.ranks import Ranks, launched
from agents.run.parts import Invitation, join


@contextlib.contextmanager
def learning_together(config: TrainConfig, *, supervised: bool = False) -> Iterator[Ranks]:
    """The processes that `torchrun` has started, while they learn; or this one alone.

    Args:
        config: of the run.
        supervised: there is a warm start only.
    """
    ranks = launched()
    try:
        if ranks.size > 1 and ranks.leads:
            check_shareable(config, ranks.size, supervised=supervised)
        yield ranks
    except BaseException:
        if ranks.leads:
            with contextlib.suppress(RuntimeError):  # nobody is left to hear it, which may be why
                ranks.dismiss()
        raise
    finally:
        ranks.forget()


def follow(ranks: Ranks) -> Any:
    """Do what the first process asks for until it has done all: gives what that has led to."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first one decides when to stop
    heard = ranks.hear()
    while isinstance(heard, Invitation):
        with tempfile.TemporaryDirectory() as nowhere:  # what there is to be kept, the first one keeps
            join(replace(heard, config=heard.config.replace(out=Path(nowhere))), ranks)
            heard = ranks.follow()
        ranks.forget()
    if heard is None:
        raise SystemExit(1)
    return heard


def check_shareable(config: TrainConfig, size: int, *, supervised: bool = False) -> None:
    """Raise if so many processes cannot share the work."""
    for name, settings in () if supervised else (("actor", config.actor), ("critic", config.critic)):
        rows = config.rollout.batch_size
        if rows % (settings.minibatches * size):
            raise ConfigError(
                f"--rollout.batch-size is {rows} and --{name}.minibatches {settings.minibatches}, but there are {size} "
                f"processes, each of which reads as many texts of a mini-batch: use a multiple of "
                f"{settings.minibatches * size} for the batch"
            )
    if config.sft.steps and config.sft.batch_size < size:
        raise ConfigError(
            f"--sft.batch-size is {config.sft.batch_size}, but there are {size} processes, each of which reads some "
            f"of the texts of a step: use {size} or more"
        )
    if config.rollout.engine != "transformers" and not config.workers:
        raise ConfigError(
            f"--rollout.engine is {config.rollout.engine} and --workers 0, but an engine with processes of its own "
            "cannot be where several learn together: let another process write, --workers 1"
        )
    if config.device not in ("cpu", "cuda"):
        raise ConfigError(f"--device is {config.device}, but each process has a GPU of its own: use cuda")
    if config.model.refresh_reference and config.model.lora.rank:
        raise ConfigError(
            f"--model.refresh-reference is {config.model.refresh_reference}, which makes an adapter of the policy, and "
            "weights in parts take no new ones: leave it or --model.lora.rank out, or use one process"
        )
    if config.model.frozen_bits or 8 in (config.actor.state_bits, config.critic.state_bits):
        raise ConfigError(
            "weights and averages in few bits are not divided among processes: leave --model.frozen-bits, "
            "--actor.state-bits and --critic.state-bits out, or use one process"
        )
    if config.model.offload_reference:
        raise ConfigError(
            "--model.offload-reference is on, but each process has a part of the reference only: leave it out, or use "
            "one process"
        )
    if config.model.compile:
        raise ConfigError(
            "--model.compile is on, but a model in parts is not compiled: leave it out, or use one process"
        )
