"""Settings that do nothing because another setting has switched off what would read them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from agents.config import TrainConfig
from agents.config.checks import flatten


@dataclass(frozen=True)
class Switch:
    """What is switched off, and by what.

    Attributes:
        settings: which settings, by dotted names or as "part.*".
        off: whether nothing reads them.
        why: the reason, in the words that follow "but".
    """

    settings: tuple[str, ...]
    off: Callable[[TrainConfig], bool]
    why: str


def critic_steps(config: TrainConfig) -> bool:
    """Whether a critic, where the algorithm has one, learns by optimizer steps: one that is fitted is computed.

    Examples:
        >>> critic_steps(TrainConfig()), critic_steps(TrainConfig().replace(model__critic="shared"))
        (False, True)
    """
    return config.model.critic != "fitted" and config.loss.value > 0


def critic_follows(config: TrainConfig) -> bool:
    """Whether a critic takes part in the passes of the policy, in their portions, and never makes one by itself.

    Examples:
        >>> shared = TrainConfig().replace(model__critic="shared")
        >>> critic_follows(shared), critic_follows(shared.replace(critic_warmup=1))
        (True, False)
    """
    shared = config.model.critic == "shared"
    return shared and not config.critic_warmup and config.critic.epochs <= config.actor.epochs


SWITCHES = (
    Switch(
        ("model.lora.*",), lambda c: c.model.lora.rank == 0, "--model.lora.rank is 0, so there are no LoRA adapters"
    ),
    Switch(("task.reward_args",), lambda c: c.task.reward is None, "--task.reward names no reward to give them to"),
    Switch(("kl.where", "kl.estimator"), lambda c: c.kl.beta == 0, "--kl.beta is 0, so there is no penalty"),
    Switch(
        ("model.reference_dtype", "model.refresh_reference"),
        lambda c: not c.keeps_reference,
        "there is no reference model, as --kl.beta is 0 (--model.reference always keeps one all the same)",
    ),
    Switch(("loss.entropy_decay",), lambda c: c.loss.entropy == 0, "--loss.entropy is 0, so there is no bonus"),
    Switch(("sft.evaluate_every",), lambda c: c.sft.stop_at is None, "--sft.stop-at is none, so nobody asks"),
    Switch(("kl.horizon",), lambda c: c.kl.target is None, "without --kl.target the penalty keeps its weight"),
    Switch(
        ("advantage.actor_lambda",),
        lambda c: c.advantage.length_adaptive is not None,
        "--advantage.length-adaptive makes a lambda for each text",
    ),
    Switch(
        (
            *("critic.*", "critic_warmup", "model.critic", "model.hints", "loss.value_clip"),
            "advantage.critic_lambda",
        ),
        lambda c: c.loss.value == 0,
        "--loss.value is 0, so no critic learns, and it predicts 0",
    ),
    Switch(
        ("critic.*", "loss.value_clip"),
        lambda c: c.model.critic == "fitted",
        "--model.critic is fitted: its head is computed, without steps",
    ),
    Switch(
        ("critic.minibatches", "critic.micro_batch_size"),
        critic_follows,
        "a shared critic learns in the policy's passes, with --actor.minibatches and --actor.micro-batch-size, unless "
        "--critic.epochs or --critic-warmup give it some of its own",
    ),
)


def switched_off(config: TrainConfig) -> dict[str, str]:
    """The settings that differ from their defaults and do nothing, by dotted names, and why.

    Examples:
        >>> switched_off(TrainConfig().replace(model__lora__alpha=16))
        {'model.lora.alpha': '--model.lora.rank is 0, so there are no LoRA adapters'}
        >>> switched_off(TrainConfig().replace(model__lora__alpha=16, model__lora__rank=8))
        {}
    """
    defaults = dict(flatten(TrainConfig()))
    changed = [name for name, value in flatten(config) if value != defaults[name]]
    found: dict[str, str] = {}
    for switch in SWITCHES:
        if switch.off(config):
            found |= {name: switch.why for name in changed if name not in found and matches(name, switch.settings)}
    return found


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a setting is among these, given by dotted names or as "part.*".

    Examples:
        >>> matches("critic.epochs", ["critic.*"]), matches("critic_warmup", ["critic.*"])
        (True, False)
    """
    return any(name.startswith(p[:-1]) if p.endswith(".*") else name == p for p in patterns)
