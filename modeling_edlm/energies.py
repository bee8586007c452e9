"""Energies of EDLM (arXiv 2410.21357): autoregressive, carry-over autoregressive, NCE, and any function. No sampler.

An energy takes a candidate x and the masked state xt it was proposed for and gives one scalar per sequence; low is
good: p(x | xt) is proportional to mu(x | xt) exp(-E). x is a full x0, or the next state xs for a step energy.
Shapes: N rows, K candidates, L length, V vocabulary, M selected positions (flat indices into N * L).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from .backbone import position_chunks
from .prefix_cache import PrefixCache, behind_bos, cache_argument, text_first, token_log_probs


class Energy:
    """What an energy looks at, and the energies of candidates: what the sampler needs to know of it.

    Attributes:
        target: "x0", a full candidate, with the time of xt; or "xs", the next state, with the time of that.
        network: the module whose size says how many candidates fit into one pass.
        is_of_text: whether E = log mu(x | xt) plus a function of the text alone: the corrector then knows the present
            text's part of it, and leaves the law proportional to exp(-that part) as it is.
        needs_log_mu: whether it reads log mu(x | xt).
        has_unit_z: whether Z(xt) is 1 for any denoiser.
    """

    target, is_of_text, needs_log_mu, has_unit_z = "x0", False, False, False
    network: Any  # has the config, dtype and device of a model of the library

    def __call__(
        self, x_NL: Tensor, xt_NL: Tensor, t: Tensor | float | None, attention_mask: Tensor | None, log_mu_N: Tensor
    ) -> Tensor:
        """Energies (N,) float32 of candidates x of the states xt, given t, scalar or (N,), and log mu(x | xt)."""
        raise NotImplementedError

    def time(self, t: Tensor | float, s: Tensor | float) -> Tensor | float:
        """Which of the times of a step, of xt and of the next state, it is given."""
        return t if self.target == "x0" else s

    def prefix_cache(self, plain: Callable[..., Tensor], tokens_B: Tensor, length: int) -> PrefixCache | None:
        """What it can keep of the first tokens of B texts; None: nothing. See `PrefixCache`."""
        return None


class AutoregressiveEnergy(Energy):
    """E = log mu(x0 | xt) - log p_AR(x0), of a causal language model whose texts start with its BOS."""

    is_of_text, needs_log_mu = True, True

    def __init__(self, network: PreTrainedModel, mask_token_id: int):
        self.network, self.mask_token_id = network, mask_token_id

    def counted(self, xt_NL: Tensor) -> Tensor | None:
        """Which tokens of p_AR count, (N, L) bool; None: all."""
        return None

    def __call__(
        self, x_NL: Tensor, xt_NL: Tensor, t: Tensor | float | None, attention_mask: Tensor | None, log_mu_N: Tensor
    ) -> Tensor:
        bos = self.network.config.get_text_config().bos_token_id
        where_NL = self.counted(xt_NL)
        return log_mu_N - causal_log_prob(self.network, x_NL, where_NL, bos, self.mask_token_id, attention_mask)

    def prefix_cache(self, plain: Callable[..., Tensor], tokens_B: Tensor, length: int) -> PrefixCache | None:
        if (name := cache_argument(self.network)) is None:
            return None
        return PrefixCache(self.network, name, self.counted, plain, self.mask_token_id, tokens_B, length)


class CarryOverEnergy(AutoregressiveEnergy):
    """coAR: of the tokens that are masked in xt alone, whose conditionals p_AR(x0_i | x0_{<i}) they are. Z is 1."""

    is_of_text, has_unit_z = False, True

    def counted(self, xt_NL: Tensor) -> Tensor:
        return xt_NL == self.mask_token_id


class NCEEnergy(Energy):
    """That of an `EDLMEnergyModel`."""

    def __init__(self, network: PreTrainedModel):
        self.network, self.target = network, network.config.energy_target

    def __call__(
        self, x_NL: Tensor, xt_NL: Tensor, t: Tensor | float | None, attention_mask: Tensor | None, log_mu_N: Tensor
    ) -> Tensor:
        return self.network(x_NL, xt=xt_NL, t=t, attention_mask=attention_mask).logits[:, 0]


class FunctionEnergy(Energy):
    """Any function with the arguments of `Energy.__call__`; `network` is one whose passes are about as large."""

    needs_log_mu = True  # the function is given it

    def __init__(self, function: Callable[..., Tensor], target: str, network: nn.Module):
        self.function, self.target, self.network = function, target, network

    def __call__(
        self, x_NL: Tensor, xt_NL: Tensor, t: Tensor | float | None, attention_mask: Tensor | None, log_mu_N: Tensor
    ) -> Tensor:
        energy_N = self.function(x_NL, xt_NL, t, attention_mask, log_mu_N)
        if not isinstance(energy_N, Tensor) or energy_N.shape != log_mu_N.shape:
            what = getattr(energy_N, "shape", type(energy_N).__name__)
            raise ValueError(f"energy must give a tensor {tuple(log_mu_N.shape)}, one for each candidate, got {what}")
        return energy_N.float()


def network_energy(energy_type: str, network: Any, mask_token_id: int) -> Energy | None:
    """The energy of a network by the `energy_type` of a configuration; None for "none"."""
    if energy_type in ("none", "nce"):
        return None if energy_type == "none" else NCEEnergy(network)
    return {"ar": AutoregressiveEnergy, "coar": CarryOverEnergy}[energy_type](network, mask_token_id)


class EnergyMixin:
    """`energy()` for a class with a `scorer`, `log_p_x0()` and `config.mask_token_id`."""

    config: Any
    scorer: Energy | None
    log_p_x0: Callable[..., Tensor]

    def energy(
        self,
        x: Tensor,
        xt: Tensor,
        t: Tensor | float | None = None,
        attention_mask: Tensor | None = None,
        log_mu: Tensor | None = None,
    ) -> Tensor:
        """Energy of candidates, lower is better.

        Args:
            x: (N, L) candidates: x0, or xs for `energy_target="xs"`. xt: (N, L) the state they were proposed for.
            t: time of xt (of xs for a step energy), scalar or (N,); read only by networks with time conditioning.
            log_mu: (N,) log mu(x | xt) where the caller knows it already, for AR energies and functions.
        Returns:
            (N,) float32; zeros without an energy. Source: EDLM (arXiv 2410.21357).
        """
        x, xt = x.long(), xt.long()
        if (scorer := self.scorer) is None:
            return torch.zeros(x.shape[0], dtype=torch.float32, device=x.device)
        if log_mu is None and scorer.needs_log_mu:
            log_mu = self._log_mu(x, xt, t, attention_mask)
        return scorer(x, xt, t, attention_mask, log_mu)  # type: ignore[arg-type]

    @torch.no_grad()
    def score(self, x: Tensor, xt: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """log mu(x | xt) - E(x, xt) of finished texts, (N,) float32, higher is better: log p(x | xt) but for Z, which
        the texts for one state have in common. With an AR energy it is log p_AR(x).

        Args:
            x: (N, L) texts. xt: (N, L) the state that they complete; its time is the share of its masks.
        """
        is_masked_NL = xt == self.config.mask_token_id
        if attention_mask is not None:
            is_masked_NL = is_masked_NL & attention_mask.bool()
        t_N = is_masked_NL.float().sum(-1) / (xt.shape[1] if attention_mask is None else attention_mask.sum(-1))
        log_mu_N = self._log_mu(x, xt, t_N, attention_mask)
        time = 0 * t_N if self.scorer is not None and self.scorer.target == "xs" else t_N
        return log_mu_N - self.energy(x, xt, time, attention_mask, log_mu_N)

    def _log_mu(self, x: Tensor, xt: Tensor, t: Tensor | float | None, attention_mask: Tensor | None) -> Tensor:
        """Of what x has in place of masks, (N,)."""
        masked_NL = (xt == self.config.mask_token_id) & (x != self.config.mask_token_id)
        if attention_mask is not None:
            masked_NL &= attention_mask.bool()
        log_p_NL = self.log_p_x0(xt, t, attention_mask).gather(-1, x[..., None])[..., 0]
        return torch.where(masked_NL, log_p_NL, 0.0).sum(-1)


def check_vocabulary(vocab_size: int, mask_token_id: int, theirs: PreTrainedConfig) -> None:
    """Raises ValueError unless the token ids of an energy with the configuration `theirs` are those of the denoiser. A
    network of another library may lack the mask token if it is the last id.
    """
    sizes = theirs.get_text_config()
    fits = sizes.vocab_size == vocab_size
    if theirs.model_type == "edlm":
        fits = fits and theirs.mask_token_id == mask_token_id
    elif sizes.vocab_size == vocab_size - 1:
        fits = mask_token_id == sizes.vocab_size
    if not fits:
        raise ValueError(
            f"energy has vocab_size {sizes.vocab_size}, the denoiser has {vocab_size} with mask_token_id "
            f"{mask_token_id}: both must use the same tokenizer"
        )
    if getattr(sizes, "bos_token_id", None) is None:
        raise ValueError(f"energy ({sizes.model_type}) has bos_token_id None: set the id that starts its texts")


def causal_log_prob(
    causal_lm: Any,
    x0_NL: Tensor,
    where_NL: Tensor | None,
    bos_token_id: int,
    mask_token_id: int,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """sum over `where` of log p_AR(x0_i | x0_{<i}), the first token given the BOS alone.

    Args:
        causal_lm: an `EDLMForCausalLM`, or any causal language model with the same token ids.
        x0_NL: tokens without masks at the places that count. where_NL: bool, the positions that count; None: all.
        attention_mask: (N, L), 0 for padding; the BOS then stands before the first token of each row.
    Returns:
        (N,) float32.
    """
    if attention_mask is not None:  # the text first: what comes after it changes nothing in a causal model
        order_NL = text_first(attention_mask)
        where_NL = attention_mask.bool() if where_NL is None else where_NL & attention_mask.bool()
        x0_NL = x0_NL.masked_fill(attention_mask == 0, bos_token_id)  # it may hold masks, which the model may lack
        x0_NL, where_NL = x0_NL.gather(1, order_NL), where_NL.gather(1, order_NL)
    inputs_NL, theirs = behind_bos(x0_NL, bos_token_id), causal_lm.config.get_text_config()
    if causal_lm.config.model_type == "edlm":
        return token_log_probs(causal_lm, inputs_NL, x0_NL, where_NL, mask_token_id).sum(-1)
    # a model of another library class gives the logits of whole rows, so some rows at a time
    rows = position_chunks(torch.arange(len(x0_NL), device=x0_NL.device), x0_NL.shape[1] * theirs.vocab_size)
    parts = [(inputs_NL[now_R], x0_NL[now_R], None if where_NL is None else where_NL[now_R]) for now_R in rows]
    return torch.cat([token_log_probs(causal_lm, *part, mask_token_id).sum(-1) for part in parts])


def candidate_energies(
    energy: Callable[..., Tensor],
    x_NKL: Tensor,
    xt_NL: Tensor,
    t: float | Tensor | None,
    log_mu_NK: Tensor,
    attention_mask: Tensor | None = None,
    batch_size: int | None = None,
    rows_N: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Energies (N, K) of K candidates for each row, and how many of these were scored, (N,): equal ones once.

    `energy` is a model's `energy(x, xt, t, attention_mask, log_mu)`; `batch_size` candidates go into one pass (None:
    all); t is a scalar or (N,). A `PrefixCache` is told the numbers `rows_N` of the rows too.
    """
    N, K, _ = x_NKL.shape
    scored_S, which_P = distinct(x_NKL)  # P = N * K, the candidates of a row side by side
    x_PL, log_mu_P, row_S = x_NKL.flatten(0, 1), log_mu_NK.flatten(), scored_S // K
    energies = []
    for now_S in torch.arange(len(scored_S), device=x_NKL.device).split(batch_size or len(scored_S)):
        candidate, row = scored_S[now_S], row_S[now_S]
        mask = None if attention_mask is None else attention_mask[row]
        now_t = t[row] if isinstance(t, Tensor) and t.ndim else t
        numbers = () if rows_N is None else (rows_N[row],)
        energies.append(energy(x_PL[candidate], xt_NL[row], now_t, mask, log_mu_P[candidate], *numbers))
    number_N = row_S.new_zeros(N).index_add_(0, row_S, torch.ones_like(row_S))
    return torch.cat(energies)[which_P].view(N, K), number_N


def distinct(x_NKL: Tensor) -> tuple[Tensor, Tensor]:
    """Flat indices (S,) of one candidate of each kind in a row, and (N * K,) which of these every candidate is."""
    N, K, _ = x_NKL.shape
    candidate_K = torch.arange(K, device=x_NKL.device)
    first_NK = candidate_K.repeat(N, 1)
    for j in range(K - 2, -1, -1):
        first_NK = torch.where((x_NKL == x_NKL[:, j : j + 1]).all(-1), j, first_NK)
    is_first_P = (first_NK == candidate_K).flatten()
    start_N1 = torch.arange(N, device=x_NKL.device)[:, None] * K
    return is_first_P.nonzero()[:, 0], (is_first_P.cumsum(0) - 1)[(first_NK + start_N1).flatten()]
