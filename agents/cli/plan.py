"""`llm-env plan`: whether a run fits into a machine, and about how long an iteration takes, before it is begun."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from agents.cli.options import read_options, split_options
from agents.config import TrainConfig
from agents.config.checks import out_of_range
from agents.config.files import complain
from agents.config.machine import Machine

if TYPE_CHECKING:
    from agents.run.plan import Shape, Texts

GIB = 2**30


def plan(arguments: Sequence[str]) -> None:
    """Run the command."""
    machine, rest = split_options(
        arguments,
        Machine(),
        "llm-env plan",
        "What a run needs of memory and time. Nothing is loaded but the configuration of the model.",
        "All flags of `llm-env train --help` say what is planned.",
    )
    complain(list(out_of_range(machine)))
    config = read_options(rest, "llm-env plan", begins=False).settings
    from agents.run.learners import check_shareable  # imports torch: --help and slips in flags do without
    from agents.run.parts import make_task_of
    from agents.run.plan import Shape, Texts

    if machine.gpus > 1:
        check_shareable(config, machine.gpus)
    task = make_task_of(config)
    new = config.task.max_new_tokens or task.max_new_tokens
    texts = Texts((config.task.context or task.default_context(new)) - new, new)
    print(planned(config, Shape.of(config.model.name), texts, machine))


def planned(config: TrainConfig, shape: Shape, texts: Texts, machine: Machine) -> str:
    """The plan in words and numbers."""
    from agents.run.plan import AS_IT_IS, ROOM, memory, options, seconds

    needs, times = memory(config, shape, texts, machine.gpus), seconds(config, shape, texts, machine)
    many = f"{machine.gpus} GPUs" if machine.gpus > 1 else "a GPU"
    lines = [
        f"{config.model.name}: {shape.parameters:,} parameters, {shape.layers} layers; {many} of {machine.gpu:g} GiB",
        f"{config.rollout.batch_size} texts in an iteration, of {texts.prompt} + {texts.new} tokens at most",
        "",
        *(f"{name:<28}{value / GIB:>9.3f} GiB" for name, value in needs.items()),
        f"{'together':<28}{sum(needs.values()) / GIB:>9.3f} GiB",
        "",
        "an iteration takes, at best and with texts of that length:",
        *(f"{name:<28}{value:>9.3f} s" for name, value in times.items()),
        "",
        f"{'GiB':>8}{'seconds':>10}   fits   with",
    ]
    fitting = []
    for flags, other in options(config, shape, machine.gpus):
        size = sum(memory(other, shape, texts, machine.gpus).values()) / GIB
        took = sum(seconds(other, shape, texts, machine).values())
        fits = size <= ROOM * machine.gpu
        fitting += [flags] * fits
        lines.append(f"{size:>8.2f}{took:>10.3f}   {'yes' if fits else 'no':<7}{flags}")
    if not fitting:
        lines += [
            "",
            "nothing of this fits: use more --gpus, shorter texts, or fewer of them at a time (--rollout.slots)",
        ]
    elif fitting[0] != AS_IT_IS:
        lines += ["", f"the least change that fits: {fitting[0]}"]
    return "\n".join(lines)
