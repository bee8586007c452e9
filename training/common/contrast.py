"""The task an energy is trained on: to tell the data from what the denoiser proposes for the same masked text.

Shapes: B rows of a micro-batch, J negatives of each row, P = (1 + J) B, G rows of a global batch, L length.
"""

import torch
from torch import nn

from modeling_edlm.schedule import q_sample

from .loop import row_draws, step_seed


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


LOSSES = {"nce": nce_loss, "ranking": ranking_loss}


def contrast(
    denoiser,
    x0_BL: torch.Tensor,
    t_B: torch.Tensor,
    s_B: torch.Tensor | None,
    u_BL: torch.Tensor,
    seed: int,
    num_negatives: int = 1,
    rows_B: torch.Tensor | None = None,
):
    """The data and proposals for the same masked text.

    Args:
        x0_BL: data. t_B: times of xt. s_B: times of the next state for a step energy, None for energies of x0.
        u_BL: uniforms of the masks. seed, rows_B: of the proposals; a row's draws depend on its number alone.
    Returns:
        positive (B, L), negatives (B, J, L), xt (B, L).
    Raises:
        ValueError: the denoiser is in training mode, where dropout would spoil the proposal.
    """
    if any(module.training for module in denoiser.modules()):
        raise ValueError("denoiser must be in eval mode: dropout would change the proposal")
    mask = denoiser.config.mask_token_id
    xt_BL = q_sample(x0_BL, t_B, u_BL, mask)
    # the same uniforms: what is clean at t is clean at s < t too
    positive_BL = x0_BL if s_B is None else q_sample(x0_BL, s_B, u_BL, mask)
    filled_BL = (xt_BL == mask) & (positive_BL != mask)
    rows_B = torch.arange(len(x0_BL)) if rows_B is None else rows_B
    proposal = denoiser.propose(xt_BL, filled_BL.cpu(), num_negatives, (seed, rows_B, 0), t_B)
    return positive_BL, proposal.x_NKL, xt_BL


def step_times(t_G: torch.Tensor, seed: int, target: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Times t (G,) of xt, and for a step energy s (G,) of xs: those of a sampler with T steps, T log-uniform in
    [2, 128]."""
    if target == "x0":
        return t_G, None
    generator = torch.Generator().manual_seed(seed)
    num_steps_G = torch.exp2(1 + 6 * torch.rand(len(t_G), generator=generator)).round()
    t_G = (t_G * num_steps_G).ceil() / num_steps_G
    return t_G, (t_G - 1 / num_steps_G).clamp(min=0)


def energies(model, positive_BL, negatives_BJL, xt_BL, t_B, s_B) -> tuple[torch.Tensor, torch.Tensor]:
    """E of the data (B,) and of the proposals (B, J), from one forward pass."""
    (B, J, L), time_B = negatives_BJL.shape, t_B if s_B is None else s_B
    x_PL = torch.cat((positive_BL, negatives_BJL.transpose(0, 1).reshape(J * B, L)))
    energy_P = model(x_PL, xt=xt_BL.repeat(1 + J, 1), t=time_B.repeat(1 + J)).logits[:, 0]
    return energy_P[:B], energy_P[B:].view(J, B).T


def accuracy(data_B: torch.Tensor, proposal_BJ: torch.Tensor, loss: str) -> torch.Tensor:
    """(B, J) share that is told right; an energy that cannot tell is half right.

    "nce": of data and proposal, by the sign of the energy. "ranking": of the pair, by the lower energy.
    """
    if loss == "ranking":
        return 0.5 + (proposal_BJ - data_B[:, None]).sign() / 2
    return 0.5 + (proposal_BJ.sign() - data_B[:, None].sign()) / 4


def draw_contrast(denoiser, x0_BL, rows_B, num_rows: int, seed: int, target: str, num_negatives: int):
    """Times and texts of one micro-batch, rows of a global batch whose draws are a function of the seed.

    Returns:
        positive, negatives, xt, t, s: what `energies` takes.
    """
    t_G, u_GL = row_draws(seed, num_rows, x0_BL.shape[1])
    t_G, s_G = step_times(t_G, step_seed(seed, 1), target)
    t_B, s_B, u_BL = (None if x is None else x[rows_B].to(x0_BL.device) for x in (t_G, s_G, u_GL))
    positive_BL, negatives_BJL, xt_BL = contrast(
        denoiser, x0_BL, t_B, s_B, u_BL, step_seed(seed, 2), num_negatives, rows_B
    )
    return positive_BL, negatives_BJL, xt_BL, t_B, s_B
