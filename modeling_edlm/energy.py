"""The three energies of EDLM (arXiv 2410.21357): autoregressive, carry-over autoregressive, and NCE. Knows no sampler.

An energy takes a candidate x and the masked state xt it was proposed for and gives one scalar per sequence; low is
good: p(x | xt) is proportional to mu(x | xt) exp(-E). x is a full x0, or the next state xs for a step energy.
Shapes: N rows, L length, D hidden size, V vocabulary, M selected positions (flat indices into N * L).
"""

import torch
from torch import nn

from .backbone import Backbone, Head, ZeroLinear, log_probs, position_chunks


def causal_log_prob(
    causal_lm: nn.Module,
    x0_NL: torch.Tensor,
    where_NL: torch.Tensor,
    bos_token_id: int,
    mask_token_id: int,
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """sum over `where` of log p_AR(x0_i | x0_{<i}), the first token given the BOS alone.

    Args:
        causal_lm: an `EDLMForCausalLM`, or any causal language model with the same token ids.
        x0_NL: tokens without masks at the places that count. where_NL: bool, the positions that count.
        attention_mask: (N, L), 0 for padding on the left; the BOS then stands before the first token of each row.
    Returns:
        (N,) float32.
    """
    bos = torch.full_like(x0_NL[:, :1], bos_token_id)
    inputs_NL = torch.cat((bos, x0_NL[:, :-1]), dim=1)
    if attention_mask is not None:
        is_pad = nn.functional.pad(attention_mask[:, :-1], (1, 0)) == 0
        inputs_NL = torch.where(is_pad, bos, inputs_NL)
        where_NL = where_NL & attention_mask.bool()
    if causal_lm.config.model_type == "edlm":  # projects the positions that count and no others, some at a time
        encoded = causal_lm.encode(inputs_NL, attention_mask)
        log_p_P, targets_P1 = torch.zeros(x0_NL.numel(), device=x0_NL.device), x0_NL.flatten()[:, None]
        for now_M in position_chunks(where_NL.flatten().nonzero()[:, 0], causal_lm.config.vocab_size):
            log_p_MV = log_probs(causal_lm.head(*encoded, now_M), mask_token_id)
            log_p_P[now_M] = log_p_MV.gather(-1, targets_P1[now_M])[:, 0]
        return log_p_P.view(x0_NL.shape).sum(-1)
    # a model of another library class gives the logits of whole rows, so some rows at a time
    rows = position_chunks(torch.arange(len(x0_NL), device=x0_NL.device), x0_NL.shape[1] * causal_lm.config.vocab_size)
    sums = []
    for now_R in rows:
        mask = None if attention_mask is None else attention_mask[now_R]
        log_p_RLV = log_probs(causal_lm(inputs_NL[now_R], attention_mask=mask, use_cache=False).logits, mask_token_id)
        log_p_RL = log_p_RLV.gather(-1, x0_NL[now_R, :, None])[..., 0]
        sums.append(torch.where(where_NL[now_R], log_p_RL, 0.0).sum(-1))
    return torch.cat(sums)


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
        embed = self.backbone.embedding
        joined_NLD = self.projection(torch.cat((embed(xt_NL), embed(x_NL)), dim=-1))
        y_NLD = self.head(*self.backbone(inputs_embeds=joined_NLD, noise_N=noise_N, attention_mask=attention_mask))
        if self.config.energy_pooling == "mean":
            weight_NL = torch.ones_like(x_NL) if attention_mask is None else attention_mask
            weight_NL1 = (weight_NL / weight_NL.sum(-1, keepdim=True))[..., None].to(y_NLD.dtype)
            return self.scalar((y_NLD * weight_NL1).sum(1))[:, 0].float()
        revealed_NL = (xt_NL == self.config.mask_token_id) & (x_NL != self.config.mask_token_id)
        return (self.scalar(y_NLD)[..., 0].float() * revealed_NL).sum(-1)

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
) -> torch.Tensor:
    """Energies (N, K) of K candidates for each row, `batch_size` of them in one pass (None: all).

    `energy` is a model's `energy(x, xt, t, attention_mask, log_mu)`; t is a scalar or (N,).
    """
    N, K, _ = x_NKL.shape
    xt_PL = xt_NL.repeat_interleave(K, dim=0)  # P = N * K, the candidates of a row side by side
    mask_PL = None if attention_mask is None else attention_mask.repeat_interleave(K, dim=0)
    t_P = t.repeat_interleave(K) if isinstance(t, torch.Tensor) and t.ndim else None
    x_PL, log_mu_P = x_NKL.flatten(0, 1), log_mu_NK.flatten()
    energies = []
    for start in range(0, N * K, batch_size or N * K):
        now = slice(start, start + (batch_size or N * K))
        mask = None if mask_PL is None else mask_PL[now]
        energies.append(energy(x_PL[now], xt_PL[now], t if t_P is None else t_P[now], mask, log_mu_P[now]))
    return torch.cat(energies).view(N, K)


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
