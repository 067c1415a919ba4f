"""What a run computes in, where that is left to the machine: `--model.autocast auto`.

Whether bfloat16 is faster depends on the processor, and on how large the products are. A data sheet does not tell, so
the network of the run itself is timed, on texts of about the size that it will learn from.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
from tensordict import TensorDict

from agents.config import TrainConfig
from agents.config.files import save_config
from agents.config.schema import Autocast
from agents.networks.distribution import TokenDistribution
from agents.networks.network import Network
from agents.report.display import Display
from agents.state.saved import rng_state, set_rng_state
from llm_env.mdp.core import TokenMDP

MARGIN = 1.1
"""So many times as fast bfloat16 must be: of two that are about as fast, float32 has the more exact numbers."""

MOST_TOKENS = {"cpu": 384}
"""How many tokens are enough for the measurement, by device. Of fewer, bfloat16 would seem slower than it is, as the
weights are converted once in a pass however long its texts are."""

MOST_TOKENS_ELSEWHERE = 16384
"""The same on a GPU, which fewer would not keep busy."""

TURNS = 2
"""How often each precision is timed."""


@dataclass(frozen=True)
class Speeds:
    """How fast this machine computes forward and backward passes, in tokens per second.

    Examples:
        >>> print(Speeds(float32=167.2, bfloat16=150.4))
        computing in float32: this machine runs forward and backward at 167 tokens/s in float32, 150 in bfloat16
        >>> Speeds(float32=100, bfloat16=105).autocast, Speeds(float32=100, bfloat16=120).autocast
        ('off', 'on')
    """

    float32: float
    bfloat16: float

    @property
    def autocast(self) -> Autocast:
        """The faster one, and float32 if it is about as fast."""
        return "on" if self.bfloat16 > MARGIN * self.float32 else "off"

    def __str__(self) -> str:
        chosen = "bfloat16" if self.autocast == "on" else "float32"
        return (
            f"computing in {chosen}: this machine runs forward and backward at {self.float32:.0f} tokens/s in float32, "
            f"{self.bfloat16:.0f} in bfloat16"
        )


def choose_precision(config: TrainConfig, network: Network, mdp: TokenMDP) -> Speeds:
    """Measure both precisions, and let the network compute in the faster one.

    Nothing else changes: no weight, no gradient, and no random number that is drawn afterwards.

    Args:
        config: of the run.
        network: new, with weights in float32, and no gradients yet.
        mdp: the task, which says how long the texts are.
    """
    prompt = round(float(np.mean([len(tokens) for tokens in mdp.prompts.tokens])))
    reply = max(1, min(mdp.max_new_tokens, mdp.context - prompt))
    shares = config.actor.minibatches * network.ranks.size
    rows = config.actor.micro_batch_size or max(1, config.rollout.batch_size // shares)
    speeds = measure(network, random_texts(network, prompt, reply, rows))
    network.set_autocast(speeds.autocast)
    return speeds


def settle(config: TrainConfig, speeds: Speeds | None, display: Display) -> TrainConfig:
    """Say what was chosen, and write it into the run's folder: a resumed run goes on with it, and measures nothing.

    Args:
        config: of the run.
        speeds: why; None if nothing was left to choose.
        display: is told.

    Returns:
        The configuration with what was chosen.
    """
    if speeds is None:
        return config
    display.message(str(speeds))
    settled = config.replace(model__autocast=speeds.autocast)
    save_config(settled, config.out / "config.yaml")
    return settled


def random_texts(network: Network, prompt: int, reply: int, rows: int) -> TensorDict:
    """A micro-batch of texts without meaning, or a part of it that is large enough to be measured.

    Args:
        network: what is to read them.
        prompt: how many tokens come before what is learned.
        reply: how many tokens are learned.
        rows: how many texts there are in a micro-batch.
    """
    device = network.head.weight.device
    most = MOST_TOKENS.get(device.type, MOST_TOKENS_ELSEWHERE)
    shorter = min(1.0, most / (prompt + reply))
    prompt, reply = max(1, int(prompt * shorter)), max(1, int(reply * shorter))
    rows = min(rows, -(-most // (prompt + reply)))
    tokens = np.random.default_rng(0).integers(network.num_tokens, size=(rows, prompt + reply))
    position = torch.arange(prompt - 1, prompt + reply - 1).expand(rows, reply)
    data = TensorDict({"tokens": torch.from_numpy(tokens), "state_position": position}, batch_size=[rows])
    data["action"] = data["tokens"][:, prompt:]
    return data.to(device)


def measure(network: Network, data: TensorDict) -> Speeds:
    """Time both precisions on the same texts.

    A first pass over a single text does what is done but once. Then they take turns, so that whatever else the machine
    does meets both, and the best turn of each counts: the one that was disturbed least.
    """
    seconds: dict[Autocast, list[float]] = {"off": [], "on": []}
    for turn in range(1 + TURNS):
        for choice, taken in seconds.items():
            network.set_autocast(choice)
            taken.append(network.compute(seconds_of_a_pass, data if turn else data[:1]))
    best = {choice: min(taken[1:]) for choice, taken in seconds.items()}
    tokens = data["tokens"].numel()
    return Speeds(float32=tokens / best["off"], bfloat16=tokens / best["on"])


def seconds_of_a_pass(network: Network, data: TensorDict) -> float:
    """How long the policy's forward and backward pass over some texts takes; no gradients are left."""
    before = rng_state()  # dropout of adapters draws
    data = data.to(network.head.weight.device)
    network.train()  # checkpointing is at work then only
    try:
        start = _clock(data["tokens"].device)
        hidden = network.encode(data.clone(recurse=False), critic=False)["hidden"]
        policy = TokenDistribution(
            hidden, network.head, None, network.temperature, network.compute_dtype, network.vocabulary
        )
        policy.log_prob(data["action"]).mean().backward()  # type: ignore[no-untyped-call]
        return _clock(data["tokens"].device) - start
    finally:
        network.eval()
        network.zero_grad(set_to_none=True)
        set_rng_state(before)


def _clock(device: torch.device) -> float:
    """The time at which all is done that the device was told to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
