"""Peak memory of one PPO iteration, in a process that does nothing else. Prints a JSON object.

    python examples/benchmarks/ppo_memory.py lora

Kinds, for SmolLM2-135M with 32 x (24+32) tokens, written by the transformers engine on the very weights that learn:

    lora        an adapter for the actor and one for the critic over one model, which without them is the reference
    lora_micro  the same, 4 texts at a time in the passes forward and backward
    lora_again  the same, and layers are computed again in the backward pass (--model.gradient-checkpointing)
    lora_least  the same with one text at a time
    lora_8      as lora_again, the frozen weights in 8 bits
    lora_4      the same in 4 bits
    shared      full fine-tuning, a value head on the policy's hidden states, a frozen copy as the reference
    shared_8    the same with the reference and the optimizer's averages in 8 bits
    separate    full fine-tuning of two models, and a frozen copy as the reference
    forward     no learning: one model reads the same texts once, all logits, no gradients

`extra_mb` is the most memory this process has ever held, less what it held when all was imported (on a GPU: the most
that torch has had allocated there); `weights_mb` is the size of one model's weights, and `planned_mb` what
`llm-env plan` says of such a run, with `--iterations 2`.
"""

from __future__ import annotations

import argparse
import json
import resource
from pathlib import Path
from typing import Any

import peft  # noqa: F401 - loads much, and is no part of what is measured
import torch
import transformers.models.llama.modeling_llama  # noqa: F401
from ppo_shared import DTYPES, SHAPES, configuration, open_run

from agents.config import TrainConfig
from agents.run.plan import Shape as ModelShape
from agents.run.plan import Texts, memory
from llm_env.models import load_model


def micro(texts: int) -> dict[str, Any]:
    """So many texts in a pass forward and backward."""
    return {"actor__micro_batch_size": texts, "critic__micro_batch_size": texts}


LORA: dict[str, Any] = {"model__lora__rank": 16, "model__critic": "separate"}
KINDS: dict[str, dict[str, Any]] = {
    "lora": LORA,
    "lora_micro": {**LORA, **micro(4)},
    "lora_again": {**LORA, **micro(4), "model__gradient_checkpointing": True},
    "lora_least": {**LORA, **micro(1), "model__gradient_checkpointing": True},
    **{
        f"lora_{bits}": {**LORA, **micro(4), "model__gradient_checkpointing": True, "model__frozen_bits": bits}
        for bits in (8, 4)
    },
    "shared": {"model__critic": "shared"},
    "shared_8": {"model__critic": "shared", "model__frozen_bits": 8, "actor__state_bits": 8},
    "separate": {"model__critic": "separate"},
    "forward": {},
}
MB = 2**20


def resident() -> tuple[float, float]:
    """MB of memory now, and at most so far. Not `ru_maxrss` on Linux: it is inherited from the parent process."""
    status = Path("/proc/self/status")
    if not status.exists():
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        return peak, peak
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
    now, peak = (int(lines[key].split()[0]) / 1024 for key in ("VmRSS", "VmHWM"))
    return now, peak


def iterate(config: TrainConfig, count: int) -> float:
    """Whole iterations; MB of one model's weights."""
    run = open_run(config)
    for _ in range(count):
        run.algorithm.step()
    size = megabytes(run.algorithm.network.engine_model())
    run.close()
    return size


def planned(config: TrainConfig) -> float:
    """MB that `llm-env plan` foretells."""
    shape = SHAPES["smollm2" if config.model.name.startswith("smollm2") else config.model.name]
    needs = memory(config, ModelShape.of(config.model.name), Texts(shape.prompt, shape.response))
    return sum(needs.values()) / MB


@torch.no_grad()
def forward(config: TrainConfig) -> float:
    """A pass over as many texts; MB of the model's weights."""
    model = load_model(config.model.name, dtype=getattr(torch, config.model.dtype), device=config.device)
    prompt, response = config.task.args["prompt"], config.task.args["response"]
    tokens = torch.randint(4, model.config.vocab_size, (config.rollout.batch_size, int(prompt) + int(response)))
    model(input_ids=tokens.to(config.device), use_cache=False)
    return megabytes(model)


def megabytes(model: Any) -> float:
    own = [weight for name, weight in model.named_parameters() if "lora_" not in name]
    return sum(weight.numel() * weight.element_size() for weight in own) / MB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--model", choices=SHAPES, default="smollm2")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--iterations", type=int, default=1, help="from the second on there are the optimizer's averages"
    )
    args = parser.parse_args()

    config = configuration(
        SHAPES[args.model],
        device=args.device,
        model__dtype=DTYPES[args.dtype],
        model__autocast="off",
        **KINDS[args.kind],
    )
    start, _ = resident()
    reads_only = args.kind == "forward"
    weights = forward(config) if reads_only else iterate(config, args.iterations)
    extra = resident()[1] - start
    if args.device != "cpu":
        extra = torch.cuda.max_memory_allocated(args.device) / MB
    found = {"weights_mb": weights, "extra_mb": extra, "start_mb": start}
    if not reads_only:
        found["planned_mb"] = planned(config)
    print(json.dumps({name: round(value, 1) for name, value in found.items()}))


if __name__ == "__main__":
    main()
