"""Draws from the proposal mu(x0 | xt), which is independent at each masked position given xt.

Shapes: N rows, K candidates, L length, V vocabulary, M selected positions (flat in N * L), P all N * L positions.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .draws import draw, uniforms

ORDERS = ("random", "confidence", "margin", "entropy")  # in which positions are revealed


@dataclass(frozen=True)
class Columns:
    """How the K candidates of a row differ.

    shown_K, rest_K: int64, the number of each one's draw at the positions that a step shows, and at the others; equal
    numbers are equal draws. given_K: bool, which ones are given their tokens at the positions shown; None: none.
    """

    shown_K: Tensor
    rest_K: Tensor
    given_K: Tensor | None = None

    @classmethod
    def independent(
        cls, K: int, device: torch.device | None = None, shared: bool = False, first_given: bool = False
    ) -> "Columns":
        """K draws, of which `shared` have one and the same rest; the first may be given instead."""
        draw_K = torch.arange(K, device=device)
        return cls(draw_K, 0 * draw_K if shared else draw_K, draw_K == 0 if first_given else None)


@dataclass(frozen=True)
class Proposal:
    """x (N, K, L), the state with K candidates in place; log mu_i of the tokens put there, (N, L, K) float32, zero
    elsewhere; log mu of the given tokens where that was asked for, (N, L), zero elsewhere; and how certain mu_i is
    where something was drawn, (N, L), None where no order asked for that."""

    x_NKL: Tensor
    log_mu_NLK: Tensor
    log_given_NL: Tensor
    certainty_NL: Tensor | None = None

    @property
    def log_mu_NK(self) -> Tensor:
        # summed row by row, not scattered with atomics: the same seed gives the same bits
        return self.log_mu_NLK.sum(1)

    def showing(self, shown_NL: Tensor, rest_NL: Tensor, counts_rest: bool) -> "Proposal":
        """The same with `rest` (N, L) in all candidates where nothing is shown; the first candidate has it there, or it
        is not drawn at all and does not count."""
        rest_NLK = self.log_mu_NLK[..., :1] if counts_rest else torch.zeros_like(self.log_mu_NLK)
        x_NKL = torch.where(shown_NL[:, None], self.x_NKL, rest_NL[:, None])
        return replace(self, x_NKL=x_NKL, log_mu_NLK=torch.where(shown_NL[..., None], self.log_mu_NLK, rest_NLK))


def certainty(order: str, logits_MV: Tensor) -> Tensor:
    """(M,) what an order ranks positions by, from the logits of mu_i: of the largest value first."""
    p_MV = logits_MV.softmax(-1)
    if order == "confidence":
        return p_MV.amax(-1)
    if order == "margin":
        best_M2 = p_MV.topk(2).values
        return best_M2[:, 0] - best_M2[:, 1]
    return torch.special.entr(p_MV).sum(-1).neg()


def own_positions(like_NL: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The place of each token in its own text, (N, L): what is drawn for it must not depend on the padding."""
    if attention_mask is None:
        return torch.arange(like_NL.shape[1], device=like_NL.device).expand_as(like_NL)
    return (attention_mask.long().cumsum(-1) - 1).clamp_(min=0)


def only_best(logits_MV: Tensor) -> Tensor:
    """Logits that leave the most likely token of each row."""
    best_M1 = logits_MV.argmax(-1, keepdim=True)
    return torch.full_like(logits_MV, -torch.inf).scatter(-1, best_M1, logits_MV.gather(-1, best_M1))


class ProposalMixin:
    """`propose()` for a denoiser, which has a method `logit_chunks`."""

    def logit_chunks(
        self, xt_NL: Tensor, where_NL: Tensor, t: Tensor | float | None = None, attention_mask: Tensor | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields flat positions (M,) and their logits (M, V), float32 and -inf for the mask token.

        Together they are all of `where_NL`, bool and on the CPU so that the device is not waited for; there are as many
        at once as fit into memory. mu_i(. | xt) is their softmax.
        """
        raise NotImplementedError

    def draw_chunks(
        self,
        xt_NL: Tensor,
        where_NL: Tensor,
        uniforms_at: Callable[[Tensor], Tensor],
        t: Tensor | float | None = None,
        attention_mask: Tensor | None = None,
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yields flat positions (M,), what is drawn there (M, K), and its log mu (M, K); together all of `where_NL`.
        `uniforms_at` gives the uniforms (M, K) of flat positions.
        """
        for chunk_M, logits_MV in self.logit_chunks(xt_NL, where_NL, t, attention_mask):
            yield chunk_M, *draw(logits_MV, uniforms_at(chunk_M))

    @torch.no_grad()
    def propose(
        self,
        xt_NL: Tensor,
        where_NL: Tensor,
        columns: int | Columns,
        counters: tuple[Tensor | int, ...],
        t: Tensor | float | None = None,
        attention_mask: Tensor | None = None,
        process: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None = None,
        shown_NL: Tensor | None = None,
        given_NL: Tensor | None = None,
        scored_NL: Tensor | None = None,
        order: str = "random",
        is_greedy: bool = False,
    ) -> Proposal:
        """K independent draws from mu(. | xt) at `where`, all from one pass; only positions in question are projected.

        Args:
            xt_NL: states. where_NL: bool on the CPU, what to fill.
            columns: how the candidates differ; K: independent draws.
            counters: the seed and other counters of the uniforms, each an integer or (N,); the position in its own text
                and the number of the draw come after them.
            process: `(rows (M,), states (M, L), logits (M, V), positions (M,))` to logits whose softmax is mu; None: as
                they are.
            shown_NL: bool on the CPU, where `columns.shown_K` and `given_K` count; None: everywhere.
            given_NL: tokens (N, L). scored_NL: bool on the CPU, where their log mu is wanted; it holds `where`.
            order: what the positions are to be ranked by, see `certainty`. is_greedy: the likeliest token alone is
                drawn, which the ranking does not know of.
        """
        (N, L), device = xt_NL.shape, xt_NL.device
        columns = Columns.independent(columns, device) if isinstance(columns, int) else columns
        K = len(columns.shown_K)
        position_P = own_positions(xt_NL, attention_mask).flatten()  # P = N * L
        shown_P = None if shown_NL is None else shown_NL.to(device, non_blocking=True).flatten()
        seed, *others = (c.to(device)[:, None] if isinstance(c, Tensor) else c for c in counters)

        def uniforms_at(chunk_M: Tensor) -> Tensor:
            draw_MK = columns.shown_K
            if shown_P is not None and columns.shown_K is not columns.rest_K:
                draw_MK = torch.where(shown_P[chunk_M, None], columns.shown_K, columns.rest_K)
            row_M = chunk_M // L
            now = (c[row_M] if isinstance(c, Tensor) else c for c in others)
            return uniforms(seed, *now, position_P[chunk_M, None], draw_MK)  # type: ignore[arg-type]

        def all_draws() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
            if process is None and given_NL is None and order == "random":
                yield from self.draw_chunks(xt_NL, where_NL, uniforms_at, t, attention_mask)
                return
            read_NL = where_NL if scored_NL is None else scored_NL
            is_drawn_P = None if scored_NL is None else where_NL.to(device, non_blocking=True).flatten()
            for chunk_M, logits_MV in self.logit_chunks(xt_NL, read_NL, t, attention_mask):
                if process is not None:
                    logits_MV = process(chunk_M // L, xt_NL[chunk_M // L], logits_MV, position_P[chunk_M])
                if order != "random":
                    certainty_P[chunk_M] = certainty(order, logits_MV)
                logits_MV = only_best(logits_MV) if is_greedy else logits_MV
                if given_NL is not None:  # not the log of a softmax, which has nothing below e-38
                    token_M1 = given_NL.flatten()[chunk_M, None]
                    log_given_P[chunk_M] = logits_MV.log_softmax(-1).gather(-1, token_M1)[:, 0]
                if is_drawn_P is not None:
                    chosen_M = is_drawn_P[chunk_M]
                    chunk_M, logits_MV = chunk_M[chosen_M], logits_MV[chosen_M]
                yield chunk_M, *draw(logits_MV, uniforms_at(chunk_M))

        x_PK = xt_NL.flatten()[:, None].repeat(1, K)
        log_mu_PK = torch.zeros(N * L, K, dtype=torch.float32, device=device)
        log_given_P = torch.zeros(N * L, dtype=torch.float32, device=device)
        certainty_P = torch.zeros(N * L, dtype=torch.float32, device=device)
        for chunk_M, x_MK, log_mu_MK in all_draws():
            x_PK[chunk_M], log_mu_PK[chunk_M] = x_MK, log_mu_MK
        if columns.given_K is not None:
            is_given_P = where_NL.to(device, non_blocking=True).flatten()
            is_given_P = is_given_P if shown_P is None else is_given_P & shown_P
            is_given_PK = is_given_P[:, None] & columns.given_K
            x_PK = torch.where(is_given_PK, given_NL.flatten()[:, None], x_PK)  # type: ignore[union-attr]
            log_mu_PK = torch.where(is_given_PK, log_given_P[:, None], log_mu_PK)
        x_NKL, log_mu_NLK = x_PK.view(N, L, K).transpose(1, 2), log_mu_PK.view(N, L, K)
        certainty_NL = None if order == "random" else certainty_P.view(N, L)
        return Proposal(x_NKL, log_mu_NLK, log_given_P.view(N, L), certainty_NL)
