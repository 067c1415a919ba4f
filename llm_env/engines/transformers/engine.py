"""The engine that runs anywhere: a Hugging Face transformers model and a cache with one row for each slot."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from llm_env.engines.base import EngineBase
from llm_env.engines.registry import register_engine
from llm_env.engines.transformers.attention import grouped
from llm_env.engines.transformers.slot_cache import Plan, SlotCache
from llm_env.engines.weights import copy_weights
from llm_env.models import eos_tokens, load_model, load_tokenizer
from llm_env.tokens.stopping import IntArray
from llm_env.tokens.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PREFILL_TOKENS = 8192  # at most so many tokens, padding included, in one pass: bounds the memory of activations
LOGITS_BYTES = 2**29  # at most so much memory for the logits of one pass of `log_probs`


@register_engine("transformers")
class TransformersEngine(EngineBase):
    """Steps any causal language model of transformers that has plain causal attention.

    The keys and values of all slots are allocated once, at first use. A step writes one position of each slot in
    place, and reads what is there as it lies.

    Args:
        model: a name (see `llm_env.models`), or a model. A model is used as it is, not copied: an engine can share
            the very weights that are being trained, and needs no `load_weights` then. Stop its slots when they change.
        tokenizer: by default the one that belongs to the name.
        num_slots: how many texts live side by side.
        context: how many tokens a slot can hold, prompt included.
        dtype: of a model given by name; by default the one it is stored in.
        device: of a model given by name; by default the CPU.

    Examples:
        >>> with TransformersEngine("tiny", num_slots=2, context=32) as engine:
        ...     logits = engine.start([0], [engine.vocabulary.encode("Hello")])
        >>> logits.shape
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
        device: str | torch.device | None = None,
    ) -> None:
        if isinstance(model, str):
            tokenizer = tokenizer or load_tokenizer(model)
            model = load_model(model, dtype=dtype, device=device or "cpu")
        elif dtype is not None or device is not None:
            raise ValueError("dtype and device belong to a model given by name; move a model yourself with `.to(...)`")
        if tokenizer is None:
            raise ValueError(f"a {type(model).__name__} does not know its tokenizer: pass it as `tokenizer`")
        _check_model(model, context)
        vocabulary = Vocabulary(
            tokenizer,
            size=model.get_output_embeddings().weight.shape[0],
            eos_tokens=eos_tokens(tokenizer, getattr(model, "generation_config", None)),
        )
        super().__init__(num_slots=num_slots, context=context, vocabulary=vocabulary)
        self.model: Any = model
        self._cache = self._new_cache()

    def close(self) -> None:
        """Free the cache and let go of the model."""
        super().close()
        self.model = self._cache = None  # type: ignore[assignment]

    def _new_cache(self) -> SlotCache:
        return SlotCache(self.model.config.get_text_config().num_hidden_layers, self.num_slots, self.context)

    def _advance(
        self, slots: IntArray, token_lists: IntArray | Sequence[IntArray], fresh: IntArray, prompts: Sequence[IntArray]
    ) -> torch.Tensor:
        # A text that begins is one that is appended to, from length 0. Those of one token take a pass, those of several
        # another: together they would mostly be padding.
        everyone, lists = np.concatenate([slots, fresh]), [*token_lists, *prompts]
        single = np.array([len(tokens) == 1 for tokens in lists], dtype=np.bool_)
        if single.all():
            return self._step(everyone, lists)
        if not single.any():
            return self._read(everyone, lists)
        ones, others = np.flatnonzero(single), np.flatnonzero(~single)
        logits = torch.cat(
            [
                self._step(everyone[ones], [lists[place] for place in ones]),
                self._read(everyone[others], [lists[place] for place in others]),
            ]
        )
        return logits[self._tensor(np.argsort(np.concatenate([ones, others])))]

    def _read(self, slots: IntArray, token_lists: list[IntArray]) -> torch.Tensor:
        # Several completions of one prompt are the rule in training: compute it once, and copy its keys.
        first: dict[bytes | int, int] = {}
        keys = [
            tokens.tobytes() if self.lengths[slot] == 0 else int(slot)
            for slot, tokens in zip(slots, token_lists, strict=True)
        ]
        source = np.array([first.setdefault(key, place) for place, key in enumerate(keys)], dtype=np.int64)
        own = np.unique(source)
        logits = self._extend(slots[own], [token_lists[place] for place in own])
        if len(own) == len(source):
            return logits
        copies = np.flatnonzero(source != np.arange(len(source)))
        longest = max(len(token_lists[place]) for place in copies)
        with torch.inference_mode():
            self._cache.copy_rows(self._tensor(slots[source[copies]]), self._tensor(slots[copies]), longest)
        return logits[self._tensor(np.searchsorted(own, source))]

    def _extend(self, slots: IntArray, token_lists: list[IntArray]) -> torch.Tensor:
        lengths = np.array([len(tokens) for tokens in token_lists], dtype=np.int64)
        parts = list(_batches(lengths, PREFILL_TOKENS))
        logits = []
        for part in parts:
            # Padding on the left puts the last token of every row into the last column, the only one whose logits
            # are wanted. Positions are explicit and padding is not written to the cache: its side does not matter.
            padded = np.zeros((len(part), lengths[part].max()), dtype=np.int64)
            for row, index in enumerate(part):
                padded[row, padded.shape[1] - lengths[index] :] = token_lists[index]
            logits.append(self._forward(slots[part], padded, lengths[part]))
        return torch.cat(logits)[self._tensor(np.argsort(np.concatenate(parts)))]

    def _step(self, slots: IntArray, token_lists: list[IntArray]) -> torch.Tensor:
        if not len(slots):
            return torch.zeros(0, self.vocab_size, device=self.model.device)
        return self._forward(slots, np.stack(token_lists), None)

    def _forward(self, slots: IntArray, tokens: IntArray, lengths: IntArray | None) -> torch.Tensor:
        """Run `[n, width]` tokens, of which the last `lengths` of each row are real (None: all)."""
        n, width = tokens.shape
        padding = np.zeros_like(slots) if lengths is None else width - lengths
        positions = (self.lengths[slots] - padding)[:, None] + np.arange(width)
        real = np.flatnonzero(np.arange(width) >= padding[:, None]) if padding.any() else None
        # Padding stands at some valid position, looks at something, and is never looked at.
        positions = np.maximum(positions, 0)
        places = (slots[:, None] * self.context + positions).ravel()
        in_order = bool((slots == np.arange(slots[0], slots[0] + n)).all())
        plan = Plan(
            target=self._tensor(places if real is None else places[real]),
            source=None if real is None else self._tensor(real),
            rows=slice(int(slots[0]), int(slots[0]) + n) if in_order else self._tensor(slots),
            columns=int(positions.max()) + 1,
        )
        position_ids = self._tensor(positions)
        with torch.inference_mode(), _evaluating(self.model), grouped(self.model.config):
            dtype = self.model.dtype
            hidden = torch.arange(plan.columns, device=position_ids.device) > position_ids[:, None, :, None]
            mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
            mask.masked_fill_(hidden, torch.finfo(dtype).min)
            self._cache.use(plan)
            output = self.model(
                input_ids=self._tensor(tokens),
                attention_mask=mask,
                position_ids=position_ids,
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
        # Out of inference mode, so that these are ordinary tensors, which autograd takes as constants.
        return torch.empty(n, self.vocab_size, device=output.logits.device).copy_(output.logits[:, -1])

    def _log_probs(self, sequences: list[IntArray]) -> list[npt.NDArray[np.float32]]:
        scores: list[npt.NDArray[np.float32]] = [np.zeros(0, dtype=np.float32)] * len(sequences)
        lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int64)
        # Scoring wants the logits of all positions, so they are what fills the memory.
        most = min(PREFILL_TOKENS, LOGITS_BYTES // (4 * self.vocab_size))
        for part in _batches(lengths, most):
            padded = np.zeros((len(part), lengths[part].max()), dtype=np.int64)
            for row, index in enumerate(part):
                padded[row, : lengths[index]] = sequences[index]
            if padded.shape[1] > 1:  # else there is nothing to score
                scored = self._score(self._tensor(padded)).cpu().numpy()
                for row, index in enumerate(part):
                    scores[index] = scored[row, : max(lengths[index] - 1, 0)].copy()
        return scores

    def _score(self, tokens: torch.Tensor) -> torch.Tensor:
        """`[n, P]` tokens to `[n, P - 1]` log-probs; a long text in several parts, whose logits fit in memory."""
        n, length = tokens.shape
        width = max(1, LOGITS_BYTES // (4 * n * self.vocab_size))
        cache = DynamicCache(config=self.model.config) if width < length - 1 else None
        scored = []
        with torch.inference_mode(), _evaluating(self.model):
            for begin in range(0, length - 1, width):
                part = slice(begin, min(begin + width, length - 1))
                # Padding is on the right, where causal attention does not look: no mask.
                logits = self.model(tokens[:, part], past_key_values=cache, use_cache=cache is not None).logits.float()
                chosen = logits.gather(-1, tokens[:, part.start + 1 : part.stop + 1, None])[..., 0]
                scored.append(chosen - logits.logsumexp(-1))
        return torch.cat(scored, dim=1)

    def _load_weights(self, named_tensors: dict[str, torch.Tensor]) -> None:
        copy_weights(self.model, named_tensors)
        self._cache = self._new_cache()  # it may hold a NaN of bad weights, which no mask would hide

    def _tensor(self, array: IntArray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.model.device)


def _batches(lengths: IntArray, most: int) -> Iterator[IntArray]:
    """Indices of rows in batches of at most `most` tokens, padding included (or one row, if that is longer)."""
    if lengths.max(initial=0) * len(lengths) <= most:
        yield np.arange(len(lengths))  # in the order given, so that slots in order stay so
        return
    order = np.argsort(lengths, kind="stable")  # rows of similar length together need the least padding
    begin = 0
    for end in range(1, len(order) + 1):
        if end == len(order) or (end + 1 - begin) * lengths[order[end]] > most:
            yield order[begin:end]
            begin = end


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """No dropout, also while a trainer that shares the model has it in training mode."""
    training = [module for module in model.modules() if module.training] if model.training else []
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _check_model(model: Any, context: int) -> None:
    """Refuse what this engine would compute wrongly."""
    name = type(model).__name__
    config = model.config.get_text_config()
    if model.config.is_encoder_decoder or model.get_output_embeddings() is None:
        raise ValueError(f"{name} is not a causal language model (a decoder with logits for the next token)")
    try:
        plain = all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)
    except (KeyError, ValueError):
        plain = False
    accepted = set(inspect.signature(model.forward).parameters)
    if not plain or not {"position_ids", "past_key_values", "logits_to_keep"} <= accepted:
        raise ValueError(
            f"{name} has attention other than plain causal (a sliding window, chunks, a recurrence, ALiBi, ...), "
            "which this engine does not support. If it is a sliding window longer than your context, load the model "
            "with `sliding_window=None`"
        )
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in ("dynamic", "longrope"):
        raise ValueError(f"{name} has {rope!r} rotary positions, which depend on the other texts of a batch")
    if config._attn_implementation not in ("sdpa", "eager"):
        raise ValueError(
            f"{name} uses the attention kernel {config._attn_implementation!r}, which takes no 4D mask: "
            "call `model.set_attn_implementation('sdpa')`"
        )
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and context > longest:
        raise ValueError(f"{name} was made for at most {longest} positions, a context of {context} is too long")
