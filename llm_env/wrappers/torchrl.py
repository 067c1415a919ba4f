"""The KL penalty as a TorchRL transform."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase
from torchrl.envs import Transform

from llm_env.envs.torchrl import TorchRLTokenEnv
from llm_env.wrappers.penalty import KLPenalty


class KLReward(Transform):  # type: ignore[misc]
    """Take `beta * (log pi(token) - log ref(token))` off the reward of every token.

    The policy must write the log-prob of its action, as TorchRL's do with `return_log_prob=True`.

    Args:
        env: the environment it is to be appended to.
        beta: the weight of the penalty.
        reference: the reference model: an engine or the name of one; None: the model that the environment observes.
        model: which model a named engine serves; by default the environment's.
        log_prob_key: where the policy writes the log-prob.

    Examples:
        >>> from torchrl.envs import TransformedEnv
        >>> env = TorchRLTokenEnv("Copy", num_envs=2, seed=0)
        >>> env = TransformedEnv(env, KLReward(env, beta=0.1, reference="transformers"))
        >>> data = env.rand_action(env.reset()).set("action_log_prob", torch.tensor([-1.0, -2.0]))
        >>> env.step(data)["next", "reward"].shape
        torch.Size([2, 1])
    """

    def __init__(
        self,
        env: TorchRLTokenEnv,
        beta: float,
        reference: Any = None,
        model: Any = None,
        log_prob_key: str = "action_log_prob",
    ) -> None:
        super().__init__(in_keys=["reward"], out_keys=["reward"])
        self.log_prob_key = log_prob_key
        self.penalty = KLPenalty(env.mdp, beta, reference, model)
        self._num_envs = env.mdp.num_envs

    def _rows(self, tensordict: TensorDictBase | None, mask: str) -> Any:
        chosen = None if tensordict is None else tensordict.get(mask, None)
        if chosen is None:
            return np.arange(self._num_envs)
        return np.flatnonzero(chosen.cpu().numpy().reshape(-1))

    def _reset(self, tensordict: TensorDictBase | None, tensordict_reset: TensorDictBase) -> TensorDictBase:
        self.penalty.begin(self._rows(tensordict, "_reset"))
        return tensordict_reset

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        log_prob = tensordict.get(self.log_prob_key, None)
        if log_prob is None:
            raise KeyError(
                f"the KL penalty needs the log-prob of the action under {self.log_prob_key!r}; the policy wrote "
                f"{sorted(map(str, tensordict.keys()))}: give it return_log_prob=True, or set log_prob_key"
            )
        rows = self._rows(tensordict, "_step")
        tokens = tensordict["action"].cpu().numpy()[rows]
        given = log_prob.detach().cpu().numpy().reshape(-1)[rows]
        penalty = torch.zeros_like(next_tensordict["reward"])
        ratio = torch.from_numpy(self.penalty.log_ratio(rows, tokens, given)).to(penalty)
        penalty[rows, 0] = self.penalty.beta * ratio
        self.penalty.advance(rows)
        return next_tensordict.set("reward", next_tensordict["reward"] - penalty)

    def close(self) -> None:
        """Free the reference engine, if this transform made it."""
        self.penalty.close()
