"""Draws from the proposal mu(x0 | xt), which is independent at each masked position given xt.

Shapes: N rows, K candidates, L length, V vocabulary, M selected positions (flat in N * L), P all N * L positions.
"""

from collections.abc import Callable, Iterator

import torch

from .sampler import draw, uniforms


def own_positions(like_NL: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """The place of each token in its own text, (N, L): what is drawn for it must not depend on the padding."""
    if attention_mask is None:
        return torch.arange(like_NL.shape[1], device=like_NL.device).expand_as(like_NL)
    return (attention_mask.long().cumsum(-1) - 1).clamp_(min=0)


class ProposalMixin:
    """`propose()` for a denoiser, which has a method `logit_chunks`."""

    def logit_chunks(
        self, xt_NL: torch.Tensor, where_NL: torch.Tensor, t=None, attention_mask: torch.Tensor | None = None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yields flat positions (M,) and their logits (M, V), float32 and -inf for the mask token.

        Together they are all of `where_NL`, bool and on the CPU so that the device is not waited for; there are as many
        at once as fit into memory. mu_i(. | xt) is their softmax.
        """
        raise NotImplementedError

    def draw_chunks(
        self, xt_NL, where_NL, uniforms_at: Callable, t=None, attention_mask=None, process=None, present_NL=None
    ):
        """Yields flat positions (M,), what is drawn there (M, K), and its log mu (M, K); together all of `where_NL`.

        `uniforms_at` gives the uniforms (M, K) of flat positions, and `process` changes the logits at them. With
        `present_NL` the first candidate is not drawn: it has these tokens.
        """
        for chunk_M, logits_MV in self.logit_chunks(xt_NL, where_NL, t, attention_mask):
            if process is not None:
                logits_MV = process(chunk_M, logits_MV)
            x_MK, log_mu_MK = draw(logits_MV, uniforms_at(chunk_M))
            if present_NL is not None:
                x_MK[:, 0] = present_NL.flatten()[chunk_M]
                # not the log of a softmax, which has nothing below e-38
                log_mu_MK[:, :1] = logits_MV.log_softmax(-1).gather(-1, x_MK[:, :1])
            yield chunk_M, x_MK, log_mu_MK

    @torch.no_grad()
    def propose(
        self,
        xt_NL: torch.Tensor,
        where_NL: torch.Tensor,
        num_candidates: int,
        seed: int,
        rows_N: torch.Tensor | None = None,
        step: int = 0,
        t=None,
        attention_mask: torch.Tensor | None = None,
        varied_NL: torch.Tensor | None = None,
        process: Callable | None = None,
        do_sample: bool = True,
        present_NL: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K independent draws from mu(. | xt) at `where`, all from one pass; only these positions are projected.

        Args:
            xt_NL: states. where_NL: bool on the CPU, what to fill.
            seed, rows_N, step: with the position and the candidate, the counters of the uniforms.
            varied_NL: bool on the CPU, where the candidates differ; elsewhere all have the first one's draw. None: all.
            process: `(states (M, L), logits (M, V), positions (M,))` to logits whose softmax is mu; None: as they are.
            do_sample: False takes the most likely token instead of a draw.
            present_NL: tokens (N, L) that are the first candidate, in place of a draw. None: all are drawn.
        Returns:
            x (N, K, L), xt with the drawn values in place, and log mu of what was drawn, (N, K) float32.
        """
        (N, L), K, device = xt_NL.shape, num_candidates, xt_NL.device
        rows_N = torch.arange(N, device=device) if rows_N is None else rows_N.to(device)
        position_P = own_positions(xt_NL, attention_mask).flatten()

        def uniforms_at(chunk_M):
            candidate_MK = torch.arange(K, device=device)
            if varied_NL is not None:  # the same uniform is the same draw
                candidate_MK = candidate_MK * varied_NL.to(device).flatten()[chunk_M, None]
            return uniforms(seed, rows_N[chunk_M // L, None], step, position_P[chunk_M, None], candidate_MK)

        def processed(chunk_M, logits_MV):
            if process is not None:
                logits_MV = process(xt_NL[chunk_M // L], logits_MV, position_P[chunk_M])
            if do_sample:
                return logits_MV
            best_M1 = logits_MV.argmax(-1, keepdim=True)
            return torch.full_like(logits_MV, -torch.inf).scatter(-1, best_M1, logits_MV.gather(-1, best_M1))

        x_PK = xt_NL.flatten()[:, None].repeat(1, K)
        log_mu_PK = torch.zeros(N * L, K, device=device)
        change = processed if process is not None or not do_sample else None
        chunks = self.draw_chunks(xt_NL, where_NL, uniforms_at, t, attention_mask, change, present_NL)
        for chunk_M, x_MK, log_mu_MK in chunks:
            x_PK[chunk_M], log_mu_PK[chunk_M] = x_MK, log_mu_MK
        # summed row by row, not scattered with atomics: the same seed gives the same bits
        return x_PK.view(N, L, K).transpose(1, 2), log_mu_PK.view(N, L, K).sum(1)
