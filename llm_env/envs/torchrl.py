"""The native TorchRL environment."""

from __future__ import annotations

from typing import Any, Unpack

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Binary, Bounded, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase

from llm_env.mdp.core import Arrays, TokenMDP
from llm_env.mdp.options import MDPOptions
from llm_env.tasks.base import Task
from llm_env.tokens.state import RUNNING


class TorchRLTokenEnv(EnvBase):  # type: ignore[misc]
    """A batch of episodes as a TorchRL environment; `("next", ...)`, `"_reset"` masks and transforms work as usual.

    Observations are `tokens` `[num_envs, context]`, `length` and `prompt_length` `[num_envs, 1]`, with an engine its
    distribution of the next token, and `action_mask` where the task has one (TorchRL's `ActionMask` transform uses it).
    `reset(prompt_indices=...)` begins with these prompts of the split, one for each row that is reset.

    Args:
        task: a registered name, a `Task`, or a subclass of it.
        num_envs: the batch size.
        device: where the tensors are put. The episodes themselves live on the CPU.
        seed: see `TokenMDP.reseed`.
        **options: see `llm_env.mdp.core.TokenMDP`.

    Examples:
        >>> env = TorchRLTokenEnv("Reverse", num_envs=4, seed=0)
        >>> env.rollout(3, break_when_any_done=False)["next", "tokens"].shape
        torch.Size([4, 3, 23])
    """

    def __init__(
        self,
        task: str | Task | type[Task],
        num_envs: int = 1,
        *,
        device: torch.device | str = "cpu",
        seed: int | None = None,
        **options: Unpack[MDPOptions],
    ) -> None:
        super().__init__(device=device, batch_size=torch.Size([num_envs]))
        self.mdp = TokenMDP(task, num_envs, **options)
        self._make_specs()
        if seed is not None:
            self.set_seed(seed)

    def _make_specs(self) -> None:
        mdp, device = self.mdp, self.device
        rows, vocab = mdp.num_envs, mdp.vocabulary.size
        # Built before any reset: the arrays' shapes and dtypes are known, whatever an engine adds to them.
        specs = {}
        for name, array in mdp.observation(copy=False).items():
            if name == "action_mask":
                continue
            if array.dtype == np.int64:
                high = vocab if name in ("tokens", "top_ids") else mdp.context + 1
                specs[name] = Bounded(0, high - 1, shape=array.shape, dtype=torch.int64, device=device)
            else:
                specs[name] = Unbounded(shape=array.shape, dtype=torch.float32, device=device)
        if mdp.episodes.masks_actions or mdp.observes_mask:
            specs["action_mask"] = Binary(vocab, shape=(rows, vocab), dtype=torch.bool, device=device)
        self.observation_spec = Composite(specs, shape=self.batch_size, device=device)
        self.action_spec = Categorical(vocab, shape=(rows,), dtype=torch.int64, device=device)
        self.reward_spec = Unbounded(shape=(rows, 1), dtype=torch.float32, device=device)
        flags = {
            name: Categorical(2, shape=(rows, 1), dtype=torch.bool, device=device)
            for name in ("done", "terminated", "truncated")
        }
        self.done_spec = Composite(flags, shape=self.batch_size, device=device)

    def _reset(
        self, tensordict: TensorDictBase | None = None, *, prompt_indices: Any = None, **kwargs: Any
    ) -> TensorDictBase:
        mask = None if tensordict is None else tensordict.get("_reset", None)
        rows = None if mask is None else np.flatnonzero(mask.cpu().numpy().reshape(-1))
        self.mdp.reset(rows, prompt_indices=prompt_indices)
        return self._tensordict(self._observation())

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        actions = tensordict["action"].cpu().numpy()
        mask = tensordict.get("_step", None)
        if mask is None:
            reward = self.mdp.step(actions)
        else:  # TorchRL leaves rows that have ended out of the step: they stay as they are and earn nothing more
            rows = np.flatnonzero(mask.cpu().numpy().reshape(-1))
            reward = self.mdp.step(actions[rows], rows)
        return self._tensordict({**self._observation(), "reward": torch.from_numpy(reward).float()[:, None]})

    def _step_proc_data(self, next_tensordict_out: TensorDictBase) -> TensorDictBase:
        return next_tensordict_out  # TorchRL would complete and reshape rewards and flags; ours are as the specs say

    def step_and_maybe_reset(self, tensordict: TensorDictBase) -> tuple[TensorDictBase, TensorDictBase]:
        """Take a step, and begin new episodes where it ended one.

        What TorchRL does by merging tensordicts under a mask, at half the cost: the batch after a partial reset is
        simply observed once more, since rows that were not reset look as they did.
        """
        tensordict = self.step(tensordict)
        following = self._step_mdp(tensordict)
        ended = np.flatnonzero(self.mdp.state.end > RUNNING)
        if len(ended):
            self.mdp.reset(ended)
            following.update(self._observation())
        return tensordict, following

    def _set_seed(self, seed: int | None) -> None:
        if seed is not None:
            self.mdp.reseed(seed)

    def _observation(self) -> dict[str, torch.Tensor]:
        mdp, state = self.mdp, self.mdp.state
        terminated, truncated = state.terminated[:, None], state.truncated[:, None]
        arrays: Arrays = {
            **mdp.observation(),
            "terminated": terminated,
            "truncated": truncated,
            "done": terminated | truncated,
        }
        if (mask := arrays.get("action_mask", mdp.action_mask())) is not None:
            arrays["action_mask"] = mask.astype(np.bool_)
        return {name: torch.from_numpy(array).to(self.device) for name, array in arrays.items()}

    def _tensordict(self, tensors: dict[str, torch.Tensor]) -> TensorDictBase:
        return TensorDict(tensors, self.batch_size, device=self.device)

    def close(self, **kwargs: Any) -> None:
        """Free what the environment holds."""
        self.mdp.close()
        super().close(**kwargs)
