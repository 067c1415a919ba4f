"""What `llm-env plan` can be told of a machine. Every field is a flag of it."""

from __future__ import annotations

from dataclasses import dataclass

from agents.config.ranges import Count, Positive


@dataclass(frozen=True)
class Machine:
    """GPUs, and how fast they are. The defaults are about what an H100 comes to in such work.

    Examples:
        >>> Machine(gpu=24).gpus
        1
    """

    gpu: Positive = 80.0
    """The memory of a GPU, in GiB."""
    gpus: Count = 1
    """How many there are, each with a process that learns, as `torchrun --nproc-per-node` starts them."""
    tflops: Positive = 300.0
    """What matrix products in bfloat16 come to on each, in 10^12 operations a second; half of that in float32."""
    bandwidth: Positive = 2000.0
    """How fast each reads its memory, in GB a second: writing a text takes as long as reading the weights does."""
