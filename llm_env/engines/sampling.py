"""From logits to tokens: one sampler for engines, and for agents that want to do exactly what engines do."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from llm_env.tokens.arrays import BoolArray

BLOCK = 256  # tokens that `draw` takes together at first
HEAVY = 8  # blocks that it sums in float64
FIRST_LOOK = 256  # top-p needs the likeliest tokens only: sorting a whole vocabulary takes 30 times as long


@dataclass(frozen=True)
class Sampling:
    r"""How `generate` chooses tokens, and when it ends a text.

    Args:
        temperature: divides the logits; 0 means greedy, the likeliest token always.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the fewest likeliest tokens that have this probability together; 1 keeps all.
        min_p: keep tokens at least this fraction as likely as the likeliest; 0 keeps all.
        max_new_tokens: how many tokens may be written.
        stop: stop sequences, as strings or as token ids. The text ends with the token that completes one.
        ignore_eos: go on after an end-of-sequence token.
        n: how many texts to write after each prompt.
        seed: of the random numbers; None takes fresh ones at every call.

    Examples:
        >>> Sampling(temperature=0.0, stop=["\n"]).greedy
        True
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    max_new_tokens: int = 64
    stop: Sequence[str | Sequence[int]] = ()
    ignore_eos: bool = False
    n: int = 1
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, fine, expected in (
            ("temperature", 0 <= self.temperature < float("inf"), "a finite number, 0 (greedy) or more"),
            ("top_k", self.top_k >= 0, "0 (keep all tokens) or more"),
            ("top_p", 0 < self.top_p <= 1, "more than 0 and at most 1 (keep all tokens)"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 (keep all tokens) to 1"),
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("n", self.n >= 1, "at least 1"),
            ("seed", self.seed is None or 0 <= self.seed < 2**64, "None, or from 0 to 2**64 - 1"),
            ("stop", not isinstance(self.stop, str), "a list of stop sequences, even of a single one"),
        ):
            if not fine:
                raise ValueError(f"{name} must be {expected}, got {getattr(self, name)!r}")
        stop = tuple(s if isinstance(s, str) else tuple(int(token) for token in s) for s in self.stop)
        if not all(stop):
            raise ValueError(f"stop must not hold an empty sequence, got {self.stop!r}")
        object.__setattr__(self, "stop", stop)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0

    def with_fresh_seed(self) -> Sampling:
        """The same, with a seed drawn from the operating system if it has none."""
        if self.seed is not None:
            return self
        return dataclasses.replace(self, seed=int(np.random.SeedSequence().generate_state(1, np.uint64)[0]))


def process(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Log-probabilities of exactly the distribution that is sampled from.

    In this order, each on what the one before has left: temperature, top-k, top-p, min-p. Tokens as likely as
    the last one kept are kept too, so the outcome never depends on the order in which equals are sorted. Greedy
    choice is the distribution with all probability on the likeliest token, the first if there are several.

    Args:
        logits: `[n, V]` the model's.
        sampling: what to apply.

    Returns:
        `[n, V]` float32; -inf for tokens that cannot be chosen.

    Examples:
        >>> logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
        >>> process(logits, Sampling(top_k=2)).exp().round(decimals=3).tolist()
        [[0.7310000061988831, 0.26899999380111694, 0.0, 0.0]]
    """
    logits = logits.float()
    if sampling.greedy:
        return torch.full_like(logits, -torch.inf).scatter_(-1, logits.argmax(-1, keepdim=True), 0.0)
    if sampling.temperature != 1:
        # The largest becomes 0 first, so that no temperature, however small, can overflow.
        logits = (logits - logits.amax(-1, keepdim=True)) / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        logits = _keep_from(logits, logits.topk(sampling.top_k).values[:, -1:])
    if sampling.top_p < 1:
        logits = _keep_from(logits, _top_p_threshold(logits, sampling.top_p))
    if sampling.min_p > 0:
        logits = _keep_from(logits, logits.amax(-1, keepdim=True) + np.log(sampling.min_p))
    return logits.log_softmax(-1)


def draw(log_probs: torch.Tensor, uniforms: torch.Tensor | npt.NDArray[np.float64]) -> torch.Tensor:
    """Turn uniform random numbers into tokens, by the inverse of the cumulative distribution.

    Several times faster than `torch.multinomial` on a large vocabulary, and what a row draws depends on its own
    number only. A token of probability 0 is never drawn.

    Args:
        log_probs: `[n, V]` normalised.
        uniforms: `[n]` numbers in [0, 1).

    Returns:
        `[n]` token ids.

    Examples:
        >>> draw(torch.tensor([[0.5, 0.0, 0.5]]).log().expand(3, 3), np.array([0.0, 0.49, 0.5])).tolist()
        [0, 0, 2]
    """
    # In two steps, first a block of tokens and then a token of it: the sum over a large vocabulary is what takes time.
    # float64: in float32 a sum near 1 has no room for the probabilities of most tokens of a large vocabulary. Blocks
    # are summed in float32, several times faster, but for the heaviest: a likely token would hide those beside it.
    n, size = log_probs.shape
    width = BLOCK if size > BLOCK else size
    blocks = torch.nn.functional.pad(log_probs.exp(), (0, -size % width)).view(n, -1, width)
    of_block = blocks.sum(-1)
    heavy = of_block.topk(min(HEAVY, of_block.shape[-1])).indices
    exact = blocks.gather(1, heavy[..., None].expand(-1, -1, width)).sum(-1, dtype=torch.float64)
    of_block = of_block.double().scatter_(1, heavy, exact)
    cumulative = of_block.cumsum(-1)
    total = cumulative[:, -1:].contiguous()
    if not bool((total > 0).all()):
        row = int((~(total > 0)).flatten().nonzero()[0])
        raise ValueError(f"row {row} has no token of positive probability: its logits are all -inf, or some are NaN")
    target = torch.as_tensor(uniforms, dtype=torch.float64, device=log_probs.device)[:, None] * total
    block = _first_above(cumulative, target)
    left = target - (cumulative - of_block).gather(-1, block)
    inside = blocks[torch.arange(n, device=block.device), block[:, 0]].cumsum(-1, dtype=torch.float64)
    return (block * width + _first_above(inside, left.clamp_min(0)))[:, 0]


def _first_above(cumulative: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """`[n, 1]` where `[n, m]` sums exceed `[n, 1]` targets; where rounding keeps all below, where they end to grow."""
    total = cumulative[:, -1:].contiguous()
    return torch.minimum(torch.searchsorted(cumulative, target, right=True), torch.searchsorted(cumulative, total))


def uniforms(seed: int, request: int, completion: int, count: int) -> npt.NDArray[np.float64]:
    """The random numbers of one text: number i decides its token i.

    They depend on nothing but the seed and which text it is, so it is the same in any batch and beside any other; asked
    for more, the first ones stay the same.

    Args:
        seed: `Sampling.seed`.
        request: which prompt of the call to `generate`.
        completion: which of the `Sampling.n` texts after it.
        count: how many numbers.

    Returns:
        `[count]` in [0, 1).

    Examples:
        >>> bool((uniforms(7, 0, 0, 3) == uniforms(7, 0, 0, 5)[:3]).all())
        True
    """
    # A counter-based generator: the key and the counter's high word choose a stream, with no state to carry.
    return np.random.Generator(np.random.Philox(key=[seed, request], counter=[0, 0, 0, completion])).random(count)


def choose(
    logits: torch.Tensor,
    sampling: Sampling,
    uniforms: torch.Tensor | npt.NDArray[np.float64],
    allowed: torch.Tensor | BoolArray | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`process`, then `draw`: `[n]` tokens and `[n]` their log-probabilities.

    Args:
        logits: `[n, V]` the model's.
        sampling: what to apply.
        uniforms: `[n]` numbers in [0, 1).
        allowed: `[n, V]` bool, a task's action mask. What it forbids is left out before anything else: top-k and the
            like choose among the allowed tokens, and log-probabilities are those of the distribution over them.

    Examples:
        >>> tokens, log_probs = choose(torch.zeros(1, 4), Sampling(), np.array([0.6]))
        >>> tokens.tolist(), log_probs.exp().tolist()
        ([2], [0.25])
        >>> tokens, log_probs = choose(
        ...     torch.zeros(1, 4), Sampling(), np.array([0.6]), np.array([[True, False, False, True]])
        ... )
        >>> tokens.tolist(), log_probs.exp().tolist()
        ([3], [0.5])
    """
    if allowed is not None:
        logits = logits.masked_fill(~torch.as_tensor(allowed).to(logits.device), -torch.inf)
    log_probs = process(logits, sampling)
    tokens = log_probs.argmax(-1) if sampling.greedy else draw(log_probs, uniforms)
    return tokens, log_probs.gather(-1, tokens[:, None])[:, 0]


def _keep_from(logits: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    return logits.masked_fill(logits < threshold, -torch.inf)


def _top_p_threshold(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """`[n, 1]` the logit of the last token that top-p keeps."""
    normaliser = logits.logsumexp(-1, keepdim=True)
    for count in (min(FIRST_LOOK, logits.shape[-1]), logits.shape[-1]):
        largest = logits.topk(count).values
        reached = (largest - normaliser).exp().cumsum(-1) >= top_p
        if bool(reached[:, -1].all()):
            break
    # Where rounding keeps even the whole vocabulary from reaching top_p, argmax is 0 and would keep one token.
    first = torch.where(reached[:, -1:], reached.int().argmax(-1, keepdim=True), count - 1)
    return largest.gather(-1, first)
