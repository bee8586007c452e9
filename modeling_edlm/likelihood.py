"""What a likelihood of EDLM needs. Shares the sampler's draws, never calls generate().

Shapes: N rows, K proposals, L length.
"""

import math

import torch

from .energy import candidate_energies


@torch.no_grad()
def log_partition(
    model,
    xt_NL: torch.Tensor,
    t: float | None = None,
    num_samples: int = 64,
    seed: int = 0,
    energy_batch_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """log Z(xt) = log E_{x0 ~ mu(. | xt)}[exp(-E(x0, xt, t))], by log-mean-exp over proposals, and its standard error.

    The estimate is biased low by about half its squared standard error (Jensen), so one sample is refused. For coAR
    energies Z is 1 for any denoiser. Source: the residual form of EDLM (arXiv 2410.21357).

    Returns:
        log Z (N,) float64 and its standard error (N,) by the delta method.
    Raises:
        ValueError: `num_samples` < 2, the model in training mode (dropout), or an energy of the next state, whose Z
            depends on what is revealed.
    """
    if model.config.energy_target != "x0":
        raise ValueError(f"log_partition needs energy_target='x0', got {model.config.energy_target!r}")
    if model.training:
        raise ValueError("log_partition needs model.eval(), got a model in training mode")
    if num_samples < 2:
        raise ValueError(f"num_samples must be at least 2, got {num_samples}")
    masked_NL = (xt_NL == model.config.mask_token_id).cpu()
    x_NKL, log_mu_NK = model.denoiser.propose(xt_NL, masked_NL, num_samples, seed, t=t)
    log_w_NK = (
        -candidate_energies(model.energy, x_NKL, xt_NL, t, log_mu_NK, batch_size=energy_batch_size).cpu().double()
    )
    log_z_N = log_w_NK.logsumexp(-1) - math.log(num_samples)
    relative_NK = (log_w_NK - log_z_N[:, None]).exp()
    return log_z_N, relative_NK.std(-1) / math.sqrt(num_samples)
