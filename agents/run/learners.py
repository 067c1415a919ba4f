"""A run in several processes that `torchrun` has started."""

from __future__ import annotations

import contextlib
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

from agents.config import TrainConfig
from agents.config.files import ConfigError
from agents.networks.ranks import Ranks, launched
from agents.run.loop import Result
from agents.run.parts import Invitation, join


@contextlib.contextmanager
def learning_together(config: TrainConfig) -> Iterator[Ranks]:
    """The processes that `torchrun` has started, while they learn; or this one alone."""
    ranks = launched()
    try:
        if ranks.size > 1 and ranks.leads:
            check_shareable(config, ranks.size)
        yield ranks
    except BaseException:
        if ranks.leads:
            with contextlib.suppress(RuntimeError):  # nobody is left to hear it, which may be why
                ranks.dismiss()
        raise
    finally:
        ranks.parts.clear()


def follow(ranks: Ranks) -> Result:
    """Do what the first process asks for until the run has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first one decides when to stop
    heard = ranks.hear()
    if isinstance(heard, Invitation):
        with tempfile.TemporaryDirectory() as nowhere:  # what there is to be kept, the first one keeps
            join(Invitation(heard.config.replace(out=Path(nowhere)), heard.source), ranks)
            heard = ranks.follow()
    if not isinstance(heard, Result):
        raise SystemExit(1)
    return heard


def check_shareable(config: TrainConfig, size: int) -> None:
    """Raise if so many processes cannot share the work."""
    for name, settings in (("actor", config.actor), ("critic", config.critic)):
        rows = config.rollout.batch_size
        if rows % (settings.minibatches * size):
            raise ConfigError(
                f"--rollout.batch-size is {rows} and --{name}.minibatches {settings.minibatches}, but there are {size} "
                f"processes, each of which reads as many texts of a mini-batch: use a multiple of "
                f"{settings.minibatches * size} for the batch"
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
    if config.model.compile:
        raise ConfigError(
            "--model.compile is on, but a model in parts is not compiled: leave it out, or use one process"
        )
