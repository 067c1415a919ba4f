"""Texts read one behind the other: what a model makes of each is what it makes of it alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
)

from agents.config import LoraConfig, ModelConfig
from agents.networks.network import Network
from agents.networks.ragged import Ragged, can_read, is_worth_it, reading
from rewards.portions import WASTE

SMALL = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES: dict[str, PretrainedConfig] = {
    "Llama, a key for two heads": LlamaConfig(**SMALL, num_key_value_heads=2),
    "Qwen2": Qwen2Config(**SMALL, num_key_value_heads=4),
    "GPT-2": GPT2Config(vocab_size=32, n_embd=32, n_layer=2, n_head=4),
    "GPT-NeoX": GPTNeoXConfig(**SMALL),
}
LENGTHS = [1, 9, 2, 2, 17, 3, 8, 4, 5, 4]


def model_of(config: PretrainedConfig) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.2)  # as they begin, models look at hardly anything
    return model


def network_of(name: str, **settings: Any) -> Network:
    network = Network(model_of(FAMILIES[name]), ModelConfig(**settings), reference=True)
    assert network.backbone.packing == settings.get("packing", True)
    return network


def batch_of(lengths: list[int], alike: int = 0) -> TensorDict:
    """Texts of so many tokens; each chooses its tokens from the second on. Or after a prompt that every other has."""
    torch.manual_seed(1)
    longest, size = max(lengths) + alike, torch.tensor(lengths) + alike
    tokens = torch.randint(1, 32, (len(lengths), longest))
    tokens[:, :alike] = tokens[:2, :alike].repeat(len(lengths), 1)[: len(lengths)]
    first = max(alike - 1, 0)
    steps = torch.arange(first, longest - 1).expand(len(lengths), -1)
    mask = steps < size[:, None] - 1
    position = torch.where(mask, steps, first)
    return TensorDict(
        {"tokens": tokens, "state_position": position, "mask": mask, "action": tokens[:, first + 1 :]}, [len(lengths)]
    )


@pytest.mark.parametrize("alike", [0, 6])
@pytest.mark.parametrize("name", FAMILIES)
def test_as_each_text_alone(name: str, alike: int) -> None:
    """Log-probs and the reference's; and the gradient is the sum of those of the texts."""
    network, data = network_of(name), batch_of(LENGTHS, alike)
    positions, first = data["state_position"], max(alike - 1, 0)
    assert is_worth_it(data["tokens"], positions.amax(1) + 1, positions[:, 0] + 1)
    read: list[int] = []
    network.model.get_input_embeddings().register_forward_hook(lambda *given: read.append(given[1][0].numel()))
    found = network.actor.get_dist(data.clone()).log_prob(data["action"])
    found.sum().backward()
    prompts = data["tokens"][:, : first + 1]
    assert read == [int((positions.amax(1) + 1).sum()) - (len(prompts) - len(prompts.unique(dim=0))) * (first + 1)]
    gradients = {weight: values.grad.clone() for weight, values in network.model.named_parameters()}
    network.zero_grad()
    for row, length in enumerate(LENGTHS):
        length += alike - first
        if length == 1:
            continue
        alone = TensorDict({key: value[row : row + 1, : length - 1] for key, value in data.items()}, [1])
        alone["tokens"] = data["tokens"][row : row + 1, : length + first]
        expected = network.actor.get_dist(alone.clone()).log_prob(alone["action"])
        expected.sum().backward()
        torch.testing.assert_close(found[row, : length - 1], expected[0], rtol=1e-5, atol=1e-5)
        reference = network.reference_log_prob(data)[row, : length - 1]
        torch.testing.assert_close(reference, network.reference_log_prob(alone)[0], rtol=1e-5, atol=1e-5)
    assert float(found[~data["mask"]].abs().max()) == 0
    for weight, values in network.model.named_parameters():
        largest = float(values.grad.abs().max())
        torch.testing.assert_close(gradients[weight], values.grad, rtol=1e-4, atol=1e-5 * max(1.0, largest), msg=weight)


@pytest.mark.parametrize(
    "settings",
    [
        {"critic": "separate"},
        {"critic": "shared", "gradient_checkpointing": True},
        {"critic": "separate", "gradient_checkpointing": True},
        {"critic": "separate", "lora": LoraConfig(rank=2)},
        {"critic": "shared", "lora": LoraConfig(rank=2), "gradient_checkpointing": True},
        {"critic": "separate", "lora": LoraConfig(rank=2), "gradient_checkpointing": True},
    ],
    ids=str,
)
def test_as_with_padding(settings: dict[str, Any]) -> None:
    """Of actor and critic alike, whatever they are made of."""
    found = []
    for packing in (True, False):
        network = network_of("Llama, a key for two heads", packing=packing, **settings).train()
        data = batch_of(LENGTHS)
        network.encode(data)
        values = network.critic_head(data)["state_value"][..., 0] * data["mask"]
        log_prob = network.actor_head.get_dist(data).log_prob(data["action"])
        (values.square().sum() + log_prob.sum()).backward()
        gradients = [weight.grad for weight in network.parameters() if weight.grad is not None]
        found.append([values.detach(), log_prob.detach(), *gradients])
    assert len(found[0]) == len(found[1]) > 4
    for packed, padded in zip(*found, strict=True):
        torch.testing.assert_close(packed, padded, rtol=1e-4, atol=1e-4)


def test_no_text_sees_another() -> None:
    """Nor what stands behind its own last state."""
    network, data = network_of("Qwen2"), batch_of(LENGTHS)
    before = network.actor.get_dist(data.clone()).log_prob(data["action"]).detach()
    other = data.clone()
    other["tokens"][4] = 1 + (other["tokens"][4] + 7) % 31
    after = network.actor.get_dist(other.clone()).log_prob(data["action"]).detach()
    rows = torch.arange(len(LENGTHS)) != 4
    torch.testing.assert_close(after[rows], before[rows], rtol=1e-6, atol=1e-6)
    assert (after[4] - before[4]).abs().max() > 0.1


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 3)), min_size=1, max_size=12), st.booleans())
def test_every_token_has_its_place(texts: list[tuple[int, int]], share: bool) -> None:
    """Whatever the lengths and prompts: each text can be had whole, is attended to whole, and is little padded."""
    lengths = torch.tensor([length for length, _ in texts])
    kinds = torch.tensor([kind for _, kind in texts])
    prompts = lengths.clamp_max(4 * kinds + 1)
    places = torch.arange(int(lengths.max())).expand(len(texts), -1)
    own = 1000 * torch.arange(1, len(texts) + 1)[:, None] + places
    tokens = torch.where(places < prompts[:, None], 100 * kinds[:, None] + places, own)
    ragged = Ragged.of(tokens, lengths, prompts if share else None)
    read = ragged.states(ragged.tokens[..., None], places.clamp_max(lengths[:, None] - 1))[..., 0]
    assert torch.equal(read[places < lengths[:, None]], tokens[places < lengths[:, None]])
    where = ragged.states(ragged.positions[..., None], places.clamp_max(lengths[:, None] - 1))[..., 0]
    assert torch.equal(where[places < lengths[:, None]], places[places < lengths[:, None]])

    different = {tuple(row[:prompt]) for row, prompt in zip(tokens.tolist(), prompts.tolist(), strict=True)}
    needed = int((lengths - prompts).sum()) + sum(map(len, different)) if share else int(lengths.sum())
    assert sum(bucket.size for bucket in ragged.buckets) == needed == ragged.tokens.numel()
    rows, found = iter(lengths.argsort(stable=True).tolist()), []
    for bucket in ragged.buckets:
        side = bucket._side_by_side(ragged.tokens[0][:, None, None])[:, 0, :, 0]
        for text in side:
            row = next(rows)
            assert text[: lengths[row]].tolist() == tokens[row, : lengths[row]].tolist()
            assert bucket.shape[1] <= WASTE * lengths[row]
        found += (side.flatten() if bucket.real is None else side.flatten()[bucket.real]).tolist()
    assert found == ragged.tokens[0].tolist()


@pytest.mark.parametrize(
    ("config", "implementation"),
    [
        (MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=4), "sdpa"),
        (Gemma3TextConfig(**SMALL, num_key_value_heads=2, head_dim=8, sliding_window=4), "sdpa"),
        (LlamaConfig(**SMALL), "eager"),
    ],
    ids=["a window", "windows in some layers", "eager"],
)
def test_models_that_are_padded(config: PretrainedConfig, implementation: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()
    assert not can_read(model.base_model)
    assert not Network(model, ModelConfig()).backbone.packing


def test_a_model_that_looks_ahead_is_found_out() -> None:
    config = BertConfig(**SMALL)
    config._attn_implementation = "sdpa"
    assert not can_read(BertModel(config).eval())


def test_afterwards_the_model_is_as_it_was() -> None:
    """Its own attention is back, also after an error; with little padding it is never replaced."""
    network = network_of("Llama, a key for two heads")
    config = network.model.config
    ragged = Ragged.of(torch.ones(2, 3, dtype=torch.long), torch.tensor([3, 1]))
    network.model.get_input_embeddings().register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), reading(config, ragged):
        network.model(ragged.tokens)
    assert config._attn_implementation == "sdpa"
    assert not is_worth_it(torch.ones(4, 20), torch.tensor([20, 20, 19, 18]), torch.zeros(4, dtype=torch.long))
    compiled = dataclasses.replace(network.config, compile=True)
    assert not Network(model_of(FAMILIES["Qwen2"]), compiled).backbone.packing
