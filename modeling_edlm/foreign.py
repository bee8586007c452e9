"""Masked language models of other classes as denoisers, with any energy: `generate()`, `revise()` and `likelihood()`.

    bert = BertForMaskedLM.from_pretrained("...")
    model = ForeignModel(bert, energy=causal_lm, energy_type="coar", mask_token_id=tokenizer.mask_token_id)
    model.generate(tokenizer("A [MASK] [MASK].", return_tensors="pt").input_ids, num_steps=2, num_candidates=4)

Shapes: N rows, R rows in one pass, L length, S length of the texts in one pass, V vocabulary, M selected positions
(flat in N * L; in R * S for P).
"""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from .backbone import position_chunks, suppress
from .checks import as_integer, check_count
from .energies import EnergyMixin, FunctionEnergy, check_vocabulary, network_energy
from .generation_edlm import EDLMGenerationConfig, EDLMGenerationMixin, own_config
from .likelihood import EDLMLikelihoodMixin
from .proposal import ProposalMixin


def load_energy(path: str, **kwargs: Any) -> PreTrainedModel:
    """The causal language model, or else the NCE energy, of a folder or Hub repo."""
    config = AutoConfig.from_pretrained(path, **kwargs)
    is_nce = config.model_type == "edlm" and config.energy_type == "nce"
    return (AutoModelForSequenceClassification if is_nce else AutoModelForCausalLM).from_pretrained(path, **kwargs)


def longest_text(model: PreTrainedModel) -> int | None:
    """The number of tokens that a model has positions for; None where its configuration names no limit."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            longest = module.num_embeddings - module.padding_idx - 1  # RoBERTa and its kin: positions start after it
    return longest


def check_length(name: str, length: int, longest: int | None) -> None:
    """Raises ValueError where a text is longer than a model takes: some would read on, past their positions."""
    if longest is not None and length > longest:
        raise ValueError(f"{name} has max_position_embeddings={longest}, fewer than the {length} tokens of a text")


class Denoiser(nn.Module, ProposalMixin):
    """A masked language model of any class as mu(x0 | xt).

    Args:
        model: `model(input_ids=).logits` (N, L, V). It is given no padding and no attention mask, which models of other
            libraries read in ways of their own, or not at all: texts of different lengths have separate passes.
        logits_shift: the logits of a token stand so many positions to the left of it: 0 in BERT, LLaDA and their kin, 1
            in models that were autoregressive once (Dream). The first token has the first position's logits then.
        num_tokens: ids from here on are padding of the vocabulary and never drawn; None: all are tokens.
        max_position_embeddings: the longest text that the model takes; None: any.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        mask_token_id: int,
        logits_shift: int = 0,
        num_tokens: int | None = None,
        max_position_embeddings: int | None = None,
    ):
        super().__init__()
        self.vocab_size = model.config.get_text_config().vocab_size
        if as_integer(logits_shift) not in (0, 1):
            raise ValueError(f"logits_shift must be 0 or 1, got {logits_shift!r}")
        if num_tokens is not None and not 0 < (as_integer(num_tokens) or 0) <= self.vocab_size:
            raise ValueError(f"num_tokens must lie in [1, {self.vocab_size}], got {num_tokens!r}")
        self.model, self.mask_token_id = model, mask_token_id
        self.logits_shift, self.num_tokens, self.longest = logits_shift, num_tokens, max_position_embeddings
        self.takes_time = model.config.model_type == "edlm"
        width = getattr(model.config.get_text_config(), "hidden_size", None)  # remote code has other names for it
        sizes = SimpleNamespace(hidden_size=width or model.get_input_embeddings().weight.shape[-1])  # type: ignore[index]
        self.config = SimpleNamespace(get_text_config=lambda: sizes)  # all that `rows_at_once` reads

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def logit_chunks(
        self, xt_NL: Tensor, where_NL: Tensor, t: Tensor | float | None = None, attention_mask: Tensor | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        (N, L), device = xt_NL.shape, xt_NL.device
        order_NL, length_N = torch.arange(L, device=device).expand(N, L), torch.full((N,), L)
        if attention_mask is not None:  # the text first
            order_NL = attention_mask.argsort(dim=-1, descending=True, stable=True)
            xt_NL, length_N = xt_NL.gather(1, order_NL), attention_mask.sum(-1).cpu()
            where_NL = where_NL.gather(1, order_NL.cpu())
        is_read_N = where_NL.any(-1)
        for S in length_N[is_read_N].unique().tolist():
            check_length(type(self.model).__name__, S, self.longest)
            for now_R in position_chunks((is_read_N & (length_N == S)).nonzero()[:, 0], S * self.vocab_size):
                where_P = where_NL[now_R, :S].flatten().nonzero()[:, 0].to(device)
                now_R = now_R.to(device)
                time = {"t": t[now_R] if isinstance(t, Tensor) and t.ndim else t} if self.takes_time else {}
                logits_RSV = self.model(input_ids=xt_NL[now_R, :S], **time).logits
                row_P, place_P = where_P // S, where_P % S
                logits_PV = logits_RSV[row_P, (place_P - self.logits_shift).clamp(min=0), : self.vocab_size]
                logits_PV = suppress(logits_PV, self.mask_token_id)
                if self.num_tokens is not None:
                    logits_PV[:, self.num_tokens :] = float("-inf")
                yield now_R[row_P] * L + order_NL[now_R[row_P], place_P], logits_PV

    def log_p_x0(self, xt: Tensor, t: Tensor | float | None = None, attention_mask: Tensor | None = None) -> Tensor:
        """SUBS log-probabilities (N, L, V), float32, as those of `EDLMForMaskedLM`; padding keeps its tokens."""
        xt = xt.long()
        log_p_NLV = torch.full((*xt.shape, self.vocab_size), float("-inf"), device=xt.device)
        log_p_NLV.scatter_(-1, xt[..., None], 0.0)
        for chunk_M, logits_MV in self.logit_chunks(xt, (xt == self.mask_token_id).cpu(), t, attention_mask):
            log_p_NLV.view(-1, self.vocab_size)[chunk_M] = logits_MV.log_softmax(-1)
        return log_p_NLV


class ForeignModel(nn.Module, EnergyMixin, EDLMGenerationMixin, EDLMLikelihoodMixin):
    """A masked language model and an energy, with all that an `EDLMModel` can do but training and files.

    Args:
        model, logits_shift, num_tokens: see `Denoiser`.
        energy: None for plain masked diffusion (MDLM); a causal language model of the same vocabulary, whose texts
            start with its `config.bos_token_id` (with `num_tokens` its vocabulary may be padded to another size); an
            `EDLMEnergyModel`; or a function `(x (N, L), xt (N, L), t, attention_mask, log_mu (N,))` to energies (N,),
            low for what is good.
        energy_type: `"ar"` (the default) or `"coar"`, for a causal language model.
        energy_target: of a function: `"x0"` (the default) if it scores a full candidate, `"xs"` for the next state.
        mask_token_id: default `model.config.mask_token_id`.
        max_position_embeddings: the longest text; default: what the configurations of the model and of the energy
            allow, the smaller of the two.
    Raises:
        ValueError: an argument that does not fit, named with its value.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        energy: nn.Module | Callable[..., Tensor] | None = None,
        energy_type: str | None = None,
        energy_target: str | None = None,
        mask_token_id: int | None = None,
        max_position_embeddings: int | None = None,
        logits_shift: int = 0,
        num_tokens: int | None = None,
    ):
        super().__init__()
        sizes: Any = model.config.get_text_config()
        mask: Any = getattr(sizes, "mask_token_id", None) if mask_token_id is None else mask_token_id
        if max_position_embeddings is not None:
            max_position_embeddings = check_count("max_position_embeddings", max_position_embeddings)
        longest: Any = longest_text(model) if max_position_embeddings is None else max_position_embeddings
        for name, value in {"mask_token_id": mask, "max_position_embeddings": longest}.items():
            if value is None:
                raise ValueError(f"{name} must be given: the configuration of {type(model).__name__} has none")
        mask = check_count("mask_token_id", mask, least=0)
        if mask >= sizes.vocab_size:
            raise ValueError(f"mask_token_id must lie in [0, {sizes.vocab_size}), got {mask}")
        self.config = SimpleNamespace(vocab_size=sizes.vocab_size, mask_token_id=mask, max_position_embeddings=longest)
        self.denoiser = Denoiser(model, mask, logits_shift, num_tokens, longest)
        self.generation_config = EDLMGenerationConfig()
        if model.config.model_type == "edlm":
            self.generation_config = own_config(model.generation_config)
        kind = kind_of(energy)
        for name, value in {"energy_type": energy_type, "energy_target": energy_target}.items():
            if not isinstance(value, str | None):
                raise ValueError(f"{name} must be a name, got {value!r}")
        if energy_type is not None and (kind != "ar" or energy_type not in ("ar", "coar")):
            raise ValueError(f"energy_type is ar or coar and for a causal language model, got {energy_type!r}")
        if energy_target is not None and (kind != "function" or energy_target not in ("x0", "xs")):
            raise ValueError(f"energy_target is x0 or xs and for a function, got {energy_target!r}")
        self.energy_model = energy if isinstance(energy, nn.Module) else None  # a function may be a module too
        self.energy_longest: int | None = None
        if kind == "function":
            self.scorer = FunctionEnergy(energy, energy_target or "x0", self.denoiser)  # type: ignore[arg-type]
        else:
            if energy is not None:
                theirs: Any = energy.config  # type: ignore[union-attr]
                size = theirs.get_text_config().vocab_size
                is_padded = num_tokens is not None and theirs.model_type != "edlm" and size >= num_tokens
                check_vocabulary(size if is_padded else sizes.vocab_size, mask, theirs)
                self.energy_longest = longest_text(energy)  # type: ignore[arg-type]
                if max_position_embeddings is not None:
                    check_length("energy", max_position_embeddings, self.energy_longest)
                elif self.energy_longest is not None:
                    self.config.max_position_embeddings = min(longest, self.energy_longest)
            kind = energy_type or kind
            self.scorer = network_energy(kind, energy, mask)
        self.energy_type, self.config.energy_target = kind, self.scorer.target if self.scorer else "x0"

    @property
    def device(self) -> torch.device:
        return self.denoiser.device

    def log_p_x0(self, xt: Tensor, t: Tensor | float | None = None, attention_mask: Tensor | None = None) -> Tensor:
        """SUBS log-probabilities (N, L, V) of the denoiser, float32."""
        return self.denoiser.log_p_x0(xt, t, attention_mask)

    def energy(self, x: Tensor, xt: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Energy (N,) of candidates, lower is better; zeros without one. See `EDLMModel.energy`."""
        check_length("energy", x.shape[1], self.energy_longest)
        return super().energy(x.long(), xt.long(), *args, **kwargs).float()


def kind_of(energy: Any) -> str:
    """How an energy is called. EDLM's classes are told by their names: remote code has copies of its own."""
    if energy is None:
        return "none"
    if isinstance(getattr(energy, "config", None), PreTrainedConfig):
        if type(energy).__name__.endswith("MaskedLM"):
            raise ValueError(
                f"energy must be a causal language model, a function or None, got a {type(energy).__name__}"
            )
        if energy.config.model_type != "edlm" or type(energy).__name__ == "EDLMForCausalLM":
            return "ar"
        if type(energy).__name__ == "EDLMEnergyModel":
            return "nce"
        raise ValueError(f"energy must be an energy, got an {type(energy).__name__}; its method energy would be one")
    if callable(energy):
        return "function"
    raise ValueError(f"energy must be a model, a function or the name of a model, got {energy!r}")
