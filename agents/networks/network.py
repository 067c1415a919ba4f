"""Actor, critic and reference over one causal language model, as TensorDict modules."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar, cast

import torch
from tensordict import TensorDictBase
from tensordict.nn import (
    InteractionType,
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictSequential,
)
from torch import nn

from agents.config import ModelConfig
from agents.config.schema import Autocast
from agents.networks.adapters import (
    ACTOR,
    CRITIC,
    REFERENCE,
    adapted_layers,
    adapter_parameters,
    add_adapters,
    copy_adapter,
    is_adapted,
)
from agents.networks.backbone import Backbone, recomputing
from agents.networks.distribution import TokenDistribution
from agents.networks.few_bits import keep_in_few_bits
from agents.networks.prepared import prepare
from agents.networks.ragged import can_read
from agents.networks.ranks import ALONE, Ranks, together
from agents.networks.sharding import all_whole, like, shard
from agents.networks.value import FittedValueHead, ValueHead
from agents.rollouts.hints import HINTS
from agents.rollouts.masks import allowed_in
from llm_env.engines import merged_weights
from llm_env.tokens.vocabulary import Vocabulary
from rewards.weights import cast_weights, lent_to

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tensor = torch.Tensor
P = ParamSpec("P")
T = TypeVar("T")


class PolicyHead(ProbabilisticTensorDictModule):  # type: ignore[misc]
    """From hidden states to the distribution of tokens, or to the one already made of them, if the input brings it.

    What a task forbids has no probability: the input says it as a batch does, or in an environment's `action_mask`.
    A `distribution` in the input has computed its log-probs once, with their graph, and need not do it again.
    """

    def get_dist(self, tensordict: TensorDictBase) -> TokenDistribution:
        """The distribution."""
        made: TokenDistribution | None = tensordict.get_non_tensor("distribution", default=None)
        if made is not None:
            return made
        distribution = cast(TokenDistribution, super().get_dist(tensordict))
        distribution.allowed = allowed_in(tensordict)
        return distribution


class Network(nn.Module):
    """A policy, its critic, and the reference it is held to.

    What TorchRL needs is here by TorchRL's names. `actor` and `critic` go from tokens to a distribution and to a value,
    and work in any TorchRL loss. Where both share a backbone, `encode` runs it once, and `actor_head` and `critic_head`
    go on from there. A text is read once for all its steps:

        tokens          [B, L]      whole texts, padded on the right
        state_position  [B, T]      where in `tokens` the last token lies that each choice was made after
        mask            [B, T]      real steps
        hints           [B, T, K]   what the task tells the critic about each state, if the network has `hints`
        hidden          [B, T, H]   written by `encode`; with a critic of its own, `critic_hidden` too
        state_value     [B, T, 1]   written by the critic

    Args:
        model: a causal language model of transformers. It is used as it is (or, with LoRA, wrapped), not copied. On the
            device "meta", it is taken for one that has passed the checks: see `shard`.
        config: how.
        temperature: of the policy.
        vocabulary: the tokens that the policy chooses among, those of an environment or an engine. By default there is
            one for each row of the output layer, of which a model may have more than its tokenizer has tokens.
        reference: keep the model as it is now, to compare with: as a frozen copy, or with LoRA as the model without its
            adapters.
        hints: how many numbers the task tells the critic about each state (`Task.hints`).

    Attributes:
        has_reference: whether there is a model to compare with.
        num_hints: how many numbers the critic is told about each state.
        ranks: the processes that have a part of it each, see `shard`; mostly this one alone.

    Examples:
        >>> from llm_env.models import load_model
        >>> from tensordict import TensorDict
        >>> network = Network(load_model("tiny"))
        >>> data = TensorDict({"tokens": torch.tensor([[5, 6, 7]]), "state_position": torch.tensor([[0, 1]])}, [1])
        >>> network.actor.get_dist(data).log_prob(torch.tensor([[6, 7]])).shape
        torch.Size([1, 2])
        >>> network.critic(data)["state_value"].shape
        torch.Size([1, 2, 1])
    """

    def __init__(
        self,
        model: Any,
        config: ModelConfig = ModelConfig(),  # noqa: B008
        temperature: float = 1.0,
        vocabulary: Vocabulary | None = None,
        *,
        reference: bool = False,
        hints: int = 0,
    ) -> None:
        super().__init__()
        self.ranks = ALONE
        self.has_reference = reference
        self.num_hints = hints
        self.temperature = temperature
        self.vocabulary = vocabulary
        self.head = model.get_output_embeddings()
        prepare(model)
        lora, separate = config.lora.rank > 0, config.critic == "separate"
        self._with_adapters: list[Any] = []
        if config.gradient_checkpointing:
            again = {"use_reentrant": False, "context_fn": lambda: recomputing(self._with_adapters)}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=again)
        width: int = self.head.weight.shape[1]
        self.width = width
        body = model.base_model
        packs = config.packing and not config.compile and (self.head.weight.is_meta or can_read(body))
        self.config = config = dataclasses.replace(config, packing=packs)
        how: dict[str, Any] = {"autocast": config.in_bfloat16, "compile": config.compile, "packing": packs}
        self._reference: Any = None
        if reference and not lora:
            self._reference = copy.deepcopy(model).eval().requires_grad_(False)
            if config.reference_dtype:
                cast_weights(self._reference, getattr(torch, config.reference_dtype))
            if config.frozen_bits:
                keep_in_few_bits(self._reference, config.frozen_bits, but=self._reference.get_output_embeddings())
            if config.offload_reference:
                self._reference.to("cpu")
        critic_body = copy.deepcopy(body) if separate and not lora else None
        if lora:
            model = add_adapters(model, config.lora, [ACTOR, CRITIC] if separate else [ACTOR])
            if config.frozen_bits:
                keep_in_few_bits(model, config.frozen_bits, but=self.head)
        self.model = model
        self._with_adapters = adapted_layers(model)
        self._reference_adapter: str | None = None
        self.backbone = Backbone(model, body, adapter=ACTOR, **how)
        self.critic_backbone: Backbone | None = None
        if separate:
            own = (model, body) if critic_body is None else (critic_body, critic_body)
            self.critic_backbone = Backbone(*own, adapter=CRITIC, **how)
        head = FittedValueHead if config.critic == "fitted" else ValueHead
        self.value_head = head(width, hints).to(self.head.weight.device)
        self._build_operators()

    def _build_operators(self) -> None:
        reads = ["tokens", "state_position"]
        self.encoder = TensorDictModule(self.backbone, in_keys=reads, out_keys=["hidden"])
        self.actor_head = PolicyHead(
            in_keys={"hidden": "hidden", "mask": "mask"},
            out_keys=["action"],
            distribution_class=TokenDistribution,
            distribution_kwargs={
                "head": self.head,
                "temperature": self.temperature,
                "dtype": self.compute_dtype,
                "vocabulary": self.vocabulary,
            },
            return_log_prob=True,
            default_interaction_type=InteractionType.RANDOM,
        )
        self.actor = ProbabilisticTensorDictSequential(self.encoder, self.actor_head)
        self.critic_encoder, key = self.encoder, "hidden"
        if self.critic_backbone is not None:
            key = "critic_hidden"
            self.critic_encoder = TensorDictModule(self.critic_backbone, in_keys=reads, out_keys=[key])
        reads = [key, HINTS] if self.num_hints else [key]
        self.critic_head = TensorDictModule(self.value_head, in_keys=reads, out_keys=["state_value"])
        self.critic = TensorDictSequential(self.critic_encoder, self.critic_head)

    @property
    def num_tokens(self) -> int:
        """How many tokens the policy chooses among."""
        return int(self.head.weight.shape[0]) if self.vocabulary is None else self.vocabulary.size

    @property
    def compute_dtype(self) -> torch.dtype:
        """What the output layer multiplies in."""
        return torch.bfloat16 if self.config.in_bfloat16 else cast(torch.dtype, self.head.weight.dtype)

    @together
    def set_autocast(self, choice: Autocast) -> None:
        """Compute in bfloat16 from now on, or no longer."""
        self.config = dataclasses.replace(self.config, autocast=choice)
        for backbone in (self.backbone, self.critic_backbone):
            if backbone is not None:
                backbone.autocast = self.config.in_bfloat16
        self.actor_head.distribution_kwargs["dtype"] = self.compute_dtype

    @property
    def shared(self) -> bool:
        """Whether actor and critic have one backbone."""
        return self.critic_backbone is None

    def encode(self, data: TensorDictBase, *, actor: bool = True, critic: bool = True) -> TensorDictBase:
        """Write the hidden states that the heads need; one pass serves both if they share."""
        if actor or (critic and self.shared):
            self.encoder(data)
        if critic and not self.shared:
            self.critic_encoder(data)
        return data

    @property
    def fits_values(self) -> bool:
        """Whether the critic is computed from a batch (`fit_values`) instead of following a gradient."""
        return isinstance(self.value_head, FittedValueHead)

    @together
    def fit_values(self, read: Tensor, target: Tensor, fold: Tensor) -> Tensor:
        """Compute the critic anew; see `FittedValueHead.fit`."""
        assert isinstance(self.value_head, FittedValueHead)
        device = self.head.weight.device
        return self.value_head.fit(read.to(device), target.to(device), fold.to(device))

    @torch.no_grad()
    def value_of(self, data: TensorDictBase) -> Tensor:
        """`[B, T, 1]` values of encoded states."""
        return cast(Tensor, self.critic_head(data)["state_value"])

    def policy(self) -> ProbabilisticTensorDictSequential:
        """A policy for `TorchRLTokenEnv`: from `tokens` and `length` to the next `action`.

        It chooses what `action_mask` allows, if there is one. It reads the whole text at every step: simple, and slow
        on long ones. A collector has engines for that.
        """

        class NextState(nn.Module):
            def __init__(self, backbone: Backbone) -> None:
                super().__init__()
                self.backbone = backbone

            def forward(self, tokens: Tensor, length: Tensor) -> Tensor:
                """`[n, H]` from `[n, context]` tokens and `[n, 1]` lengths."""
                return cast(Tensor, self.backbone(tokens, length - 1)[:, 0])

        head = copy.copy(self.actor_head)
        head.in_keys, head.dist_keys = ["hidden"], ["hidden"]
        encoder = TensorDictModule(NextState(self.backbone), in_keys=["tokens", "length"], out_keys=["hidden"])
        return ProbabilisticTensorDictSequential(encoder, head)

    # Several processes.

    def shard(self, ranks: Ranks, device: torch.device) -> None:
        """Leave each of several processes a part of the weights, on a device. From now on they must `compute` together.

        The network of a process but the first may have been made of a model without weights, on the device "meta".
        """
        if ranks.size == 1:
            return
        self.ranks = ranks
        ranks.parts["network"] = self
        head, fitted = [self.value_head], self.fits_values
        kept, apart = (head, []) if fitted else ([], head)
        shard(self, ranks, device, apart=apart, kept=kept, computes=self._compute.__name__)

    @together
    def compute(self, function: Callable[Concatenate[Network, P], T], *args: P.args, **options: P.kwargs) -> T:
        """Call a function of the network that needs its weights, in all processes that have a part of them."""
        return self._compute(function, *args, **options)

    def _compute(self, function: Callable[Concatenate[Network, P], T], *args: P.args, **options: P.kwargs) -> T:
        return function(self, *args, **options)

    # The reference.

    def reference_at_hand(self) -> AbstractContextManager[None]:
        """Have the reference where the policy is for as long as texts are read, if it is kept elsewhere."""
        return lent_to(self.head.weight.device, self._reference) if self.config.offload_reference else nullcontext()

    @torch.no_grad()
    def reference_log_prob(self, data: TensorDictBase) -> Tensor:
        """`[B, T]` log-probs of `action` under the reference, which chooses among the same tokens."""
        if not self.has_reference:
            raise ValueError("there is no reference model: make the network with reference=True")
        model = self.model if self._reference is None else self._reference
        body = self.backbone.body if self._reference is None else self._reference.base_model
        head = self.head if self._reference is None else self._reference.get_output_embeddings()
        how: dict[str, Any] = {"autocast": self.config.in_bfloat16, "packing": self.config.packing}
        backbone = Backbone(model, body, adapter=self._reference_adapter, **how)
        dtype = torch.bfloat16 if self.config.in_bfloat16 else head.weight.dtype
        training = model.training
        model.eval()  # dropout belongs to the policy's training only
        mask, allowed = data.get("mask"), allowed_in(data)
        with self.reference_at_hand():
            try:
                hidden = backbone(data["tokens"], data["state_position"])
            finally:
                model.train(training)
            reference = TokenDistribution(hidden, head, mask, self.temperature, dtype, self.vocabulary, allowed)
            return reference.log_prob(data["action"])

    @together
    @torch.no_grad()
    def refresh_reference(self) -> None:
        """Let the present policy be the reference from now on."""
        if self._reference is None:
            copy_adapter(self.model, ACTOR, REFERENCE)
            self._reference_adapter = REFERENCE
        else:
            for ours, theirs in zip(self._reference.parameters(), self.model.parameters(), strict=True):
                ours.copy_(theirs)

    # Weights.

    def actor_parameters(self) -> dict[str, nn.Parameter]:
        """What the actor's optimizer trains: the policy, and with it a backbone that the critic shares."""
        if is_adapted(self.model):
            return adapter_parameters(self.model, ACTOR)
        return dict(self.model.named_parameters())

    def critic_parameters(self) -> dict[str, nn.Parameter]:
        """What the critic's optimizer trains: the value head, and a backbone of its own; nothing if it is fitted."""
        if self.fits_values:
            return {}
        own: dict[str, nn.Parameter] = {}
        if self.critic_backbone is not None:
            adapted = is_adapted(self.model)
            own = adapter_parameters(self.model, CRITIC) if adapted else dict(self.critic_backbone.named_parameters())
        return own | {f"value_head.{name}": weight for name, weight in self.value_head.named_parameters()}

    @together
    def weights(self) -> dict[str, Tensor]:
        """Everything that training changes, by name, as a checkpoint needs it. Not copied.

        Where processes have parts of them, the first gets copies of whole weights, and the others nothing.
        """
        return all_whole(self._learned(), self.ranks)

    def _learned(self) -> dict[str, Tensor]:
        of_head = {f"value_head.{name}": kept for name, kept in self.value_head.state_dict(keep_vars=True).items()}
        critic = self.critic_parameters() | of_head
        parts: dict[str, Mapping[str, Tensor]] = {"actor": self.actor_parameters(), "critic": critic}
        if self._reference_adapter is not None:
            parts["reference"] = adapter_parameters(self.model, REFERENCE)
        elif self._reference is not None and self.config.refresh_reference:
            parts["reference"] = dict(self._reference.named_parameters())
        return {f"{part}.{name}": weight.detach() for part, named in parts.items() for name, weight in named.items()}

    @together
    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Put back what `weights` gave."""
        if any(name.startswith("reference.") for name in weights) and self._reference is None:
            self.refresh_reference()  # it had been refreshed: make the adapter
        ours = self._learned()
        if ours.keys() != weights.keys():
            odd = sorted(ours.keys() ^ weights.keys())[:5]
            raise ValueError(f"these weights are not of this network: {', '.join(odd)} are in one of the two only")
        for name, weight in ours.items():
            weight.copy_(like(weights[name], weight, self.ranks))

    def engine_model(self) -> Any:
        """The model for an engine that shares its weights: adapters, if any, are those of the actor."""
        return self.model.get_base_model() if is_adapted(self.model) else self.model

    @together
    def engine_weights(self) -> dict[str, Tensor]:
        """The policy's weights for an engine with a copy of its own, adapters merged, by the plain model's names."""
        return all_whole(merged_weights(self.model), self.ranks)

    def export(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write the policy as an ordinary Hugging Face folder, adapters merged."""
        state = {name: weight.contiguous().clone() for name, weight in self.engine_weights().items()}
        self.engine_model().save_pretrained(folder, state_dict=state)
        tokenizer.save_pretrained(folder)
