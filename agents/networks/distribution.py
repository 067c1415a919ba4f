"""The distribution of the next token, given hidden states: logits exist for a few rows at a time, never for a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.distributions import Distribution, constraints

from agents.rollouts.masks import Allowed
from llm_env.engines.sampling import draw
from llm_env.tokens.vocabulary import Vocabulary

Tensor = torch.Tensor

LOGITS_BYTES = 2**28  # at most so much memory for the logits of one chunk, were they float32
SCORING_BYTES = 2**25  # without a backward pass, which would have to compute them again, chunks may be small
BLOCK_BYTES = 2**23  # what is done to single logits is done in portions that fit the cache
IMPOSSIBLE = -1e30  # the logit of what cannot be chosen: its probability is exactly 0, and no product of it is NaN


@dataclass(frozen=True, eq=False)
class _Computed:
    """What was computed last, and of what: `versions` tells whether any of that was edited in place since."""

    tokens: Tensor
    versions: tuple[int, ...] | None
    log_prob: Tensor
    entropy: Tensor | None


class TokenDistribution(Distribution):
    """A categorical distribution over the vocabulary at each of many states.

    Log-prob and entropy are computed together, in chunks of rows, and in the backward pass computed again (unless one
    chunk holds all, when its logits are kept): memory does not depend on the number of states times the
    vocabulary. The last result is kept, for as long as it is what would be computed now: of the same tokens, states
    and weights, and with a graph where one is wanted.

    Args:
        hidden: `[..., H]` hidden states.
        head: the output layer, `[V, H]` weights. What it holds now is what counts, also if it is swapped later.
        mask: `[...]` bool; where it is False nothing is computed, and log-prob and entropy are 0.
        temperature: divides the logits.
        dtype: what the product of hidden states and weights is computed in; by default that of the weights. Everything
            after it is float32.
        vocabulary: the tokens to choose among; by default there is one for each row of the weights. Models often have
            rows beyond the tokens of their tokenizer, which no engine samples (see `Vocabulary.usable`).
        allowed: which tokens can be chosen at each state; all by default. Log-probs, entropy and samples are those of
            the distribution over the allowed ones, as those of TorchRL's MaskedCategorical are.

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
        vocabulary: Vocabulary | None = None,
        allowed: Allowed | None = None,
    ) -> None:
        super().__init__(hidden.shape[:-1], validate_args=False)
        self.hidden = hidden
        self.mask = mask
        self.temperature = temperature
        self.dtype = dtype or head.weight.dtype
        self._weight, self._bias, self._unused = _rows_of_tokens(head, vocabulary)
        self.allowed = allowed
        self._last: _Computed | None = None

    @property
    def support(self) -> Any:
        """Token ids."""
        return constraints.integer_interval(0, self._weight.shape[0] - 1)  # type: ignore[no-untyped-call]

    @property
    def logits(self) -> Tensor:
        """`[..., V]` all logits, divided by the temperature, -inf for what cannot be chosen.

        For the few states of a step, not for a batch of texts.
        """
        hidden = self.hidden.reshape(-1, self.hidden.shape[-1])
        logits = _product(hidden, self._weight, self._bias, self.dtype)
        limits = self._limits(slice(None))
        return limits.final(logits, self.temperature, slice(None), -torch.inf).view(*self.batch_shape, -1)

    def log_prob(self, value: Tensor) -> Tensor:
        """`[...]` float32 log-probabilities of the tokens; 0 where the mask is False."""
        kept = self._kept()
        # The numbers are compared, not the objects: tokens may be edited in place, or indexed anew.
        if kept is None or not torch.equal(kept.tokens, value):
            kept = self._compute(value, with_entropy=torch.is_grad_enabled())
        return kept.log_prob if torch.is_grad_enabled() else kept.log_prob.detach()

    def entropy(self) -> Tensor:
        """`[...]` float32 entropies; free after a `log_prob` that autograd has seen."""
        kept = self._kept()
        if kept is None or kept.entropy is None:
            any_tokens = torch.zeros(self.batch_shape, dtype=torch.long, device=self.hidden.device)
            kept = self._compute(any_tokens, with_entropy=True)
        assert kept.entropy is not None
        return kept.entropy if torch.is_grad_enabled() else kept.entropy.detach()

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

    def _limits(self, states: Tensor | slice) -> _Limits:
        """Of some states, counted along all of them."""
        allowed = self.allowed
        if allowed is not None:
            allowed = Allowed(allowed.bits, allowed.index.reshape(-1)[states])
        return _Limits(self._unused, allowed)

    def _kept(self) -> _Computed | None:
        """The last result, if it is what would be computed now."""
        last = self._last
        if last is None or last.versions is None or last.versions != self._versions():
            return None
        learns = any(part.requires_grad for part in (self.hidden, self._weight, self._bias) if part is not None)
        lacks_a_graph = learns and torch.is_grad_enabled() and not last.log_prob.requires_grad
        return None if lacks_a_graph else last

    def _compute(self, tokens: Tensor, with_entropy: bool) -> _Computed:
        log_prob, entropy = self._both(tokens, with_entropy)
        self._last = _Computed(tokens.clone(), self._versions(), log_prob, entropy)
        return self._last

    def _versions(self) -> tuple[int, ...] | None:
        """How often each of the tensors was edited in place; None if one does not tell."""
        parts = [part for part in (self.hidden, self._weight, self._bias, self.mask) if part is not None]
        return None if any(part.is_inference() for part in parts) else tuple(part._version for part in parts)

    def _both(self, tokens: Tensor, with_entropy: bool) -> tuple[Tensor, Tensor | None]:
        shape = self.batch_shape
        hidden, tokens = self.hidden.reshape(-1, self.hidden.shape[-1]), tokens.reshape(-1)
        real = None if self.mask is None else self.mask.reshape(-1).nonzero()[:, 0]
        if real is not None:  # padding is left out before anything is computed
            hidden, tokens = hidden[real], tokens[real]
        limits = self._limits(slice(None) if real is None else real)
        memory = LOGITS_BYTES if torch.is_grad_enabled() else min(LOGITS_BYTES, SCORING_BYTES)
        rows = max(1, memory // (4 * self._weight.shape[0]))
        results = _ChunkedLogProb.apply(  # type: ignore[no-untyped-call]
            hidden, self._weight, self._bias, tokens, self.temperature, self.dtype, rows, with_entropy, limits
        )
        if real is not None:
            zeros = torch.zeros(shape.numel(), device=hidden.device)
            results = [None if result is None else zeros.index_put((real,), result) for result in results]
        log_prob, entropy = (None if result is None else result.view(shape) for result in results)
        assert log_prob is not None
        return log_prob, entropy


class _Limits(NamedTuple):
    """What cannot be chosen: ids that stand for no token, and what was forbidden at each of N states."""

    unused: Tensor | None
    allowed: Allowed | None

    @property
    def any(self) -> bool:
        return self.unused is not None or self.allowed is not None

    def final(self, raw: Tensor, temperature: float, part: slice, impossible: float = IMPOSSIBLE) -> Tensor:
        """The logits of the states in this part, in float32, divided by the temperature, and `impossible` where they
        must be. Perhaps the very tensor given, which is left as it is.
        """
        logits = raw.float() if temperature == 1 else raw.float() / temperature
        if self.any and logits is raw:
            logits = raw.clone()
        if self.unused is not None:
            logits = logits.index_fill_(-1, self.unused, impossible)
        if self.allowed is not None:
            forbidden = self.allowed.forbidden(self.allowed.index[part], logits.shape[-1])
            logits = logits.masked_fill_(forbidden, impossible)
        return logits


class _ChunkedLogProb(torch.autograd.Function):
    """Log-prob of given tokens and entropy, from `[N, H]` hidden states, some rows of logits at a time.

    With z the logits and p = softmax(z), of a token a: log p_a = z_a - logsumexp(z), whose gradient is onehot(a) - p,
    and H = logsumexp(z) - sum(p z), whose gradient is -p (log p + H).

    The matrix products run over chunks of `rows`; what is done to each logit runs over blocks of a chunk that fit the
    cache, for at this size every pass over the memory counts, and fresh memory counts twice.
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
        limits: _Limits,
    ) -> tuple[Tensor, Tensor | None]:
        normaliser = torch.empty(len(hidden), device=hidden.device)
        log_prob = torch.empty_like(normaliser)
        entropy = torch.empty_like(normaliser) if with_entropy else None
        cast_weight = weight.to(dtype)
        kept = None
        for begin in range(0, len(hidden), rows):
            raw = _product(hidden[begin : begin + rows], cast_weight, bias, dtype)
            for part, block in _blocks(raw, begin):
                logits = limits.final(raw[block], temperature, part)
                total = normaliser[part] = logits.logsumexp(-1)
                log_prob[part] = logits.gather(-1, tokens[part, None])[:, 0] - total
                if entropy is not None:
                    log_probs = logits - total[:, None]
                    entropy[part] = -log_probs.exp().mul_(log_probs).sum(-1)
            kept = raw if len(hidden) <= rows else None
        if limits.any:
            log_prob.masked_fill_(log_prob < IMPOSSIBLE / 2, -torch.inf)
        ctx.save_for_backward(hidden, weight, bias, tokens, normaliser, entropy, kept, cast_weight)
        ctx.temperature, ctx.dtype, ctx.rows, ctx.limits = temperature, dtype, rows, limits
        ctx.set_materialize_grads(False)  # an entropy that is only looked at costs nothing in the backward pass
        return log_prob, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        of_log_prob, of_entropy = gradients
        hidden, weight, bias, tokens, normaliser, entropy, kept, cast_weight = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.empty_like(hidden) if wants_hidden else None
        d_weight: Tensor | None = None
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if wants_bias else None
        for begin in range(0, len(hidden), ctx.rows):
            chunk = slice(begin, begin + ctx.rows)
            raw = _product(hidden[chunk], cast_weight, bias, ctx.dtype) if kept is None else kept
            d_logits = torch.empty_like(raw)
            for part, block in _blocks(raw, begin):
                log_probs = ctx.limits.final(raw[block], ctx.temperature, part) - normaliser[part, None]
                probabilities = log_probs.exp()
                if of_entropy is None:
                    change = torch.zeros(1, 1, device=raw.device)
                else:
                    change = log_probs.add_(entropy[part, None]).mul_(-of_entropy[part, None])
                if of_log_prob is not None:
                    change = change - of_log_prob[part, None]
                change = probabilities.mul_(change)
                if of_log_prob is not None:
                    change.scatter_add_(1, tokens[part, None], of_log_prob[part, None])
                d_logits[block] = change if ctx.temperature == 1 else change.div_(ctx.temperature)
            if d_hidden is not None:
                d_hidden[chunk] = d_logits @ cast_weight
            if wants_weight:
                d_chunk = d_logits.T @ hidden[chunk].to(ctx.dtype)
                # Of several chunks the sum is taken in float32.
                d_weight = d_chunk if d_weight is None else d_weight.float().add_(d_chunk)
            if d_bias is not None:
                d_bias += d_logits.sum(0, dtype=torch.float32)
        if wants_weight and d_weight is None:
            d_weight = torch.zeros_like(weight)
        return (
            d_hidden,
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_bias is None else d_bias.to(bias.dtype),
            *[None] * 6,
        )


def _product(hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    # Autocast is kept out, for the dtype is chosen here.
    with torch.autocast(hidden.device.type, enabled=False):
        return nn.functional.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def _rows_of_tokens(head: nn.Linear, vocabulary: Vocabulary | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Weights and bias of the rows that tokens have, and which of these ids stand for none after all."""
    weight: Tensor = head.weight
    bias: Tensor | None = head.bias
    if vocabulary is None:
        return weight, bias, None
    if len(weight) != vocabulary.size:
        vocabulary.check_model(len(weight))
        weight, bias = weight[: vocabulary.size], None if bias is None else bias[: vocabulary.size]
    unused = torch.from_numpy(vocabulary.unused).to(weight.device) if len(vocabulary.unused) else None
    return weight, bias, unused


def _blocks(chunk: Tensor, begin: int) -> Iterator[tuple[slice, slice]]:
    """Portions of a chunk's rows: where they lie among all rows, and where in the chunk."""
    rows = max(1, BLOCK_BYTES // (4 * chunk.shape[1]))
    for first in range(0, len(chunk), rows):
        last = min(first + rows, len(chunk))
        yield slice(begin + first, begin + last), slice(first, last)
