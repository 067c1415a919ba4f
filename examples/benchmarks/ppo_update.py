"""Two parts of ppo_throughput.py, which describes them: PPO's update beside a bare one, and against response length."""

from __future__ import annotations

import torch
from ppo_shared import (
    LEARNING_RATE,
    SHAPES,
    Results,
    Shape,
    Turn,
    clock,
    configuration,
    label_of,
    median,
    open_run,
    ratio_of,
    take_turns,
    texts,
)
from tensordict import TensorDict

from agents.algorithms.scoring import GRAPH
from agents.networks.network import Network
from agents.run.parts import Run

REPEATS = {"tiny": 10, "smollm2": 1}  # updates in a turn, lest it be too short to be timed
LENGTHS = (32, 64, 128, 256, 512)
LENGTH_TOKENS = {"tiny": 8192, "smollm2": 2048}  # in a batch
LENGTH_PROMPT = 4


def update_turn(run: Run, data: TensorDict, repeats: int = 1) -> Turn:
    """`PPO.learn`."""
    device = run.algorithm.config.device

    def turn() -> float:
        start = clock(device)
        for _ in range(repeats):
            run.algorithm.learn(data)
        return (clock(device) - start) / repeats

    return turn


def bare_turn(network: Network, data: TensorDict, repeats: int, response_only: bool) -> Turn:
    """The same forward and backward pass, and optimizer step, by hand."""
    weights = {**network.actor_parameters(), **{f"critic.{k}": v for k, v in network.critic_parameters().items()}}
    optimizer = torch.optim.AdamW(weights.values(), lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True)
    tokens, mask, position = data["tokens"], data["mask"], data["state_position"]
    bodies = [network.model.base_model]
    if network.critic_backbone is not None:
        bodies.append(network.critic_backbone.body)
    where = position[..., None].expand(-1, -1, network.width)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=network.config.in_bfloat16):
            hidden = [body(input_ids=tokens, use_cache=False).last_hidden_state for body in bodies]
            states = [each.gather(1, where) for each in hidden]
            logits = network.head(states[0] if response_only else hidden[0][:, :-1])
        log_probs = logits.float().log_softmax(-1)
        if response_only:
            log_prob = log_probs.gather(-1, data["action"][..., None])
        else:
            log_prob = log_probs.gather(-1, tokens[:, 1:, None]).gather(1, position[..., None])
        value = network.value_head(states[-1])
        per_token = -log_prob * data["advantage"] + 0.5 * (value - data["value_target"]) ** 2
        ((per_token[..., 0] * mask).sum() / mask.sum()).backward()
        optimizer.step()

    def turn() -> float:
        start = clock(tokens.device.type)
        for _ in range(repeats):
            step()
        return (clock(tokens.device.type) - start) / repeats

    return turn


def measure_update(name: str, critic: str, dtype: str, rounds: int, device: str) -> Results:
    shape = SHAPES[name]
    run = open_run(
        configuration(shape, model__critic=critic, model__autocast="on" if dtype == "bf16" else "off", device=device)
    )
    lengths = [
        (shape.prompt - row * 5 % (shape.prompt // 2 + 1), shape.response - row * 7 % (shape.response // 2 + 1))
        for row in range(shape.batch)
    ]
    # Scoring may sort the rows, and what it has computed for the update to use is left out: it would not be timed.
    data = run.algorithm.score(texts(run, lengths)).exclude(*GRAPH)
    network, repeats = run.algorithm.network, REPEATS[name]
    seconds = take_turns(
        {
            "ours": update_turn(run, data, repeats),
            "bare": bare_turn(network, data, repeats, response_only=False),
            "bare_response_only": bare_turn(network, data, repeats, response_only=True),
        },
        rounds,
    )
    run.close()
    label, tokens = label_of(name, critic, dtype), sum(map(sum, lengths))
    return {
        f"update_over_bare{label}": ratio_of(seconds["bare"], seconds["ours"]),
        f"update_over_bare{label}_response_only": ratio_of(seconds["bare_response_only"], seconds["ours"]),
        **{f"{way}_update_tokens_per_s{label}": round(tokens / median(took), 1) for way, took in seconds.items()},
    }


def measure_length(name: str, rounds: int, device: str) -> Results:
    shape = Shape(SHAPES[name].model, 1, LENGTH_PROMPT, max(LENGTHS))
    run = open_run(configuration(shape, model__autocast="on" if name == "smollm2" else "off", device=device))
    turns: dict[str, Turn] = {}
    tokens: dict[str, int] = {}
    for length in LENGTHS:
        rows = max(1, round(LENGTH_TOKENS[name] / (LENGTH_PROMPT + length)))
        key = f"update_us_per_token_len{length}" + ("" if name == "tiny" else f"_{name}")
        tokens[key] = rows * (LENGTH_PROMPT + length)
        data = run.algorithm.score(texts(run, [(LENGTH_PROMPT, length)] * rows))
        turns[key] = update_turn(run, data.exclude(*GRAPH))
    seconds = take_turns(turns, rounds)
    run.close()
    results = {key: median([took / tokens[key] * 1e6 for took in seconds[key]]) for key in turns}
    keys = list(turns)
    return results | {keys[-1].replace("len512", "len512_over_len32"): round(results[keys[-1]] / results[keys[0]], 3)}
