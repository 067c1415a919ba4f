"""What a return is compared with, and how far the critic is trusted."""

from __future__ import annotations

import torch

from agents.losses.ops import above_least, explained_variance, zero_padding

Tensor = torch.Tensor

_TINY = 1e-30  # where no token can be learned from, no weight is to be divided by


def trusted_lambda(value: Tensor, returns: Tensor, mask: Tensor) -> float:
    """GAE's lambda by how good the critic is: 1 - its explained variance on this batch.

    A critic that explains nothing is not asked (lambda 1: the rewards alone count), a perfect one is believed
    (lambda 0).

    Examples:
        >>> returns, mask = torch.tensor([[0.0, 1.0]]), torch.tensor([[True, True]])
        >>> [trusted_lambda(torch.tensor([values]), returns, mask) for values in ([5.0, 5.0], [0.0, 1.0], [9.0, 0.0])]
        [1.0, 0.0, 1.0]
    """
    return 1.0 - _explained(value, returns, mask)


def fitted_baseline(value: Tensor, returns: Tensor, log_prob: Tensor, mask: Tensor) -> Tensor:
    """`[B, T]` the baseline a + b * value that makes the policy gradient least noisy.

    The value itself, the mean of what is to come, is not it. A token adds its advantage times the gradient of its
    log-prob to the policy's gradient, and these differ in size: that of a token which was nearly certain is nearly 0,
    that of one which was unlikely is large. So the baseline has to fit where the gradient is large: it is the
    least-squares fit in which each token weighs as the square of its gradient, about (1 - probability)². Once a policy
    is nearly always right, what has weight is the rare wrong token: the baseline is what it leads to, and the many
    right ones are still made likelier, where a baseline of their mean would make the rare wrong ones the loudest.

    How much the critic has to say is fitted along: nothing, if its explained variance is not above 0.

    Args:
        value: the critic's, 0 on padding.
        returns: what it is to be compared with, 0 on padding.
        log_prob: of the tokens under the policy that chose them.
        mask: real tokens.

    Examples:
        >>> mask = torch.ones(1, 4, dtype=torch.bool)
        >>> returns = torch.tensor([[1.0, 1.0, 1.0, 0.0]])
        >>> log_prob = torch.tensor([[0.999, 0.999, 0.999, 0.001]]).log()  # right and nearly certain, and a slip
        >>> round(fitted_baseline(torch.zeros(1, 4), returns, log_prob, mask)[0, 0].item(), 4)  # the mean is 0.75
        0.0
    """
    weight = zero_padding((1 - log_prob.exp()) ** 2, mask)
    above = above_least(returns, mask)  # exactly 0 if all are equal
    baseline = returns - above + _mean(above, weight)
    if _explained(value, returns, mask) > 0:
        centre = value - _mean(value, weight)
        share = _mean(centre * above, weight) / _mean(centre**2, weight).clamp_min(_TINY)
        baseline = baseline + share * centre
    return zero_padding(baseline, mask)


def _mean(values: Tensor, weight: Tensor) -> Tensor:
    return (values * weight).sum() / weight.sum().clamp_min(_TINY)


def _explained(value: Tensor, returns: Tensor, mask: Tensor) -> float:
    """The explained variance, from 0 to 1; 0 where there is no variance to explain."""
    return float(explained_variance(value, returns, mask).nan_to_num(0.0).clamp(0.0, 1.0))
