"""Weights in parts, one for each process (FSDP2): whoever computes gathers a layer, and lets it go again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from agents.networks.ranks import ALONE, Ranks


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
    delivery = _Delivery(network, ranks, device)
    layers = {name for part in network.modules() for name in getattr(part, "_no_split_modules", None) or ()}
    for part in [*(each for each in network.modules() if type(each).__name__ in layers), *apart]:
        delivery.take(part)
        fully_shard(part, mesh=mesh)
    delivery.take(network)
    # What is left would else stay whole until the next backward pass, and miss what is done to the parts meanwhile.
    whole_everywhere = {weight for part in kept for weight in part.parameters()}
    fully_shard(network, mesh=mesh, reshard_after_forward=True, ignored_params=whole_everywhere)
    register_fsdp_forward_method(network, computes)
    for part in network.modules():
        if isinstance(part, FSDPModule):  # losses add up over processes, as they do over micro-batches
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)  # gloo cannot multiply on the way


Place = tuple[str, str, str]
"""Of a tensor: the name of its module, the table that it is in there, and its own name."""


class _Delivery:
    """The first process's weights and buffers, on their way to all, part by part.

    A follower has them in the number formats of the first one, and tied where they are tied there: what a checkpoint
    holds decides that, which followers have not read.
    """

    def __init__(self, network: nn.Module, ranks: Ranks, device: torch.device) -> None:
        self.ranks = ranks
        self.device = device
        self.names = {module: name for name, module in network.named_modules()}
        numbers: dict[Tensor, int] = {}
        own = {
            place: (numbers.setdefault(tensor, len(numbers)), tensor.shape, tensor.dtype)
            for module in network.modules()
            for place, tensor in self._places(module)
        }
        if ranks.leads:
            ranks.say(own)
        self.places: dict[Place, tuple[int, torch.Size, torch.dtype]] = own if ranks.leads else ranks.hear()
        shapes, theirs = ({place: shape for place, (_, shape, _) in each.items()} for each in (own, self.places))
        if odd := {place for place, _ in shapes.items() ^ theirs.items()}:
            names = ", ".join(sorted(f"{module}.{name}" for module, _, name in odd)[:5])
            raise RuntimeError(f"the first process has another model: {names} are not the same there")

    def take(self, part: nn.Module) -> None:
        """Have what belongs to a part of the network, but for what is in parts already."""
        taken: dict[int, Tensor] = {}
        for module in part.modules():
            for place, tensor in self._places(module):
                number, shape, dtype = self.places[place]
                if number not in taken:
                    here = torch.empty(shape, dtype=dtype, device=self.device)
                    if self.ranks.leads:
                        here = tensor.detach().to(self.device)
                    distributed.broadcast(here, src=0)
                    is_weight = isinstance(tensor, nn.Parameter)
                    taken[number] = nn.Parameter(here, tensor.requires_grad) if is_weight else here
                _, table, name = place
                getattr(module, table)[name] = taken[number]

    def _places(self, module: nn.Module) -> list[tuple[Place, Tensor]]:
        return [
            ((self.names[module], table, name), tensor)
            for table in ("_parameters", "_buffers")
            for name, tensor in getattr(module, table).items()
            if tensor is not None and not isinstance(tensor, DTensor)
        ]


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


def like(tensor: Tensor, target: Any, ranks: Ranks = ALONE) -> Tensor:
    """What this process has of a tensor of the first one, if it is to lie beside the target: a part, or all.

    Args:
        tensor: whole; in all processes but the first, its shape is enough.
        target: what it is for.
        ranks: the processes.
    """
    if isinstance(target, DTensor):
        return distribute_tensor(tensor.to(target.device), target.device_mesh, target.placements)
    if ranks.size > 1:
        tensor = tensor.to(target.device)
        distributed.broadcast(tensor, src=0)
    return tensor
