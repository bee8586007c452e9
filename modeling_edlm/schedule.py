"""The forward process and the reveal schedule. Knows no network.

Time runs from t=1 (all mask) to t=0 (data). alpha(t) is the probability that a token is still clean.
Shapes: B batch, L length.
"""

import torch
from torch import Tensor


def alpha(t: Tensor) -> Tensor:
    """Probability that a token is clean at time t, the log-linear schedule of MDLM (arXiv 2406.07524): 1 - t."""
    return 1.0 - t


def time_at(alpha_t: Tensor) -> Tensor:
    """The time at which `alpha` has this value."""
    return 1.0 - alpha_t


def conditioning(t: Tensor) -> Tensor:
    """What a time-conditioned network is fed for t: the total noise of MDLM, finite at t=1."""
    return -torch.log1p(-(1 - 1e-3) * t)


def times(num_steps: int) -> Tensor:
    """The grid t_0 = 1 > ... > t_T = 0, shape (num_steps + 1,), float64."""
    return torch.linspace(1, 0, num_steps + 1, dtype=torch.float64, device="cpu")


def antithetic_times(u: Tensor, batch_size: int) -> Tensor:
    """One t for each row, one in each of `batch_size` equal strata of (0, 1]: lowers the variance of the loss.

    Args:
        u: scalar in [0, 1), shifts all strata together.
    Returns:
        (B,) times in (0, 1].
    """
    return 1 - (torch.arange(batch_size, device=u.device, dtype=u.dtype) / batch_size + u) % 1


def q_sample(x0_BL: Tensor, t_B: Tensor, u_BL: Tensor, mask_token_id: int) -> Tensor:
    """Draw xt ~ q(xt | x0): a token is kept with probability alpha(t), else it becomes the mask token.

    Args:
        x0_BL: clean tokens. t_B: times. u_BL: uniforms in [0, 1).
    """
    return torch.where(u_BL < alpha(t_B)[:, None], x0_BL, mask_token_id)


def reveal_steps(v_BL: Tensor, num_steps: int) -> Tensor:
    """The step in which the time 1 - v lies: P(step = i) = alpha(t_{i+1}) - alpha(t_i) for a uniform v in [0, 1)."""
    alpha_s_T = alpha(times(num_steps)[1:]).to(v_BL)
    return torch.searchsorted(alpha_s_T, v_BL, right=True).clamp_(max=num_steps - 1)


class RevealPlan:
    """Which position is revealed at which step, drawn before the sampling loop: under absorbing noise it depends on no
    token value.

    A position that is still masked at step i is revealed at it with probability (alpha(s) - alpha(t)) / (1 - alpha(t)),
    the posterior of MDLM (arXiv 2406.07524), and the last step reveals all that is left. With blocks (block diffusion,
    arXiv 2503.09573) each has the part of time that is its share of the free positions, from left to right, and the
    same posterior within it; a step may belong to two blocks, unless there is a whole number of steps for each.

    Args:
        u_BL: uniforms in [0, 1), on the CPU. free_BL: bool, what is to be revealed.
        num_steps: T. None: continuous time, which has moments and no steps.
        block_length: free positions of a block; None: all are one.
        is_even: each step reveals as many as the one before, up to one: not the posterior of MDLM, but what an order by
            value starts from (see `prefer`).

    Attributes:
        v_BL: 1 - the time at which a free position is revealed. step_BL: its step in [0, T), -1 where nothing is free.
    """

    def __init__(
        self,
        u_BL: Tensor,
        free_BL: Tensor,
        num_steps: int | None,
        block_length: int | None = None,
        is_even: bool = False,
    ):
        self.free_BL, self.num_steps, self.block_length = free_BL, num_steps, block_length
        self.v_BL = u_BL
        if block_length is not None:
            start_BL, size_BL = self.block(free_BL.long().cumsum(-1) - 1)
            self.v_BL = (start_BL + u_BL * size_BL) / self.num_free_B1
        if is_even:
            rank_BL = self.v_BL.masked_fill(~free_BL, 2.0).argsort(dim=-1).argsort(dim=-1)
            self.v_BL = (rank_BL + 0.5) / self.num_free_B1
        self._find_steps()

    def _find_steps(self) -> None:
        if self.num_steps is not None:
            self.step_BL = reveal_steps(self.v_BL, self.num_steps).masked_fill(~self.free_BL, -1)

    @property
    def num_free_B1(self) -> Tensor:
        return self.free_BL.sum(-1, keepdim=True)

    def block(self, rank_BL: Tensor, rows_N: Tensor | slice = slice(None)) -> tuple[Tensor, Tensor]:
        """First rank and number of the free positions in the block of each rank, counted over the free positions."""
        num_free_B1 = self.num_free_B1[rows_N]
        if self.block_length is None:
            return torch.zeros_like(rank_BL), num_free_B1.expand_as(rank_BL)
        start_BL = rank_BL.div(self.block_length, rounding_mode="floor") * self.block_length
        return start_BL, (num_free_B1 - start_BL).clamp(max=self.block_length)

    def sets(self, step: int | Tensor, rows_N: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(N, L) bool: what is masked before a step (an integer, or (N, 1)), what is still masked after it, and what it
        reveals."""
        step_NL = self.step_BL if rows_N is None else self.step_BL[rows_N]
        return step_NL >= step, step_NL > step, step_NL == step

    def prefer(self, step: int, rows_N: Tensor, certainty_NL: Tensor, threshold: float | None = None) -> Tensor:
        """Reveal at a step, of what is masked in its blocks and those before, the most certain positions, as many as
        were planned, and with a threshold all that reach it. The others share the later steps that these had; of too
        many the earliest are left out, so that time goes on telling how much is masked.

        Returns:
            (N, L) bool, what the step reveals now.
        """
        step_NL, (hidden_NL, _, planned_NL), L = self.step_BL[rows_N], self.sets(step, rows_N), certainty_NL.shape[1]
        start_NL, _ = self.block(self.free_BL[rows_N].long().cumsum(-1) - 1, rows_N)
        last_N1 = start_NL.masked_fill(~planned_NL, -1).amax(-1, keepdim=True)
        open_NL = hidden_NL & (start_NL <= last_N1)
        certainty_NL = certainty_NL.masked_fill(~open_NL, -torch.inf)
        rank_NL = certainty_NL.argsort(stable=True, dim=-1, descending=True).argsort(-1)
        shown_NL = rank_NL < planned_NL.sum(-1, keepdim=True)
        if threshold is not None:
            shown_NL |= open_NL & (certainty_NL >= threshold)
        left_NL = open_NL & ~shown_NL
        steps_NL = step_NL.masked_fill(~open_NL, -1).sort(-1).values  # those of what is open come last
        place_NL = L - left_NL.sum(-1, keepdim=True) + left_NL.long().cumsum(-1) - 1
        later_NL = steps_NL.gather(1, place_NL.clamp(0, L - 1))
        self.step_BL[rows_N] = torch.where(shown_NL, step, torch.where(left_NL, later_NL, step_NL))
        return shown_NL

    def moment(self, v_B1: Tensor, u_B1: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The state just before a random free position is revealed, at time 1 - v: where the plan had another time for
        it, it is changed.

        Args:
            v_B1: uniforms in [0, 1): the block is the one whose time this is. u_B1: uniforms, the position in it.
        Returns:
            t, s (B,) float64, and (B, L) bool: what is masked; what is revealed next (in continuous time: any of it
            may be); and what else could have been, with the same probability.
        """
        start_B1, size_B1 = self.block(torch.minimum((v_B1 * self.num_free_B1).long(), self.num_free_B1 - 1))
        rank_B1 = start_B1 + (u_B1 * size_B1).long()
        picked_B1 = (self.free_BL.cumsum(-1) == rank_B1 + 1).long().argmax(-1, keepdim=True)
        self.v_BL = self.v_BL.scatter(1, picked_B1, v_B1)
        self._find_steps()
        if self.num_steps is None:
            rank_BL = self.free_BL.long().cumsum(-1) - 1
            hidden_BL, t_B = self.free_BL & (self.v_BL >= v_B1), time_at(v_B1[:, 0])
            shown_BL = hidden_BL & (rank_BL < start_B1 + size_B1)
            return t_B, t_B, hidden_BL, shown_BL, shown_BL
        step_B1, grid = self.step_BL.gather(1, picked_B1), times(self.num_steps)
        hidden_BL, _, shown_BL = self.sets(step_B1)
        alike_BL = hidden_BL if self.block_length is None else shown_BL
        return grid[step_B1[:, 0]], grid[step_B1[:, 0] + 1], hidden_BL, shown_BL, alike_BL


def revision_set(u_BL: Tensor, free_BL: Tensor, size: int, is_contiguous: bool = False) -> Tensor:
    """(B, L) bool: `size` of the free positions of each row, all of them where there are fewer; every set of this size
    is as likely as any other, or every one of neighbours among the free positions, around the ends too (so that each
    position is revised as often as any other).

    Args:
        u_BL: uniforms in [0, 1). free_BL: bool, what may be revised.
    """
    if is_contiguous:
        rank_BL, num_free_B1 = free_BL.long().cumsum(-1) - 1, free_BL.sum(-1, keepdim=True)
        start_B1 = (u_BL[:, :1] * num_free_B1).long()
        rank_BL = (rank_BL - start_B1) % num_free_B1.clamp(min=1)
    else:
        rank_BL = u_BL.masked_fill(~free_BL, 2.0).argsort(dim=-1).argsort(dim=-1)
    return free_BL & (rank_BL < size)
