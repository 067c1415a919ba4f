"""A trust region: how far one batch may move the policy, and the learning rate that keeps it there."""

from __future__ import annotations

import math

import torch
from tensordict import TensorDict

from agents.losses.ops import kl_estimate, masked_mean
from agents.networks.network import Network
from agents.rollouts.packing import trim

FURTHEST = 1.5  # times the target: further away than this no step is taken
FIRST = 0.1  # the learning rate of the first batch, as a share of the highest: nothing is known of the policy yet
SLOWEST, FASTEST = 0.5, 1.5  # by how much the learning rate changes after a batch
SUREST = 0.01  # an entropy, in nats: below it the region shrinks no more
MEASURED = 64  # texts that the distance is measured on


class TrustRegion:
    """Scales the learning rate so that a batch moves the policy by about a wanted KL per token, and no further.

    Adam's steps are as long as the learning rate says, however little the gradient knows: where few texts succeed, they
    follow noise, and a rate that suits the end of a run ruins the policy at its beginning. A KL says how far they went.
    It grows with the square of a step, so the rate is scaled by the square root of wanted over measured. It begins at a
    tenth of what was configured, and never rises above that. A batch that has moved the policy too far all the same is
    taken back in part, along the line from where it began.

    How far is far depends on how sure the policy is: one that is nearly certain of each token, with an entropy of 0.1
    nats, would be another one after a KL of 0.05. So below an entropy of one nat the region shrinks in proportion to
    it; towards the end of a run, where gradients are mostly noise, that keeps what was learned.

    Args:
        widest: the wanted KL to the policy that wrote a batch, in nats per token; None sets no bound.

    Attributes:
        target: the wanted KL for the present batch.
        scale: what the learning rate is multiplied by, at most 1.

    Examples:
        >>> region = TrustRegion(0.01)
        >>> region.scale
        0.1
        >>> region.moved(0.005)
        >>> round(region.scale, 3)  # times the square root of two
        0.141
        >>> region.moved(0.0)
        >>> round(region.scale, 3)  # by 1.5 at most
        0.212
    """

    def __init__(self, widest: float | None) -> None:
        self.widest = self.target = widest
        self.scale = 1.0 if widest is None else FIRST

    def begin(self, entropy: float, share: float = 1.0) -> None:
        """A batch begins, written by a policy of that entropy; a schedule leaves that share of the region.

        Examples:
            >>> region = TrustRegion(0.05)
            >>> region.begin(entropy=0.2, share=0.5)
            >>> round(region.target, 4)
            0.005
        """
        if self.widest is not None:
            self.target = self.widest * share * min(1.0, max(SUREST, entropy))

    @property
    def limit(self) -> float:
        """The KL beyond which no further step is taken on a batch."""
        return math.inf if self.target is None else FURTHEST * self.target

    def moved(self, kl: float) -> None:
        """The policy is so far from the one that wrote the batch, after all steps on it."""
        if self.target is not None:
            self.scale = min(1.0, self.scale * min(FASTEST, max(SLOWEST, self._wanted(kl))))

    def share_allowed(self, kl: float) -> float:
        """What share of a way that led so far may be kept: all within the limit, and of a longer one what comes to the
        target; nothing of one whose end is no policy any more.

        Examples:
            >>> [round(TrustRegion(0.01).share_allowed(kl), 3) for kl in (0.001, 0.014, 0.04, math.nan)]
            [1.0, 1.0, 0.5, 0.0]
        """
        return 1.0 if kl <= self.limit else self._wanted(kl)

    def _wanted(self, kl: float) -> float:
        """The wanted length of a step, as a share of one that led so far."""
        assert self.target is not None
        if not math.isfinite(kl):
            return 0.0
        return math.sqrt(self.target / kl) if kl > 0 else math.inf


@torch.no_grad()
def distance(network: Network, data: TensorDict) -> float:
    """The KL per token of the present policy to the one that wrote a batch, estimated on some of its texts."""
    some = trim(data[:: max(1, len(data) // MEASURED)])
    network.encode(some, critic=False)
    log_prob = network.actor_head.get_dist(some).log_prob(some["action"])
    return float(masked_mean(kl_estimate(some["action_log_prob"], log_prob, "k3"), some["mask"]))
