"""What a task allowed at each step, as a batch holds it: bits, each distinct mask once, and an index for every step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from tensordict import TensorDictBase

from llm_env.tokens.episode import Episode

INDEX, TABLE = "action_mask_index", "action_mask_table"


class MaskTable:
    """Distinct action masks.

    A mask for every step of a batch would be bools `[B, T, V]`, more than the weights of many a model. Most tasks have
    few masks, and bits are an eighth of bools.

    Args:
        bits: `[M, ceil(V / 8)]` uint8, as `np.packbits` gives them.
    """

    def __init__(self, bits: torch.Tensor) -> None:
        self.bits = bits


@dataclass(frozen=True, slots=True, eq=False)
class Allowed:
    """Which tokens could be chosen at each of many states.

    Attributes:
        bits: of a `MaskTable`.
        index: `[...]` which of its masks holds at each state.

    Examples:
        >>> allowed = Allowed.of(torch.tensor([[True, False, True], [False, True, True]]))
        >>> allowed.forbidden(torch.tensor([1, 0, 1]), 3).tolist()
        [[True, False, False], [False, True, False], [True, False, False]]
    """

    bits: torch.Tensor
    index: torch.Tensor

    @classmethod
    def of(cls, masks: torch.Tensor) -> Allowed:
        """From `[..., V]` bools."""
        bits = torch.from_numpy(np.packbits(masks.flatten(0, -2).cpu().numpy(), axis=1))
        index = torch.arange(len(bits), device=masks.device).view(masks.shape[:-1])
        return cls(bits.to(masks.device), index)

    def forbidden(self, index: torch.Tensor, size: int) -> torch.Tensor:
        """`[n, size]` bool, from `[n]` indices: True for tokens that could not be chosen."""
        # Only the masks that these states need are unpacked, and each of them once.
        which, place = torch.unique(index, return_inverse=True)
        shift = torch.arange(7, -1, -1, dtype=torch.uint8, device=index.device)
        unpacked = (self.bits[which][..., None] >> shift) & 1 == 0
        return unpacked.flatten(1)[:, :size][place]


def allowed_in(data: TensorDictBase) -> Allowed | None:
    """What a batch says was allowed at its steps, or an environment's `action_mask`; None if all tokens are."""
    table: MaskTable | None = data.get_non_tensor(TABLE, default=None)
    if table is not None:
        index: torch.Tensor = data[INDEX]
        return Allowed(table.bits.to(index.device), index)
    masks = data.get("action_mask", None)
    return None if masks is None else Allowed.of(masks)


def pack_masks(episodes: Sequence[Episode], steps: int) -> tuple[npt.NDArray[np.int64], MaskTable] | None:
    """`[B, T]` which mask held at each step, and the masks; None if no episode had any."""
    sizes = {len(episode.action_masks[0]) for episode in episodes if episode.action_masks is not None}
    if not sizes:
        return None
    (size,) = sizes
    everything = b"\xff" * size
    found: dict[bytes, int] = {}
    index = np.zeros((len(episodes), steps), dtype=np.int64)
    for row, episode in enumerate(episodes):
        masks = episode.action_masks or (everything,) * episode.rollout.num_actions
        index[row, : len(masks)] = [found.setdefault(mask, len(found)) for mask in masks]
    bits = np.frombuffer(b"".join(found), dtype=np.uint8).reshape(len(found), size)
    return index, MaskTable(torch.from_numpy(bits.copy()))
