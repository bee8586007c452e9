"""The sampler of EDLM (arXiv 2410.21357) for any masked language model, with any energy.

In a Hub repo this file is custom_generate/generate.py, where the library's own `generate()` finds it:

    class Bert(BertForMaskedLM, GenerationMixin):
        "A masked language model of the library lacks `generate()`."

    model = Bert.from_pretrained("...")
    model.generate(**tokenizer("A [MASK] [MASK].", return_tensors="pt"), mask_token_id=tokenizer.mask_token_id,
                   custom_generate="user/edlm", trust_remote_code=True, energy=causal_lm, energy_type="coar")

Shapes: N rows, R rows in one pass, L length, V vocabulary, M selected positions (flat in N * L; in R * L for P).
"""

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from .backbone import position_chunks, suppress
from .energies import FunctionEnergy, check_vocabulary, network_energy
from .generation_edlm import EDLMGenerationConfig, EDLMGenerationMixin, EDLMGenerationOutput, own_config
from .proposal import ProposalMixin

# arguments of the library's generate() that mean something else, or nothing, here
UNSUPPORTED = (
    "prefix_allowed_tokens_fn",
    "synced_gpus",
    "assistant_model",
    "negative_prompt_ids",
    "negative_prompt_attention_mask",
)
# what the library has used itself, to find this file, and hands on
USED = ("cache_dir", "force_download", "local_files_only", "proxies", "repo_type", "revision", "token")


def generate(
    model: PreTrainedModel,
    inputs: torch.LongTensor | None = None,
    generation_config: GenerationConfig | None = None,
    *,
    energy: nn.Module | Callable | str | None = None,
    energy_type: str | None = None,
    energy_target: str | None = None,
    energy_kwargs: dict | None = None,
    mask_token_id: int | None = None,
    max_position_embeddings: int | None = None,
    input_ids: torch.LongTensor | None = None,
    token_type_ids: torch.LongTensor | None = None,
    **kwargs,
) -> EDLMGenerationOutput | torch.LongTensor:
    """Sample text: unconditional, after a prompt, or in place of the mask tokens of `input_ids`.

    Args:
        model: `model(input_ids=, attention_mask=).logits` (N, L, V) are of the clean token at each position itself, not
            of the next one. Texts are put to the left of their padding before it sees them.
        inputs, input_ids: (N, L), one name or the other.
        generation_config: an `EDLMGenerationConfig`, or the library's with no fields set but its; keyword arguments
            change single fields.
        energy: None for plain masked diffusion (MDLM); a causal language model of the same vocabulary, whose texts
            start with its `config.bos_token_id`; an `EDLMEnergyModel`; or a function `(x (N, L), xt (N, L), t,
            attention_mask, log_mu (N,))` to energies (N,), low for what is good. Also the folder or Hub repo of a
            model, which is then loaded in every call.
        energy_type: `"ar"` (the default) or `"coar"`, for a causal language model.
        energy_target: of a function: `"x0"` (the default) if it scores a full candidate, `"xs"` for the next state.
        energy_kwargs: for the `from_pretrained` of an energy that is a name: `subfolder`, `trust_remote_code`, ...
        mask_token_id: default `model.config.mask_token_id`.
        max_position_embeddings: the longest text that the model takes; default `model.config.max_position_embeddings`,
            which is 2 too many for RoBERTa and its kin.
        token_type_ids: what a tokenizer gives; only zeros.
        kwargs: every argument of EDLM's `generate()`: `num_steps`, `num_candidates`, `energy_window`, `seed`,
            `batch_size`, `max_length`, `logits_processor`, `streamer`, ... (not `compile`).
    Returns:
        sequences, or an `EDLMGenerationOutput`.
    Raises:
        ValueError: an argument that does not exist or does not fit, named with its value.
        FloatingPointError: a network gave NaN, or no candidate of a row a finite energy.
    """
    for name in UNSUPPORTED:
        if (value := kwargs.pop(name, None)) is not None and value is not False:
            raise ValueError(f"{name} is not supported by the sampler of EDLM, got {value!r}")
    kwargs = {name: value for name, value in kwargs.items() if name not in USED}
    if inputs is not None and input_ids is not None:
        raise ValueError("give inputs or input_ids, not both")
    if token_type_ids is not None and token_type_ids.any():
        raise ValueError("token_type_ids must be zeros: what is generated has type 0")
    if isinstance(energy, str):
        energy = load_energy(energy, **energy_kwargs or {}).to(model.device)
    elif energy_kwargs is not None:
        raise ValueError(f"energy_kwargs are for an energy that is a name, got {energy_kwargs}")
    sampler = Sampler(model, energy, energy_type, energy_target, mask_token_id, max_position_embeddings)
    generation_config = own_config(generation_config or sampler.generation_config)
    if kwargs.get("compile", generation_config.compile):
        raise ValueError("compile=True compiles EDLM's own blocks, and not this model: call model.compile()")
    return sampler.generate(inputs if input_ids is None else input_ids, generation_config=generation_config, **kwargs)


def load_energy(path: str, **kwargs) -> PreTrainedModel:
    """The causal language model, or else the NCE energy, of a folder or Hub repo."""
    config = AutoConfig.from_pretrained(path, **kwargs)
    is_nce = config.model_type == "edlm" and config.energy_type == "nce"
    return (AutoModelForSequenceClassification if is_nce else AutoModelForCausalLM).from_pretrained(path, **kwargs)


class Denoiser(nn.Module, ProposalMixin):
    """A masked language model of any class as mu(x0 | xt)."""

    def __init__(self, model: PreTrainedModel, mask_token_id: int):
        super().__init__()
        self.model, self.mask_token_id = model, mask_token_id
        self.vocab_size = model.config.get_text_config().vocab_size
        self.takes_time = model.config.model_type == "edlm"
        width = getattr(model.config.get_text_config(), "hidden_size", None)  # remote code has other names for it
        sizes = SimpleNamespace(hidden_size=width or model.get_input_embeddings().weight.shape[-1])
        self.config = SimpleNamespace(get_text_config=lambda: sizes)  # all that `rows_at_once` reads

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def logit_chunks(self, xt_NL, where_NL, t=None, attention_mask=None):
        L, device = xt_NL.shape[1], xt_NL.device
        order_NL = torch.arange(L, device=device).expand_as(xt_NL)
        if attention_mask is not None:  # the text first: many models count positions from the left end, padding or not
            order_NL = attention_mask.argsort(dim=-1, descending=True, stable=True)
            xt_NL, attention_mask = xt_NL.gather(1, order_NL), attention_mask.gather(1, order_NL)
            where_NL = where_NL.gather(1, order_NL.cpu())
        for now_R in position_chunks(where_NL.any(-1).nonzero()[:, 0], L * self.vocab_size):
            where_P = where_NL[now_R].flatten().nonzero()[:, 0].to(device)
            now_R = now_R.to(device)
            mask_RL = None if attention_mask is None else attention_mask[now_R]
            time = {"t": t[now_R] if isinstance(t, torch.Tensor) else t} if self.takes_time else {}
            logits_RLV = self.model(input_ids=xt_NL[now_R], attention_mask=mask_RL, **time).logits
            row_P = now_R[where_P // L]
            yield (
                row_P * L + order_NL[row_P, where_P % L],
                suppress(logits_RLV.flatten(0, 1)[where_P], self.mask_token_id),
            )


class Sampler(nn.Module, EDLMGenerationMixin):
    """A masked language model and an energy, as the sampler wants to see them."""

    def __init__(self, model, energy, energy_type, energy_target, mask_token_id, max_position_embeddings):
        super().__init__()
        sizes = model.config.get_text_config()
        given = {"mask_token_id": mask_token_id, "max_position_embeddings": max_position_embeddings}
        for name, value in given.items():
            given[name] = getattr(sizes, name, None) if value is None else value
            if given[name] is None:
                raise ValueError(f"{name} must be given: the configuration of {type(model).__name__} has none")
        if not 0 <= given["mask_token_id"] < sizes.vocab_size:
            raise ValueError(f"mask_token_id must lie in [0, {sizes.vocab_size}), got {given['mask_token_id']}")
        self.config = SimpleNamespace(vocab_size=sizes.vocab_size, energy_target="x0", **given)
        self.denoiser = Denoiser(model, given["mask_token_id"])
        self.generation_config = EDLMGenerationConfig()
        if model.config.model_type == "edlm":
            self.generation_config = own_config(model.generation_config)
        kind = kind_of(energy)
        if energy_type is not None and (kind != "ar" or energy_type not in ("ar", "coar")):
            raise ValueError(f"energy_type is ar or coar and for a causal language model, got {energy_type!r}")
        if energy_target is not None and (kind != "function" or energy_target not in ("x0", "xs")):
            raise ValueError(f"energy_target is x0 or xs and for a function, got {energy_target!r}")
        self.energy_model = energy if kind in ("ar", "nce") else None
        if kind == "function":
            self.scorer = FunctionEnergy(energy, energy_target or "x0", self.denoiser)
        else:
            if energy is not None:
                check_vocabulary(self.config.vocab_size, self.config.mask_token_id, energy.config)
            kind = energy_type or kind
            self.scorer = network_energy(kind, energy, self.config.mask_token_id)
        self.energy_type, self.config.energy_target = kind, self.scorer.target if self.scorer else "x0"

    @property
    def device(self) -> torch.device:
        return self.denoiser.device

    def energy(self, x, xt, t=None, attention_mask=None, log_mu=None) -> torch.Tensor:
        """Energies (N,) float32 of candidates x (N, L) of the states xt, as those of `EDLMModel`."""
        return self.scorer(x, xt, t, attention_mask, log_mu)


def kind_of(energy) -> str:
    """How an energy is called. EDLM's classes are told by their names: remote code has copies of its own."""
    if energy is None:
        return "none"
    if isinstance(getattr(energy, "config", None), PreTrainedConfig):
        if energy.config.model_type != "edlm" or type(energy).__name__ == "EDLMForCausalLM":
            return "ar"
        if type(energy).__name__ == "EDLMEnergyModel":
            return "nce"
        raise ValueError(f"energy must be an energy, got an {type(energy).__name__}; its method energy would be one")
    if callable(energy):
        return "function"
    raise ValueError(f"energy must be a model, a function or the name of a model, got {energy!r}")
