"""The forward process and the reveal schedule. Knows no network.

Time runs from t=1 (all mask) to t=0 (data). alpha(t) is the probability that a token is still clean.
Shapes: B batch, L length.
"""

import torch


def alpha(t: torch.Tensor) -> torch.Tensor:
    """Probability that a token is clean at time t, the log-linear schedule of MDLM (arXiv 2406.07524): 1 - t."""
    return 1.0 - t


def time_at(alpha_t: torch.Tensor) -> torch.Tensor:
    """The time at which `alpha` has this value."""
    return 1.0 - alpha_t


def dalpha(t: torch.Tensor) -> torch.Tensor:
    """Derivative of `alpha` with respect to t."""
    return -torch.ones_like(t)


def conditioning(t: torch.Tensor) -> torch.Tensor:
    """What a time-conditioned network is fed for t: the total noise of MDLM, finite at t=1."""
    return -torch.log1p(-(1 - 1e-3) * t)


def times(num_steps: int) -> torch.Tensor:
    """The grid t_0 = 1 > ... > t_T = 0, shape (num_steps + 1,), float64."""
    return torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)


def antithetic_times(u: torch.Tensor, batch_size: int) -> torch.Tensor:
    """One t for each row, one in each of `batch_size` equal strata of (0, 1]: lowers the variance of the loss.

    Args:
        u: scalar in [0, 1), shifts all strata together.
    Returns:
        (B,) times in (0, 1].
    """
    return 1 - (torch.arange(batch_size, device=u.device) / batch_size + u) % 1


def q_sample(x0_BL: torch.Tensor, t_B: torch.Tensor, u_BL: torch.Tensor, mask_token_id: int) -> torch.Tensor:
    """Draw xt ~ q(xt | x0): a token is kept with probability alpha(t), else it becomes the mask token.

    Args:
        x0_BL: clean tokens. t_B: times. u_BL: uniforms in [0, 1).
    """
    return torch.where(u_BL < alpha(t_B)[:, None], x0_BL, mask_token_id)


def reveal_steps(u_BL: torch.Tensor, num_steps: int) -> torch.Tensor:
    """The step at which each masked position is revealed: P(step = i) = alpha(t_{i+1}) - alpha(t_i).

    Under absorbing noise this step does not depend on any token value, so it is drawn before the sampling loop. A
    position still masked at step i is then revealed at it with probability (alpha(s) - alpha(t)) / (1 - alpha(t)),
    the posterior of MDLM (arXiv 2406.07524), and the last step reveals all that is left.

    Args:
        u_BL: uniforms in [0, 1).
    Returns:
        (B, L) int64 in [0, num_steps).
    """
    alpha_s_T = alpha(times(num_steps)[1:]).to(u_BL)
    return torch.searchsorted(alpha_s_T, u_BL, right=True).clamp_(max=num_steps - 1)


def revision_set(u_BL: torch.Tensor, free_BL: torch.Tensor, size: int) -> torch.Tensor:
    """(B, L) bool: `size` of the free positions of each row, all of them where there are fewer; every set of this size
    is as likely as any other.

    Args:
        u_BL: uniforms in [0, 1). free_BL: bool, what may be revised.
    """
    rank_BL = u_BL.masked_fill(~free_BL, 2.0).argsort(dim=-1).argsort(dim=-1)
    return free_BL & (rank_BL < size)
