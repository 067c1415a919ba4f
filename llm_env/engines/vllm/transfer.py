"""A backend of vLLM's weight-transfer API for a trainer in the same process: tensors are handed over, not sent.

vLLM's own backends carry weights from process to process: NCCL copies them over, and CUDA IPC cannot open a handle in
the process that exported it. Here vLLM reads the trainer's tensors where they lie, which on one GPU is the very memory
that the trainer writes to.

Where vLLM divides the weights among processes, each is told all of them, through the host, and keeps its part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

NAME = "llm_env_in_process"
PORTION = 2**30  # bytes of weights that are on their way to other processes at once


def register_backend() -> None:
    """Let vLLM know it, in this process."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if NAME not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(NAME, _backend())


def config() -> Any:
    """What makes vLLM take weights this way."""
    from vllm.config.weight_transfer import WeightTransferConfig

    return WeightTransferConfig(backend=NAME)


def transfer(tell: Callable[..., Any], named_tensors: dict[str, torch.Tensor], *, apart: bool) -> None:
    """Replace all weights through the API.

    The same calls serve CPU and GPU. Tested on CPU only: the machines that test this library have no GPU.
    """
    tell("start_weight_update")
    for portion in _portions(named_tensors) if apart else [named_tensors]:
        tell("update_weights", {"named_tensors": portion})
    tell("finish_weight_update")


def _portions(named_tensors: dict[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """The tensors on the host, a few at a time."""
    portion: dict[str, torch.Tensor] = {}
    for name, tensor in named_tensors.items():
        if portion and tensor.nbytes + sum(other.nbytes for other in portion.values()) > PORTION:
            yield portion
            portion = {}
        portion[name] = tensor.detach().cpu()
    yield portion


def _backend() -> Any:
    """The class; made here because vLLM may not be installed when this module is read."""
    from vllm.distributed.weight_transfer.base import (
        WeightTransferEngine,
        WeightTransferInitInfo,
        WeightTransferUpdateInfo,
    )
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    @dataclass
    class Start(WeightTransferInitInfo):
        """Nothing to agree on."""

    @dataclass
    class Tensors(WeightTransferUpdateInfo):
        """The weights, by the names of the checkpoint."""

        named_tensors: dict[str, torch.Tensor]

    class InProcess(WeightTransferEngine):
        """The receiving side; there is no sending one."""

        init_info_cls = Start
        update_info_cls = Tensors

        def init_transfer_engine(self, init_info: Start) -> None:
            """Nothing to connect."""

        def start_weight_update(self) -> None:
            """Let every layer take weights as they are in a checkpoint, also those that were repacked."""
            initialize_layerwise_reload(self.model)

        def receive_weights(self, update_info: Tensors) -> None:
            """Copy them in."""
            self.model.load_weights(iter(update_info.named_tensors.items()))

        def finish_weight_update(self) -> None:
            """Repack."""
            finalize_layerwise_reload(self.model, self.model_config)

        def shutdown(self) -> None:
            """Nothing to release."""

    return InProcess
