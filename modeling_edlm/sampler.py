"""Draw k candidates, choose one. Pure functions of tensors; knows no network and no schedule.

Randomness is counter-based: a uniform is a hash of (seed, row, step, position, candidate), so a row's text depends
neither on the batch, the chunk nor the process it was made in.
Shapes: N rows, K candidates, M selected positions, V vocabulary.
"""

import torch


def uniforms(seed: int, *counters: torch.Tensor | int) -> torch.Tensor:
    """Uniforms in [0, 1), one for each entry of the broadcast counters (int64 tensors or integers).

    SplitMix64's finaliser (Steele et al. 2014) absorbs the counters one after the other. The top 52 bits make a
    float64, so that u * total stays below total for any float64 total (23 bits and float32 where float64 is missing).
    """
    device = next((c.device for c in counters if isinstance(c, torch.Tensor)), torch.device("cpu"))
    state = _mix(torch.tensor(_signed(seed), device=device))
    for counter in counters:
        state = _mix(state ^ _mix(torch.as_tensor(counter, dtype=torch.int64, device=device) + _GOLDEN))
    bits, dtype = (23, torch.float32) if device.type == "mps" else (52, torch.float64)
    return _shift(state, 64 - bits).to(dtype) * 2.0**-bits


def draw(log_p_MV: torch.Tensor, u_MK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """K independent draws from each row's distribution, by inverse CDF: one cumulative sum, then K look-ups.

    Args:
        log_p_MV: log-probabilities, normalised or not, -inf for what must not be drawn.
        u_MK: uniforms; their dtype is that of the cumulative sum.
    Returns:
        x_MK int64 and their entries of log_p_MV, (M, K). A row of NaN (log_softmax spreads a single one) gives NaN.
    """
    cdf_MV = (log_p_MV - log_p_MV.amax(-1, keepdim=True)).to(u_MK.dtype).exp().cumsum(-1)
    # right=True: a token without mass has the CDF of its predecessor and is never found
    x_MK = torch.searchsorted(cdf_MV, u_MK * cdf_MV[:, -1:], right=True).clamp_(max=log_p_MV.shape[-1] - 1)
    return x_MK, log_p_MV.gather(-1, x_MK)


def choose(energy_NK: torch.Tensor, temperature: float, u_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keep one of K candidates with probability proportional to w = exp(-E / temperature) (EDLM, Algorithm 1).

    Returns:
        the index kept (N,) int64 and the effective sample size (sum w)^2 / sum w^2 (N,), between 1 and K. Rows
        without a single finite weight give NaN for the latter.
    """
    log_w_NK = -energy_NK.to(u_N.dtype) / temperature
    choice_N1, _ = draw(log_w_NK, u_N[:, None])
    return choice_N1[:, 0], effective_sample_size(log_w_NK).float()


def effective_sample_size(log_w_NK: torch.Tensor) -> torch.Tensor:
    """(sum w)^2 / sum w^2, (N,): K if all weights are the same, 1 if one has everything."""
    return 1 / log_w_NK.softmax(-1).square().sum(-1)


_GOLDEN = 0x9E3779B97F4A7C15 - 2**64


def _signed(x: int) -> int:
    """An unsigned 64-bit integer as the int64 of the same bits."""
    return (int(x) + 2**63) % 2**64 - 2**63


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finaliser; int64 products wrap around."""
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)
