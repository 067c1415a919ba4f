"""Where the processes that write the texts of a run come from."""

from __future__ import annotations

import os

import torch

from agents.config import TrainConfig
from agents.config.address import KEY, Address
from agents.config.files import ConfigError
from agents.rollouts.workers.gate import Gate, Visitors, listening_at
from agents.rollouts.workers.here import Here
from agents.rollouts.workers.link import Links
from agents.rollouts.workers.on_ray import OnRay, check_cluster


def check_links(config: TrainConfig) -> None:
    """Raise if they cannot come; to be called before anything heavy is done."""
    if config.ray is not None:
        check_cluster(config.ray)
    if config.listen is not None:
        try:
            listening_at(Address.read(config.listen)).close()
        except OSError as error:
            raise ConfigError(
                f"--listen is {config.listen}, but nothing can wait there ({error}): use another port, and an address "
                "of this machine, or 0.0.0.0 for all of them"
            ) from error


def make_links(config: TrainConfig, learners: int = 1) -> Links:
    """Where processes that write texts come from."""
    patience = config.rollout.patience
    if config.ray is not None:
        return OnRay(config.ray, cpus=config.worker_cpus or 1, gpus=config.worker_gpus, patience=patience)
    if config.listen is not None:
        return Visitors(Gate(Address.read(config.listen), os.environ[KEY].encode(), patience))
    on_gpu = torch.device(config.device).type == "cuda"
    return Here(share_of_threads(config)[1], config.worker_gpus, first_gpu=learners if on_gpu else 0)


def share_of_threads(config: TrainConfig) -> tuple[int, int]:
    """With how many threads the learner computes, and each process that writes texts on this machine. Those that do it
    at the same time share them: the learner, too, if texts are written ahead.
    """
    threads = torch.get_num_threads()
    if not config.workers or config.ray is not None or config.listen is not None:
        return threads, threads
    each = config.worker_cpus or max(1, threads // (config.workers + (config.rollout.ahead > 0)))
    return max(1, threads - config.workers * each) if config.rollout.ahead else threads, each
