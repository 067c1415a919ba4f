"""Weights in parts, one for each process (FSDP2): whoever computes gathers a layer, and lets it go again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from agents.networks.ranks import Ranks


@torch.no_grad()
def shard(
    network: nn.Module,
    ranks: Ranks,
    device: torch.device,
    *,
    apart: Sequence[nn.Module],
    kept: Sequence[nn.Module],
    computes: str,
) -> None:
    """Leave each process a part of every weight, those of the first process.

    They go out layer by layer: no process but the first ever holds more than its part and a layer.

    Args:
        network: the same in each process, but for the weights, which only the first must have; others may have their
            shapes only (on the device "meta").
        ranks: the processes.
        device: where the parts shall lie.
        apart: what is gathered by itself, as its weights are of another precision.
        kept: what each process keeps all of, as it is not learned by a gradient.
        computes: the name of the method of the network in which weights are needed.
    """
    mesh = init_device_mesh(device.type, (ranks.size,))
    layers = {name for part in network.modules() for name in getattr(part, "_no_split_modules", None) or ()}
    for part in [*(each for each in network.modules() if type(each).__name__ in layers), *apart]:
        _take(part, ranks, device)
        fully_shard(part, mesh=mesh)
    _take(network, ranks, device)
    # What is left would else stay whole until the next backward pass, and miss what is done to the parts meanwhile.
    whole_everywhere = {weight for part in kept for weight in part.parameters()}
    fully_shard(network, mesh=mesh, reshard_after_forward=True, ignored_params=whole_everywhere)
    register_fsdp_forward_method(network, computes)
    for part in network.modules():
        if isinstance(part, FSDPModule):  # losses add up over processes, as they do over micro-batches
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)  # gloo cannot multiply on the way


def _take(part: nn.Module, ranks: Ranks, device: torch.device) -> None:
    """Have the first process's weights, on this device, but for what is in parts already."""
    taken: dict[Tensor, Tensor] = {}  # layers may share a weight
    for module in part.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for tensors in tables:
            for name, tensor in tensors.items():
                if tensor is None or isinstance(tensor, DTensor):
                    continue
                if tensor not in taken:
                    here = tensor.detach().to(device) if ranks.leads else torch.empty_like(tensor, device=device)
                    distributed.broadcast(here, src=0)
                    learns = tensor.requires_grad
                    taken[tensor] = nn.Parameter(here, learns) if isinstance(tensor, nn.Parameter) else here
                tensors[name] = taken[tensor]


def whole(tensor: Tensor) -> Tensor:
    """All of it; to be called by all processes at once."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def all_whole(tensors: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """Whole tensors in the memory of the first process; the others, which must call this too, get nothing."""
    if ranks.size == 1:
        return dict(tensors)
    found = {}
    for name, tensor in tensors.items():
        gathered = whole(tensor).cpu()
        if ranks.leads:
            found[name] = gathered
    return found


def like(tensor: Tensor, target: Any) -> Tensor:
    """This process's part of a whole tensor, if the target has but a part."""
    if isinstance(target, DTensor):
        return distribute_tensor(tensor.to(target.device), target.device_mesh, target.placements)
    return tensor
