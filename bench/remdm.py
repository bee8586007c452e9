"""ReMDM (Wang et al. 2025, arXiv 2503.00307): a masked denoiser whose sampler also masks tokens again.

From time t to s < t a position of the state z_t becomes

    z_s ~ Cat((1 - sigma) x + sigma m)   where it shows a token x
    z_s ~ Cat(r mu + (1 - r) m)          where it is the mask m, r = (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t)

so that z_s has the marginals of masked diffusion for every sigma up to (1 - alpha_s) / alpha_t; sigma = 0 is MDLM.
Which positions move depends on no token value: a step that shows nothing in a row costs it no pass.
Shapes: B rows, N rows stepped now, L length.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from modeling_edlm.backbone import fixed_weights, rows_at_once
from modeling_edlm.draws import uniforms
from modeling_edlm.schedule import alpha, time_at, times

ETA = {"cap": 0.04, "rescale": 0.015, "loop": 0.02}  # of each schedule
LOOP_ON, LOOP_OFF, LOOP_ALPHA = 0.55, 0.05, 0.9  # between these times alpha stands still, and tokens are masked again
MOVE = -5  # counter of the draws that say which positions move; those of the sampler are -1 to -4


@dataclass(frozen=True)
class Move:
    """A step: alpha before and after it, and sigma, the probability that a token is masked again."""

    alpha_t: float
    alpha_s: float
    sigma: float

    @property
    def reveal(self) -> float:
        return (self.alpha_s - (1 - self.sigma) * self.alpha_t) / (1 - self.alpha_t)


def moves(schedule: str, num_steps: int, eta: float) -> list[Move]:
    """The steps of a schedule of the paper: "cap", sigma = min(eta, its largest value); "rescale", eta times that; or
    "loop", "cap" while alpha stands still, and MDLM before and after it."""
    grid, found = times(num_steps).tolist(), []
    for t, s in pairwise(grid):
        alpha_t, alpha_s = (_alpha_of_loop(x) if schedule == "loop" else float(alpha(x)) for x in (t, s))
        largest = min(1.0, (1 - alpha_s) / alpha_t) if alpha_t > 0 else 1.0
        sigma = eta * largest if schedule == "rescale" else min(eta, largest)
        if schedule == "loop" and not LOOP_OFF < t <= LOOP_ON:
            sigma = 0.0
        found.append(Move(alpha_t, alpha_s, sigma))
    return found


def _alpha_of_loop(t: float) -> float:
    if t > LOOP_ON:
        return (1 - t) / (1 - LOOP_ON) * LOOP_ALPHA
    return LOOP_ALPHA if t > LOOP_OFF else 1 - t / LOOP_OFF * (1 - LOOP_ALPHA)


@torch.no_grad()
def sample(
    denoiser, size: int, length: int, steps: list[Move], seed: int, first_row: int = 0, process: Callable | None = None
) -> tuple[Tensor, Tensor]:
    """Texts (B, L) from nothing but masks, and the passes (B,) that each took.

    Args:
        denoiser: has `propose()`; see there for `process`. first_row: number of the first row, as in `generate()`.
    """
    device, mask_token_id = denoiser.device, denoiser.config.mask_token_id
    row_B1, place_L = torch.arange(first_row, first_row + size)[:, None], torch.arange(length)
    x_BL = torch.full((size, length), mask_token_id, device=device)
    is_masked_BL, nfe_B = torch.ones(size, length, dtype=torch.bool), torch.zeros(size, dtype=torch.int64)
    with fixed_weights():
        for step, move in enumerate(steps):
            u_BL = uniforms(seed, row_B1, step, MOVE, place_L)
            shown_BL, hidden_BL = is_masked_BL & (u_BL < move.reveal), ~is_masked_BL & (u_BL < move.sigma)
            for rows_N in shown_BL.any(-1).nonzero()[:, 0].split(rows_at_once(denoiser, length)):
                if not len(rows_N):
                    continue
                on_N, shown_NL = rows_N.to(device), shown_BL[rows_N]
                counters = seed, on_N + first_row, step
                t = float(time_at(move.alpha_t))
                proposal = denoiser.propose(x_BL[on_N], shown_NL, 1, counters, t, process=process)
                x_BL[on_N] = torch.where(shown_NL.to(device), proposal.x_NKL[:, 0], x_BL[on_N])
                nfe_B[rows_N] += 1
            x_BL[hidden_BL.to(device)] = mask_token_id
            is_masked_BL = (is_masked_BL & ~shown_BL) | hidden_BL
    return x_BL, nfe_B
