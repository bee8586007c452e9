"""Draws and log-probabilities of a projection on the vocabulary, without the table of logits.

The vocabulary goes by in blocks whose logits stay in the cache: the (M, V) table of a large vocabulary would cost more
time, to be written and read again, than the products themselves. Both functions are `softmax(hidden @ weight.T + bias)`
with no mass on one token; softmax and sums of 32 tokens are float32, so the law is right to 1e-6.
Shapes: M rows, K draws for each, D hidden size, V vocabulary, W tokens of a block, C pieces of 32 tokens.
"""

from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .backbone import linear, pad_rows

PIECE = 32  # tokens: a draw finds its piece first, and projects that again
ROWS = 2048  # at a time
BLOCK = defaultdict(lambda: 2**24, cpu=2**20)  # logits at a time, by kind of device: what its caches hold
GATHERED = defaultdict(lambda: 2**26, cpu=2**20)  # weights of pieces at a time: on a GPU launches cost more than memory


def draw_projected(
    hidden_MD: Tensor, weight_VD: Tensor, bias_V: Tensor, banned: int, u_MK: Tensor
) -> tuple[Tensor, Tensor]:
    """K independent draws of each row by inverse CDF, what `sampler.draw` does with the logits.

    Args:
        banned: the token without mass. u_MK: uniforms; their dtype is that of the cumulative sums.
    Returns:
        x_MK int64 and its log-probabilities (M, K) float32. A row of NaN gives NaN.
    """
    parts = zip(hidden_MD.split(ROWS), u_MK.split(ROWS), strict=True)
    drawn = [_draw(hidden_RD, weight_VD, bias_V, banned, u_RK) for hidden_RD, u_RK in parts]
    return tuple(torch.cat(results) for results in zip(*drawn, strict=True))  # type: ignore[return-value]


def log_prob_projected(hidden_MD: Tensor, weight_VD: Tensor, bias_V: Tensor, banned: int, x_M: Tensor) -> Tensor:
    """log-probability of a token in each row, (M,) float32."""
    log_p = []
    for hidden_RD, x_R in zip(hidden_MD.split(ROWS), x_M.split(ROWS), strict=True):
        lowest = torch.finfo(torch.float32).min
        top_R = torch.full((len(x_R),), lowest, dtype=torch.float32, device=x_M.device)
        total_R = torch.zeros_like(top_R)
        for _, logits_RW in blocks(hidden_RD, weight_VD, bias_V, banned):
            before_R, top_R = top_R, torch.maximum(top_R, logits_RW.amax(-1))
            total_R = total_R * (before_R - top_R).exp() + logits_RW.sub_(top_R[:, None]).exp_().sum(-1)
        logit_R = (hidden_RD.float() * weight_VD[x_R].float()).sum(-1) + bias_V[x_R].float()
        log_p.append((logit_R - top_R - total_R.log()).masked_fill_(x_R == banned, float("-inf")))
    return torch.cat(log_p)


def blocks(hidden_MD: Tensor, weight_VD: Tensor, bias_V: Tensor, banned: int) -> Iterator[tuple[int, Tensor]]:
    """Yields the first token of each block and its logits (M, W), float32, to be overwritten at will."""
    M = len(hidden_MD)
    width = max(1024, BLOCK[hidden_MD.device.type] // max(1, M) // PIECE * PIECE)
    hidden_MD = pad_rows(hidden_MD)
    for start in range(0, len(weight_VD), width):
        logits_MW = project(hidden_MD, weight_VD[start : start + width], bias_V[start : start + width])[:M]
        if start <= banned < start + width:
            logits_MW[:, banned - start] = float("-inf")
        yield start, logits_MW


def project(hidden_MD: Tensor, weight_WD: Tensor, bias_W: Tensor) -> Tensor:
    return linear(hidden_MD, weight_WD, bias_W).float()


def _draw(hidden_MD: Tensor, weight_VD: Tensor, bias_V: Tensor, banned: int, u_MK: Tensor) -> tuple[Tensor, Tensor]:
    (V, D), dtype = weight_VD.shape, u_MK.dtype
    tops, sums = [], []
    for _, logits_MW in blocks(hidden_MD, weight_VD, bias_V, banned):
        tops.append(logits_MW.amax(-1, keepdim=True).clamp_(min=torch.finfo(torch.float32).min))  # all may be -inf
        p_MW = logits_MW.sub_(tops[-1]).exp_()
        if extra := -p_MW.shape[-1] % PIECE:  # of the last block
            p_MW = nn.functional.pad(p_MW, (0, extra))
        sums.append(p_MW.unflatten(-1, (-1, PIECE)).sum(-1))
    top_M1 = torch.cat(tops, dim=-1).amax(-1, keepdim=True)
    sums_MC = torch.cat([s * (top - top_M1).exp() for s, top in zip(sums, tops, strict=True)], dim=-1)
    cdf_MC = sums_MC.to(dtype).cumsum(-1)
    target_MK = u_MK * cdf_MC[:, -1:]
    # right=True: what has no mass has the CDF of its predecessor and is never found
    piece_MK = torch.searchsorted(cdf_MC, target_MK, right=True).clamp_(max=cdf_MC.shape[-1] - 1)
    start_MK = nn.functional.pad(cdf_MC, (1, 0)).gather(-1, piece_MK)
    share_MK = (target_MK - start_MK) / (cdf_MC.gather(-1, piece_MK) - start_MK)

    x, log_p = [], []
    log_total_M1 = top_M1 + cdf_MC[:, -1:].log().float()
    inside_P = torch.arange(PIECE, device=u_MK.device)
    at_a_time = max(1, GATHERED[u_MK.device.type] // (u_MK.shape[1] * PIECE * D))
    for rows_R in torch.arange(len(u_MK), device=u_MK.device).split(at_a_time):
        x_RKP = piece_MK[rows_R, :, None] * PIECE + inside_P
        token_RKP, is_out = x_RKP.clamp(max=V - 1), (x_RKP >= V) | (x_RKP == banned)
        logits_RKP = torch.einsum("rkpd,rd->rkp", weight_VD[token_RKP].float(), hidden_MD[rows_R].float())
        logits_RKP = (logits_RKP + bias_V[token_RKP].float()).masked_fill_(is_out, float("-inf"))
        cdf_RKP = (logits_RKP - logits_RKP.amax(-1, keepdim=True)).to(dtype).exp().cumsum(-1)
        # the end of the CDF must not be reached
        target_RK1 = share_MK[rows_R, :, None].clamp(max=1 - 2 * torch.finfo(dtype).eps) * cdf_RKP[..., -1:]
        found_RK1 = torch.searchsorted(cdf_RKP, target_RK1, right=True).clamp_(max=PIECE - 1)
        x.append(x_RKP.gather(-1, found_RK1)[..., 0].clamp_(max=V - 1))
        log_p.append(logits_RKP.gather(-1, found_RK1)[..., 0] - log_total_M1[rows_R])
    return torch.cat(x), torch.cat(log_p)
