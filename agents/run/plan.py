"""What a run needs of a machine: memory by what it is for, and time, before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from agents.config import TrainConfig
from agents.config.machine import Machine
from agents.networks.distribution import LOGITS_BYTES
from agents.run.parts import shares_weights
from llm_env.models import load_model

BYTES = {"float32": 4, "bfloat16": 2}
ADAM = {None: 8, 8: 2 * (1 + 4 / 256)}
"""Two averages of a gradient, in float32; or in 8 bits, with a scale for each 256."""
UNDER_AUTOCAST, IN_BFLOAT16 = 0.67, 0.55
"""What layers keep for the backward pass, as a share of what they keep in float32; some of it stays in float32."""
ROOM = 0.9
"""The share of a GPU's memory that a plan may fill; the rest is for what lies between tensors, and for libraries."""
AS_IT_IS = "as it is"
LOSS_COPIES = 3
"""How often the logits of a chunk are there at once: themselves, their probabilities, their gradient."""


@dataclass(frozen=True)
class Shape:
    """A language model, in numbers.

    Attributes:
        parameters: all of them; a layer that is tied to another counts once.
        trunk: those that a critic of its own has, too: all but an output layer that is not tied.
        layers: how many blocks there are.
        width: of the hidden states.
        inner: of the layer within a block.
        cached: numbers that a block keeps for each token that it has read: keys, or as many values.
        vocabulary: rows of the output layer.
        linear: the sum of the widths of all linear layers but the output layer, in and out.
        attention: of those that belong to the attention.
        dense: weights of all linear layers but the output layer.
        rows: of these layers' weights.
        heads: of the attention in a block.
        cached_heads: for which keys are kept.

    Examples:
        >>> shape = Shape.of("tiny")
        >>> shape.layers, shape.width, shape.parameters
        (4, 128, 1062528)
    """

    parameters: int
    trunk: int
    layers: int
    width: int
    inner: int
    cached: int
    vocabulary: int
    linear: int
    attention: int
    dense: int
    rows: int
    heads: int
    cached_heads: int

    def divides_by(self, parts: int) -> bool:
        """Whether an engine can divide it among so many GPUs."""
        of_cache = self.cached_heads % parts == 0 or parts % self.cached_heads == 0
        return self.heads % parts == 0 and self.inner % parts == 0 and of_cache

    @classmethod
    def of(cls, source: str) -> Shape:
        """That of a built-in model, a folder, or an id on the hub; only its configuration is read."""
        model: Any = load_model(source, device="meta")
        text = model.config.get_text_config()
        head = model.get_output_embeddings()
        parts = model.named_modules()
        layers = {name: part for name, part in parts if isinstance(part, nn.Linear) and part is not head}
        sizes = {name: part.in_features + part.out_features for name, part in layers.items()}
        heads = text.num_attention_heads
        width = getattr(text, "head_dim", None) or text.hidden_size // heads
        cached_heads = getattr(text, "num_key_value_heads", None) or heads
        return cls(
            parameters=sum(weight.numel() for weight in model.parameters()),
            trunk=sum(weight.numel() for weight in model.base_model.parameters()),
            layers=text.num_hidden_layers,
            width=text.hidden_size,
            inner=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
            cached=width * cached_heads,
            vocabulary=len(head.weight),
            linear=sum(sizes.values()),
            attention=sum(size for name, size in sizes.items() if "att" in name),
            dense=sum(part.weight.numel() for part in layers.values()),
            rows=sum(part.out_features for part in layers.values()),
            heads=heads,
            cached_heads=cached_heads,
        )


@dataclass(frozen=True)
class Texts:
    """What is written and read: at most so many tokens of a prompt, and so many that the policy chooses."""

    prompt: int
    new: int

    @property
    def whole(self) -> int:
        """Tokens of a text."""
        return self.prompt + self.new


def memory(config: TrainConfig, shape: Shape, texts: Texts, gpus: int = 1) -> dict[str, float]:
    """Bytes on the fullest GPU, by what they are for. It is the first one, which also writes the texts.

    Examples:
        >>> found = memory(TrainConfig(), Shape.of("tiny"), Texts(prompt=12, new=8))
        >>> found["weights"] == 4 * 1062528 and found["optimizer"] == 8 * 1062528
        True
    """
    model, rollout = config.model, config.rollout
    size = BYTES[model.dtype]
    lora, separate = model.lora.rank > 0, model.critic == "separate"
    adapter = model.lora.rank * (shape.linear if model.lora.targets == "all" else shape.attention)
    of_actor = adapter if lora else shape.parameters
    of_critic = (adapter if lora else shape.trunk) if separate else 0
    learned = of_actor + of_critic
    # One that is kept elsewhere comes when there are no gradients, which are no smaller.
    reference = config.keeps_reference and not lora and not model.offload_reference
    averages = of_actor * ADAM[config.actor.state_bits] + of_critic * ADAM[config.critic.state_bits]
    of_engine = BYTES[rollout.engine_dtype or model.dtype]
    of_reference = BYTES[model.reference_dtype or model.dtype]
    alone = shares_weights(config, gpus)
    elsewhere = _writes_elsewhere(config)
    cache = 2 * shape.cached * shape.layers * of_engine / min(rollout.tensor_parallel, shape.cached_heads)
    writers_here = 0 if elsewhere else max(1, config.workers)
    tokens = _in_memory(config, gpus) * texts.whole
    layers, gradients = tokens * _kept(config, shape), max(of_actor, of_critic) * 4 / gpus
    if _in_one_go(config, gpus):  # they come as what layers kept goes
        layers = max(0.0, layers - gradients)
    found: dict[str, float] = {
        "weights": (_frozen(shape, size, model.frozen_bits) if lora else shape.parameters * size) / gpus,
        "critic": 0 if lora else of_critic * size / gpus,
        "adapters": learned * 4 * lora / gpus,  # peft keeps them in float32
        "reference": reference * _frozen(shape, of_reference, model.frozen_bits) / gpus,
        # The critic's come when the actor's have gone. Of weights in bfloat16 they are made into float32.
        "gradients": gradients,
        "optimizer": (averages + learned * 4 * (size < 4 and not lora)) / gpus,
        "way back": of_actor * 4 * (config.loss.target_kl is not None) / gpus,
        "layer at work": 0 if gpus == 1 else 2 * size * shape.trunk / shape.layers,
        "what layers keep": layers,
        "logits": LOSS_COPIES * min(LOGITS_BYTES, tokens * shape.vocabulary * 4),
        "writing: weights": 0 if alone else shape.parameters * of_engine / rollout.tensor_parallel * writers_here,
        "writing: keys and values": 0 if elsewhere else cache * texts.whole * config.rollout.side_by_side,
    }
    return {name: value for name, value in found.items() if value}


def seconds(config: TrainConfig, shape: Shape, texts: Texts, machine: Machine) -> dict[str, float]:
    """Of an iteration: writing, scoring and learning, if nothing had to wait for anything else.

    Operations are counted as two for each weight and token forward, and as many again for the gradient of what a layer
    was given, and for that of its weights.

    Examples:
        >>> found = seconds(TrainConfig(), Shape.of("tiny"), Texts(12, 8), Machine())
        >>> list(found)
        ['writing', 'scoring', 'learning']
    """
    model, rollout, rows = config.model, config.rollout, config.rollout.batch_size
    speed = 1e12 * machine.tflops * (1.0 if _computes_in_bfloat16(config) else 0.5)
    forward = 2 * shape.parameters
    epochs = config.actor.epochs + (config.critic.epochs if model.critic == "separate" else 0)
    passes = 2 + (model.lora.rank == 0) + model.gradient_checkpointing
    read = 1 + config.keeps_reference + (model.critic == "separate")
    writers = max(1, config.workers)
    of_engine = BYTES[rollout.engine_dtype or model.dtype]
    steps = texts.new * -(-rows // (config.rollout.side_by_side * (writers if config.workers else 1)))
    # Each token reads all weights from memory; with many texts side by side, computing takes longer.
    step = max(
        shape.parameters * of_engine / (1e9 * machine.bandwidth),
        min(rows, config.rollout.side_by_side) * forward / (1e12 * machine.tflops * (1.0 if of_engine == 2 else 0.5)),
    )
    step /= rollout.tensor_parallel
    return {
        "writing": steps * step,
        "scoring": rows * texts.whole * forward * read / (speed * machine.gpus),
        "learning": rows * texts.whole * forward * passes * epochs / (speed * machine.gpus),
    }


def options(config: TrainConfig, shape: Shape, gpus: int = 1) -> Iterator[tuple[str, TrainConfig]]:
    """The configuration, and others that need less, each with the flags that make it of the one given.

    Examples:
        >>> [flags for flags, _ in options(TrainConfig(), Shape.of("tiny"))][:2]
        ['as it is', '--actor.micro-batch-size 4']
    """
    yield AS_IT_IS, config
    model, few = config.model, max(1, _in_memory(config, gpus) // 4)
    separate, frozen = model.critic == "separate", config.keeps_reference and not model.lora.rank
    portions: dict[str, object] = {"actor__micro_batch_size": few}
    steps: list[Step] = [(f"--actor.micro-batch-size {few}", portions)] * (few < _in_memory(config, gpus))
    if steps and separate:
        steps = [(f"{steps[0][0]} --critic.micro-batch-size {few}", {**portions, "critic__micro_batch_size": few})]
    if model.dtype == "float32" and config.rollout.engine_dtype is None and not shares_weights(config, gpus):
        steps.append(("--rollout.engine-dtype bfloat16", {"rollout__engine_dtype": "bfloat16"}))
    parts = max(parts for parts in range(1, gpus + 1) if shape.divides_by(parts))
    is_here = config.rollout.engine != "transformers" and not _writes_elsewhere(config)
    if is_here and config.rollout.tensor_parallel < parts:
        steps.append((f"--rollout.tensor-parallel {parts}", {"rollout__tensor_parallel": parts}))
    again: Step = ("--model.gradient-checkpointing", {"model__gradient_checkpointing": True})
    whole = [*steps, *[again] * (not model.gradient_checkpointing)]
    if frozen and model.dtype == "float32" and model.reference_dtype is None:
        whole.append(("--model.reference-dtype bfloat16", {"model__reference_dtype": "bfloat16"}))
    if frozen and gpus == 1 and not model.offload_reference:
        whole.append(("--model.offload-reference", {"model__offload_reference": True}))
    yield from _one_on_top_of_the_other(config, whole)
    if not model.lora.rank:
        without = {"model__reference_dtype": None, "model__offload_reference": False}  # it is the model itself
        adapters: list[Step] = [("--model.lora.rank 16", {"model__lora__rank": 16, **without})]
        if model.dtype == "float32":
            adapters.append(("--model.dtype bfloat16", {"model__dtype": "bfloat16", "model__autocast": "off"}))
        adapters += [again] * (not model.gradient_checkpointing)
        adapters += [(f"--model.frozen-bits {bits}", {"model__frozen_bits": bits}) for bits in (8, 4)]
        made = list(_one_on_top_of_the_other(config, [*steps, *adapters]))
        yield from made[len(steps) :]


def _frozen(shape: Shape, size: int, bits: int | None) -> float:
    """Bytes of a model that does not learn: with few bits, a scale for each row or for each 64 weights beside them."""
    if bits is None:
        return shape.parameters * size
    scales = shape.rows * size if bits == 8 else shape.dense / 64 * 4
    return (shape.parameters - shape.dense) * size + shape.dense * bits / 8 + scales


Step = tuple[str, dict[str, object]]


def _one_on_top_of_the_other(config: TrainConfig, steps: list[Step]) -> Iterator[tuple[str, TrainConfig]]:
    said: dict[str, str] = {}
    for flags, changes in steps:
        config = config.replace(**changes)
        said[flags.partition(" ")[0]] = flags
        yield " ".join(said.values()), config


def _in_memory(config: TrainConfig, gpus: int) -> int:
    """Texts of a pass forward and backward in each process."""
    shares = [
        settings.micro_batch_size or -(-config.rollout.batch_size // (settings.minibatches * gpus))
        for settings in (config.actor, config.critic)
    ]
    return shares[0] if config.model.critic != "separate" else max(shares)


def _writes_elsewhere(config: TrainConfig) -> bool:
    """Whether texts are written on other GPUs."""
    return config.ray is not None or config.listen is not None or config.worker_gpus > 0


def _in_one_go(config: TrainConfig, gpus: int) -> bool:
    """Whether a step reads all its texts in one pass, so that no gradients are there while it reads."""
    rows = config.rollout.batch_size // (config.actor.minibatches * gpus)
    return _in_memory(config, gpus) >= rows


def _kept(config: TrainConfig, shape: Shape) -> float:
    """Bytes for each token that is learned from; measured on Llama's layers, and near for those like them."""
    layer = 4 * (4 * shape.inner + 8.3 * shape.width + 2 * shape.cached)
    if config.model.dtype == "bfloat16":
        layer *= IN_BFLOAT16
    elif _computes_in_bfloat16(config):
        layer *= UNDER_AUTOCAST
    if config.model.gradient_checkpointing:  # what each layer was given, and one layer at a time
        return 4 * shape.width * (shape.layers + 2) + layer
    return shape.layers * layer


def _computes_in_bfloat16(config: TrainConfig) -> bool:
    return config.model.dtype == "bfloat16" or config.model.autocast != "off"
