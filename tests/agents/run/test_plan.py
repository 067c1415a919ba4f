"""What a plan says beside what a run takes: of weights to the byte, of layers nearly."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from agents.cli import main
from agents.config import TrainConfig
from agents.config.machine import Machine
from agents.networks.few_bits import FewBits
from agents.run.plan import AS_IT_IS, Shape, Texts, memory, options, seconds
from tests.agents.runs import Config, running

KINDS = {
    "whole": {},
    "fitted": {"model__critic": "fitted"},
    "apart": {"model__critic": "separate", "kl__beta": 0.1},
    "reference": {"kl__beta": 0.1, "model__reference_dtype": "bfloat16"},
    "halves": {"model__dtype": "bfloat16", "kl__beta": 0.1},
    "adapters": {"model__lora__rank": 4, "model__critic": "separate", "kl__beta": 0.1},
    "eight": {"model__lora__rank": 4, "kl__beta": 0.1, "model__frozen_bits": 8},
    "four": {"model__lora__rank": 4, "model__dtype": "bfloat16", "model__frozen_bits": 4},
    "reference in eight": {"kl__beta": 0.1, "model__reference_dtype": "bfloat16", "model__frozen_bits": 8},
    "attention": {"model__lora__rank": 4, "model__lora__targets": "attention"},
}
TEXTS = Texts(prompt=12, new=5)


def size(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, each counted once."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors if tensor.numel()}.values())


def kept_by(model: nn.Module) -> list[Tensor]:
    """Its weights, and those in few bits with their scales."""
    few = [layer for layer in model.modules() if isinstance(layer, FewBits)]
    packed = [each for layer in few for name, each in layer.named_buffers(recurse=False)]
    return [*model.parameters(), *packed, *(layer.state.absmax for layer in few if layer.state is not None)]


@pytest.mark.parametrize("kind", KINDS)
def test_weights_and_what_learns_them_take_what_was_said(config: Config, kind: str) -> None:
    told = config(loss__target_kl=0.01, **KINDS[kind])
    planned = memory(told, Shape.of(told.model.name), TEXTS)
    with running(told) as run:
        run.algorithm.step()
        network, learner = run.algorithm.network, run.algorithm.learner
        head = set(network.value_head.parameters())  # which a plan leaves out: it has one weight for each of the width
        adapters = [weight for name, weight in network.named_parameters() if "lora_" in name]
        reference = () if network._reference is None else kept_by(network._reference)
        critic = network.critic_backbone
        apart = [] if critic is None or adapters else list(critic.parameters())
        assert planned["weights"] == size(kept_by(network.engine_model())) - size(adapters)
        assert planned.get("adapters", 0) == size(adapters)
        assert planned.get("critic", 0) == size(apart)
        assert planned.get("reference", 0) == size(reference)
        kept = 0
        for optimizer in filter(None, (learner.actor_optimizer, learner.critic_optimizer)):
            for weight, stepped in zip(optimizer.weights, optimizer._stepped, strict=True):
                if weight not in head:
                    averages = [each for each in optimizer.adam.state[stepped].values() if each.numel() > 1]
                    kept += size(averages) + (0 if stepped is weight else stepped.nbytes)
        assert planned["optimizer"] == kept
        learner.actor_optimizer.remember()
        assert planned["way back"] == size(learner.actor_optimizer._remembered)


@pytest.mark.parametrize("changes", [{}, {"model__gradient_checkpointing": True}, {"model__dtype": "bfloat16"}])
def test_layers_keep_about_what_was_said(config: Config, changes: dict[str, object]) -> None:
    told = config(model__packing=False, model__name="tiny", actor__micro_batch_size=4, **changes)
    planned = memory(told, Shape.of("tiny"), TEXTS)["what layers keep"]
    with running(told) as run:
        network = run.algorithm.network.train()
        weights = {weight.untyped_storage().data_ptr() for weight in network.parameters()}
        tokens = torch.randint(4, 90, (4, TEXTS.whole))  # as many texts as are read at a time
        kept: dict[int, tuple[int, Tensor]] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes(), tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            hidden = network.backbone.read(tokens)
        found = sum(each for each, _ in kept.values())
        if told.model.gradient_checkpointing:  # in the backward pass one layer comes on top
            found += memory(told.replace(model__gradient_checkpointing=False), Shape.of("tiny"), TEXTS)[
                "what layers keep"
            ] / len(network.model.model.layers)
        assert hidden.requires_grad
        assert planned == pytest.approx(found, rel=0.15)


def test_parts_are_divided_by_those_who_learn(config: Config) -> None:
    told = config(kl__beta=0.1, rollout__batch_size=64, actor__micro_batch_size=4)
    alone, four = (memory(told, Shape.of(told.model.name), TEXTS, gpus) for gpus in (1, 4))
    for name in ("weights", "reference", "gradients", "optimizer"):
        assert four[name] == alone[name] / 4
    assert four["what layers keep"] == alone["what layers keep"]  # each reads so many texts at a time
    assert "writing: weights" not in alone  # it writes with those that learn
    assert four["writing: weights"] == alone["weights"]


def test_a_reference_that_is_kept_elsewhere_takes_no_room(config: Config) -> None:
    """It comes when there are no gradients, which are as large."""
    told, shape = config(kl__beta=0.1, model__offload_reference=True), Shape.of("tiny")
    here, elsewhere = (memory(told.replace(model__offload_reference=on), shape, TEXTS) for on in (False, True))
    assert "reference" not in elsewhere
    assert sum(here.values()) - sum(elsewhere.values()) == here["reference"] <= here["gradients"]


def test_an_engine_divides_what_it_holds_by_what_its_heads_allow(config: Config) -> None:
    told = config(rollout__engine="vllm", workers=1)
    shape = Shape.of(told.model.name)
    whole, parts = (memory(told.replace(rollout__tensor_parallel=parts), shape, TEXTS) for parts in (1, 2))
    for name in ("writing: weights", "writing: keys and values"):
        assert parts[name] == whole[name] / 2
    six = replace(shape, heads=6, cached_heads=3, inner=12)
    flags = [flags for flags, _ in options(told, six, 4)]
    assert any("--rollout.tensor-parallel 3" in each for each in flags)  # four do not divide six
    for other in (config(), told.replace(worker_gpus=1)):  # which is on other GPUs
        assert not any("tensor" in flags for flags, _ in options(other, six, 4))
    for parts, divides in ((1, True), (2, False), (3, True), (6, True), (12, False)):  # keys of two for three, no
        assert six.divides_by(parts) == divides
    told = told.replace(rollout__tensor_parallel=6)
    cache = memory(told, six, TEXTS)["writing: keys and values"]
    assert cache == memory(told.replace(rollout__tensor_parallel=3), six, TEXTS)["writing: keys and values"]


def test_gradients_come_as_what_layers_keep_goes(config: Config) -> None:
    at_once, in_portions = (
        memory(config(rollout__batch_size=64, actor__micro_batch_size=size), Shape.of("tiny"), Texts(100, 100))
        for size in (None, 16)
    )
    both = in_portions["gradients"] + at_once["what layers keep"]
    assert both == 2 * in_portions["what layers keep"]  # 32 texts at a time, beside 16


def test_time_is_counted_in_operations() -> None:
    """By hand: a model of 1,000 weights, 4 texts of 2 + 3 tokens, two epochs."""
    shape = Shape(1000, 1000, 2, 8, 32, 8, 16, 100, 50, 800, 80, 2, 2)
    told = TrainConfig().replace(rollout__batch_size=4, actor__epochs=2, kl__beta=0.1, model__dtype="bfloat16")
    found = seconds(told, shape, Texts(2, 3), Machine(tflops=1e-9, bandwidth=1.0))  # a thousand operations a second
    forward = 4 * 5 * 2 * 1000 / 1000
    assert found["scoring"] == pytest.approx(2 * forward)  # the policy, and the reference
    assert found["learning"] == pytest.approx(2 * 3 * forward)
    assert found["writing"] == pytest.approx(3 * 4 * 2 * 1000 / 1000)  # three steps of four texts
    assert seconds(told, shape, Texts(2, 3), Machine(gpus=2, tflops=1e-9))["learning"] == pytest.approx(3 * forward)


def test_each_option_needs_less_than_the_one_before(config: Config) -> None:
    told = config(kl__beta=0.1, model__critic="separate", workers=1, model__name="tiny")
    texts = Texts(prompt=100, new=100)
    found = list(options(told, Shape.of("tiny")))
    whole = [each for each in found if "lora" not in each[0]]
    sizes = [sum(memory(each, Shape.of("tiny"), texts).values()) for _, each in whole]
    assert whole[0] == (AS_IT_IS, told)
    assert len(whole) == 6
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == len(sizes)
    assert found[-1][0] == (
        "--actor.micro-batch-size 2 --critic.micro-batch-size 2 --rollout.engine-dtype bfloat16 --model.lora.rank 16 "
        "--model.dtype bfloat16 --model.gradient-checkpointing --model.frozen-bits 4"
    )


def test_a_plan_says_what_fits(capsys: pytest.CaptureFixture[str], random_model: Path) -> None:
    assert main(["plan", "--model.name", str(random_model), "--gpu", "80"]) == 0
    said = capsys.readouterr().out
    assert "yes    as it is" in said
    assert "fits:" not in said
    assert main(["plan", "--gpu", "0.05", "--rollout.batch-size", "256"]) == 0
    said = capsys.readouterr().out
    assert "no     as it is" in said
    assert "the least change that fits: --actor.micro-batch-size 16" in said
    assert main(["plan", "--gpu", "0.0001"]) == 0
    assert "nothing of this fits" in capsys.readouterr().out
    assert main(["plan", "--gpu", "-1"]) == 2
    assert main(["plan", "--gpus", "3"]) == 2
    assert "use a multiple of 12" in capsys.readouterr().err
