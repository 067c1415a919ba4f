"""The distribution of the next token, given hidden states: logits exist for a few rows at a time, never for a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributions import Distribution, constraints

from llm_env.engines.sampling import draw

Tensor = torch.Tensor

LOGITS_BYTES = 2**28  # at most so much memory for the float32 logits of one chunk
SCORING_BYTES = 2**25  # without a backward pass: chunks that fit the cache take two thirds of the time


class TokenDistribution(Distribution):
    """A categorical distribution over the vocabulary at each of many states.

    Log-prob and entropy are computed together, in chunks of rows, and in the backward pass computed again (unless one
    chunk holds all, when its probabilities are kept): memory does not depend on the number of states times the
    vocabulary.

    Args:
        hidden: `[..., H]` hidden states.
        head: the output layer, `[V, H]` weights. What it holds now is what counts, also if it is swapped later.
        mask: `[...]` bool; where it is False nothing is computed, and log-prob and entropy are 0.
        temperature: divides the logits.
        dtype: what the product of hidden states and weights is computed in; by default that of the weights. Everything
            after it is float32.

    Examples:
        >>> head = nn.Linear(2, 3, bias=False)
        >>> distribution = TokenDistribution(torch.zeros(1, 4, 2), head)
        >>> distribution.log_prob(torch.zeros(1, 4, dtype=torch.long)).exp().allclose(torch.tensor(1 / 3))
        True
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012  (named so by torch)
    has_rsample = False
    has_enumerate_support = False

    def __init__(
        self,
        hidden: Tensor,
        head: nn.Linear,
        mask: Tensor | None = None,
        temperature: float = 1.0,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(hidden.shape[:-1], validate_args=False)
        self.hidden = hidden
        self.mask = mask
        self.temperature = temperature
        self.dtype = dtype or head.weight.dtype
        self._weight, self._bias = head.weight, head.bias
        self._last: tuple[Tensor, Tensor, Tensor | None] | None = None  # tokens, their log-probs, entropies

    @property
    def support(self) -> Any:
        """Token ids."""
        return constraints.integer_interval(0, self._weight.shape[0] - 1)  # type: ignore[no-untyped-call]

    @property
    def logits(self) -> Tensor:
        """`[..., V]` all logits, divided by the temperature: for the few states of a step, not for a batch of texts."""
        return _logits(self.hidden, self._weight, self._bias, self.temperature, self.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        """`[...]` float32 log-probabilities of the tokens; 0 where the mask is False."""
        if self._last is None or self._last[0] is not value:
            self._last = (value, *self._both(value, with_entropy=torch.is_grad_enabled()))
        return self._last[1]

    def entropy(self) -> Tensor:
        """`[...]` float32 entropies; free after a `log_prob` that autograd has seen."""
        if self._last is None or self._last[2] is None:
            any_tokens = torch.zeros(self.batch_shape, dtype=torch.long, device=self.hidden.device)
            self._last = (any_tokens, *self._both(any_tokens, with_entropy=True))
        assert self._last[2] is not None
        return self._last[2]

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Tokens, drawn with torch's global random numbers."""
        with torch.no_grad():
            log_probs = self.logits.log_softmax(-1).expand(*sample_shape, *self.batch_shape, -1)
            flat = log_probs.reshape(-1, log_probs.shape[-1])
            tokens = draw(flat, torch.rand(len(flat), dtype=torch.float64).numpy())
            return tokens.view(*sample_shape, *self.batch_shape)

    @property
    def mode(self) -> Tensor:
        """The likeliest tokens."""
        return self.logits.argmax(-1)

    @property
    def deterministic_sample(self) -> Tensor:
        """What TorchRL takes when it does not explore: the likeliest tokens."""
        return self.mode

    def _both(self, tokens: Tensor, with_entropy: bool) -> tuple[Tensor, Tensor | None]:
        shape = self.batch_shape
        hidden, tokens = self.hidden.reshape(-1, self.hidden.shape[-1]), tokens.reshape(-1)
        real = None if self.mask is None else self.mask.reshape(-1).nonzero()[:, 0]
        if real is not None:  # padding is left out before anything is computed
            hidden, tokens = hidden[real], tokens[real]
        memory = LOGITS_BYTES if torch.is_grad_enabled() else min(LOGITS_BYTES, SCORING_BYTES)
        rows = max(1, memory // (4 * self._weight.shape[0]))
        results = _ChunkedLogProb.apply(  # type: ignore[no-untyped-call]
            hidden, self._weight, self._bias, tokens, self.temperature, self.dtype, rows, with_entropy
        )
        if real is not None:
            zeros = torch.zeros(shape.numel(), device=hidden.device)
            results = [None if result is None else zeros.index_put((real,), result) for result in results]
        log_prob, entropy = (None if result is None else result.view(shape) for result in results)
        assert log_prob is not None
        return log_prob, entropy


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, dtype: torch.dtype) -> Tensor:
    # Autocast is kept out, for the dtype is chosen here.
    with torch.autocast(hidden.device.type, enabled=False):
        logits = nn.functional.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
        logits = logits.float()
        return logits if temperature == 1 else logits / temperature


class _ChunkedLogProb(torch.autograd.Function):
    """Log-prob of given tokens and entropy, from `[N, H]` hidden states, a few rows of logits at a time.

    With z the logits and p = softmax(z), of a token a: log p_a = z_a - logsumexp(z), whose gradient is onehot(a) - p,
    and H = logsumexp(z) - sum(p z), whose gradient is -p (log p + H).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tokens: Tensor,
        temperature: float,
        dtype: torch.dtype,
        rows: int,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor | None]:
        log_prob = torch.empty(len(hidden), device=hidden.device)
        entropy = torch.empty_like(log_prob) if with_entropy else None
        cast_weight = weight.to(dtype)
        kept = None
        for begin in range(0, len(hidden), rows):
            part = slice(begin, begin + rows)
            logits = _logits(hidden[part], cast_weight, bias, temperature, dtype)
            if entropy is None:  # every pass over the memory counts
                log_prob[part] = logits.gather(-1, tokens[part, None])[:, 0] - logits.logsumexp(-1)
                continue
            log_probs = _log_softmax_(logits)
            log_prob[part] = log_probs.gather(-1, tokens[part, None])[:, 0]
            entropy[part] = -(log_probs.exp() * log_probs).sum(-1)
            kept = log_probs if len(hidden) <= rows else None
        ctx.save_for_backward(hidden, weight, bias, tokens, entropy, kept, cast_weight)
        ctx.temperature, ctx.dtype, ctx.rows = temperature, dtype, rows
        ctx.set_materialize_grads(False)  # an entropy that is only looked at costs nothing in the backward pass
        return log_prob, entropy

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        of_log_prob, of_entropy = gradients
        hidden, weight, bias, tokens, entropy, kept, cast_weight = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.empty_like(hidden) if wants_hidden else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if wants_bias else None
        for begin in range(0, len(hidden), ctx.rows):
            part = slice(begin, begin + ctx.rows)
            log_probs = kept
            if log_probs is None:
                log_probs = _log_softmax_(_logits(hidden[part], cast_weight, bias, ctx.temperature, ctx.dtype))
            d_logits = torch.zeros_like(log_probs)
            if of_entropy is not None:
                d_logits -= of_entropy[part, None] * (log_probs + entropy[part, None])
            if of_log_prob is not None:
                d_logits -= of_log_prob[part, None]
            d_logits *= log_probs.exp()
            if of_log_prob is not None:
                d_logits.scatter_add_(1, tokens[part, None], of_log_prob[part, None])
            if ctx.temperature != 1:
                d_logits /= ctx.temperature
            d_logits = d_logits.to(ctx.dtype)
            if d_hidden is not None:
                d_hidden[part] = d_logits @ cast_weight
            if d_weight is not None:
                d_weight += d_logits.T @ hidden[part].to(ctx.dtype)
            if d_bias is not None:
                d_bias += d_logits.sum(0, dtype=torch.float32)
        return (
            d_hidden,
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_bias is None else d_bias.to(bias.dtype),
            *[None] * 5,
        )


def _log_softmax_(logits: Tensor) -> Tensor:
    """In place, for it may be all the memory there is."""
    return logits.sub_(logits.logsumexp(-1, keepdim=True))
