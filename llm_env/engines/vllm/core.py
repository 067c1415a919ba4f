"""All that touches vLLM's insides: one engine core in this process, whose requests grow by tokens chosen elsewhere.

vLLM's scheduler knows no prefill and no decoding: each request has tokens, of which some are computed, and a step
computes what is missing. So tokens can be chosen outside, without a thread and without tricking the sampler. A pass is

    scheduler.schedule()  ->  model_executor.execute_model()  ->  take the logits  ->  scheduler.update_from_output()

and reports that nothing was sampled, as the pass over a part of a long prompt does. The request then has nothing left
to compute, and the scheduler leaves it alone until the agent's token is appended: to the scheduler's request, and to
the model runner's copy of it. Any subset of the requests can therefore act, and others begin or end in the same pass.

The scheduler is in this process. The model runner is, too, unless vLLM divides the weights among processes: what is
done to it is in `inside`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from llm_env.engines.vllm.process import process_untouched, stderr_kept

# vLLM reads these when it is imported, when an engine is made, or later: so they are set once, and stay set.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # with 1, its CPU platform insists on a process of its own
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # the other runner keeps its requests differently
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",  # `max_model_len` is one more than we use, see below
    "VLLM_NO_USAGE_STATS": "1",
}
BATCHED_TOKENS = 8192  # at most so many tokens in a pass; longer prompts take several


class VLLMCore:
    """A model in vLLM, and requests by name.

    Args:
        folder: of the model.
        dtype: of the weights and of the cache.
        num_requests: how many there may be at once; more wait for their turn.
        context: how many tokens each may hold. Memory for all of them is set aside, so that vLLM never has to throw
            one out to make room for another.
        tensor_parallel: how many processes share the weights.
        verbose: let vLLM log.
        **engine_args: what else vLLM's `EngineArgs` takes.

    Attributes:
        vocab_size: the number of logits.
    """

    def __init__(
        self,
        folder: str,
        *,
        dtype: str,
        num_requests: int,
        context: int,
        tensor_parallel: int,
        verbose: bool,
        **engine_args: Any,
    ) -> None:
        os.environ.update(ENVIRONMENT)
        if tensor_parallel > 1:  # on a CPU, vLLM would want a NUMA node for each
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
            os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"  # a forked process hangs where torch has had threads
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO" if verbose else "ERROR")
        if not _alive:
            _trainers_group[:] = [torch.distributed.is_initialized()]
        with process_untouched(), contextlib.nullcontext() if verbose else stderr_kept():
            from vllm.engine.arg_utils import EngineArgs
            from vllm.platforms import current_platform
            from vllm.v1.engine.core import EngineCore
            from vllm.v1.executor.abstract import Executor

            from llm_env.engines.vllm import inside, transfer

            defaults: dict[str, Any] = {
                "tokenizer": folder,
                "skip_tokenizer_init": True,
                "enforce_eager": current_platform.is_cpu(),
                # Memory is set aside by need below, not as a share of what there is: a trainer may live there too.
                "gpu_memory_utilization": 0.01,
                "block_size": 64 if current_platform.is_cpu() else 16,  # on CPU 32 and 128 are 10 % slower
                "max_num_batched_tokens": max(BATCHED_TOKENS, num_requests),
                "use_tqdm_on_load": False,
            }
            arguments = EngineArgs(
                model=folder,
                dtype=dtype,
                max_num_seqs=num_requests,
                tensor_parallel_size=tensor_parallel,
                max_model_len=context + 1,  # the scheduler keeps a place for a sampled token, also if none is sampled
                async_scheduling=False,
                disable_log_stats=True,
                weight_transfer_config=transfer.config(),
                worker_extension_cls=inside.NAME,
                **{**defaults, **engine_args},
            )
            config = arguments.create_engine_config()
            _reserve_cache(config, num_requests, context)
            self._core = EngineCore(config, Executor.get_class(config), log_stats=False)
        _alive.append(self)
        if not all(self._core.model_executor.collective_rpc("stepping_is_possible")):
            self.close()
            raise RuntimeError(
                "this vLLM does not run its V1 model runner, which stepping needs: leave out what you gave as vllm_args"
            )
        self._scheduler: Any = self._core.scheduler
        self._requests: dict[str, Any] = {}
        self._appended: list[tuple[str, list[int]]] = []
        self.vocab_size = int(config.model_config.get_vocab_size())
        self.dtype: torch.dtype = config.model_config.dtype

    def texts(self) -> dict[str, list[int]]:
        """The tokens of each request."""
        return {name: list(request.all_token_ids) for name, request in self._requests.items()}

    def add(self, name: str, tokens: list[int], *, reuse: bool = True) -> None:
        """Add a request; nothing is computed yet.

        Args:
            name: new, never used before.
            tokens: at least one.
            reuse: what an earlier text with the same beginning has left in the cache. Scoring needs every position.
        """
        from vllm.sampling_params import SamplingParams
        from vllm.v1.request import Request

        request = Request(
            request_id=name,
            prompt_token_ids=tokens,
            sampling_params=SamplingParams(
                temperature=0.0, max_tokens=2**30, detokenize=False, skip_reading_prefix_cache=not reuse
            ),
            pooling_params=None,
            block_hasher=self._core.request_block_hasher,
        )
        self._requests[name] = request
        self._scheduler.add_request(request)

    def append(self, names: Sequence[str], token_lists: Sequence[list[int]]) -> None:
        """Append tokens to requests that have none left to compute; nothing is computed yet."""
        for name, tokens in zip(names, token_lists, strict=True):
            self._requests[name].append_output_token_ids(tokens)
            self._appended.append((name, tokens))

    def run(self, names: Sequence[str]) -> torch.Tensor:
        """Compute what is missing of all requests; `[n, V]` float32 logits after the last token of these, in order."""
        result: torch.Tensor | None = None
        places = {name: place for place, name in enumerate(names)}
        while places:
            _, logits, ids = self._pass()
            done = [(row, places.pop(name)) for row, name in enumerate(ids) if name in places and self._is_done(name)]
            if result is None:
                if len(done) == len(names) == len(ids) and all(row == place for row, place in done):
                    return _ordinary(logits)
                result = torch.empty(len(names), logits.shape[-1], device=logits.device)
            if done:
                here, there = torch.tensor(done, device=logits.device).T
                result[there] = _ordinary(logits)[here]
        assert result is not None
        return result

    def remove(self, names: Sequence[str]) -> None:
        """Forget requests, whatever state they are in."""
        from vllm.v1.request import RequestStatus

        if names:
            self._scheduler.finish_requests(list(names), RequestStatus.FINISHED_ABORTED)
            for name in names:
                del self._requests[name]

    def score(
        self, sequences: dict[str, list[int]], usable: Callable[[torch.Tensor], torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Log-probabilities of each sequence's tokens from the second on; the names are those of new requests.

        Args:
            sequences: their tokens, by name.
            usable: which of the logits count, see `Vocabulary.usable`.
        """
        for name, tokens in sequences.items():
            self.add(name, tokens, reuse=False)
        scores = {name: torch.zeros(len(tokens) - 1) for name, tokens in sequences.items()}
        try:
            while waiting := [name for name in sequences if name in self._requests]:
                scheduled, _, ids = self._pass(keep_hidden=True)
                rows, targets, places = [], [], []
                offset = 0
                for name in ids:
                    count = scheduled.num_scheduled_tokens[name]
                    end = self._requests[name].num_computed_tokens
                    scored = sequences[name][end - count + 1 : end + 1]  # one less in the pass over the last part
                    rows.append(torch.arange(offset, offset + len(scored)))
                    targets += scored
                    places.append((name, slice(end - count, end - count + len(scored))))
                    offset += count
                values = self._tell("stepping_score", torch.cat(rows), torch.tensor(targets), usable)
                parts = torch.split_with_sizes(values, [len(part) for part in rows])
                for (name, place), part in zip(places, parts, strict=True):
                    scores[name][place] = part
                self.remove([name for name in waiting if self._is_done(name)])
        finally:
            self.remove([name for name in sequences if name in self._requests])
        return scores

    def load_weights(self, named_tensors: dict[str, torch.Tensor]) -> None:
        """Replace all weights, given by the names of the checkpoint; there must be no requests."""
        assert not self._requests
        from llm_env.engines.vllm.transfer import transfer

        transfer(self._tell, named_tensors, apart=self._core.model_executor.parallel_config.world_size > 1)
        self._tell("stepping_finish_update")
        if not self._core.reset_prefix_cache():
            raise RuntimeError("vLLM did not clear its prefix cache: it would mix keys of the old and the new weights")

    def close(self) -> None:
        """Free the model and the cache."""
        if self not in _alive:
            return
        _alive.remove(self)
        self._requests = {}
        if not _alive:
            with _trainers_group_kept():
                self._core.shutdown()
        else:  # `shutdown` would also tear down torch.distributed, which others in this process use
            self._core.model_executor.shutdown()
            self._scheduler.shutdown()
        self._core = self._scheduler = None

    def _pass(self, keep_hidden: bool = False) -> tuple[Any, torch.Tensor, list[str]]:
        """One pass of vLLM; what it scheduled, and `[n, V]` logits of the requests with these names."""
        from vllm.v1.outputs import ModelRunnerOutput

        scheduled = self._scheduler.schedule()
        appended, self._appended = self._appended, []
        logits, names = self._tell("stepping_pass", appended, scheduled, keep_hidden)
        rows = {name: row for row, name in enumerate(names)}
        self._scheduler.update_from_output(scheduled, ModelRunnerOutput(req_ids=names, req_id_to_index=rows))
        return scheduled, logits, names

    def _tell(self, method: str, *arguments: Any) -> Any:
        """Call a method of vLLM's worker, or of `Inside`, where the weights are; what the first of them says."""
        from vllm import envs

        executor = self._core.model_executor
        try:
            return executor.collective_rpc(method, envs.VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS, arguments)[0]
        except RuntimeError as error:
            if getattr(executor, "is_failed", False):  # it says "cancelled"
                raise RuntimeError("a process that holds a part of the weights has died") from error
            raise

    def _is_done(self, name: str) -> bool:
        request = self._requests[name]
        return bool(request.num_computed_tokens == request.num_tokens)


_alive: list[VLLMCore] = []
_trainers_group: list[bool] = []  # whether torch.distributed was initialised before there was any engine


@contextlib.contextmanager
def _trainers_group_kept() -> Iterator[None]:
    """Shutting down ends all of torch.distributed: keep the default group, if it was there before any engine."""
    destroy = torch.distributed.destroy_process_group
    if any(_trainers_group):
        torch.distributed.destroy_process_group = lambda group=None: None if group is None else destroy(group)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group = destroy


def _ordinary(logits: torch.Tensor) -> torch.Tensor:
    """Float32, contiguous, and no inference tensor, which autograd would refuse as a constant."""
    if logits.dtype == torch.float32 and logits.is_contiguous() and not logits.is_inference():
        return logits
    return torch.empty(logits.shape, device=logits.device).copy_(logits)


def _reserve_cache(config: Any, num_requests: int, context: int) -> None:
    """Let the cache have as many blocks as the requests can need together."""
    model, block = config.model_config, config.cache_config.block_size
    blocks = 1 + num_requests * -(-(context + 1) // block)  # one block is vLLM's own
    config.cache_config.num_gpu_blocks_override = blocks
    heads, layers = model.get_num_kv_heads(config.parallel_config), model.get_num_layers(config.parallel_config)
    # Checked by vLLM, and given explicitly so that it does not measure what is free; the blocks decide what it takes.
    config.cache_config.kv_cache_memory_bytes = (
        blocks * block * heads * 2 * model.get_head_size() * layers * model.dtype.itemsize
    )
