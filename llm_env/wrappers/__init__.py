"""Wrappers for `TokenEnv`; `llm_env.wrappers.vector` has those for `TokenVectorEnv`, under the same names.

They are laid out as Gymnasium's own, which work here as well. A wrapper of a single environment is recorded in
`env.spec`, and `gymnasium.make` builds the environment again from there, wrappers and all:

    >>> import gymnasium
    >>> env = ScaleReward(FlatTokens(gymnasium.make("llm_env/Copy-v0")), scale=2.0)
    >>> gymnasium.make(env.spec)
    ScaleReward(FlatTokens(<OrderEnforcing<PassiveEnvCheckerTokenEnv(Copy, model='tiny', context=20)>>))

`llm_env.wrappers.torchrl` has the KL penalty as a TorchRL transform; it is not imported here, because it needs TorchRL.
"""

from llm_env.wrappers import vector
from llm_env.wrappers.allowed import AllowedTokens
from llm_env.wrappers.flat import FlatTokens
from llm_env.wrappers.kl import KLReward
from llm_env.wrappers.one_hot import OneHotTokens
from llm_env.wrappers.scale import ScaleReward
from llm_env.wrappers.statistics import EpisodeStatistics
from llm_env.wrappers.top_k import TopKActions

__all__ = [
    "AllowedTokens",
    "EpisodeStatistics",
    "FlatTokens",
    "KLReward",
    "OneHotTokens",
    "ScaleReward",
    "TopKActions",
    "vector",
]
