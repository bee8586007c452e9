"""The EDLM models: denoiser, autoregressive model, energy, and the three put together.

Shapes: N rows, K candidates, L length, V vocabulary, M selected positions (flat indices into N * L).
"""

import copy
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast, MaskedLMOutput, SequenceClassifierOutput
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, can_return_tuple

from .adapter import CONFIG as ADAPTER_CONFIG
from .adapter import DESCRIPTION, energy_fields, find_adapter, load_adapter, save_adapter
from .backbone import CACHE, Backbone, Head, initialize, log_probs, position_chunks, prepend_bos, suppress, twin
from .configuration_edlm import EDLMConfig
from .energies import Energy, EnergyMixin, check_vocabulary, network_energy
from .energy_network import EnergyNetwork
from .generation_edlm import EDLMGenerationConfig, EDLMGenerationMixin
from .likelihood import EDLMLikelihoodMixin
from .proposal import ProposalMixin
from .schedule import conditioning
from .vocabulary import draw_projected

ADAPTER_FOLDER = "energy"  # within the folder of a whole model
WHERE = ("cache_dir", "force_download", "local_files_only", "token", "revision")  # of the files of a model
UNSUPPORTED = ("inputs_embeds", "output_attentions", "output_hidden_states")  # what PEFT names to every model, as None


def library_forward(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A `forward` with the library's `return_dict`; what it does not support is an error only where it is asked for."""

    @functools.wraps(forward)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        for name in UNSUPPORTED:
            value = kwargs.pop(name, None)
            if value is not None and value is not False:
                raise ValueError(f"{type(self).__name__} does not support {name}, got {_shown(value)}")
        return forward(self, *args, **kwargs)

    return can_return_tuple(checked)


def mean_loss(loss_M: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
    """The mean where a label is not -100; or, of the number of labels that one optimizer step is made of, this batch's
    part of their mean: the library's Trainer asks for it, so that accumulation gives the gradient of the large batch.
    """
    counts_M = labels.flatten() != -100
    number = counts_M.sum() if num_items_in_batch is None else num_items_in_batch
    return loss_M.where(counts_M, 0.0).sum() / number


class EDLMPreTrainedModel(PreTrainedModel):
    config_class = EDLMConfig
    main_input_name = "input_ids"
    output_modalities = ("text",)  # the library's pipelines show it
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _no_split_modules = ["Block"]
    accepts_loss_kwargs = True  # each forward with labels takes `num_items_in_batch`: the Trainer need not guess
    to: Callable[..., Self]  # type: ignore[assignment]  # the library's has lost its type

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        initialize(module, self.config.initializer_range)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Self | Any:
        """As in the library, but a folder that lacks weights is an error and not a random network."""
        model, info = cast(Any, super().from_pretrained(*args, output_loading_info=True, **kwargs))
        if missing := sorted(info["missing_keys"]):
            names = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
            raise ValueError(f"{args[0] if args else 'the checkpoint'} lacks {len(missing)} weights: {names}")
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory: str | Path, is_main_process: bool = True, **kwargs: Any) -> None:
        """As in the library, into a folder that has no other weights of the model afterwards.

        Raises:
            ValueError: the folder holds an adapter, which the library would load over these weights.
        """
        forms = [Path(save_directory) / name for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)]
        if is_main_process and not self._hf_peft_config_loaded:  # with PEFT's adapter in it, that alone is saved
            check_folder(save_directory)
        before = {path: path.stat().st_mtime_ns for path in forms if path.exists()}
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if is_main_process and all(path.exists() for path in forms):  # the library loads the first one, new or not
            for path in forms:
                if path.stat().st_mtime_ns == before.get(path):
                    path.unlink()

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Module:
        """The vocabulary is of the mask token, of the energy and of every checkpoint: it cannot be resized."""
        if new_num_tokens not in (None, self.config.vocab_size) or pad_to_multiple_of is not None:
            raise ValueError(
                f"resize_token_embeddings cannot change a vocabulary of {self.config.vocab_size} tokens with the mask, "
                f"got new_num_tokens={new_num_tokens}, pad_to_multiple_of={pad_to_multiple_of}: make the model of an "
                f"EDLMConfig with another vocab_size"
            )
        return self.get_input_embeddings()

    def _cross_entropy(self, logits: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
        log_p_MV = log_probs(logits, self.config.mask_token_id).flatten(0, -2)
        loss_M = nn.functional.nll_loss(log_p_MV, labels.flatten().long(), reduction="none")
        return mean_loss(loss_M, labels, num_items_in_batch)

    def noise(self, t: Tensor | float | None, like: Tensor) -> Tensor | None:
        """What the network is told of the time: None without time conditioning, else (N,)."""
        if not self.config.time_conditioning:
            return None
        if t is None:
            raise ValueError("t must be given to a model with time_conditioning=True, got None")
        if not isinstance(t, Tensor):  # filled there: a copy would wait for the device
            t = torch.full((), t, dtype=torch.float32, device=like.device)
        return conditioning(t.to(like.device, torch.float32).expand(like.shape[0]))


class EDLMForMaskedLM(EDLMPreTrainedModel, EnergyMixin, EDLMGenerationMixin, EDLMLikelihoodMixin, ProposalMixin):
    """The denoiser alone: a masked diffusion language model (MDLM, arXiv 2406.07524), with `generate()`."""

    base_model_prefix = "denoiser"  # where a whole EDLM keeps it
    generation_config_class = EDLMGenerationConfig
    _keys_to_ignore_on_load_unexpected = [r"^energy_model\."]
    energy_type, scorer = "none", None

    def __init__(self, config: EDLMConfig) -> None:
        _check_architecture(config, "EDLMForMaskedLM", "EDLMModel")
        if config.energy_type != "none" or config.energy_config is not None:
            config = config.for_denoiser()
        super().__init__(config)
        self.backbone = Backbone(config)
        self.head = Head(config, config.vocab_size)
        self.post_init()

    @property
    def denoiser(self) -> "EDLMForMaskedLM":
        return self

    def get_input_embeddings(self) -> nn.Embedding:
        return self.backbone.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.backbone.embedding = value

    def get_output_embeddings(self) -> nn.Linear:
        return self.head.linear

    @library_forward
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        t: Tensor | float | None = None,
        positions: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> MaskedLMOutput:
        """Raw logits of the clean token at every position.

        Args:
            input_ids: (N, L) with masks. attention_mask: (N, L), 0 for padding.
            t: times in [0, 1], scalar or (N,); only read by a model with time conditioning.
            positions: (M,) flat indices into N * L: project only these.
            labels: (N, L), -100 where no loss is taken; the loss is the mean cross-entropy.
            num_items_in_batch: what the sum is divided by in place of the number of labels, see `mean_loss`.
        Returns:
            `logits` (N, L, V), or (M, V) when positions are given.
        """
        logits = self.head(*self.encode(input_ids, t, attention_mask, position_ids), positions)
        loss = None
        if labels is not None:
            labels = labels if positions is None else labels.flatten()[positions]
            loss = self._cross_entropy(logits, labels, num_items_in_batch)
        return MaskedLMOutput(loss=loss, logits=logits)

    def encode(
        self,
        xt_NL: Tensor,
        t: Tensor | float | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        where_NL: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The last hidden states (N, L, D), where they are needed, and the conditioning: what `head` projects from."""
        noise_N = self.noise(t, xt_NL)
        if not self.config.prepend_bos:
            return self.backbone(xt_NL, noise_N, attention_mask, position_ids, where_NL=where_NL)
        xt_NL, attention_mask = prepend_bos(xt_NL, self.config.bos_token_id, attention_mask)
        if position_ids is not None:
            position_ids = nn.functional.pad(position_ids + 1, (1, 0))
        if where_NL is not None:
            where_NL = nn.functional.pad(where_NL, (1, 0))
        hidden, cond = self.backbone(xt_NL, noise_N, attention_mask, position_ids, where_NL=where_NL)
        return hidden[:, 1:], cond

    def logit_chunks(
        self, xt_NL: Tensor, where_NL: Tensor, t: Tensor | float | None = None, attention_mask: Tensor | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        encoded = self.encode(xt_NL, t, attention_mask, where_NL=where_NL)
        for chunk_M in position_chunks(where_NL.flatten().nonzero()[:, 0], self.config.vocab_size):
            chunk_M = chunk_M.to(xt_NL.device, non_blocking=True)
            yield chunk_M, suppress(self.head(*encoded, chunk_M), self.config.mask_token_id)

    def draw_chunks(
        self,
        xt_NL: Tensor,
        where_NL: Tensor,
        uniforms_at: Callable[[Tensor], Tensor],
        t: Tensor | float | None = None,
        attention_mask: Tensor | None = None,
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        if not self.head.is_large:
            yield from super().draw_chunks(xt_NL, where_NL, uniforms_at, t, attention_mask)
            return
        encoded, linear = self.encode(xt_NL, t, attention_mask, where_NL=where_NL), self.head.linear
        where_M = where_NL.flatten().nonzero()[:, 0].to(xt_NL.device, non_blocking=True)
        drawn = draw_projected(
            self.head.select(*encoded, where_M),
            linear.weight,
            linear.bias,
            self.config.mask_token_id,
            uniforms_at(where_M),
        )
        yield where_M, *drawn

    def log_p_x0(self, xt: Tensor, t: Tensor | float | None = None, attention_mask: Tensor | None = None) -> Tensor:
        """SUBS log-probabilities (N, L, V), float32: no mass on the mask token, unmasked tokens carry over.

        Source: the SUBS parameterization of MDLM, arXiv 2406.07524.
        """
        xt = xt.long()
        log_p_NLV = log_probs(self.head(*self.encode(xt, t, attention_mask)), self.config.mask_token_id)
        carried_NLV = torch.full_like(log_p_NLV, float("-inf")).scatter_(-1, xt[..., None], 0.0)
        return torch.where((xt == self.config.mask_token_id)[..., None], log_p_NLV, carried_NLV)


class EDLMForCausalLM(EDLMPreTrainedModel, GenerationMixin):
    """The same blocks, causal: the autoregressive baseline and the network of the AR and coAR energies.

    As any causal language model of the library it predicts token i+1 at position i; the first token of a text is
    predicted from `config.bos_token_id`, which the caller puts in front.
    """

    base_model_prefix = "energy_model"
    _keys_to_ignore_on_load_unexpected = [r"^denoiser\."]

    def __init__(self, config: EDLMConfig) -> None:
        config = _energy_part(config, ("ar", "coar"), "EDLMForCausalLM")
        super().__init__(config)
        self.backbone = Backbone(config, is_causal=True)
        self.head = Head(config, config.vocab_size)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.backbone.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.backbone.embedding = value

    def get_output_embeddings(self) -> nn.Linear:
        return self.head.linear

    @library_forward
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        positions: Tensor | None = None,
        logits_to_keep: int = 0,
        num_items_in_batch: Tensor | int | None = None,
    ) -> CausalLMOutputWithPast:
        """Raw logits (N, L, V) of the next token; `positions` (M,), flat, or `logits_to_keep` project fewer rows.

        `labels` (N, L) are shifted inside, as in every causal language model of the library; -100 is left out, and
        `num_items_in_batch` is what the sum is divided by in place of their number, see `mean_loss`. They need the
        logits of all positions. The keys and values of earlier tokens are `cache` to transformers 5.24 and newer,
        `past_key_values` to older ones: both are taken, and the output has the library's own name.
        """
        if cache is not None and past_key_values is not None:
            raise ValueError("cache and past_key_values are two names of one argument: give one of them")
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        hidden, cond = self.encode(input_ids, attention_mask, position_ids, cache)
        if logits_to_keep:
            hidden = hidden[:, -logits_to_keep:]
        logits = self.head(hidden, cond, positions)
        loss = None
        if labels is not None:
            if positions is not None or logits_to_keep:
                raise ValueError("labels need all logits: leave positions and logits_to_keep out")
            loss = self._cross_entropy(logits[:, :-1], labels[:, 1:], num_items_in_batch)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})  # type: ignore[arg-type]

    def encode(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The last hidden states (N, L, D) and the conditioning, from which `head` projects what is needed."""
        return self.backbone(input_ids, None, attention_mask, position_ids, cache)

    def generate(
        self, inputs: Tensor | None = None, generation_config: GenerationConfig | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """The library's autoregressive generation. No text holds the mask token, and where neither the call nor a
        configuration has another `bos_token_id`, that of the model starts it.
        """

        def asked(name: str) -> Any:  # in the library's order: what is None stands back
            own = vars(self.generation_config)
            sources = kwargs, own if generation_config is None else vars(generation_config), own
            return next((source[name] for source in sources if source.get(name) is not None), None)

        bos, mask = asked("bos_token_id"), self.config.mask_token_id
        changes = {"bos_token_id": self.config.bos_token_id if bos is None else bos}
        changes["suppress_tokens"] = [mask, *(asked("suppress_tokens") or ())]
        if generation_config is None:
            kwargs |= changes
        else:  # in a copy: the library warns of a configuration beside arguments
            kwargs = {name: value for name, value in kwargs.items() if name not in changes}
            generation_config = copy.deepcopy(generation_config)
            generation_config.update(**changes)
        return super().generate(inputs, generation_config, *args, **kwargs)

    def adjust_generation_fn(self, *args: Any, **kwargs: Any) -> None:
        """Called by `from_pretrained`. The library would put the custom_generate/ of the repo, which is the sampler for
        masked models, in place of `generate()`; it does so only where remote code is trusted.
        """
        super().adjust_generation_fn(*args, **kwargs | {"trust_remote_code": False})  # type: ignore[misc]


class EDLMEnergyModel(EDLMPreTrainedModel):
    """The NCE energy network alone: one scalar per sequence, low for what the data would say."""

    base_model_prefix = "energy_model"
    _keys_to_ignore_on_load_unexpected = [r"^denoiser\."]

    def __init__(self, config: EDLMConfig, backbone: Backbone | None = None) -> None:
        config = _energy_part(config, ("nce",), "EDLMEnergyModel")
        super().__init__(config)
        self.network = EnergyNetwork(config, _keep(backbone))
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.network.backbone.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.network.backbone.embedding = value

    @classmethod
    def from_denoiser(cls, denoiser: EDLMForMaskedLM, share_weights: bool = False, **changes: Any) -> "EDLMEnergyModel":
        """A fresh energy that starts from the denoiser's blocks.

        Args:
            share_weights: the blocks' weights are the denoiser's own, not copies: to be trained by an adapter
                (`adapter.add_lora`), never themselves.
            changes: to its configuration.
        Raises:
            ValueError: the changes do not fit the denoiser's weights.
        """
        fields = denoiser.config.fields()
        config = EDLMConfig(**fields | {"energy_type": "nce", "energy_config": None} | changes)
        num_layers, theirs = config.energy_num_layers or config.num_hidden_layers, denoiser.state_dict()
        if num_layers > len(denoiser.backbone.blocks):
            raise ValueError(f"{changes} do not fit the denoiser, which has {len(denoiser.backbone.blocks)} blocks")
        backbone = None
        if share_weights:
            backbone = twin(denoiser.backbone)
            backbone.blocks = backbone.blocks[:num_layers]
            for module in backbone.modules():
                if isinstance(module, nn.Dropout):
                    module.p = config.dropout
        model = cls(config, backbone).to(denoiser.device, denoiser.dtype)  # before it takes weights: none is rounded
        own = model.network.state_dict()
        start = {k: theirs.get(k) for k in own if k.startswith(("backbone.", "head.norm."))}
        if unfit := [k for k, v in start.items() if v is None or v.shape != own[k].shape]:
            raise ValueError(f"{changes} do not fit the denoiser, which has no such {unfit[0]}")
        if share_weights:
            start = {k: v for k, v in start.items() if k.startswith("head.")}
        model.network.load_state_dict(start, strict=False)
        with torch.no_grad():  # the mean of both embeddings: a token that was never masked looks as it did
            half = torch.eye(model.config.hidden_size) / 2
            model.network.projection.weight.copy_(torch.cat((half, half), dim=1))
        return model

    @classmethod
    def from_adapter(
        cls, denoiser: EDLMForMaskedLM, path: str | Path, merge: bool = False, **where: Any
    ) -> "EDLMEnergyModel":
        """The energy of an adapter over this denoiser, which stays as it is.

        Args:
            path: folder or Hub repo. where: `subfolder`, `revision`, `token`, `cache_dir`, `local_files_only`.
            merge: give it weights of its own, with the adapter added in, that need no PEFT any more.
        Raises:
            ValueError: it was trained over another denoiser. OSError: there is no adapter. ImportError: no PEFT.
        """
        if (folder := find_adapter(path, **where)) is None:
            raise OSError(f"{path} holds no adapter of an energy: no {DESCRIPTION} there")
        fields = energy_fields(folder, denoiser)
        adapted = load_adapter(cls.from_denoiser(denoiser, share_weights=not merge, **fields), folder)
        energy = adapted.merge_and_unload() if merge else adapted.get_base_model()
        return energy.to(denoiser.device, denoiser.dtype).eval()

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As in the library, for a network with weights of its own."""
        if any(".modules_to_save." in name for name, _ in self.named_parameters(remove_duplicate=False)):
            raise ValueError("this energy is an adapter: save the EDLMModel that has it, or merge it (from_adapter)")
        super().save_pretrained(*args, **kwargs)

    @library_forward
    def forward(
        self,
        input_ids: Tensor,
        xt: Tensor | None = None,
        t: Tensor | float | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> SequenceClassifierOutput:
        """Energies of candidates.

        Args:
            input_ids: (N, L) candidates, x0 or xs. xt: (N, L) the masked state they complete. t: its time (for a
                step energy: the time of xs), scalar or (N,).
            labels: (N,), 1 for data and 0 for what the denoiser has drawn: the loss is that of noise contrastive
                estimation, softplus(E) and softplus(-E), mean over rows. num_items_in_batch: see `mean_loss`.
        Returns:
            `logits` (N, 1) float32, the energies.
        """
        if xt is None:
            raise ValueError("xt must be given: an energy scores a completion of xt, got None")
        energy_N = self.network(input_ids, xt, self.noise(t, input_ids), attention_mask)
        loss = None
        if labels is not None:
            loss_N = nn.functional.softplus(torch.where(labels.bool(), energy_N, -energy_N))
            loss = mean_loss(loss_N, labels, num_items_in_batch)
        return SequenceClassifierOutput(loss=loss, logits=energy_N[:, None])


class EDLMModel(EDLMPreTrainedModel, EnergyMixin, EDLMGenerationMixin, EDLMLikelihoodMixin):
    """Denoiser and energy: p(x0 | xt) = mu(x0 | xt) exp(-E(x0, xt, t)) / Z(xt), the residual form of EDLM."""

    base_model_prefix = "denoiser"
    generation_config_class = EDLMGenerationConfig
    denoiser: EDLMForMaskedLM
    energy_model: PreTrainedModel | None

    def __init__(
        self, config: EDLMConfig, denoiser: EDLMForMaskedLM | None = None, energy_model: PreTrainedModel | None = None
    ) -> None:
        _check_architecture(config, "EDLMModel", "EDLMForMaskedLM")
        if config.energy_type != "none" and config.energy_config is None:
            config.energy_config = {}  # says that the weights of config are those of a whole EDLM
        super().__init__(config)
        self.denoiser = EDLMForMaskedLM(config) if denoiser is None else _keep(denoiser)
        self.energy_model = self._new_energy(config) if energy_model is None else _keep(energy_model)
        self.post_init()

    @staticmethod
    def _new_energy(config: EDLMConfig) -> PreTrainedModel | None:
        if config.energy_type == "none" or config.energy_adapter is not None:  # an adapter is loaded when its base is
            return None
        if config.energy_is_foreign:
            return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config.energy_config))  # type: ignore[arg-type]
        return (EDLMEnergyModel if config.energy_type == "nce" else EDLMForCausalLM)(config)

    @classmethod
    def from_components(
        cls, denoiser: EDLMForMaskedLM, energy: PreTrainedModel | None = None, energy_type: str = "ar"
    ) -> "EDLMModel":
        """Put trained parts together; they are not copied.

        Args:
            denoiser: proposes.
            energy: `EDLMEnergyModel` for `energy_type="nce"`, a network of its own or an adapter over this denoiser; a
                causal language model with the same token ids for `"ar"` and `"coar"`; None for no energy. The longest
                text is that of the part which takes less.
        Raises:
            ValueError: the parts do not fit: another vocabulary, mask or kind of network.
        """
        fields = denoiser.config.fields()
        if energy is None:
            return cls(EDLMConfig(**fields | {"energy_type": "none", "energy_config": None}), denoiser=denoiser)
        is_nce = isinstance(energy, EDLMEnergyModel)
        if energy_type == "none" or (energy_type == "nce") != is_nce:
            raise ValueError(f"energy_type={energy_type!r} does not go with an energy of class {type(energy).__name__}")
        check_vocabulary(denoiser.config.vocab_size, denoiser.config.mask_token_id, energy.config)
        positions = getattr(energy.config.get_text_config(), "max_position_embeddings", None)
        if positions is not None:  # a longer text than the energy can read would have none
            fields["max_position_embeddings"] = min(fields["max_position_embeddings"], positions)
        if energy.config.model_type != EDLMConfig.model_type:
            changes, own = {"energy_config": energy.config.to_dict()}, {}
        else:
            own = energy.config.fields()
            changes = {
                "energy_config": {
                    name: value
                    for name, value in own.items()
                    if value != fields[name] and not name.startswith("energy_")
                }
            }
        if isinstance(energy, EDLMEnergyModel):
            changes |= {name: own[name] for name in ("energy_target", "energy_pooling", "energy_num_layers")}
            is_adapter = energy.network.backbone.embedding.weight is denoiser.backbone.embedding.weight
            changes |= {"energy_adapter": ADAPTER_FOLDER if is_adapter else None}  # type: ignore[dict-item]
        config = EDLMConfig(**fields | {"energy_type": energy_type} | changes)
        return cls(config, denoiser=denoiser, energy_model=energy)

    def load_energy(self, path: str | Path, **where: Any) -> "EDLMModel":
        """Take the NCE energy of a folder or Hub repo in place of this model's own, and return this model.

        Args:
            path: an adapter over this model's denoiser (its blocks are then shared, not copied; needs PEFT), or an
                `EDLMEnergyModel`. where: `subfolder`, `revision`, `token`, `cache_dir`, `local_files_only`.
        Raises:
            ValueError: the adapter was trained over another denoiser, or the energy does not fit this one.
            OSError: there is no energy. ImportError: an adapter, and PEFT is not installed.
        """
        if find_adapter(path, **where) is not None:
            energy = EDLMEnergyModel.from_adapter(self.denoiser, path, **where)
        else:
            energy = EDLMEnergyModel.from_pretrained(path, **where)
        energy = energy.to(self.device, self.dtype).train(self.training)
        self.config = EDLMModel.from_components(self.denoiser, energy, "nce").config
        self.energy_model = energy
        return self

    def load_adapter(
        self, peft_model_id: str | Path, *args: Any, adapter_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> SimpleNamespace:
        """Called by `from_pretrained` for the folder or repo of an adapter, when its base is loaded."""
        self.load_energy(peft_model_id, **{k: v for k, v in (adapter_kwargs or {}).items() if k in WHERE})
        info: dict = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}
        return SimpleNamespace(to_dict=lambda: info)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *args: Any, **kwargs: Any) -> Self | Any:
        """As in the library; an energy that is an adapter is loaded over the denoiser it lies beside."""
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if model.config.energy_adapter is not None and model.energy_model is None:
            where = {name: kwargs[name] for name in WHERE if kwargs.get(name) is not None}
            where["subfolder"] = "/".join(filter(None, (kwargs.get("subfolder"), model.config.energy_adapter)))
            model.load_energy(pretrained_model_name_or_path, **where)
        return loaded

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """As in the library; an adapter goes into a folder of its own, and the shared blocks are written once."""
        if self.config.energy_adapter is not None:
            if kwargs.get("push_to_hub"):
                raise ValueError("push_to_hub=True would leave the adapter behind: call push_to_hub(repo) instead")
            save_adapter(Path(save_directory) / self.config.energy_adapter, self.energy_model, self.denoiser, None)
            weights = {f"denoiser.{name}": value for name, value in self.denoiser.state_dict().items()}
            kwargs = {"state_dict": weights} | kwargs
        super().save_pretrained(save_directory, *args, **kwargs)

    @property
    def energy_type(self) -> str:
        return self.config.energy_type

    @property
    def scorer(self) -> Energy | None:
        """What the sampler knows of the energy; None without one."""
        return network_energy(self.energy_type, self.energy_model, self.config.mask_token_id)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.denoiser.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.denoiser.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Linear:
        return self.denoiser.get_output_embeddings()

    @library_forward
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        t: Tensor | float | None = None,
        positions: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> MaskedLMOutput:
        """The denoiser's forward pass, see `EDLMForMaskedLM.forward`."""
        return self.denoiser(input_ids, attention_mask, t, positions, position_ids, labels, num_items_in_batch)

    def log_p_x0(self, xt: Tensor, t: Tensor | float | None = None, attention_mask: Tensor | None = None) -> Tensor:
        """SUBS log-probabilities (N, L, V) of the denoiser, float32."""
        return self.denoiser.log_p_x0(xt, t, attention_mask)


def check_folder(folder: str | Path) -> None:
    """Raises ValueError for a folder in which weights would lie beside an adapter."""
    if (Path(folder) / ADAPTER_CONFIG).exists():
        raise ValueError(f"{folder} holds an adapter, {ADAPTER_CONFIG}, that would be loaded too: name another folder")


def _shown(value: Any) -> str:
    return f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


def _keep(part: Any) -> Any:
    """A part that has its weights: `post_init` would draw new ones for layers that PEFT or the user put there."""
    for module in part.modules() if part is not None else ():
        module._is_hf_initialized = True
    return part


def _check_architecture(config: EDLMConfig, *holds: str) -> None:
    """A folder's weights fit only the classes that hold them: the names of the layers alone would not tell."""
    if config.architectures and config.architectures[0] not in holds:
        raise ValueError(f"the checkpoint holds an {config.architectures[0]}; this class loads {' or '.join(holds)}")


def _energy_part(config: EDLMConfig, energy_types: tuple[str, ...], name: str) -> EDLMConfig:
    """The configuration of an energy network, given its own or that of the whole EDLM that holds it."""
    _check_architecture(config, name, "EDLMModel")
    if config.energy_config is None:
        return config
    if config.energy_adapter is not None:
        raise ValueError(f"{name} loads no adapter, got energy_adapter={config.energy_adapter!r}; EDLMModel does")
    if config.energy_type not in energy_types or config.energy_is_foreign:
        raise ValueError(f"{name} needs energy_type in {energy_types}, the checkpoint has {config.energy_type!r}")
    return config.for_energy()
