"""EDLMConfig: what a model is. How it is sampled is said by the generation configuration."""

import copy
import dataclasses
import difflib
from typing import TYPE_CHECKING, Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

if TYPE_CHECKING:  # never run: by this line the library puts the file that CUSTOM_PIPELINES names beside the others
    from .pipeline_edlm import EDLMTextGenerationPipeline  # noqa: F401

ENERGY_TYPES = ("none", "ar", "coar", "nce")
ENERGY_TARGETS = ("x0", "xs")
ENERGY_POOLINGS = ("mean", "sum")
AUTO_MAP = {  # which class of a folder's code each Auto class takes
    "AutoConfig": "configuration_edlm.EDLMConfig",
    "AutoModel": "modeling_edlm.EDLMModel",
    "AutoModelForMaskedLM": "modeling_edlm.EDLMForMaskedLM",
    "AutoModelForCausalLM": "modeling_edlm.EDLMForCausalLM",
    "AutoModelForSequenceClassification": "modeling_edlm.EDLMEnergyModel",
}
# which pipeline of a folder's code the library takes for a task, where the folder's weights are those of a SAMPLER
CUSTOM_PIPELINES = {"text-generation": {"impl": "pipeline_edlm.EDLMTextGenerationPipeline", "pt": ["AutoModel"]}}
SAMPLERS = ("EDLMModel", "EDLMForMaskedLM")


@strict
class EDLMConfig(PreTrainedConfig):
    """Configuration of the denoiser, of its energy, and of the autoregressive model of the same blocks.

    Args:
        vocab_size: number of token ids, the mask token counts.
        mask_token_id: id of the absorbing state. `None`: the last id.
        bos_token_id: the autoregressive model's first input. `None`: the mask id, which no text contains.
        eos_token_id, pad_token_id: of the tokenizer, where it has them.
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size: the blocks. `intermediate_size`
            `None` is 4 * hidden_size.
        cond_dim: width of the conditioning vector of the adaptive layer norms; 0 leaves them out.
        max_position_embeddings: longest sequence the model was made for.
        time_conditioning: whether the network sees t. Needs `cond_dim` > 0.
        prepend_bos: whether the denoiser and an NCE energy see the BOS before the text. Their positions are relative:
            without it they cannot tell the beginning of a text from its middle.
        dropout: probability, in training only.
        rope_theta: base of the rotary position embedding.
        energy_type: `"none"`, `"ar"`, `"coar"` or `"nce"` (EDLM, arXiv 2410.21357).
        energy_target: `"x0"`, the paper's energy of a full candidate, or `"xs"`, an energy of the next state.
        energy_pooling: `"mean"` pools hidden states over all positions, as published; `"sum"` adds one scalar
            for each position that is masked in xt and given in x.
        energy_num_layers: blocks of the NCE energy; `None` is `num_hidden_layers`.
        energy_config: what of the above is different in the energy network; a dictionary with a `model_type`
            other than "edlm" is the whole configuration of another causal language model.
        energy_adapter: folder, beside the weights, of an NCE energy that is LoRA over the denoiser's own blocks.

    Raises:
        ValueError: for a misspelt argument.
        huggingface_hub.errors.StrictDataclassError: for values of another type, sizes that do not fit each other and
            ids outside the vocabulary; the message names them.
    """

    model_type = "edlm"

    vocab_size: int = 50258
    mask_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int | None = None
    cond_dim: int = 128
    max_position_embeddings: int = 1024
    time_conditioning: bool = False
    prepend_bos: bool = False
    dropout: int | float = 0.1
    rope_theta: int | float = 10000.0
    initializer_range: int | float = 0.02
    energy_type: str = "none"
    energy_target: str = "x0"
    energy_pooling: str = "sum"
    energy_num_layers: int | None = None
    energy_config: dict | None = None
    energy_adapter: str | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        fields, known = list(type(self).__annotations__), {field.name for field in dataclasses.fields(PreTrainedConfig)}
        known |= {f"{name}_token_id" for name in ("sep", "cls", "unk", "decoder_start")} | {"num_labels"}
        for name in kwargs.keys() - known:  # unknown keys of newer library versions pass, misspelt fields do not
            if close := difflib.get_close_matches(name, fields, n=1, cutoff=0.7):
                raise ValueError(f"EDLMConfig has no argument {name!r}; did you mean {close[0]!r}?")
        if self.mask_token_id is None:
            self.mask_token_id = self.vocab_size - 1
        if self.bos_token_id is None:
            self.bos_token_id = self.mask_token_id
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        # copied in depth: pipeline() writes into it
        pipelines = copy.deepcopy(CUSTOM_PIPELINES) if self._is_sampler else {}
        super().__post_init__(**{"auto_map": dict(AUTO_MAP), "custom_pipelines": pipelines} | kwargs)

    def validate_architecture(self) -> None:
        """Part of the strict validation that the base class runs after `__post_init__`."""
        sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size must be an even multiple of num_attention_heads, got {self.hidden_size} and "
                f"{self.num_attention_heads}"
            )
        for name in ("mask_token_id", "bos_token_id", "eos_token_id", "pad_token_id"):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) < self.vocab_size:
                raise ValueError(f"{name} must lie in [0, vocab_size={self.vocab_size}), got {getattr(self, name)}")
        if self.cond_dim < 0:
            raise ValueError(f"cond_dim must not be negative, got {self.cond_dim}")
        if self.time_conditioning and self.cond_dim == 0:
            raise ValueError("time_conditioning=True needs cond_dim > 0, got cond_dim=0")
        if self.prepend_bos and self.bos_token_id == self.mask_token_id:
            raise ValueError(f"prepend_bos=True needs a bos_token_id other than the mask's, got {self.bos_token_id}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")
        for name, allowed in (
            ("energy_type", ENERGY_TYPES),
            ("energy_target", ENERGY_TARGETS),
            ("energy_pooling", ENERGY_POOLINGS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        if self.energy_target == "xs" and self.energy_type in ("ar", "coar"):
            raise ValueError(f"energy_target='xs' needs energy_type='nce', got energy_type={self.energy_type!r}")
        if self.energy_target == "xs" and self.energy_pooling != "sum":
            raise ValueError(f"energy_target='xs' needs energy_pooling='sum', got {self.energy_pooling!r}")
        if self.energy_adapter is not None and self.energy_type != "nce":
            raise ValueError(f"energy_adapter needs energy_type='nce', got energy_type={self.energy_type!r}")
        if self.tie_word_embeddings:
            raise ValueError("tie_word_embeddings must be False: the head has weights of its own")
        if self.energy_num_layers is not None and self.energy_num_layers < 1:
            raise ValueError(f"energy_num_layers must be at least 1, got {self.energy_num_layers}")

    @property
    def _is_sampler(self) -> bool:
        """Whether the weights are a denoiser's, or nothing is said of them; else the library's own pipelines fit."""
        return not self.architectures or self.architectures[0] in SAMPLERS

    def to_dict(self) -> dict:
        """As in the library; an autoregressive model or an energy alone names no pipeline of ours."""
        fields = super().to_dict()
        if not self._is_sampler and fields.get("custom_pipelines") in ({}, CUSTOM_PIPELINES):
            del fields["custom_pipelines"]
        return fields

    @property
    def energy_is_foreign(self) -> bool:
        """Whether the energy is a causal language model of another library class."""
        return (self.energy_config or {}).get("model_type", self.model_type) != self.model_type

    def for_denoiser(self) -> "EDLMConfig":
        """The configuration of the denoiser alone."""
        own = [name for name in type(self).__annotations__ if name.startswith("energy_")]
        return self._changed({name: getattr(type(self), name) for name in own})

    def for_energy(self) -> "EDLMConfig":
        """The configuration of the energy network: this one, changed by `energy_config`."""
        changes = {**(self.energy_config or {}), "energy_config": None, "energy_adapter": None}
        changes.pop("model_type", None)
        return self._changed(changes)

    def fields(self) -> dict:
        """The arguments that are EDLM's own."""
        return {name: getattr(self, name) for name in type(self).__annotations__}

    def _changed(self, changes: dict) -> "EDLMConfig":
        config = type(self)(**self.fields() | changes)
        config._attn_implementation = self._attn_implementation
        config.dtype = self.dtype
        return config
