"""Draw k candidates, choose one. Pure functions of tensors; knows no network and no schedule.

Randomness is counter-based: a uniform is a hash of (seed, row, step, position, candidate), so a row's text depends
neither on the batch, the chunk nor the process it was made in.
Shapes: N rows, K candidates, M selected positions, V vocabulary.
"""

import torch
from torch import Tensor, nn


def uniforms(seed: int, *counters: Tensor | int) -> Tensor:
    """Uniforms in [0, 1), one for each entry of the broadcast counters (int64 tensors or integers).

    SplitMix64's finaliser (Steele et al. 2014) absorbs the counters one after the other. The top 52 bits make a
    float64, so that u * total stays below total for any float64 total (23 bits and float32 where float64 is missing).
    """
    device = next((c.device for c in counters if isinstance(c, Tensor)), torch.device("cpu"))
    state = _mix(_signed(seed))
    for counter in counters:
        state = _mix(
            state ^ _mix(counter.long() + _GOLDEN if isinstance(counter, Tensor) else _signed(counter + _GOLDEN))
        )
    if not isinstance(state, Tensor):  # no counter was one
        state = torch.tensor(state, device="cpu")
    bits, dtype = (23, torch.float32) if device.type == "mps" else (52, torch.float64)
    return _shift(state, 64 - bits).to(dtype) * 2.0**-bits  # type: ignore[union-attr]


def draw(logits_MV: Tensor, u_MK: Tensor) -> tuple[Tensor, Tensor]:
    """K independent draws from each row's softmax, by inverse CDF: one pass over the vocabulary, then K look-ups.

    For a large vocabulary the CDF has two levels: that of blocks of tokens, and that of each block that was hit. These
    alone are accumulated in the dtype of u; softmax and block sums are float32, so the law is right to 1e-6.

    Args:
        logits_MV: float32, normalised or not, -inf for what must not be drawn.
        u_MK: uniforms; their dtype is that of the cumulative sums.
    Returns:
        x_MK int64 and its log-probabilities (M, K). A row of NaN (softmax spreads a single one) gives NaN, of token 0:
        the last one may be the mask, which an energy of another library cannot read.
    """
    p_MV = logits_MV.softmax(-1)
    x_MK = (_look_up if p_MV.shape[-1] <= 1024 else _look_up_in_blocks)(p_MV, u_MK)
    log_p_MK = p_MV.gather(-1, x_MK).log()
    return x_MK.masked_fill(log_p_MK.isnan(), 0), log_p_MK


def _look_up(p_MV: Tensor, u_MK: Tensor) -> Tensor:
    cdf_MV = p_MV.to(u_MK.dtype).cumsum(-1)
    # right=True: a token without mass has the CDF of its predecessor and is never found
    return torch.searchsorted(cdf_MV, u_MK * cdf_MV[:, -1:], right=True).clamp_(max=p_MV.shape[-1] - 1)


def _look_up_in_blocks(p_MV: Tensor, u_MK: Tensor, width: int = 64) -> Tensor:
    (M, V), K, dtype = p_MV.shape, u_MK.shape[-1], u_MK.dtype
    whole = V // width * width
    sums_MC = (p_MV[:, :whole].unflatten(-1, (-1, width)).sum(-1), p_MV[:, whole:].sum(-1, keepdim=True))
    cdf_MC = torch.cat(sums_MC, dim=-1).to(dtype).cumsum(-1)
    target_MK = u_MK * cdf_MC[:, -1:]
    block_MK = torch.searchsorted(cdf_MC, target_MK, right=True).clamp_(max=cdf_MC.shape[-1] - 1)
    x_MKW = block_MK[..., None] * width + torch.arange(width, device=p_MV.device)
    p_MKW = p_MV.gather(-1, x_MKW.clamp(max=V - 1).flatten(1)).view(M, K, width).masked_fill_(x_MKW >= V, 0.0)
    cdf_MKW = p_MKW.to(dtype).cumsum(-1)
    start_MK = nn.functional.pad(cdf_MC, (1, 0)).gather(-1, block_MK)
    # the sum of a block is rounded otherwise than the end of its CDF, which must not be reached
    below_MK1 = cdf_MKW[..., -1:] * (1 - 2 * torch.finfo(dtype).eps)
    inside_MK1 = torch.searchsorted(cdf_MKW, torch.minimum((target_MK - start_MK)[..., None], below_MK1), right=True)
    return (block_MK * width + inside_MK1[..., 0]).clamp_(max=V - 1)


def choose(energy_NK: Tensor, temperature: float, u_N: Tensor, is_move: bool = False) -> tuple[Tensor, Tensor]:
    """Keep one of K candidates with probability proportional to w = exp(-E / temperature) (EDLM, Algorithm 1).

    Args:
        is_move: the first candidate is the present state, and the others are chosen more often than in proportion:
            another with w_j / (sum w - min(w_j, w_0)). This leaves the same law as it is and stays less often
            (Metropolised Gibbs sampling, Liu 1996, Biometrika 83); with K = 2 it is Metropolis and Hastings' rule.
    Returns:
        the index kept (N,) int64 and the effective sample size (sum w)^2 / sum w^2 (N,), between 1 and K. Rows
        without a single finite weight give NaN for the latter.
    """
    log_w_NK = -energy_NK.to(u_N.dtype) / temperature
    choice_N1, _ = draw(_moves(log_w_NK) if is_move else log_w_NK, u_N[:, None])
    return choice_N1[:, 0], effective_sample_size(log_w_NK).float()


def _moves(log_w_NK: Tensor) -> Tensor:
    p_NK = log_w_NK.softmax(-1)
    move_NK = p_NK / (1 - torch.minimum(p_NK, p_NK[:, :1]))
    move_NK[:, 0] = (1 - move_NK[:, 1:].sum(-1)).clamp(min=0)
    return move_NK.log()


def effective_sample_size(log_w_NK: Tensor) -> Tensor:
    """(sum w)^2 / sum w^2, (N,): K if all weights are the same, 1 if one has everything."""
    return 1 / log_w_NK.softmax(-1).square().sum(-1)


_GOLDEN = 0x9E3779B97F4A7C15 - 2**64


def _signed(x: int) -> int:
    """An unsigned 64-bit integer as the int64 of the same bits."""
    return (int(x) + 2**63) % 2**64 - 2**63


def _shift(x: Tensor | int, bits: int) -> Tensor | int:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _times(x: Tensor | int, factor: int) -> Tensor | int:
    """The product of int64, which wraps around."""
    return x * factor if isinstance(x, Tensor) else _signed(x * factor)


def _mix(x: Tensor | int) -> Tensor | int:
    """SplitMix64's finaliser."""
    x = _times(x ^ _shift(x, 30), _signed(0xBF58476D1CE4E5B9))
    x = _times(x ^ _shift(x, 27), _signed(0x94D049BB133111EB))
    return x ^ _shift(x, 31)
