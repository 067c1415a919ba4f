"""Adapters, the reference, and weights that go out and in."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from agents.config import LoraConfig, ModelConfig
from agents.networks.adapters import ACTOR, CRITIC, add_adapters, using
from agents.networks.network import Network
from llm_env.models import load_tokenizer
from tests.agents.small import (
    LORA,
    NETWORKS,
    by_the_whole_model,
    disturb,
    log_probs,
    small_batch,
    small_model,
    small_network,
)

networks = pytest.mark.parametrize("config", NETWORKS.values(), ids=NETWORKS.keys())
lora_networks = pytest.mark.parametrize("critic", ["shared", "separate"])


# LoRA.


@lora_networks
def test_adapters_are_small_and_leave_the_base_alone(critic: Any) -> None:
    network = small_network(ModelConfig(lora=LORA, critic=critic))
    actor = network.actor_parameters()
    assert len(actor) == 2 * 7 * 2  # A and B of seven linear layers in two blocks: not of the output
    assert all(2 in weight.shape for weight in actor.values())
    own = len(network.critic_parameters()) - 2
    assert own == (0 if critic == "shared" else len(actor))
    attention = small_network(ModelConfig(lora=LoraConfig(rank=3, targets="attention"), critic=critic))
    assert len(attention.actor_parameters()) == 2 * 4 * 2


@lora_networks
def test_the_reference_is_the_base(critic: Any) -> None:
    network, data = small_network(ModelConfig(lora=LORA, critic=critic)), small_batch([3, 1, 5])
    assert not torch.allclose(log_probs(network, data), network.reference_log_prob(data), atol=0.1)
    with torch.no_grad():
        expected = by_the_whole_model(small_model(), data)
    torch.testing.assert_close(network.reference_log_prob(data), expected, rtol=1e-4, atol=1e-4)


def test_using_puts_everything_back() -> None:
    network = small_network(ModelConfig(lora=LORA, critic="separate"))
    network.refresh_reference()
    model, data = network.model, small_batch([4])

    def state() -> tuple[Any, ...]:
        layer = next(module for module in model.modules() if hasattr(module, "lora_A"))
        learning = {name for name, weight in model.named_parameters() if weight.requires_grad}
        return model.active_adapter, tuple(layer.active_adapters), layer.disable_adapters, learning

    before, logits = state(), model(data["tokens"]).logits
    results = []
    for adapter in (ACTOR, CRITIC, "reference", None):
        with using(model, adapter):
            results.append(model(data["tokens"]).logits)
            with using(model, None), using(model, CRITIC):
                pass
            torch.testing.assert_close(model(data["tokens"]).logits, results[-1], rtol=0, atol=0)
        assert state() == before
        with pytest.raises(KeyError), using(model, adapter):
            raise KeyError
        assert state() == before
    torch.testing.assert_close(model(data["tokens"]).logits, logits, rtol=0, atol=0)
    actor, critic, reference, none = results
    torch.testing.assert_close(actor, reference)  # just refreshed
    assert not torch.allclose(actor, critic, atol=0.1)
    assert not torch.allclose(actor, none, atol=0.1)
    assert not torch.allclose(critic, none, atol=0.1)


def test_a_model_without_adapters_is_left_alone() -> None:
    model = small_model()
    with using(model, None):
        assert all(weight.requires_grad for weight in model.parameters())


def test_a_model_whose_attention_has_another_name() -> None:
    model = small_model()
    for block in model.model.layers:
        block.mixer = block.self_attn
        del block._modules["self_attn"]
    with pytest.raises(ValueError, match="has none whose name says that it belongs to the attention"):
        add_adapters(model, LoraConfig(rank=2, targets="attention"), [ACTOR])


# The reference.


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_a_reference_is_a_copy_that_stays(temperature: float) -> None:
    network, data = small_network(temperature=temperature, trained=False), small_batch([3, 1, 5])
    with torch.no_grad():
        before = by_the_whole_model(small_model(), data, temperature)
    torch.testing.assert_close(network.reference_log_prob(data), before)
    disturb(network)
    torch.testing.assert_close(network.reference_log_prob(data), before)
    assert not network.reference_log_prob(data).requires_grad


@networks
def test_refreshing_the_reference(config: ModelConfig) -> None:
    network, data = small_network(config), small_batch([3, 5])
    for seed in (1, 2):  # the second time over the first
        disturb(network, seed=seed)
        now = log_probs(network, data).detach()
        network.refresh_reference()
        torch.testing.assert_close(network.reference_log_prob(data), now)
        disturb(network, seed=seed + 10)
        torch.testing.assert_close(network.reference_log_prob(data), now)
        assert not torch.allclose(log_probs(network, data), now, atol=0.05)
        trained = network.actor_parameters() | network.critic_parameters()
        assert all(weight.requires_grad for weight in trained.values())


def test_a_reference_in_bfloat16() -> None:
    network, data = small_network(ModelConfig(reference_dtype="bfloat16"), trained=False), small_batch([3, 5])
    now = log_probs(network, data).detach()
    error = (network.reference_log_prob(data) - now).abs().max()
    assert 0 < error < 0.3
    assert next(network.model.parameters()).dtype == torch.float32
    disturb(network)
    now = log_probs(network, data).detach()
    network.refresh_reference()
    assert 0 < (network.reference_log_prob(data) - now).abs().max() < 0.3


@networks
def test_dropout_of_the_model_is_switched_off(config: ModelConfig) -> None:
    """Policies are compared as functions, not as samples of noise; adapters may have a dropout of their own."""
    model = small_model()
    for block in model.model.layers:
        block.mlp.act_fn = torch.nn.Sequential(block.mlp.act_fn, torch.nn.Dropout(0.5))
        block.self_attn.attention_dropout = 0.5
    network, data = Network(model.train(), config, reference=True), small_batch([3, 5])
    with torch.no_grad():
        expected, reference = log_probs(network.eval(), data), network.reference_log_prob(data)
        network.train()
        torch.testing.assert_close(log_probs(network, data), expected)
        torch.testing.assert_close(network.reference_log_prob(data), reference)


def test_dropout_of_adapters_never_reaches_the_reference() -> None:
    config = ModelConfig(lora=LoraConfig(rank=2, dropout=0.5))
    network, data = small_network(config), small_batch([3, 5])
    network.refresh_reference()
    with torch.no_grad():
        expected = network.eval().reference_log_prob(data)
        network.train()
        assert not torch.allclose(log_probs(network, data), expected, atol=1e-3)
        torch.testing.assert_close(network.reference_log_prob(data), expected)
    assert network.model.training


@pytest.mark.parametrize("lora", [LoraConfig(), LORA], ids=["full", "LoRA"])
def test_no_reference(lora: LoraConfig) -> None:
    network = small_network(ModelConfig(lora=lora), reference=False)
    assert not network.has_reference
    with pytest.raises(ValueError, match="there is no reference model"):
        network.reference_log_prob(small_batch([3]))


# Weights.


@networks
@pytest.mark.parametrize("refreshed", [False, True])
def test_weights_go_out_and_in(config: ModelConfig, refreshed: bool) -> None:
    config = dataclasses.replace(config, refresh_reference=1)
    network, data = small_network(config), small_batch([3, 5])
    if refreshed:
        network.refresh_reference()
        disturb(network, seed=7)
    saved = {name: weight.clone() for name, weight in network.weights().items()}

    def results(network: Network) -> list[torch.Tensor]:
        with torch.no_grad():
            return [
                log_probs(network, data),
                network.critic(data.clone(False))["state_value"],
                network.reference_log_prob(data),
            ]

    expected = results(network)
    other = small_network(config, trained=False)
    assert not torch.allclose(results(other)[0], expected[0], atol=0.05)
    other.load_weights(saved)
    for ours, theirs in zip(results(other), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert other.weights().keys() == saved.keys()
    trained = {id(w) for w in (other.actor_parameters() | other.critic_parameters()).values()}
    assert {id(w) for w in other.parameters() if w.requires_grad} == trained


def test_weights_are_few_with_lora_and_have_no_gradient() -> None:
    network = small_network(ModelConfig(lora=LORA))
    assert all("lora_" in name or "value_head" in name for name in network.weights())
    assert not any(weight.requires_grad for weight in network.weights().values())


def test_weights_of_another_network() -> None:
    network, other = small_network(), small_network(ModelConfig(lora=LORA))
    before = {name: weight.clone() for name, weight in network.weights().items()}
    with pytest.raises(ValueError, match=r"these weights are not of this network: actor.*are in one of the two only"):
        network.load_weights(other.weights())
    for name, weight in network.weights().items():
        assert torch.equal(weight, before[name])


@networks
@pytest.mark.parametrize("tied", [True, False])
def test_an_exported_policy_is_an_ordinary_model(config: ModelConfig, tied: bool, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    network = small_network(config, tied=tied)
    data = small_batch([5, 5])
    with torch.no_grad():
        expected = network.model(data["tokens"]).logits
    network.export(tmp_path, load_tokenizer("tiny"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded).__name__ == "LlamaForCausalLM"
    assert not list(tmp_path.glob("adapter*"))
    assert AutoTokenizer.from_pretrained(tmp_path).decode([40, 41])
    with torch.no_grad():
        torch.testing.assert_close(loaded(data["tokens"]).logits, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(network.model(data["tokens"]).logits, expected, rtol=0, atol=0)  # left as it was
        assert not torch.allclose(small_model(tied=tied)(data["tokens"]).logits, expected, atol=0.1)


@networks
def test_engines_get_the_policy(config: ModelConfig) -> None:
    network, data = small_network(config), small_batch([5])
    network.refresh_reference()
    disturb(network, seed=5)
    copy = small_model(seed=9)
    copy.load_state_dict(network.engine_weights(), strict=False)
    with torch.no_grad():
        expected = by_the_whole_model(copy, data)
        torch.testing.assert_close(log_probs(network, data), expected, rtol=1e-4, atol=1e-4)
        shared = by_the_whole_model(network.engine_model(), data)
    torch.testing.assert_close(shared, expected, rtol=1e-4, atol=1e-4)
