"""PPO in one file of plain torch, on `gymnasium.make_vec`: read it from top to bottom, change what you like.

    python examples/cleanrl_style_ppo.py

The agent is a small transformer over the tokens written so far. It uses the task's action mask, which every step's
info carries. An episode that ends begins anew on the next step, whose action is ignored and left out of the loss.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields

import gymnasium
import numpy as np
import torch
from torch import nn
from torch.distributions import Categorical

import llm_env  # noqa: F401  (registers the environments)


@dataclass
class Args:
    """The settings; each is a flag of the command line."""

    env_id: str = "llm_env/Reverse-v0"
    seed: int = 0
    total_steps: int = 60_000
    num_envs: int = 64
    num_steps: int = 32  # steps of each env per iteration
    num_epochs: int = 4
    num_minibatches: int = 4
    learning_rate: float = 1e-3
    gamma: float = 1.0
    gae_lambda: float = 0.95
    clip: float = 0.2
    entropy_weight: float = 0.01
    value_weight: float = 0.5
    max_grad_norm: float = 1.0
    length: int = 3
    alphabet: str = "abcd"


class Agent(nn.Module):
    """A transformer reads the text; two heads on its last token give the policy and the value."""

    def __init__(self, vocab_size: int, context: int, width: int = 64) -> None:
        super().__init__()
        self.token = nn.Embedding(vocab_size, width)
        self.position = nn.Embedding(context, width)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.policy = nn.Linear(width, vocab_size)
        self.value = nn.Linear(width, 1)

    def forward(
        self, tokens: torch.Tensor, length: torch.Tensor, mask: torch.Tensor
    ) -> tuple[Categorical, torch.Tensor]:
        """`tokens` [B, context], `length` [B, 1], `mask` [B, vocab] -> policy of the next token, value [B]."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        unwritten = places >= length
        hidden = self.body(self.token(tokens) + self.position(places), src_key_padding_mask=unwritten)
        last = hidden[torch.arange(len(tokens)), length.squeeze(1) - 1]
        logits = self.policy(last).masked_fill(mask == 0, -1e9)
        return Categorical(logits=logits), self.value(last).squeeze(1)


def train(args: Args) -> list[float]:
    """Train; the mean return of each iteration's finished episodes."""
    torch.manual_seed(args.seed)
    envs = gymnasium.make_vec(
        args.env_id,
        num_envs=args.num_envs,
        task_kwargs={"length": args.length, "alphabet": args.alphabet, "dense": True},
    )
    context = envs.single_observation_space["tokens"].shape[0]
    agent = Agent(int(envs.single_action_space.n), context)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5)

    shape = (args.num_steps, args.num_envs)
    tokens = torch.zeros((*shape, context), dtype=torch.long)
    lengths = torch.zeros((*shape, 1), dtype=torch.long)
    masks = torch.zeros((*shape, int(envs.single_action_space.n)), dtype=torch.int8)
    actions = torch.zeros(shape, dtype=torch.long)
    log_probs, rewards, values, real, terminations, dones = (torch.zeros(shape) for _ in range(6))

    observation, info = envs.reset(seed=args.seed)
    done = np.zeros(args.num_envs, dtype=bool)
    running_return = np.zeros(args.num_envs)
    history: list[float] = []
    for iteration in range(max(1, args.total_steps // (args.num_steps * args.num_envs))):
        finished: list[float] = []
        for step in range(args.num_steps):
            tokens[step] = torch.from_numpy(observation["tokens"])
            lengths[step] = torch.from_numpy(observation["length"])
            masks[step] = torch.from_numpy(info["action_mask"])
            real[step] = torch.from_numpy(~done)  # an ended env only begins anew in this step
            with torch.no_grad():
                policy, values[step] = agent(tokens[step], lengths[step], masks[step])
            actions[step] = policy.sample()
            log_probs[step] = policy.log_prob(actions[step])
            observation, reward, terminated, truncated, info = envs.step(actions[step].numpy())
            done = terminated | truncated
            rewards[step] = torch.from_numpy(reward)
            terminations[step] = torch.from_numpy(terminated)
            dones[step] = torch.from_numpy(done)
            running_return += reward
            finished += running_return[done].tolist()
            running_return[done] = 0.0

        with torch.no_grad():
            following = agent(
                torch.from_numpy(observation["tokens"]),
                torch.from_numpy(observation["length"]),
                torch.from_numpy(info["action_mask"]),
            )[1]
        # An env that has ended shows its last observation until the next step, so the value that follows is that of the
        # last state: right for a text that was cut off, and to be left out where it was finished.
        advantages = torch.zeros(shape)
        carry = torch.zeros(args.num_envs)
        for step in reversed(range(args.num_steps)):
            next_value = following if step == args.num_steps - 1 else values[step + 1]
            delta = rewards[step] + args.gamma * next_value * (1.0 - terminations[step]) - values[step]
            carry = delta + args.gamma * args.gae_lambda * (1.0 - dones[step]) * carry
            advantages[step] = carry
        returns = advantages + values

        chosen = real.flatten().nonzero().squeeze(1)
        for _ in range(args.num_epochs):
            for batch in chosen[torch.randperm(len(chosen))].chunk(args.num_minibatches):
                policy, value = agent(
                    tokens.flatten(0, 1)[batch], lengths.flatten(0, 1)[batch], masks.flatten(0, 1)[batch]
                )
                ratio = (policy.log_prob(actions.flatten()[batch]) - log_probs.flatten()[batch]).exp()
                advantage = advantages.flatten()[batch]
                advantage = advantage - advantage.mean()
                if (deviation := advantage.std()) > 1e-6:  # else they are equal but for rounding, and so are they then
                    advantage = advantage / deviation
                clipped = ratio.clamp(1 - args.clip, 1 + args.clip)
                policy_loss = -torch.min(advantage * ratio, advantage * clipped).mean()
                value_loss = 0.5 * (value - returns.flatten()[batch]).square().mean()
                entropy = policy.entropy().mean()
                loss = policy_loss + args.value_weight * value_loss - args.entropy_weight * entropy
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                optimizer.step()

        history.append(float(np.mean(finished)) if finished else float("nan"))
        if iteration % 5 == 0:
            steps = (iteration + 1) * args.num_steps * args.num_envs
            print(f"{steps:7d} tokens   mean return {history[-1]:.3f}   entropy {entropy.item():.3f}", flush=True)
    envs.close()
    print(f"mean return of the last iteration: {history[-1]:.3f}")
    return history


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in fields(Args):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    train(Args(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
