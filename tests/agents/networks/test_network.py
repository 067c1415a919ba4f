"""Actor, critic and reference over one language model."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torchrl.objectives import ClipPPOLoss

from agents.config import ModelConfig
from agents.networks.network import Network
from llm_env.envs.torchrl import TorchRLTokenEnv
from tests.agents.small import (
    NETWORKS,
    VOCAB,
    WIDTH,
    by_the_whole_model,
    gradients_of,
    log_probs,
    loss_of,
    small_batch,
    small_model,
    small_network,
)

networks = pytest.mark.parametrize("config", NETWORKS.values(), ids=NETWORKS.keys())


@networks
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_actor_is_the_language_model(config: ModelConfig, temperature: float) -> None:
    network, data = small_network(config, temperature=temperature), small_batch([3, 1, 5])
    ours = log_probs(network, data)
    with torch.no_grad():
        torch.testing.assert_close(ours, by_the_whole_model(network.model, data, temperature), rtol=1e-4, atol=1e-4)
    assert ours.std() > 0.5


@networks
def test_the_critic_begins_as_zero_and_the_actor_unchanged(config: ModelConfig) -> None:
    network, data = small_network(config, trained=False), small_batch([3, 1, 5])
    value = network.critic(data.clone(False))["state_value"]
    assert value.shape == (3, 5, 1)
    assert not value.any()
    with torch.no_grad():
        torch.testing.assert_close(log_probs(network, data), by_the_whole_model(small_model(), data))


@networks
def test_values_are_linear_in_the_critics_hidden_states(config: ModelConfig) -> None:
    network, data = small_network(config), small_batch([3, 5])
    network.encode(data)
    assert ("critic_hidden" in data) == (config.critic == "separate") == (not network.shared)
    hidden = data["hidden" if network.shared else "critic_hidden"]
    value = network.critic(data.clone(False))["state_value"]
    torch.testing.assert_close(value, network.value_head.linear(hidden))
    torch.testing.assert_close(value, network.value_of(data))
    assert value.std() > 0.1
    if not network.shared:
        assert not torch.allclose(data["hidden"], data["critic_hidden"])


@networks
def test_encode_runs_only_what_is_needed(config: ModelConfig) -> None:
    network, data = small_network(config), small_batch([3, 5])
    runs: list[int] = []
    network.backbone.register_forward_hook(lambda *_: runs.append(1))
    network.encode(data.clone(False))
    assert len(runs) == 1
    critic_only = network.encode(data.clone(False), actor=False)
    assert ("hidden" in critic_only) == network.shared
    assert "critic_hidden" not in network.encode(data.clone(False), critic=False)


@networks
@pytest.mark.parametrize("tied", [True, False])
def test_torchrls_own_ppo_loss_takes_them_as_they_are(config: ModelConfig, tied: bool) -> None:
    """Functional or not, with the gradients that the same loss of plain log-probs has."""
    found = []
    data = small_batch([4, 4])
    for functional in (True, False):
        network = small_network(config, tied=tied)
        loss = ClipPPOLoss(
            network.actor, network.critic, functional=functional, loss_critic_type="l2", entropy_coeff=0.1
        )
        loss_of(loss(data)).backward()
        found.append(gradients_of(network))
    functional_ones, others = found
    assert functional_ones.keys() == others.keys()
    for name, gradient in functional_ones.items():
        torch.testing.assert_close(gradient, others[name])
    trained = network.actor_parameters() | network.critic_parameters()
    assert len(others) == len(trained)
    assert all(gradient.any() for gradient in others.values())

    network = small_network(config, tied=tied)
    logits = network.model(data["tokens"]).logits
    states = logits.gather(1, data["state_position"][..., None].expand(-1, -1, VOCAB)).log_softmax(-1)
    log_prob = states.gather(-1, data["action"][..., None])[..., 0]
    ratio, advantage = (log_prob - data["action_log_prob"]).exp(), data["advantage"][..., 0]
    gain = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()
    entropy = -(states.exp() * states).sum(-1).mean()
    value = network.critic(data.clone(False))["state_value"]
    (-gain - 0.1 * entropy + ((value - data["value_target"]) ** 2).mean()).backward()
    plain = gradients_of(network)
    assert plain.keys() == others.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(gradient, others[name], rtol=1e-3, atol=1e-5)


def gradients_of_one(network: Network, part: str) -> set[str]:
    """The weights that the policy's or the value's loss reaches."""
    data = small_batch([3, 5])
    if part == "actor":
        log_probs(network, data).sum().backward()
    else:
        network.critic(data)["state_value"].sum().backward()
    return {name for name, gradient in gradients_of(network).items() if gradient.any()}


def names_of(network: Network, weights: Any) -> set[str]:
    of_tensor = {id(weight): name for name, weight in network.named_parameters()}
    return {of_tensor[id(weight)] for weight in weights.values()}


@networks
@pytest.mark.parametrize("tied", [True, False])
def test_which_loss_trains_what(config: ModelConfig, tied: bool) -> None:
    network = small_network(config, tied=tied)
    actor, critic = (names_of(network, p) for p in (network.actor_parameters(), network.critic_parameters()))
    assert not actor & critic
    reached_by_critic = set() if config.critic == "fitted" else gradients_of_one(network, "critic")
    assert gradients_of_one(network, "actor") == actor
    if config.critic == "separate":
        assert reached_by_critic == critic
    elif config.critic == "shared":
        assert reached_by_critic == critic | actor - (set() if tied else {"head.weight"})
    else:
        assert reached_by_critic == critic == set()
    assert {name for name, weight in network.named_parameters() if weight.requires_grad} == actor | critic


def test_a_critic_of_its_own_learns_with_its_backbone() -> None:
    network = small_network(ModelConfig(critic="separate"))
    assert gradients_of_one(network, "critic") == names_of(network, network.critic_parameters())


def test_separate_models_share_nothing() -> None:
    network, data = small_network(NETWORKS["separate"]), small_batch([3])
    before = log_probs(network, data)
    with torch.no_grad():
        for weight in network.critic_parameters().values():
            weight.add_(1)
    torch.testing.assert_close(log_probs(network, data), before, rtol=0, atol=0)


# Ways to compute.


def gradients_with(config: ModelConfig) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    network, data = small_network(config).train(), small_batch([3, 1, 5])
    network.encode(data)
    distribution = network.actor_head.get_dist(data)
    value = network.critic_head(data)["state_value"][data["mask"]]
    loss = (distribution.log_prob(data["action"]) - 0.3 * distribution.entropy()).sum() + (value**2).sum()
    loss.backward()
    found = {name.replace("_orig_mod.", ""): gradient for name, gradient in gradients_of(network).items()}
    return loss.detach(), found


def assert_same_gradients(one: ModelConfig, other: ModelConfig) -> None:
    (loss, gradients), (other_loss, others) = gradients_with(one), gradients_with(other)
    torch.testing.assert_close(loss, other_loss, rtol=1e-4, atol=1e-4)
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, others[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["shared", "fitted", "separate", "LoRA shared", "LoRA separate"])
def test_checkpointing_changes_no_gradient(name: str) -> None:
    config = NETWORKS[name]
    checkpointed = dataclasses.replace(config, gradient_checkpointing=True)
    assert_same_gradients(config, checkpointed)
    # And it does checkpoint (in training mode, by transformers' rule): in the backward pass, the layers run again.
    network, data = small_network(checkpointed).train(), small_batch([3])
    runs: list[int] = []
    for block in network.backbone.body.layers:
        block.mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    log_probs(network, data).sum().backward()
    assert len(runs) == 4


@networks
def test_autocast_is_near(config: ModelConfig) -> None:
    loss, gradients = gradients_with(config)
    near_loss, near = gradients_with(dataclasses.replace(config, autocast="on"))
    assert near_loss != loss
    assert near_loss == pytest.approx(loss.item(), rel=0.03)
    assert gradients.keys() == near.keys()
    whole, near_whole = (torch.cat([found[name].flatten() for name in gradients]) for found in (gradients, near))
    assert near_whole.dtype == torch.float32
    assert (near_whole - whole).norm() < 0.1 * whole.norm()


@networks
def test_it_can_be_told_later_what_to_compute_in(config: ModelConfig) -> None:
    """All of it: backbones, output layer, reference; and back again."""
    for first, then in (("off", "on"), ("on", "off")):
        data = small_batch([3, 5])
        made = small_network(dataclasses.replace(config, autocast=then))
        told = small_network(dataclasses.replace(config, autocast=first))
        told.set_autocast(then)
        assert told.config == made.config
        assert told.compute_dtype == made.compute_dtype
        for see in (log_probs, Network.reference_log_prob, lambda net, data: net.critic(data)["state_value"]):
            assert torch.equal(see(told, data.clone()), see(made, data.clone()))


def test_a_reference_that_is_kept_elsewhere_comes_to_read() -> None:
    """Where the policy is, which is nowhere here; and back. What it says is the same."""
    data = small_batch([3, 5])
    network = small_network(ModelConfig(offload_reference=True))
    expected = small_network(ModelConfig()).reference_log_prob(data)
    assert torch.equal(network.reference_log_prob(data), expected)
    policy, network.head = network.head, torch.nn.Linear(1, 1, device="meta")
    with network.reference_at_hand():
        assert all(weight.is_meta for weight in network._reference.parameters())
    network.head = policy
    assert torch.equal(network.reference_log_prob(data), expected)


@pytest.mark.parametrize("choice", ["auto", True])
def test_a_network_alone_cannot_choose(choice: Any) -> None:
    with pytest.raises(ValueError, match=f"autocast is {choice!r}, expected 'off' or 'on'; 'auto' is for `build`"):
        small_network(ModelConfig(autocast=choice))


def test_autocast_computes_in_bfloat16() -> None:
    network = small_network(ModelConfig(autocast="on"))
    assert network.compute_dtype == torch.bfloat16
    seen: list[torch.dtype] = []
    for module in network.model.modules():
        if isinstance(module, torch.nn.Linear) and module is not network.head:
            module.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    network.reference_log_prob(small_batch([3]))
    log_probs(network, small_batch([3]))
    assert set(seen) == {torch.bfloat16}


def test_weights_in_bfloat16() -> None:
    network, data = Network(small_model().to(torch.bfloat16), ModelConfig(dtype="bfloat16")), small_batch([3, 5])
    assert network.compute_dtype == torch.bfloat16
    assert network.value_head.linear.weight.dtype == torch.float32
    value = network.critic(data)["state_value"]
    assert value.dtype == log_probs(network, data).dtype == torch.float32
    (value.sum() + log_probs(network, data).sum()).backward()
    assert all(gradient.isfinite().all() for gradient in gradients_of(network).values())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shared", "separate", "LoRA separate"])
def test_compiling_changes_nothing(name: str) -> None:
    assert_same_gradients(NETWORKS[name], dataclasses.replace(NETWORKS[name], compile=True))


# The rest.


def test_a_policy_for_the_torchrl_environment() -> None:
    from llm_env.models import load_model

    network = Network(load_model("tiny"), temperature=0.8)
    env = TorchRLTokenEnv("Reverse", num_envs=3, seed=0)
    torch.manual_seed(0)
    rollout = env.rollout(4, network.policy(), break_when_any_done=False, auto_cast_to_device=True)
    assert rollout.shape == (3, 4)
    for step in range(4):
        for row in rollout[:, step]:
            text = row["tokens"][: int(row["length"])]
            with torch.no_grad():
                logits = network.model(text[None]).logits[0, -1] / 0.8
            expected = logits.masked_fill(~row["action_mask"], -torch.inf).log_softmax(-1)[row["action"]]
            torch.testing.assert_close(row["action_log_prob"], expected, rtol=1e-4, atol=1e-4)
    assert len(rollout["action"].unique()) > 3


@networks
def test_tokens_after_a_choice_have_no_say(config: ModelConfig) -> None:
    """Neither padding nor the future: other tokens there change no log-prob, no value, and get no gradient."""
    # Packed texts have no such tokens: see test_ragged.py.
    network, data = small_network(dataclasses.replace(config, packing=False)), small_batch([3, 1, 2])
    network.encode(data)
    embedded: list[torch.Tensor] = []

    def keep(_: Any, __: Any, out: torch.Tensor) -> None:
        out.retain_grad() if out.requires_grad else out.requires_grad_()
        embedded.append(out)

    network.model.get_input_embeddings().register_forward_hook(keep)
    others = small_batch([3, 1, 2])
    last = others["state_position"].gather(1, others["mask"].sum(1, keepdim=True) - 1)
    after = torch.arange(others["tokens"].shape[1]) > last
    others["tokens"] = torch.where(after, 22 - others["tokens"] + 3, others["tokens"])
    assert (others["tokens"] != data["tokens"]).any()
    network.encode(others)
    mask = data["mask"]
    keys = ["hidden"] if network.shared else ["hidden", "critic_hidden"]
    for key in keys:
        torch.testing.assert_close(others[key][mask], data[key][mask])
        others[key][mask].sum().backward(retain_graph=True)
    for states in embedded:
        assert states.grad is not None
        assert not states.grad[after].any()
        assert states.grad[~after].any(-1).all()


def test_the_prompt_matters() -> None:
    network, data = small_network(), small_batch([4])
    changed = data.clone()
    changed["tokens"][0, 0] = (changed["tokens"][0, 0] + 1) % VOCAB
    assert not torch.allclose(log_probs(network, changed), log_probs(network, data), atol=1e-3)


def test_models_that_are_not_just_hidden_states_and_a_head() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaModel

    config = Gemma2Config(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        final_logit_softcapping=1.0,
        initializer_range=0.5,
    )
    with pytest.raises(ValueError, match="Gemma2ForCausalLM changes its logits after the output layer"):
        Network(Gemma2ForCausalLM(config))
    config.final_logit_softcapping = None
    Network(Gemma2ForCausalLM(config))
    with pytest.raises(ValueError, match="LlamaModel has no linear output layer"):
        Network(LlamaModel(small_model().config))
