"""What PPO's update costs beside a bare forward and backward pass, and an iteration beside TRL's PPO.

    python examples/benchmarks/ppo_throughput.py
    python examples/benchmarks/ppo_throughput.py --json
    python examples/benchmarks/ppo_throughput.py --models tiny --no-trl --rounds 3

What is compared takes turns in every round, after a round that warms up. Seconds are medians over the rounds, ratios
medians of each round's own ratio. The work is 32 x (24+32) tokens for SmolLM2-135M, 64 x (12+16) for the tiny model.
Four parts (`--parts`):

update     Non-padding tokens per second of `PPO.learn` (forward, loss, backward, gradient clipping, AdamW, metrics)
           on a scored batch of texts of half to all of the full lengths, over those of the same model with a plain
           loss written by hand: forward on the same padded batch, all logits, log_softmax, gather, the squared error
           of the value; backward; one fused AdamW. `update_over_bare` is for the value head on a shared
           backbone, SmolLM2 in fp32; `_separate` for a critic of its own, `_bf16` for autocast, `_tiny` for the tiny
           model. `_response_only` compares with the best that can be written by hand: logits of the response only.
iteration  A whole iteration (write, score, update, weights to the engine) beside TRL 1.12: the same model, prompts,
           lengths, batch, epochs, optimizer steps and dtype of the weights, a KL to the reference in both. "same_work"
           is full fine-tuning with a separate critic, "default" has the value head on the shared backbone. We write
           with vLLM if it is installed; the tiny model with transformers. `iteration_speedup_over_trl_same_work` and
           `_default` are for SmolLM2 in bf16, as with `_bf16`; `_fp32` for fp32; `_tiny` for the tiny model, and
           `_tiny_gc_stubbed` beside a TRL whose calls of gc.collect() do nothing.
memory     Peak memory of a whole iteration (see ppo_memory.py), each in a process of its own, less that after imports,
           in units of one model's weights. `memory_lora_over_one_model` is that of LoRA (actor and critic adapters over
           one base, which is the reference too) over that of one model which only reads the same texts once, in fp32.
length     Microseconds of `PPO.learn` per token at responses of 32 to 512 tokens, with about as many tokens in a batch
           throughout: attention apart, that should stay the same. `_smollm2` with bf16 autocast, else the tiny model.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
from ppo_shared import (
    DTYPES,
    LEARNING_RATE,
    SHAPES,
    Results,
    Turn,
    about,
    clock,
    configuration,
    label_of,
    median,
    open_run,
    prompt_ids,
    ratio_of,
    say,
    take_turns,
    trl_workers,
    vllm_version,
)
from ppo_update import measure_length, measure_update
from trl_side import TRLWorker

from agents.run.parts import Run
from llm_env.models import model_folder

WAYS = ("same_work", "default")
PARTS = ("update", "iteration", "memory", "length")
MEMORY_KINDS = ("lora", "lora_micro", "lora_again", "lora_least", "shared", "separate", "forward")


def measure_iteration(
    name: str, dtype: str, rounds: int, workers: list[TRLWorker], device: str, ways: list[str]
) -> Results:
    shape = SHAPES[name]
    engine = "vllm" if name == "smollm2" and vllm_version() else "transformers"
    config = configuration(shape, model__dtype=DTYPES[dtype], rollout__engine=engine, device=device)
    critics = {"same_work": "separate", "default": "shared"}
    runs = {way: open_run(config.replace(model__critic=critics[way])) for way in ways}
    parts: dict[str, list[float]] = {}

    def ours(which: str, run: Run) -> float:
        start = clock(device)
        metrics = run.algorithm.step()
        stepped = clock(device)
        run.update_engine()
        end = clock(device)
        for part in ("rollout", "score", "update"):
            parts.setdefault(f"{which}_{part}", []).append(metrics[f"time/{part}"])
        parts.setdefault(f"{which}_weights", []).append(end - stepped)
        return end - start

    def theirs(which: str, worker: TRLWorker) -> float:
        answer = worker.iterate()
        for part in ("rollout", "score", "update"):
            parts.setdefault(f"{which}_{part}", []).append(answer[f"{part}_seconds"])
        return float(answer["seconds"])

    turns: dict[str, Turn] = {}
    for which, worker in zip(("trl", "trl_gc_stubbed"), workers if name == "tiny" else workers[:1], strict=False):
        worker.setup(
            model=str(model_folder(shape.model)), prompts=prompt_ids(next(iter(runs.values()))), batch_size=shape.batch,
            response_length=shape.response, epochs=1, minibatches=1, learning_rate=LEARNING_RATE,
            dtype=DTYPES[dtype], threads=torch.get_num_threads(), stub_gc=which != "trl",
        )  # fmt: skip
        turns[which] = partial(theirs, which, worker)
    for which, run in runs.items():
        turns[which] = partial(ours, which, run)
    seconds = take_turns(turns, rounds)
    for run in runs.values():
        wanted = (rounds + 1) * shape.batch * shape.response
        if run.algorithm.tokens != wanted:
            raise RuntimeError(f"the texts should have had {wanted} tokens in all, but had {run.algorithm.tokens}")
        run.close()
    label = "_tiny" if name == "tiny" else f"_{dtype}"
    results: Results = {f"iteration_engine{label}": engine}
    results |= {f"{way}_iteration_seconds{label}": median(took) for way, took in seconds.items()}
    results |= {f"{way}_seconds{label}": median(took[1:]) for way, took in parts.items()}
    for trl, suffix in (("trl", ""), ("trl_gc_stubbed", "_gc_stubbed")):
        for way in runs if trl in seconds else ():
            results[f"iteration_speedup_over_trl_{way}{label}{suffix}"] = ratio_of(seconds[trl], seconds[way])
    return results


def measure_memory(name: str, dtype: str, with_trl: bool, device: str) -> Results:
    script = Path(__file__).with_name("ppo_memory.py")
    options = ["--model", name, "--dtype", dtype, "--device", device]
    held, weights = {}, 0.0
    for kind in MEMORY_KINDS:
        command = [sys.executable, str(script), kind, *options]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout)
        held[kind], weights = found["extra_mb"], found["weights_mb"]
    if with_trl:
        held["trl"] = trl_memory(name, dtype)
    label = label_of(name, dtype)
    results: Results = {f"memory_weights_mb{label}": weights}
    results |= {f"memory_{kind}_in_weights{label}": round(extra / weights, 2) for kind, extra in held.items()}
    results |= {
        f"memory_{kind}_over_one_model{label}": round(extra / held["forward"], 2)
        for kind, extra in held.items()
        if kind != "forward"
    }
    return results


def trl_memory(name: str, dtype: str) -> float:
    """MB, of a process of its own."""
    shape = SHAPES[name]
    run = open_run(configuration(shape))
    prompts = prompt_ids(run)
    run.close()
    with TRLWorker() as worker:
        worker.setup(
            model=str(model_folder(shape.model)), prompts=prompts, batch_size=shape.batch, epochs=1, minibatches=1,
            response_length=shape.response, dtype=DTYPES[dtype], threads=torch.get_num_threads(),
        )  # fmt: skip
        worker.iterate()
        memory = worker.memory()
    return memory["peak_rss_mb"] - memory["start_rss_mb"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one flat JSON object instead of a table")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument(
        "--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="the tiny model is always fp32"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="of ours, beside TRL")
    parser.add_argument("--no-trl", action="store_true", help="leave TRL out")
    parser.add_argument("--device", default="cpu", help="of our side; TRL, which is run on CPU, is left out elsewhere")
    args = parser.parse_args()

    rounds, device = args.rounds, args.device
    work = [(name, dtype) for name in args.models for dtype in (args.dtypes if name != "tiny" else ["fp32"])]
    results: Results = {"rounds": rounds, "device": device, **about()}
    with contextlib.ExitStack() as stack:
        wants_trl = not args.no_trl and device == "cpu" and not {"iteration", "memory"}.isdisjoint(args.parts)
        # Before an engine binds threads, which a process started later would inherit. The second has its gc stubbed.
        workers = trl_workers(2 if "tiny" in args.models else 1, stack) if wants_trl else []
        for part in args.parts:
            for name, dtype in work if part != "length" else [(name, "") for name in args.models]:
                say(f"{part} of {SHAPES[name]} {dtype} ...")
                if part == "update":
                    for critic in ("shared", "separate"):
                        results |= measure_update(name, critic, dtype, rounds, device)
                        gc.collect()
                elif part == "iteration":
                    # In float32 both of ours and TRL's together need more than 24 GB: one of ours at a time.
                    for ways in [[way] for way in args.ways] if (name, dtype) == ("smollm2", "fp32") else [args.ways]:
                        results |= measure_iteration(name, dtype, rounds, workers, device, ways)
                        gc.collect()
                elif part == "memory" and (name == "smollm2" or args.models == ["tiny"]):
                    results |= measure_memory(name, dtype, bool(workers), device)
                elif part == "length":
                    results |= measure_length(name, rounds, device)
                gc.collect()  # what one measurement has held shall not weigh on the next
    for way in ("same_work", "default"):
        if (speedup := results.get(f"iteration_speedup_over_trl_{way}_bf16")) is not None:
            results[f"iteration_speedup_over_trl_{way}"] = speedup
    if args.json:
        print(json.dumps(results))
    else:
        show(results, bool(workers))


def show(results: Results, with_trl: bool) -> None:
    """Everything, and what each group is."""
    groups = {
        "machine": ("rounds", "device", "threads", "cpu", "version"),
        "update over bare forward+backward+AdamW (higher is better)": ("update_over", "ours_", "bare_"),
        "iterations: TRL's seconds over ours (higher is better), and seconds": ("iteration", "trl", "same", "default"),
        "memory of an iteration": ("memory",),
        "microseconds of the update per token, by response length": ("update_us",),
    }
    for title, prefixes in groups.items():
        rows = {name: value for name, value in results.items() if name.startswith(prefixes)}
        if rows:
            print(f"\n{title}")
            for name, value in rows.items():
                print(f"  {name:<55} {value}")
    if not with_trl:
        print("\nwithout TRL: its rows are left out")


if __name__ == "__main__":
    main()
