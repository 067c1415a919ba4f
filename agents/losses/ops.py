"""The arithmetic of learning from texts: pure functions of tensors, in which padding does not exist.

`B` texts, `T` steps (choices of the agent) at most. A `mask` is bool, True on real steps. Whatever lies under a False
may be anything, NaN included, and changes nothing.
"""

from __future__ import annotations

from typing import Literal

import torch
from torchrl.objectives.value.functional import generalized_advantage_estimate

Tensor = torch.Tensor
Estimator = Literal["k1", "k2", "k3"]
Aggregate = Literal["token", "sequence", "fixed"]

ROUNDING = 8
"""Numbers no further than this many units in the last place from their mean count as equal.

A text's reward is a sum of float32 numbers, and so is an advantage: a few hundred of them, each rounded by half a unit,
add up to an error of about eight. Differences that anybody means are larger by far; divided by themselves, as whitening
does, smaller ones would become advantages of 1 and -1.
"""


def zero_padding(values: Tensor, mask: Tensor) -> Tensor:
    """The values where `mask` is True, and 0 elsewhere.

    Selected, not multiplied: NaN times 0 is NaN, in the backward pass too.
    """
    return torch.where(mask, values, torch.zeros_like(values))


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean over real steps; 0 if there are none.

    Examples:
        >>> masked_mean(torch.tensor([1.0, 3.0, 100.0]), torch.tensor([True, True, False])).item()
        2.0
    """
    return zero_padding(values, mask).sum() / mask.sum().clamp_min(1)


def above_least(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Values minus the least of the real ones, and 0 elsewhere.

    What is left is how much they differ: exactly 0 if they are equal. The rounded mean of equal numbers may not be that
    number, so what is compared with a mean is first made this.

    Args:
        values: of any shape.
        mask: of that shape.
        dim: along which to compare; None: all with each other.
    """
    least = torch.where(mask, values, torch.inf).amin(_dims(values, dim), keepdim=True)
    return zero_padding(values - least, mask)


def centred(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Values minus their mean over real steps, and 0 elsewhere; exactly 0 where all are equal.

    Examples:
        >>> values, mask = torch.tensor([1.0, 3.0, 100.0]), torch.tensor([True, True, False])
        >>> centred(values, mask).tolist()
        [-1.0, 1.0, 0.0]
    """
    above, dims = above_least(values, mask, dim), _dims(values, dim)
    mean = above.sum(dims, keepdim=True) / mask.sum(dims, keepdim=True).clamp_min(1)
    return zero_padding(above - mean, mask)


def deviation(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """The standard deviation over real steps (divided by their number, not by one less), with the dimensions kept.

    Exactly 0 where the values differ by no more than rounding does, see `ROUNDING`.

    Examples:
        >>> deviation(torch.tensor([1.0, 3.0, 100.0]), torch.tensor([True, True, False])).item()
        1.0
    """
    centre, dims, kind = centred(values, mask, dim), _dims(values, dim), torch.finfo(values.dtype)
    furthest = centre.abs().amax(dims, keepdim=True)
    size = zero_padding(values, mask).abs().amax(dims, keepdim=True).clamp_min(kind.tiny)
    equal = furthest <= ROUNDING * kind.eps * size  # no: NaN is not equal to anything
    # In parts of the furthest: the squares of very small or large numbers would be 0 or infinite.
    squares = (centre / torch.where(furthest > 0, furthest, 1)) ** 2
    mean = squares.sum(dims, keepdim=True) / mask.sum(dims, keepdim=True).clamp_min(1)
    return torch.where(equal, 0, furthest * mean.sqrt())


def whiten(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Values of mean 0 and standard deviation 1 over real steps, and 0 elsewhere.

    Values that are all the same, but for rounding, become 0, not noise.

    Args:
        values: of any shape.
        mask: of that shape.
        dim: along which to compare; None: all with each other.

    Examples:
        >>> whiten(torch.tensor([1.0, 3.0, 100.0]), torch.tensor([True, True, False])).tolist()
        [-1.0, 1.0, 0.0]
    """
    spread = deviation(values, mask, dim)
    return torch.where(spread == 0, 0, centred(values, mask, dim) / spread)


def explained_variance(predicted: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """How much of the targets' variance the predictions explain: 1 is all, 0 is what a constant would; NaN if none."""
    spread = deviation(target, mask)
    unexplained = (deviation(target - predicted, mask) / spread) ** 2
    return torch.where(spread > 0, 1 - unexplained, torch.nan).squeeze()


def typical_error(predicted: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """The root of the mean squared error over real steps.

    It has the unit of the targets, and unlike their spread it is 0 only where nothing is left to be learned: a critic
    that is far from targets that are all the same has a large one.

    Examples:
        >>> typical_error(torch.tensor([0.0, 0.0]), torch.tensor([3.0, -3.0]), torch.tensor([True, True])).item()
        3.0
    """
    return masked_mean((target - predicted) ** 2, mask).sqrt()


def gae(
    reward: Tensor,
    value: Tensor,
    last_value: Tensor,
    mask: Tensor,
    truncated: Tensor,
    gamma: float,
    lmbda: float | Tensor,
) -> Tensor:
    """Generalised advantage estimates, by TorchRL's own function; 0 on padding.

    Args:
        reward: `[B, T]`.
        value: `[B, T]` of the state before each step.
        last_value: `[B]` of the state after the last step. It counts only where the text was truncated.
        mask: `[B, T]`, a run of True from the left; its last one is the end of the episode.
        truncated: `[B]` bool, whether the text was cut off, unscored, so that its last state has a value still.
        gamma: the discount.
        lmbda: GAE's lambda, one for all or `[B]`, one for each text.

    Returns:
        `[B, T]` advantages; plus `value` they are the targets of the values.

    Examples:
        >>> mask = torch.tensor([[True, True, False]])
        >>> reward, value = torch.tensor([[0.0, 1.0, 7.0]]), torch.tensor([[0.5, 0.25, 7.0]])
        >>> gae(reward, value, torch.tensor([9.0]), mask, torch.tensor([False]), gamma=1.0, lmbda=0.5).tolist()
        [[0.125, 0.75, 0.0]]
    """
    steps = torch.arange(mask.shape[1], device=mask.device)
    last = steps == mask.sum(1, keepdim=True) - 1
    reward, value = zero_padding(reward, mask), zero_padding(value, mask)
    following = torch.where(last, last_value[:, None], torch.roll(value, -1, dims=1))
    following = zero_padding(following, mask & ~(last & ~truncated[:, None]))
    if isinstance(lmbda, Tensor):
        lmbda = lmbda[:, None, None]
    ended = last | ~mask  # a step of padding is an episode of its own, worth nothing
    advantage, _ = generalized_advantage_estimate(
        gamma,
        lmbda,
        value[..., None],
        following[..., None],
        reward[..., None],
        done=ended[..., None],
        terminated=(ended & ~(last & truncated[:, None]))[..., None],
    )
    return zero_padding(advantage[..., 0], mask)


def kl_estimate(log_prob: Tensor, reference: Tensor, estimator: Estimator) -> Tensor:
    """An estimate of KL(policy | reference) at each token that the policy has drawn.

    Args:
        log_prob: of the token under the policy.
        reference: of the token under the reference.
        estimator: "k1", the log-ratio: unbiased, but of either sign. "k2", half its square: biased, but its
            *gradient* is that of the true KL. "k3", ratio - 1 - log-ratio of the reference to the policy: unbiased
            and never negative.

    Examples:
        >>> policy, reference = torch.tensor([0.5]).log(), torch.tensor([0.25]).log()
        >>> [round(kl_estimate(policy, reference, k).item(), 4) for k in ("k1", "k2", "k3")]
        [0.6931, 0.2402, 0.1931]
    """
    log_ratio = log_prob - reference
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return log_ratio**2 / 2
    if estimator == "k3":
        return torch.expm1(-log_ratio) + log_ratio
    raise ValueError(f"the KL estimator must be 'k1', 'k2' or 'k3', got {estimator!r}")


def token_weights(mask: Tensor, aggregate: Aggregate, fixed_length: int | None = None) -> Tensor:
    """`[B, T]` the weight of each token's loss; the weighted sum is the loss of these texts.

    Made once for the texts of an optimizer step, then cut along B: so the gradients of micro-batches add up to that of
    the whole, whatever their sizes.

    Args:
        mask: `[B, T]`.
        aggregate: "token": all tokens weigh the same. "sequence": all texts do (1 / their length for each token).
            "fixed": every token weighs 1 / (B * fixed_length), so that a long text gains nothing by its length.
        fixed_length: for "fixed".

    Examples:
        >>> mask = torch.tensor([[True, True, True], [True, False, False]])
        >>> token_weights(mask, "token").tolist()
        [[0.25, 0.25, 0.25], [0.25, 0.0, 0.0]]
        >>> token_weights(mask, "sequence")[:, 0].tolist()
        [0.1666666716337204, 0.5]
    """
    real = mask.float()
    lengths = real.sum(1, keepdim=True)
    if aggregate == "token":
        return real / lengths.sum().clamp_min(1)
    texts = (lengths > 0).sum().clamp_min(1)  # a row of padding is no text
    if aggregate == "sequence":
        return real / (lengths.clamp_min(1) * texts)
    if aggregate == "fixed":
        if fixed_length is None or fixed_length < 1:
            raise ValueError(f"aggregate='fixed' needs a fixed_length of at least 1, got {fixed_length}")
        return real / (texts * fixed_length)
    raise ValueError(f"aggregate must be 'token', 'sequence' or 'fixed', got {aggregate!r}")


def importance_weights(trainer: Tensor, engine: Tensor, mask: Tensor, cap: float) -> Tensor:
    """`[B, T]` trainer's over engine's probability of each token, at most `cap`: truncated importance sampling.

    An engine that rounds otherwise than the trainer draws from a slightly other distribution; without the correction
    the gradient is biased towards what the engine overrates.
    """
    return zero_padding((trainer - engine).exp().clamp_max(cap), mask)


def length_adaptive_lambda(lengths: Tensor, alpha: float) -> Tensor:
    """`[B]` lambda = 1 - 1 / (alpha * length): a long text carries its reward as far back as a short one.

    Examples:
        >>> length_adaptive_lambda(torch.tensor([1, 10, 100]), alpha=0.5).tolist()
        [0.0, 0.800000011920929, 0.9800000190734863]
    """
    return (1 - 1 / (alpha * lengths.clamp_min(1))).clamp(0, 1)


def _dims(values: Tensor, dim: int | None) -> list[int]:
    return list(range(values.ndim)) if dim is None else [dim]
