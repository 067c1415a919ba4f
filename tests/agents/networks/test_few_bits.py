"""Frozen weights in few bits: near what they were, and everything computes with the same."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from agents.config import LoraConfig, ModelConfig, TrainConfig
from agents.config.checks import problems
from agents.networks.adapters import ACTOR
from agents.networks.few_bits import FewBits, keep_in_few_bits
from agents.networks.network import Network
from agents.run.training import train
from llm_env.engines import Sampling, merged_weights
from llm_env.engines.transformers import TransformersEngine
from llm_env.models import load_model, load_tokenizer
from tests.agents.runs import Config, save_small_model, train_until_it_breaks
from tests.agents.small_models import character_model

Bits = Literal[8, 4]
WORST = {8: 0.5 / 127 + 1e-6, 4: 0.152}
"""How far a weight may be from what it was, as a share of the largest in its row, or of 64: half of the widest gap."""


@pytest.fixture(params=[8, 4])
def bits(request: pytest.FixtureRequest) -> Bits:
    if request.param == 4:
        pytest.importorskip("bitsandbytes")
    found: Bits = request.param
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_computes_with_what_the_bits_stand_for(bits: Bits, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(128, 24, dtype=dtype).requires_grad_(False)
    few = FewBits(plain, bits)
    full, was = few.in_full().float(), plain.weight.float()
    assert full.dtype == torch.float32
    assert few.in_full().dtype == dtype
    assert few.kept.nbytes == 128 * 24 * bits // 8
    largest = was.abs().amax(1, keepdim=True) if bits == 8 else was.view(-1, 64).abs().amax(1).repeat_interleave(64)
    gap = (full - was).abs() / largest.view(24, -1)
    assert 0 < gap.max() < WORST[bits] + (0.01 if dtype == torch.bfloat16 else 0)

    with torch.no_grad():
        plain.weight.copy_(few.in_full())
    given = torch.randn(3, 5, 128, dtype=dtype)
    found = []
    for layer in (plain, few):
        own = given.clone().requires_grad_()
        out = layer(own)
        out.square().sum().backward()
        found.append((out.detach(), own.grad))
    for one, other in zip(*found, strict=True):
        near = {"rtol": 0.02, "atol": 0.004} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(one, other, **near)  # the bias is added after rounding
    if dtype == torch.float32:
        torch.testing.assert_close(few(given[1:2]), few(given)[1:2])


def test_only_what_does_not_learn_is_kept_so() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 4).requires_grad_(False))
    keep_in_few_bits(model, 8, but=model[2])
    assert [type(layer) for layer in model] == [nn.Linear, FewBits, nn.Linear]


@pytest.mark.parametrize("targets", ["all", "attention"])
def test_network_engine_and_export_agree(bits: Bits, targets: Any, tmp_path: Path) -> None:
    config = ModelConfig(lora=LoraConfig(rank=2, targets=targets), frozen_bits=bits, critic="separate")
    network = Network(character_model(width=64, spread=0.2), config, reference=True)
    data = TensorDict({"tokens": torch.randint(4, 90, (3, 7)), "state_position": torch.arange(6).expand(3, 6)}, [3])
    data["action"] = data["tokens"][:, 1:]
    assert torch.equal(network.reference_log_prob(data), log_probs(network, data))  # adapters begin as no change
    with torch.no_grad():
        for name, weight in network.model.named_parameters():
            if "lora_B" in name and f".{ACTOR}." in name:
                weight.normal_(std=0.1)
    ours = log_probs(network, data)
    assert (ours - network.reference_log_prob(data)).abs().max() > 0.01

    # A plain model with the weights that engines are given.
    plain = character_model(width=64)
    plain.load_state_dict(merged_weights(network.model), strict=False)
    torch.testing.assert_close(log_probs(Network(plain), data), ours, atol=1e-5, rtol=1e-5)
    network.export(tmp_path, load_tokenizer("tiny"))
    exported = load_model(str(tmp_path), dtype=torch.float32)
    torch.testing.assert_close(log_probs(Network(exported), data), ours, atol=1e-5, rtol=1e-5)

    # An engine on the very layers.
    engine = TransformersEngine(network.engine_model(), load_tokenizer("tiny"), num_slots=3, context=16)
    logits = torch.as_tensor(engine.start([0, 1, 2], [row.numpy() for row in data["tokens"][:, :6]]))
    chosen = logits.log_softmax(-1).gather(-1, data["action"][:, 5:6])[:, 0]
    torch.testing.assert_close(chosen, ours[:, 5], atol=1e-5, rtol=1e-5)
    assert Sampling().temperature == 1


def test_computing_in_bfloat16(bits: Bits) -> None:
    """Gradients arrive at adapters below and above."""
    config = ModelConfig(lora=LoraConfig(rank=2), frozen_bits=bits, autocast="on")
    network = Network(character_model(width=64, layers=2, spread=0.2), config)
    data = TensorDict({"tokens": torch.randint(4, 90, (3, 7)), "state_position": torch.arange(6).expand(3, 6)}, [3])
    network.actor.get_dist(data).log_prob(data["tokens"][:, 1:]).sum().backward()
    for name, weight in network.actor_parameters().items():
        assert weight.grad is not None, name
        assert weight.grad.abs().max() > 0 or "lora_A" in name, name  # B is 0 at first


def log_probs(network: Network, data: TensorDict) -> Tensor:
    with torch.no_grad():
        found: Tensor = network.actor.get_dist(data.clone()).log_prob(data["action"])
    return found


def test_the_reference_is_kept_so_and_the_policy_is_not(bits: Bits) -> None:
    model = character_model(width=64, spread=0.2)
    network = Network(model, ModelConfig(frozen_bits=bits), reference=True)
    assert not any(isinstance(part, FewBits) for part in network.model.modules())
    expected = copy.deepcopy(model).requires_grad_(False)
    keep_in_few_bits(expected, bits, but=expected.get_output_embeddings())
    data = TensorDict({"tokens": torch.randint(4, 90, (3, 7)), "state_position": torch.arange(6).expand(3, 6)}, [3])
    data["action"] = data["tokens"][:, 1:]
    logits = expected(data["tokens"]).logits.log_softmax(-1)[:, :-1]
    theirs = logits.gather(-1, data["action"][..., None])[..., 0]
    torch.testing.assert_close(network.reference_log_prob(data), theirs, atol=1e-5, rtol=1e-5)
    assert (theirs - log_probs(network, data)).abs().max() > 1e-4


def test_a_run_goes_on_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: Config) -> None:
    """With all that there is in few bits."""
    pytest.importorskip("bitsandbytes")
    folder = save_small_model(tmp_path / "of", width=64)
    few = {"model__lora__rank": 64, "model__frozen_bits": 4, "actor__state_bits": 8}  # adapters large enough for 8 bits
    told = config(iterations=3, checkpoint__every=1, **few).replace(out=tmp_path / "whole", model__name=str(folder))
    train(told)
    again = told.replace(out=tmp_path / "stopped")
    train_until_it_breaks(again, monkeypatch, iteration=2)
    train(again, resume=True)
    whole, stopped = (load_model(str(each.out / "model"), dtype=torch.float32) for each in (told, again))
    for one, other in zip(whole.parameters(), stopped.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"model__frozen_bits": 8}, "--model.frozen-bits is 8, but all weights learn"),
        (
            {"model__frozen_bits": 4, "kl__beta": 0.1, "model__refresh_reference": 2},
            "--model.refresh-reference is 2, but the reference is kept in 4 bits",
        ),
    ],
)
def test_what_contradicts_itself(changes: dict[str, Any], problem: str) -> None:
    assert any(problem in each for each in problems(TrainConfig().replace(**changes)))


def test_without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ModuleNotFoundError, match=r"weights in 4 bits need bitsandbytes: pip install 'llm-env\[bits"):
        FewBits(nn.Linear(64, 64), 4)
    FewBits(nn.Linear(64, 64), 8)
