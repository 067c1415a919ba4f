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

from llm_env.engines.base import EngineBase
from llm_env.engines.registry import register_engine
from llm_env.engines.transformers.attention import Part, attends_plainly, can_pack, packed
from llm_env.engines.transformers.slot_cache import Plan, SlotCache
from llm_env.engines.weights import copy_weights
from llm_env.models import eos_tokens, load_model, load_tokenizer
from llm_env.tokens.arrays import IntArray
from llm_env.tokens.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PREFILL_TOKENS = 8192  # at most so many tokens, padding included, in one pass: bounds the memory of activations
LOGITS_BYTES = 2**29  # at most so much memory for the logits of one pass of `log_probs`


@register_engine("transformers")
class TransformersEngine(EngineBase):
    """Steps any causal language model of transformers that has plain causal attention.

    The keys and values of all slots are allocated once, at first use. A step writes one position of each slot in
    place, and reads the others without copying them.

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
        vocabulary = Vocabulary(tokenizer, eos_tokens=eos_tokens(tokenizer, getattr(model, "generation_config", None)))
        self._num_logits = model.get_output_embeddings().weight.shape[0]
        vocabulary.check_model(self._num_logits)
        super().__init__(num_slots=num_slots, context=context, vocabulary=vocabulary)
        self.model: Any = model
        self._config = model.config.get_text_config()
        self._packs = can_pack(model)
        self._cache = self._new_cache()

    def close(self) -> None:
        """Free the cache and let go of the model."""
        super().close()
        self.model = self._cache = None  # type: ignore[assignment]

    def _new_cache(self) -> SlotCache:
        return SlotCache(self._config.num_hidden_layers, self.num_slots, self.context)

    def _advance(
        self, slots: IntArray, token_lists: IntArray | Sequence[IntArray], fresh: IntArray, prompts: Sequence[IntArray]
    ) -> torch.Tensor:
        # A text that begins is one that is appended to, from length 0. In training, several texts usually begin with
        # the same prompt: compute it once, and copy its keys.
        first: dict[bytes, int] = {}
        same = [first.setdefault(prompt.tobytes(), place) for place, prompt in enumerate(prompts)]
        own = np.unique(np.array(same, dtype=np.int64))
        logits = self._extend(np.concatenate([slots, fresh[own]]), [*token_lists, *(prompts[place] for place in own)])
        if len(own) == len(prompts):
            return logits
        copies = [place for place, source in enumerate(same) if place != source]
        with torch.inference_mode():
            self._cache.copy_rows(
                self._tensor(fresh[[same[place] for place in copies]]),
                self._tensor(fresh[copies]),
                max(len(prompts[place]) for place in copies),
            )
        places = np.concatenate([np.arange(len(slots)), len(slots) + np.searchsorted(own, same)])
        return logits[self._tensor(places)]

    def _extend(self, slots: IntArray, token_lists: list[IntArray]) -> torch.Tensor:
        """Append to slots, in as many passes as the memory of one asks for."""
        if not len(slots):
            return torch.zeros(0, self.vocab_size, device=self.model.device)
        lengths = np.array([len(tokens) for tokens in token_lists], dtype=np.int64)
        parts = list(_batches(lengths, PREFILL_TOKENS))
        run = self._packed_pass if self._packs else self._padded_pass
        logits = [run(slots[part], [token_lists[place] for place in part], lengths[part]) for part in parts]
        if len(parts) == 1:
            return logits[0]  # in the order given
        return torch.cat(logits)[self._tensor(np.argsort(np.concatenate(parts)))]

    def _packed_pass(self, slots: IntArray, token_lists: list[IntArray], lengths: IntArray) -> torch.Tensor:
        """One pass over the tokens alone, without padding but in attention."""
        order = np.argsort(slots)  # slots that lie in order need no copy of their cache
        new = np.concatenate(token_lists)
        begin = (np.cumsum(lengths) - lengths)[order]  # where in `new` the tokens of a text begin
        slots, lengths = slots[order], lengths[order]
        before, spans = self.lengths[slots], _spans(lengths)
        tokens, positions, places, parts = [], [], [], []
        for texts, first, counts in spans:
            columns = np.arange(counts.max())
            real = columns < counts[:, None]
            ahead = first[:, None] + np.where(real, columns, 0)
            padded = before[texts, None] + ahead
            tokens.append(new[(begin[texts, None] + ahead)[real]])
            positions.append(padded[real])
            places.append((padded + slots[texts, None] * self.context)[real])
            parts.append((int(counts.sum()), self._part(slots[texts], padded, real)))
        last = np.cumsum(spans[0][2]) - 1
        unread = torch.zeros(1, 1, 1, 1, device=self.model.device)  # without a mask, transformers would make one
        with packed(self._config, parts):
            return self._forward(
                Plan(target=self._tensor(np.concatenate(places))),
                np.concatenate(tokens)[None],
                np.concatenate(positions)[None],
                mask=unread,
                wanted=last[np.argsort(order)],
            )

    def _part(self, slots: IntArray, positions: IntArray, real: npt.NDArray[np.bool_]) -> Part:
        tokens = real_places = None
        if real.shape[1] > 1:
            tokens = self._tensor((np.cumsum(real) - 1).reshape(real.shape))
            real_places = None if real.all() else self._tensor(np.flatnonzero(real))
        in_order = bool(slots[-1] - slots[0] == len(slots) - 1)
        return Part(
            tokens=tokens,
            real=real_places,
            slots=slice(int(slots[0]), int(slots[-1]) + 1) if in_order else self._tensor(slots),
            hidden=self._hidden(positions),
        )

    def _padded_pass(self, slots: IntArray, token_lists: list[IntArray], lengths: IntArray) -> torch.Tensor:
        """One pass of `[n, width]` tokens, for models whose attention cannot be replaced."""
        # Padding on the left puts the last token of every text into the last column. Padding needs a valid position and
        # something to attend to, or it would be NaN; it is not written to the cache, and no token attends to it.
        width = int(lengths.max())
        ahead = np.arange(width) - (width - lengths)[:, None]
        real = ahead >= 0
        tokens = np.zeros(real.shape, dtype=np.int64)
        tokens[real] = np.concatenate(token_lists)
        positions = np.maximum(self.lengths[slots][:, None] + ahead, 0)
        plan = Plan(
            target=self._tensor((slots[:, None] * self.context + positions)[real]),
            source=self._tensor(np.flatnonzero(real)),
            rows=self._tensor(slots),
            columns=int(positions.max()) + 1,
        )
        return self._forward(plan, tokens, positions, mask=self._hidden(positions), wanted=None)

    def _hidden(self, positions: IntArray) -> torch.Tensor:
        """`[n, 1, width, columns]` added to scores: a token at a position sees itself and what is before it."""
        dtype, own = self.model.dtype, self._tensor(positions)[:, None, :, None]
        behind = torch.arange(int(positions.max()) + 1, device=own.device) > own
        return torch.zeros(behind.shape, dtype=dtype, device=own.device).masked_fill_(behind, torch.finfo(dtype).min)

    def _forward(
        self, plan: Plan, tokens: IntArray, positions: IntArray, mask: torch.Tensor, wanted: IntArray | None
    ) -> torch.Tensor:
        """`[n, V]` logits of the `wanted` tokens of a single row, or of the last column."""
        with torch.inference_mode(), _evaluating(self.model):
            self._cache.use(plan)
            output = self.model(
                input_ids=self._tensor(tokens),
                attention_mask=mask,
                position_ids=self._tensor(positions),
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1 if wanted is None else self._tensor(wanted),
            )
            logits = output.logits[:, -1] if wanted is None else output.logits[0]
        # Out of inference mode, so that these are ordinary tensors, which autograd takes as constants.
        return torch.empty(logits.shape, device=logits.device).copy_(logits)

    def _log_probs(self, sequences: list[IntArray]) -> list[npt.NDArray[np.float32]]:
        scores: list[npt.NDArray[np.float32]] = [np.zeros(0, dtype=np.float32)] * len(sequences)
        lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int64)
        # Scoring wants the logits of all positions, so they are what fills the memory.
        most = min(PREFILL_TOKENS, LOGITS_BYTES // (4 * self._num_logits))
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
        width = max(1, LOGITS_BYTES // (4 * n * self._num_logits))
        cache = DynamicCache(config=self.model.config) if width < length - 1 else None
        scored = []
        with torch.inference_mode(), _evaluating(self.model):
            for begin in range(0, length - 1, width):
                part = slice(begin, min(begin + width, length - 1))
                # Padding is on the right, where causal attention does not look: no mask.
                output = self.model(tokens[:, part], past_key_values=cache, use_cache=cache is not None)
                logits = self.vocabulary.usable(output.logits).float()
                chosen = logits.gather(-1, tokens[:, part.start + 1 : part.stop + 1, None])[..., 0]
                scored.append(chosen - logits.logsumexp(-1))
        return torch.cat(scored, dim=1)

    def _load_weights(self, named_tensors: dict[str, torch.Tensor]) -> None:
        copy_weights(self.model, named_tensors)
        self._cache = self._new_cache()  # it may hold a NaN of bad weights, which no mask would hide

    def _tensor(self, array: IntArray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.model.device)


def _spans(lengths: IntArray) -> list[tuple[IntArray, IntArray, IntArray]]:
    """How texts that add so many tokens are attended to: which texts, from which new token on, how many of each.

    The last token of every text is in the first span. Most passes add one token to most texts, while some read a prompt
    or a reply: the last tokens are then a span without padding, and what comes before them is another.
    """
    everyone, longer = np.arange(len(lengths)), np.flatnonzero(lengths > 1)
    if len(longer) in (0, len(lengths)):
        return [(everyone, np.zeros_like(lengths), lengths)]
    return [
        (everyone, lengths - 1, np.ones_like(lengths)),
        (longer, np.zeros_like(longer), lengths[longer] - 1),
    ]


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
    """Run the model without dropout, even while a trainer that shares it has it in training mode."""
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
    accepted = set(inspect.signature(model.forward).parameters)
    if not attends_plainly(model.config) or not {"position_ids", "past_key_values", "logits_to_keep"} <= accepted:
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
