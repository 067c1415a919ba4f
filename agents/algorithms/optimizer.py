"""AdamW with warm-up, decay and gradient clipping, in float32 whatever the weights are in."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from agents.algorithms.schedules import Decay, share_left
from agents.networks import sharding
from agents.networks.few_bits import need_bitsandbytes
from agents.networks.ranks import ALONE, Ranks
from agents.networks.sharding import all_whole, whole
from agents.state.checkpoint import load_optimizer_state, optimizer_state

Tensor = torch.Tensor

_MASTER = "master."


class Optimizer:
    """The optimizer of some weights. Its learning rate is a function of how many steps it has taken.

    Weights in bfloat16 have three digits, and a small step would be rounded away from nearly all of them. Of such
    weights the optimizer keeps copies in float32, its masters: they are what it steps, and the weights are then set to
    what they round to. With gradients and Adam's two averages that takes 16 bytes for each of these weights.

    Whoever leaves out steps that the schedule counts may set `steps` forward.

    Args:
        weights: by name; the order decides what a saved state belongs to.
        learning_rate: the highest.
        total_steps: after which the decay has ended.
        warmup: steps until the learning rate is at its highest.
        decay: how it goes on from there.
        weight_decay: AdamW's.
        betas: AdamW's.
        max_gradient_norm: longer gradients are shortened to this.
        state_bits: of AdamW's averages; 8 need bitsandbytes, none is float32.

    Attributes:
        steps: where the schedule is; the next step is of this number, the first of 0.
        scale: what the whole schedule is multiplied by.

    Examples:
        >>> optimizer = Optimizer({"w": nn.Parameter(torch.ones(2))}, 0.1, total_steps=10, warmup=2, decay="linear")
        >>> [round(optimizer.rate_at(step), 3) for step in (0, 1, 2, 6, 10)]
        [0.05, 0.1, 0.1, 0.05, 0.0]
    """

    def __init__(
        self,
        weights: Mapping[str, nn.Parameter],
        learning_rate: float,
        *,
        total_steps: int,
        warmup: int = 0,
        decay: Decay = "constant",
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        max_gradient_norm: float = 1.0,
        state_bits: Literal[8] | None = None,
    ) -> None:
        self.weights = list(weights.values())
        self.learning_rate = learning_rate
        self.total_steps = total_steps
        self.warmup = warmup
        self.decay = decay
        self.max_gradient_norm = max_gradient_norm
        self.steps = 0
        self.scale = 1.0
        self._remembered: list[Tensor] = []
        # Norms and biases are not decayed: they do not make a function simpler.
        self._masters = {
            place: (weight, weight.detach().float())
            for place, weight in enumerate(self.weights)
            if torch.finfo(weight.dtype).bits < 32
        }
        self._stepped: list[Tensor] = list(self.weights)  # what AdamW itself is given
        for place, (_, master) in self._masters.items():
            self._stepped[place] = master
        decayed = [weight for weight in self._stepped if weight.ndim > 1]
        others = [weight for weight in self._stepped if weight.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
        groups = [group for group in groups if group["params"]]
        self.adam: torch.optim.Optimizer
        if state_bits is None:
            self.adam = torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)
        else:
            self.adam = need_bitsandbytes("averages in 8 bits").optim.AdamW8bit(groups, lr=learning_rate, betas=betas)

    def rate_at(self, step: int) -> float:
        """The learning rate of step number `step`, the first being 0."""
        warm = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        return self.learning_rate * self.scale * warm * self.share_at(step)

    def share_at(self, step: int) -> float:
        """What the decay leaves of the learning rate at that step, from 0 to 1."""
        return share_left(self.decay, (step - self.warmup) / max(1, self.total_steps - self.warmup))

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for weight in (*self.weights, *self._stepped):
            weight.grad = None

    def clip(self) -> Tensor:
        """Shorten the gradient if need be; returns how long it was."""
        self._hand_over_gradients()
        return whole(nn.utils.clip_grad_norm_(self._stepped, self.max_gradient_norm))

    @torch.no_grad()
    def step(self) -> None:
        """Follow the gradient."""
        self._hand_over_gradients()
        for group in self.adam.param_groups:
            group["lr"] = self.rate_at(self.steps)
        for weight, master in self._masters.values():  # where somebody else has set a weight, that is what counts
            master.copy_(torch.where(master.to(weight.dtype) == weight, master, weight.float()))
        self.adam.step()
        self._round()
        self.steps += 1

    @torch.no_grad()
    def remember(self) -> None:
        """Keep a copy of the weights as they are, for `pull_back`; it takes 4 bytes for each."""
        self._remembered = [weight.detach().clone() for weight in self._stepped]

    def forget(self) -> None:
        """Free that copy."""
        self._remembered = []

    @torch.no_grad()
    def pull_back(self, share: float) -> None:
        """Keep only this share of how the weights have changed since `remember`; with 0 they are as they were."""
        for weight, before in zip(self._stepped, self._remembered, strict=True):
            # Of what is not finite there is no share.
            weight.copy_(before.lerp(weight, share) if share else before)
        self._round()

    def state(self, ranks: Ranks = ALONE) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON from which `load_state` goes on; of processes with parts of them, the first gets them."""
        tensors, rest = optimizer_state(self.adam)
        tensors |= {f"{_MASTER}{place}": master for place, (_, master) in self._masters.items()}
        return all_whole(tensors, ranks), {"adam": rest, "steps": self.steps}

    def load_state(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any], ranks: Ranks = ALONE) -> None:
        """Go on where another optimizer of the same weights was."""
        like = partial(sharding.like, ranks=ranks)
        of_adam = {name: tensor for name, tensor in tensors.items() if not name.startswith(_MASTER)}
        load_optimizer_state(self.adam, of_adam, state["adam"], like)
        for place, (weight, master) in self._masters.items():
            kept = tensors.get(f"{_MASTER}{place}")
            master.copy_(weight.detach() if kept is None else like(kept, master))
        self.steps = state["steps"]

    def _round(self) -> None:
        """Set the weights to what their masters round to."""
        for weight, master in self._masters.values():
            weight.copy_(master)

    def _hand_over_gradients(self) -> None:
        """To the masters; the weights keep none, which would only take memory."""
        for weight, master in self._masters.values():
            if weight.grad is not None:
                master.grad, weight.grad = weight.grad.float(), None
