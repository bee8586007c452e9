"""The three energies of EDLM (arXiv 2410.21357): autoregressive, carry-over autoregressive, and NCE. Knows no sampler.

An energy takes a candidate x and the masked state xt it was proposed for and gives one scalar per sequence; low is
good: p(x | xt) is proportional to mu(x | xt) exp(-E). x is a full x0, or the next state xs for a step energy.
Shapes: N rows, L length, D hidden size, V vocabulary, M selected positions (flat indices into N * L).
"""

import torch
from torch import nn

from .backbone import Backbone, Head, ZeroLinear, apply_linear, position_chunks, prepend_bos, suppress
from .vocabulary import log_prob_projected


def causal_log_prob(
    causal_lm: nn.Module,
    x0_NL: torch.Tensor,
    where_NL: torch.Tensor | None,
    bos_token_id: int,
    mask_token_id: int,
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """sum over `where` of log p_AR(x0_i | x0_{<i}), the first token given the BOS alone.

    Args:
        causal_lm: an `EDLMForCausalLM`, or any causal language model with the same token ids.
        x0_NL: tokens without masks at the places that count. where_NL: bool, the positions that count; None: all.
        attention_mask: (N, L), 0 for padding; the BOS then stands before the first token of each row.
    Returns:
        (N,) float32.
    """
    if attention_mask is not None:  # the text first: what comes after it changes nothing in a causal model
        order_NL = attention_mask.argsort(dim=-1, descending=True, stable=True)
        where_NL = attention_mask.bool() if where_NL is None else where_NL & attention_mask.bool()
        x0_NL, where_NL = x0_NL.gather(1, order_NL), where_NL.gather(1, order_NL)
    inputs_NL = torch.cat((torch.full_like(x0_NL[:, :1], bos_token_id), x0_NL[:, :-1]), dim=1)
    log_p_NL = torch.zeros(x0_NL.shape, device=x0_NL.device)
    if causal_lm.config.model_type == "edlm":  # projects the positions that count and no others, some at a time
        encoded, head = causal_lm.encode(inputs_NL), causal_lm.head
        every_P = torch.arange(x0_NL.numel(), device=x0_NL.device)
        where_M = every_P if where_NL is None else where_NL.flatten().nonzero()[:, 0]
        for now_M in (where_M,) if head.is_large else position_chunks(where_M, causal_lm.config.vocab_size):
            x0_M = x0_NL.flatten()[now_M]
            if head.is_large:
                projection = head.select(*encoded, now_M), head.linear.weight, head.linear.bias
                log_p_M = log_prob_projected(*projection, mask_token_id, x0_M)
            else:
                logits_MV = suppress(head(*encoded, now_M), mask_token_id)
                log_p_M = -nn.functional.cross_entropy(logits_MV, x0_M, reduction="none")
            log_p_NL.view(-1)[now_M] = log_p_M
        return log_p_NL.sum(-1)
    # a model of another library class gives the logits of whole rows, so some rows at a time
    rows = position_chunks(torch.arange(len(x0_NL), device=x0_NL.device), x0_NL.shape[1] * causal_lm.config.vocab_size)
    for now_R in rows:
        logits_RLV = suppress(causal_lm(inputs_NL[now_R], use_cache=False).logits, mask_token_id)
        is_counted_RL = torch.ones_like(x0_NL[now_R], dtype=torch.bool) if where_NL is None else where_NL[now_R]
        log_p_NL[now_R] = log_p_NL[now_R].masked_scatter(
            is_counted_RL,
            -nn.functional.cross_entropy(logits_RLV[is_counted_RL], x0_NL[now_R][is_counted_RL], reduction="none"),
        )
    return log_p_NL.sum(-1)


class EnergyNetwork(nn.Module):
    """The NCE energy: both token sequences embedded, joined by a projection, read by bidirectional blocks.

    `energy_pooling="mean"` is the published form: hidden states averaged over all positions, then the scalar head.
    `"sum"` gives every position its scalar and adds those that are masked in xt and given in x. With `backbone` the
    blocks are not its own.
    """

    def __init__(self, config, backbone: Backbone | None = None):
        super().__init__()
        self.config = config
        self.backbone = Backbone(config, num_layers=config.energy_num_layers) if backbone is None else backbone
        self.projection = nn.Linear(2 * config.hidden_size, config.hidden_size)
        self.head = Head(config, config.hidden_size, zero=False)
        self.fc1 = nn.Linear(config.hidden_size, config.hidden_size)
        # starts at zero: an untrained energy leaves the proposal as it is
        self.fc2 = ZeroLinear(config.hidden_size, 1, bias=False)

    def forward(
        self,
        x_NL: torch.Tensor,
        xt_NL: torch.Tensor,
        noise_N: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Energies (N,) float32 of x_NL (x0, or xs with masks left) as a completion of xt_NL."""
        if self.config.prepend_bos:
            x_NL, _ = prepend_bos(x_NL, self.config.bos_token_id)
            xt_NL, attention_mask = prepend_bos(xt_NL, self.config.bos_token_id, attention_mask)
        embed = self.backbone.embedding
        joined_NLD = apply_linear(self.projection, torch.cat((embed(xt_NL), embed(x_NL)), dim=-1))
        if self.config.energy_pooling == "mean":
            y_NLD = self.head(*self.backbone(inputs_embeds=joined_NLD, noise_N=noise_N, attention_mask=attention_mask))
            weight_NL = torch.ones_like(x_NL) if attention_mask is None else attention_mask
            weight_NL1 = (weight_NL / weight_NL.sum(-1, keepdim=True))[..., None].to(y_NLD.dtype)
            return self.scalar((y_NLD * weight_NL1).sum(1))[:, 0].float()
        is_revealed = (xt_NL == self.config.mask_token_id) & (x_NL != self.config.mask_token_id)
        where_NL = is_revealed.cpu()
        hidden = self.backbone(None, noise_N, attention_mask, inputs_embeds=joined_NLD, where_NL=where_NL)
        positions_M = where_NL.flatten().nonzero()[:, 0].to(x_NL.device, non_blocking=True)
        scalar_M = self.scalar(self.head(*hidden, positions_M))[:, 0].float()
        return scalar_M.new_zeros(x_NL.numel()).scatter(0, positions_M, scalar_M).view(x_NL.shape).sum(-1)

    def scalar(self, y: torch.Tensor) -> torch.Tensor:
        return self.fc2(nn.functional.relu(self.fc1(y)))


def candidate_energies(
    energy,
    x_NKL: torch.Tensor,
    xt_NL: torch.Tensor,
    t: float | torch.Tensor | None,
    log_mu_NK: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    batch_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Energies (N, K) of K candidates for each row, and how many of these were scored, (N,): equal ones once.

    `energy` is a model's `energy(x, xt, t, attention_mask, log_mu)`; `batch_size` candidates go into one pass (None:
    all); t is a scalar or (N,).
    """
    N, K, _ = x_NKL.shape
    scored_S, which_P = distinct(x_NKL)  # P = N * K, the candidates of a row side by side
    x_PL, log_mu_P, row_S = x_NKL.flatten(0, 1), log_mu_NK.flatten(), scored_S // K
    energies = []
    for now_S in torch.arange(len(scored_S), device=x_NKL.device).split(batch_size or len(scored_S)):
        candidate, row = scored_S[now_S], row_S[now_S]
        mask = None if attention_mask is None else attention_mask[row]
        now_t = t[row] if isinstance(t, torch.Tensor) and t.ndim else t
        energies.append(energy(x_PL[candidate], xt_NL[row], now_t, mask, log_mu_P[candidate]))
    number_N = row_S.new_zeros(N).index_add_(0, row_S, torch.ones_like(row_S))
    return torch.cat(energies)[which_P].view(N, K), number_N


def distinct(x_NKL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Flat indices (S,) of one candidate of each kind in a row, and (N * K,) which of these every candidate is."""
    N, K, _ = x_NKL.shape
    candidate_K = torch.arange(K, device=x_NKL.device)
    first_NK = candidate_K.repeat(N, 1)
    for j in range(K - 2, -1, -1):
        first_NK = torch.where((x_NKL == x_NKL[:, j : j + 1]).all(-1), j, first_NK)
    is_first_P = (first_NK == candidate_K).flatten()
    start_N1 = torch.arange(N, device=x_NKL.device)[:, None] * K
    return is_first_P.nonzero()[:, 0], (is_first_P.cumsum(0) - 1)[(first_NK + start_N1).flatten()]


def nce_loss(energy_data_N: torch.Tensor, energy_proposal: torch.Tensor) -> torch.Tensor:
    """softplus(E(x+)) + softplus(-E(x-)), mean over rows: the NCE objective of EDLM, minimal at log mu - log q.

    `energy_proposal` is (N,) or, with several negatives for each row, (N, J): their mean has the same minimum.
    """
    return nn.functional.softplus(energy_data_N).mean() + nn.functional.softplus(-energy_proposal).mean()


def ranking_loss(energy_data_N: torch.Tensor, energy_proposal_NJ: torch.Tensor) -> torch.Tensor:
    """-log of w(x+) / (w(x+) + w(x_1) + ... + w(x_J)) with w = exp(-E), mean over rows: conditional NCE.

    But for log k it is what the energy adds to the sampler's bound with k = J + 1 candidates, so training lowers the
    bound itself. Minimal at log mu - log q plus any function of xt, which no choice among candidates depends on.
    Source: Ma and Collins 2018, arXiv 1809.01812.
    """
    return torch.cat((energy_data_N[:, None], energy_proposal_NJ), dim=1).neg().log_softmax(-1)[:, 0].neg().mean()
