"""The distribution of the next token, against a plain log_softmax of all logits at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from agents.networks import distribution
from agents.networks.distribution import TokenDistribution

VOCAB, WIDTH = 11, 5


@pytest.fixture(params=["one chunk", "many chunks"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "many chunks":
        monkeypatch.setattr(distribution, "LOGITS_BYTES", 4 * VOCAB * 2)  # two rows


def head_of(vocab: int = VOCAB, width: int = WIDTH, *, bias: bool = False, scale: float = 1.0) -> nn.Linear:
    generator = torch.Generator().manual_seed(1)
    head = nn.Linear(width, vocab, bias=bias)
    with torch.no_grad():
        for weight in head.parameters():
            weight.copy_(scale * torch.randn(weight.shape, generator=generator))
    return head


def states(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states, and a token for each."""
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(*shape, WIDTH, generator=generator).requires_grad_()
    return hidden, torch.randint(0, VOCAB, shape, generator=generator)


def plain(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, tokens: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob and entropy in float64, all logits at once."""
    logits = hidden.double() @ weight.double().T
    log_probs = ((logits if bias is None else logits + bias.double()) / temperature).log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    return log_probs.gather(-1, tokens[..., None])[..., 0], entropy


def gradients(outputs: tuple[torch.Tensor, torch.Tensor], leaves: list[torch.Tensor], which: str) -> list[torch.Tensor]:
    """Of a sum in which every log-prob and every entropy has another weight."""
    loss = torch.zeros(())
    for output, name, sign in zip(outputs, ("log_prob", "entropy"), (1, -1), strict=True):
        if name in which:
            loss = loss + (output * sign * torch.linspace(0.5, 2, output.numel()).view_as(output)).sum()
    return list(torch.autograd.grad(loss, leaves))


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("which", ["log_prob", "entropy", "log_prob and entropy"])
def test_values_and_gradients_are_those_of_a_plain_log_softmax(bias: bool, temperature: float, which: str) -> None:
    hidden, tokens = states(3, 3)
    head = head_of(bias=bias)
    ours = TokenDistribution(hidden, head, temperature=temperature)
    theirs = plain(hidden, head.weight, head.bias, tokens, temperature)
    outputs = (ours.log_prob(tokens), ours.entropy())
    for output, expected in zip(outputs, theirs, strict=True):
        assert output.dtype == torch.float32
        torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)
    leaves = [hidden, *head.parameters()]
    for gradient, expected in zip(gradients(outputs, leaves, which), gradients(theirs, leaves, which), strict=True):
        assert expected.abs().max() > 0.05
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("chunks")
def test_only_what_needs_a_gradient_gets_one() -> None:
    hidden, tokens = states(5)
    head = head_of(bias=True)
    for frozen in (hidden, *head.parameters()):
        frozen.requires_grad_(False)
        TokenDistribution(hidden, head).log_prob(tokens).sum().backward()
        assert frozen.grad is None
        assert sum(part.grad is not None for part in (hidden, *head.parameters())) == 2
        frozen.requires_grad_(True)
        hidden.grad = head.weight.grad = head.bias.grad = None


@pytest.mark.usefixtures("chunks")
def test_finite_differences_of_the_entropy() -> None:
    hidden, _ = states(4)
    head = head_of(bias=True)
    gradient = torch.autograd.grad(TokenDistribution(hidden, head).entropy().sum(), hidden)[0]
    direction = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(3))
    step = 1e-2
    ends = [TokenDistribution(hidden + side * direction, head).entropy().sum() for side in (-step, step)]
    torch.testing.assert_close((gradient * direction).sum(), (ends[1] - ends[0]) / (2 * step), rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("chunks")
def test_padding_is_zero_whatever_it_holds() -> None:
    hidden, tokens = states(3, 3)
    head = head_of(bias=True)
    mask = torch.tensor([[True, True, False], [False, False, False], [True, False, True]])
    whole = TokenDistribution(hidden, head)
    with torch.no_grad():
        junk = torch.where(mask[..., None], hidden, torch.nan)
    junk.requires_grad_()
    masked = TokenDistribution(junk, head, mask)
    wild = torch.where(mask, tokens, 10**6)  # no token of this vocabulary
    for ours, expected in (
        (masked.log_prob(wild), whole.log_prob(tokens)),
        (masked.entropy(), whole.entropy()),
    ):
        torch.testing.assert_close(ours, torch.where(mask, expected, 0.0))
    wanted = (whole.log_prob(tokens) - 2 * whole.entropy())[mask].sum()
    expected_gradients = torch.autograd.grad(wanted, [hidden, *head.parameters()])
    ours = (masked.log_prob(wild) - 2 * masked.entropy()).sum()
    for gradient, expected in zip(
        torch.autograd.grad(ours, [junk, *head.parameters()]), expected_gradients, strict=True
    ):
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("shape", [(2, 3), (2, 0), (0, 3)])
def test_nothing_but_padding(shape: tuple[int, int]) -> None:
    hidden, tokens = states(*shape)
    head = head_of(bias=True)
    nothing = TokenDistribution(hidden, head, torch.zeros(shape, dtype=torch.bool))
    assert nothing.log_prob(tokens).shape == nothing.entropy().shape == shape
    assert not nothing.log_prob(tokens).any()
    (nothing.log_prob(tokens) + nothing.entropy()).sum().backward()
    assert hidden.grad is not None
    assert head.weight.grad is not None
    assert not hidden.grad.any()
    assert not head.weight.grad.any()


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_huge_logits(offset: float) -> None:
    """Their exponentials overflow, and probabilities are exactly 0 and 1; nothing becomes NaN."""
    hidden = torch.tensor([[1.0], [-1.0], [0.0], [1.0]], requires_grad=True)
    head = nn.Linear(1, 3)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1e4], [0.0], [-1e4]]))
        head.bias.fill_(offset)
    many = TokenDistribution(hidden, head)
    log_prob = many.log_prob(torch.tensor([0, 0, 1, 2]))
    torch.testing.assert_close(log_prob, torch.tensor([0.0, -2e4, -1.0986123, -2e4]), rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(many.entropy(), torch.tensor([0.0, 0.0, 1.0986123, 0.0]), rtol=0, atol=1e-3)
    (log_prob + many.entropy()).sum().backward()
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad[:, 0], torch.tensor([0.0, 2e4, 0.0, -2e4]), rtol=1e-3, atol=1)


@pytest.mark.usefixtures("chunks")
def test_bfloat16() -> None:
    """The product is rounded to bfloat16; the rest is float32, and gradients have the dtypes of what they are of."""
    hidden, tokens = states(4, 4)
    head = head_of(bias=True)
    exact = plain(hidden, head.weight, head.bias, tokens, 1.0)
    rounding = TokenDistribution(hidden, head, dtype=torch.bfloat16)
    outputs = (rounding.log_prob(tokens), rounding.entropy())
    leaves = [hidden, *head.parameters()]
    for output, expected in zip(outputs, exact, strict=True):
        assert output.dtype == torch.float32
        error = (output - expected).abs().max()
        assert 0 < error < 0.1
    both = "log_prob and entropy"
    for gradient, expected in zip(gradients(outputs, leaves, both), gradients(exact, leaves, both), strict=True):
        assert gradient.dtype == torch.float32
        assert (gradient - expected).norm() < 0.03 * expected.norm()

    low = head_of(bias=True).to(torch.bfloat16)
    states_of_low = hidden.detach().to(torch.bfloat16).requires_grad_()
    of_low = TokenDistribution(states_of_low, low)
    assert of_low.dtype == torch.bfloat16
    (of_low.log_prob(tokens) + of_low.entropy()).sum().backward()
    for leaf in (states_of_low, *low.parameters()):
        assert leaf.grad is not None
        assert leaf.grad.dtype == torch.bfloat16


def test_autocast_does_not_reach_it() -> None:
    hidden, tokens = states(4)
    head = head_of()
    with torch.autocast("cpu", torch.bfloat16):
        inside = TokenDistribution(hidden, head).log_prob(tokens)
    torch.testing.assert_close(inside, TokenDistribution(hidden, head).log_prob(tokens), rtol=0, atol=0)


class Largest(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation gave."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.numel())
        return result


@pytest.mark.parametrize("texts", [4, 40])
def test_logits_exist_for_one_chunk_only(texts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward, whatever the number of texts."""
    vocab, rows = 1000, 8
    monkeypatch.setattr(distribution, "LOGITS_BYTES", 4 * vocab * rows)
    hidden, tokens = states(texts, 20)
    head = head_of(vocab, bias=True)
    with Largest() as largest:
        many = TokenDistribution(hidden, head)
        (many.log_prob(tokens) + many.entropy()).sum().backward()
    assert largest.elements == rows * vocab  # of texts * 20 * vocab
    with Largest() as largest, torch.no_grad():
        plain(hidden, head.weight, head.bias, tokens, 1.0)
    assert largest.elements == texts * 20 * vocab  # the measure itself works


def test_log_prob_and_entropy_are_computed_together_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    computed = distribution._product
    monkeypatch.setattr(distribution, "_product", lambda *args: calls.append(1) or computed(*args))
    hidden, tokens = states(4)
    many = TokenDistribution(hidden, head_of())
    many.log_prob(tokens)
    many.entropy()
    many.log_prob(tokens)
    many.log_prob(tokens.clone())  # the same tokens, wherever they lie
    with torch.no_grad():
        many.log_prob(tokens)
        many.entropy()
    assert len(calls) == 1
    others = (tokens + 1) % VOCAB
    assert not torch.equal(many.log_prob(others), many.log_prob(tokens))
    entropy_first = TokenDistribution(hidden, head_of())
    torch.testing.assert_close(entropy_first.entropy(), many.entropy())
    torch.testing.assert_close(entropy_first.log_prob(tokens), many.log_prob(tokens))


def test_what_was_computed_without_a_graph_is_no_answer_with_one() -> None:
    hidden, tokens = states(4)
    head = head_of()
    expected = torch.autograd.grad(TokenDistribution(hidden, head).log_prob(tokens).sum(), hidden)[0]
    for quantity in (lambda d: d.log_prob(tokens), lambda d: d.entropy()):
        many = TokenDistribution(hidden, head)
        with torch.no_grad():
            before = quantity(many)
        assert not before.requires_grad
        after = quantity(many)
        assert after.requires_grad
        torch.testing.assert_close(after, before)
        with torch.no_grad():
            assert not quantity(many).requires_grad  # what has a graph serves without it, too
    with torch.no_grad():
        many = TokenDistribution(hidden, head)
        many.log_prob(tokens)
        many.entropy()
    torch.testing.assert_close(torch.autograd.grad(many.log_prob(tokens).sum(), hidden)[0], expected)


def edited(what: torch.Tensor, how: str) -> None:
    """Changed in place: by torch, behind its back through shared memory, or by rows."""
    with torch.no_grad():
        if how == "torch":
            what.add_(1)
        elif how == "numpy":
            what.detach().numpy()[...] += 1
        else:
            what[0] += 1


@pytest.mark.parametrize("how", ["torch", "numpy", "a row"])
def test_tokens_that_were_edited_in_place_are_other_tokens(how: str) -> None:
    hidden, tokens = states(4)
    tokens = tokens.clamp_max(VOCAB - 2)
    head = head_of()
    many = TokenDistribution(hidden, head)
    before = many.log_prob(tokens)
    edited(tokens, how)
    now = many.log_prob(tokens)
    torch.testing.assert_close(now, TokenDistribution(hidden, head).log_prob(tokens))
    assert not torch.equal(now, before)


@pytest.mark.parametrize("what", ["hidden", "weight", "bias", "mask"])
def test_what_it_is_made_of_may_be_edited_in_place(what: str) -> None:
    """An optimizer step, for one: log-probs then go with the logits."""
    hidden, tokens = states(4)
    head, mask = head_of(bias=True), torch.tensor([True, True, True, False])
    many = TokenDistribution(hidden, head, mask)
    before, entropies = many.log_prob(tokens), many.entropy()
    with torch.no_grad():
        if what == "mask":
            mask[0] = False
        else:
            part = {"hidden": hidden, "weight": head.weight, "bias": head.bias}[what]
            part[0] += 1
    for now, old in ((many.log_prob(tokens), before), (many.entropy(), entropies)):
        assert not torch.equal(now, old)
    torch.testing.assert_close(many.log_prob(tokens), TokenDistribution(hidden, head, mask).log_prob(tokens))
    torch.testing.assert_close(many.entropy(), TokenDistribution(hidden, head, mask).entropy())


def test_in_inference_mode() -> None:
    """Its tensors do not tell whether they were edited."""
    hidden, tokens = states(4)
    tokens = tokens.clamp_max(VOCAB - 2)
    head = head_of()
    with torch.inference_mode():
        inside = hidden + 0
        many = TokenDistribution(inside, head)
        torch.testing.assert_close(many.log_prob(tokens), TokenDistribution(hidden, head).log_prob(tokens))
        inside += 1
        torch.testing.assert_close(many.log_prob(tokens), TokenDistribution(hidden + 1, head).log_prob(tokens))
    many = TokenDistribution(hidden, head)
    with torch.inference_mode():
        many.log_prob(tokens)
    assert many.log_prob(tokens).requires_grad


def test_samples_have_their_probabilities() -> None:
    """Pearson's chi-square of 20,000 draws for each of two states. It exceeds 29.6 once in a thousand seeds."""
    torch.manual_seed(0)
    hidden, _ = states(1, 2)
    many = TokenDistribution(hidden, head_of(scale=0.5), temperature=1.5)
    draws = 20_000
    tokens = many.sample(torch.Size([draws]))
    assert tokens.shape == (draws, 1, 2)
    probs = (many.logits.detach()).softmax(-1)
    assert probs.std() > 0.03
    for state in range(2):
        expected = draws * probs[0, state]
        found = torch.bincount(tokens[:, 0, state], minlength=VOCAB)
        assert ((found - expected) ** 2 / expected).sum() < 29.6


def test_samples_follow_torchs_seed() -> None:
    hidden, _ = states(50)
    many = TokenDistribution(hidden, head_of())
    torch.manual_seed(5)
    first, second = many.sample(), many.sample()
    torch.manual_seed(5)
    assert torch.equal(many.sample(), first)
    assert not torch.equal(first, second)
    assert first.shape == (50,)
    assert not first.requires_grad


def test_the_mode_is_the_likeliest_token() -> None:
    hidden, _ = states(3, 4)
    many = TokenDistribution(hidden, head_of(bias=True), temperature=0.5)
    assert many.mode.shape == (3, 4)
    best = many.log_prob(many.mode)
    for token in range(VOCAB):
        assert (many.log_prob(torch.full((3, 4), token)) <= best).all()
    assert torch.equal(many.deterministic_sample, many.mode)


def test_logits_give_the_same_probabilities() -> None:
    hidden, tokens = states(3)
    many = TokenDistribution(hidden, head_of(bias=True), temperature=0.7)
    picked = many.logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    torch.testing.assert_close(picked, many.log_prob(tokens))
