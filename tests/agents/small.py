"""A language model of a few thousand weights, and batches of texts for it: what the tests of the agent are made of."""

from __future__ import annotations

import functools
from typing import Any

import torch
from tensordict import TensorDict

from agents.config import LoraConfig, LossConfig, ModelConfig
from agents.losses import TokenLoss, loss_class
from agents.losses.ops import Estimator
from agents.networks.network import Network

VOCAB, WIDTH = 23, 16

LORA = LoraConfig(rank=2, alpha=4.0)
NETWORKS = {
    "fitted": ModelConfig(),
    "shared": ModelConfig(critic="shared"),
    "separate": ModelConfig(critic="separate"),
    "LoRA shared": ModelConfig(lora=LORA, critic="shared"),
    "LoRA separate": ModelConfig(lora=LORA, critic="separate"),
}


def small_model(seed: int = 0, *, tied: bool = True) -> Any:
    """A Llama whose weights are large enough for its distributions to be far from uniform."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def small_network(
    config: ModelConfig = ModelConfig(),  # noqa: B008
    *,
    temperature: float = 1.0,
    trained: bool = True,
    tied: bool = True,
    reference: bool = True,
) -> Network:
    """If `trained`, adapters and value head are not at their beginning any more, where much is zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Network(small_model(tied=tied), config, temperature, reference=reference)
        if trained:
            disturb(network)
    return network


@torch.no_grad()
def disturb(network: Network, scale: float = 0.1, seed: int = 1) -> None:
    """As if it had learned something."""
    generator = torch.Generator().manual_seed(seed)
    # A fitted head is no parameter of the critic.
    head = {f"value_head.{name}": weight for name, weight in network.value_head.named_parameters()}
    for weight in (network.actor_parameters() | network.critic_parameters() | head).values():
        weight += scale * torch.randn(weight.shape, generator=generator)


def small_batch(lengths: list[int], seed: int = 0) -> TensorDict:
    """Texts of these many steps after prompts of 1 to 3 tokens; after two steps the task injects a token. No padding
    but what their differences make, which holds junk.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, steps = len(lengths), max(lengths)
    prompts = torch.randint(1, 4, (rows, 1), generator=generator)
    step = torch.arange(steps)
    state_position = prompts - 1 + step + (step >= 2)
    tokens = torch.randint(3, VOCAB, (rows, 4 + steps), generator=generator)
    mask = step < torch.tensor(lengths)[:, None]

    def noise(mean: float = 0.0, deviation: float = 1.0) -> torch.Tensor:
        return mean + deviation * torch.randn(rows, steps, generator=generator)

    data = TensorDict(
        {
            "tokens": tokens,
            "state_position": state_position,
            "mask": mask,
            "action": tokens.gather(1, state_position + 1),
            "action_log_prob": noise(-3.0, 0.4),
            "ref_log_prob": noise(-3.0, 0.4),
            "advantage": noise()[..., None],
            "value_target": noise()[..., None],
            "state_value": noise()[..., None],
            "importance_weight": noise().exp().clamp_max(2.0),
        },
        batch_size=[rows],
    )
    return spoil_padding(data)


def spoil_padding(data: TensorDict) -> TensorDict:
    """NaN in all numbers that no real step has."""
    for key, values in data.items():
        if values.is_floating_point():
            real = data["mask"][..., None] if values.ndim == 3 else data["mask"]
            data[key] = torch.where(real, values, torch.nan)
    return data


def near_old_policy(network: Network, data: TensorDict, spread: float = 0.3) -> TensorDict:
    """With old log-probs that are not far from those of the network, so that clipping is sometimes at work."""
    with torch.no_grad():
        log_prob = network.actor.get_dist(data.clone(False)).log_prob(data["action"])
    data["action_log_prob"] = log_prob + spread * (data["action_log_prob"] + 3.0) / 0.4
    return data


def make_loss(
    kind: str,
    network: Network,
    *,
    clip: tuple[float, float] = (0.2, 0.2),
    value: float | None = 0.5,
    value_clip: float | None = None,
    kl: float = 0.0,
    kl_estimator: Estimator = "k2",
    **config: Any,
) -> TokenLoss:
    """A registered loss; without a value weight there is no critic."""
    settings = LossConfig(clip_low=clip[0], clip_high=clip[1], value=value or 0.0, value_clip=value_clip, **config)
    loss = loss_class(kind)(network, settings, critic=value is not None, kl_estimator=kl_estimator)
    loss.kl = kl
    return loss


clip_loss = functools.partial(make_loss, "clip")
penalty_loss = functools.partial(make_loss, "penalty")
gradient_loss = functools.partial(make_loss, "policy_gradient")


def loss_of(out: TensorDict) -> torch.Tensor:
    """What is differentiated."""
    return torch.stack([value for name, value in out.items() if name.startswith("loss_")]).sum()


def gradients_of(network: Network) -> dict[str, torch.Tensor]:
    """By name, of all weights that have one; they are taken away."""
    found = {name: weight.grad for name, weight in network.named_parameters() if weight.grad is not None}
    network.zero_grad(set_to_none=True)
    return found


def log_probs(network: Network, data: Any) -> torch.Tensor:
    result: torch.Tensor = network.actor.get_dist(data.clone(False)).log_prob(data["action"])
    return result


def by_the_whole_model(model: Any, data: Any, temperature: float = 1.0) -> torch.Tensor:
    """Log-probs of the actions, from the logits of one text after the other, without any padding."""
    result = torch.zeros(data["mask"].shape)
    for row, text in enumerate(data):
        steps = int(text["mask"].sum())
        for step in range(steps):
            position = int(text["state_position"][step])
            logits = model(text["tokens"][None, : position + 1]).logits[0, -1] / temperature
            result[row, step] = logits.log_softmax(-1)[text["action"][step]]
    return result
