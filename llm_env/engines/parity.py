"""Whether an engine computes with the weights it was given: a few texts scored by both sides, after every update."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from llm_env.engines.weights import check_weights
from llm_env.tokens.arrays import IntArray
from llm_env.tokens.vocabulary import Vocabulary

ODD_TEXT = 10  # one text among several may be so many tolerances off

Scores = Sequence[npt.NDArray[np.float32]]


class StaleWeightsError(RuntimeError):
    """An engine does not compute what the weights given to it would."""


class ParityCheck:
    """Runs the architecture of a model folder, in transformers, on weights that live elsewhere.

    It holds no weights of its own: its parameters have shapes only, and a trainer's tensors take their place for the
    time of one forward pass.

    Args:
        folder: of the model, for its config.
        vocabulary: the tokens that both sides choose among.
        dtype: of the engine; tensors of another one are rounded to it, as the engine does.
        tolerance: how far the log-probabilities of a typical text's tokens may be apart, on average. In
            bfloat16 that of a single token can be 0.2 from what float32 gives, on either side, and more where the token
            is unlikely.

    Attributes:
        sequences: the texts that are scored, all of one length.
        skeleton: the model without weights.
    """

    def __init__(self, folder: str, vocabulary: Vocabulary, dtype: torch.dtype, tolerance: float) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        self.vocabulary = vocabulary
        self.dtype = dtype
        self.tolerance = tolerance
        with _parameters_without_memory():
            self.skeleton: Any = AutoModelForCausalLM.from_config(
                AutoConfig.from_pretrained(folder), dtype=dtype
            ).eval()
        self.sequences: list[IntArray] = []

    def by_first_name(self, named_tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """One tensor for each weight, tied or not, by the first of its names; raises if any is missing or wrong."""
        names = check_weights(self.skeleton, named_tensors)
        return {names[name]: tensor for name, tensor in named_tensors.items()}

    def check(self, named_tensors: Mapping[str, torch.Tensor], score: Callable[[Any], Scores]) -> float:
        """Compare; the largest difference, or `StaleWeightsError`.

        Args:
            named_tensors: the weights that were given, by their first names.
            score: the engine's `log_probs`.
        """
        if not self.sequences or not np.isfinite(self.tolerance):
            return 0.0
        expected = self._log_probs(named_tensors)
        differences = np.abs(np.stack(score(self.sequences)) - expected)
        differences[~np.isfinite(differences)] = np.inf
        worst = differences.mean(axis=1)
        # In half precision a text that the model has come to find odd can be far off by rounding alone. Weights that
        # are stale or half loaded change what it says of all texts.
        fine = np.median(worst) <= self.tolerance and worst.max() <= ODD_TEXT * self.tolerance
        if fine or np.isnan(expected).all():  # weights of NaN are the trainer's affair
            return float(worst.max())
        index = int(worst.argmax())
        raise StaleWeightsError(
            f"after the update, vLLM and the weights it was given disagree by {worst[index]:.3g} on the "
            f"log-probability of a token, on average (tolerance {self.tolerance:g}). Worst is check sequence {index}, "
            f"tokens {self.sequences[index].tolist()}; the differences of all {len(worst)} are "
            f"{', '.join(f'{value:.3g}' for value in worst)}. The engine holds stale or half-loaded weights and "
            "refuses to work until an update succeeds"
        )

    def _log_probs(self, named_tensors: Mapping[str, torch.Tensor]) -> npt.NDArray[np.float32]:
        device = next(iter(named_tensors.values())).device
        weights = {
            name: tensor.detach().to(self.dtype) if tensor.is_floating_point() else tensor.detach()
            for name, tensor in named_tensors.items()
        }
        buffers = {name: buffer.to(device) for name, buffer in self.skeleton.named_buffers()}
        tokens = torch.from_numpy(np.stack(self.sequences)).to(device)
        with torch.no_grad():
            output = torch.func.functional_call(self.skeleton, {**buffers, **weights}, (tokens,), {"use_cache": False})
            log_probs = self.vocabulary.usable(output.logits[:, :-1].float()).log_softmax(-1)
            scores = log_probs.gather(-1, tokens[:, 1:, None])[..., 0]
        return np.asarray(scores.cpu().numpy(), dtype=np.float32)


@contextlib.contextmanager
def _parameters_without_memory() -> Iterator[None]:
    """Modules made inside have parameters on the meta device; buffers are real, for they are computed, not loaded."""
    register = torch.nn.Module.register_parameter

    def register_on_meta(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None and not parameter.is_meta:  # a tied one is registered again, and must stay itself
            module._parameters[name] = torch.nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    torch.nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register  # type: ignore[method-assign]
