"""What is done where vLLM's model runner is: in this process, or in each of those that hold a part of the weights.

vLLM mixes `Inside` into its worker, and `collective_rpc` calls a method of it in all of them by its name. All compute,
and the first answers.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Sequence
from typing import Any

import torch

from llm_env.engines.vllm.transfer import register_backend

register_backend()  # vLLM imports this module in each process before it looks for the backend
if multiprocessing.current_process().name.startswith("VllmWorker"):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; when to stop, the scheduler's process decides

NAME = f"{__name__}.Inside"
LOGITS_BYTES = 2**28  # at most so much memory for the float32 logits of one part of `stepping_score`


class Inside:
    """Methods of a vLLM worker; `self` is that worker."""

    model_runner: Any
    execute_model: Any
    parallel_config: Any
    is_driver_worker: bool
    stepping_hidden = None

    def stepping_is_possible(self) -> bool:
        """Whether the runner is of the kind that the rest of this class knows."""
        return hasattr(self.model_runner, "input_batch") and hasattr(self.model_runner, "requests")

    def stepping_pass(
        self, appended: Sequence[tuple[str, list[int]]], scheduled: Any, keep_hidden: bool
    ) -> tuple[torch.Tensor, list[str]] | None:
        """One pass over what the scheduler has scheduled, from which nothing is sampled.

        Args:
            appended: tokens that were chosen elsewhere since the last pass, by request.
            scheduled: which tokens of which requests are computed.
            keep_hidden: `stepping_score` comes next.

        Returns:
            `[n, V]` logits of the requests with these names.
        """
        runner = self.model_runner
        self.stepping_append(appended)
        self.execute_model(scheduled)
        state, runner.execute_model_state = runner.execute_model_state, None
        if state is None:
            raise RuntimeError("vLLM scheduled none of the requests that wait")
        if keep_hidden:
            self.stepping_hidden = state.hidden_states
        if not self.is_driver_worker:
            return None
        is_alone = self.parallel_config.world_size == 1
        return state.logits if is_alone else state.logits.cpu(), list(runner.input_batch.req_ids)

    def stepping_append(self, appended: Sequence[tuple[str, list[int]]]) -> None:
        """Let the runner's copies of requests have these tokens, too."""
        batch, states = self.model_runner.input_batch, self.model_runner.requests
        rows = batch.req_id_to_index
        for name, tokens in appended:
            state = states[name]
            begin = state.num_tokens
            end = begin + len(tokens)
            state.output_token_ids.extend(tokens)
            row = rows.get(name)
            if row is not None:  # else it did not take part in the last pass, and is copied when it next does
                batch.token_ids_cpu[row, begin:end] = tokens
                batch.is_token_ids[row, begin:end] = True
                batch.num_tokens_no_spec[row] = end

    def stepping_score(
        self, rows: torch.Tensor, targets: torch.Tensor, usable: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor | None:
        """Log-probabilities of tokens after the `rows` of the last pass, in parts that fit.

        Args:
            rows: of its hidden states.
            targets: a token for each.
            usable: which of the logits count, see `Vocabulary.usable`.
        """
        hidden: Any = self.stepping_hidden
        self.stepping_hidden = None
        model = self.model_runner.get_model()
        most = max(1, LOGITS_BYTES // (4 * self.model_runner.model_config.get_vocab_size()))
        parts = [torch.zeros(0)]
        with torch.inference_mode():
            for begin in range(0, len(rows), most):
                part = slice(begin, begin + most)
                logits = model.compute_logits(hidden[rows[part].to(hidden.device)])
                if self.is_driver_worker:  # the others have given theirs
                    logits = usable(logits).float()
                    chosen = logits.gather(-1, targets[part, None].to(logits.device))[:, 0]
                    parts.append((chosen - logits.logsumexp(-1)).cpu())
        return torch.cat(parts) if self.is_driver_worker else None

    def stepping_finish_update(self) -> None:
        """After new weights: nothing of the old ones stays."""
        self.stepping_repack_tied_head()
        for cache in self.model_runner.kv_caches:
            cache.zero_()  # a NaN of bad weights would stay: attention multiplies what it masks by 0, which gives NaN

    def stepping_repack_tied_head(self) -> None:
        """On CPU, vLLM computes with repacked copies of weights, and an update forgets that of a tied head."""
        head = getattr(self.model_runner.get_model(), "lm_head", None)
        if hasattr(head, "cpu_linear"):
            from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

            dispatch_cpu_unquantized_gemm(head, remove_weight=False)
