"""The weight of the KL penalty: fixed, or adapted to keep the KL near a target."""

from __future__ import annotations

from collections.abc import Mapping

from agents.config import KLConfig


class KLController:
    """Holds beta; with a target, a proportional controller moves it after every batch.

    The error is the KL's relative distance from the target, cut to a fifth; over `horizon` episodes an error of that
    size changes beta by a fifth, too.

    Args:
        config: beta, target, horizon.

    Examples:
        >>> controller = KLController(KLConfig(beta=0.1, target=2.0, horizon=100))
        >>> controller.update(kl=4.0, episodes=50)
        >>> round(controller.beta, 4)
        0.11
    """

    def __init__(self, config: KLConfig) -> None:
        self.beta = config.beta
        self.target = config.target
        self.horizon = config.horizon

    def update(self, kl: float, episodes: int) -> None:
        """After a batch whose texts had this KL to the reference, on average."""
        if self.target is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.beta *= 1 + error * episodes / self.horizon

    def state_dict(self) -> dict[str, float]:
        """What `load_state_dict` needs."""
        return {"beta": self.beta}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from there."""
        self.beta = state["beta"]
