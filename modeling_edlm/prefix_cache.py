"""Log-probabilities of an autoregressive model, and what it keeps of the tokens that all candidates of a row share.

Shapes: B rows of a run, S candidates, R rows of these, L length, V vocabulary, M selected positions (flat).
"""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from .backbone import CHUNK, position_chunks, rows_at_once, suppress
from .vocabulary import log_prob_projected

LEAST = 16  # shared tokens from which on it pays
PASS = {"cpu": 2**7, "cuda": 2**13}  # tokens that cost about as much as one more pass does
WIDTH = 16  # they are kept in multiples of this: few different shapes
BYTES = 2**28  # on a CPU; on a GPU a quarter of what is free


def text_first(attention_mask: Tensor) -> Tensor:
    """(N, L) indices that put the text before its padding."""
    return attention_mask.argsort(dim=-1, descending=True, stable=True)


def behind_bos(x0_NL: Tensor, bos_token_id: int) -> Tensor:
    """The inputs from which each token is predicted."""
    return torch.cat((torch.full_like(x0_NL[:, :1], bos_token_id), x0_NL[:, :-1]), dim=1)


def token_log_probs(
    causal_lm: Any,
    inputs_NL: Tensor,
    x0_NL: Tensor,
    where_NL: Tensor | None,
    mask_token_id: int,
    cache: dict[str, DynamicCache] | None = None,
) -> Tensor:
    """log p_AR of each token x0 from the inputs up to its own, (N, L) float32, zero where nothing counts.

    `cache`, by the name that the model has for it, holds the inputs before these, and then these too.
    """
    log_p_NL = torch.zeros(x0_NL.shape, dtype=torch.float32, device=x0_NL.device)
    if causal_lm.config.model_type == "edlm":  # projects the positions that count and no others, some at a time
        encoded, head = causal_lm.encode(inputs_NL, **cache or {}), causal_lm.head
        every_P = torch.arange(x0_NL.numel(), device=x0_NL.device)
        where_M = every_P if where_NL is None else where_NL.flatten().nonzero()[:, 0]
        for now_M in (where_M,) if head.is_large else position_chunks(where_M, causal_lm.config.vocab_size):
            x0_M = x0_NL.flatten()[now_M]
            if head.is_large:
                projection = head.select(*encoded, now_M), head.linear.weight, head.linear.bias
                log_p_M = log_prob_projected(*projection, mask_token_id, x0_M)
            else:
                logits_MV = suppress(head(*encoded, now_M), mask_token_id)
                log_p_M = -nn.functional.cross_entropy(logits_MV, x0_M, reduction="none")
            log_p_NL.view(-1)[now_M] = log_p_M
        return log_p_NL
    logits_NLV = suppress(causal_lm(inputs_NL, use_cache=cache is not None, **cache or {}).logits, mask_token_id)
    where_NL = torch.ones_like(x0_NL, dtype=torch.bool) if where_NL is None else where_NL
    log_p_M = -nn.functional.cross_entropy(logits_NLV[where_NL], x0_NL[where_NL], reduction="none")
    return log_p_NL.masked_scatter(where_NL, log_p_M)


def cache_argument(causal_lm: Any) -> str | None:
    """What the model calls keys and values of earlier tokens; None if it keeps others than those of all of them."""
    layers = DynamicCache(config=causal_lm.config).layers
    if getattr(causal_lm, "_is_stateful", False) or any(type(layer) is not DynamicLayer for layer in layers):
        return None
    function = causal_lm.encode if causal_lm.config.model_type == "edlm" else causal_lm.forward
    return next((n for n in ("cache", "past_key_values") if n in inspect.signature(function).parameters), None)


class PrefixCache:
    """Energies of an autoregressive model for candidates that complete masked states: what a state has before its first
    mask is computed once for a row, and again only where its tokens have changed, which is found by comparing them.

    So what is reused is right whatever the caller does. A call waits for the device once.

    Args:
        name: of `cache_argument`. counted: `(xt)` to what counts, (N, L) bool or None, of an `AutoregressiveEnergy`.
        plain: `energy(x, xt, t, attention_mask, log_mu)`, for candidates that share too little.
        tokens_B: the tokens that are computed for each row are added there.
    """

    def __init__(
        self,
        network: Any,
        name: str,
        counted: Callable[[Tensor], Tensor | None],
        plain: Callable[..., Tensor],
        mask_token_id: int,
        tokens_B: Tensor,
        length: int,
    ) -> None:
        self.network, self.name, self.counted, self.plain = network, name, counted, plain
        self.mask_token_id, self.tokens_B = mask_token_id, tokens_B
        self.tokens_of_pass = PASS.get(tokens_B.device.type, PASS["cuda"])
        sizes, budget = network.config.get_text_config(), BYTES
        if tokens_B.device.type == "cuda":
            budget = torch.cuda.mem_get_info(tokens_B.device)[0] // 4
        self.bos, row_bytes = sizes.bos_token_id, 2 * sizes.num_hidden_layers * sizes.hidden_size * length
        most = max(1, budget // (row_bytes * network.dtype.itemsize))
        self.num_rows = min(len(tokens_B), most)  # the others have plain energies
        self.x_BL = tokens_B.new_full((self.num_rows, length), -1)
        self.log_p_BL = torch.zeros(self.num_rows, length, dtype=torch.float32, device=tokens_B.device)
        self.layers: list[tuple[Tensor, Tensor]] = []  # keys and values (B, heads, L, head size)

    @staticmethod
    def pays(first_N: Tensor) -> bool:
        """Whether, given the place of the first mask of each row, (N,) on the CPU."""
        return bool((first_N >= LEAST).any())

    def __call__(
        self,
        x_SL: Tensor,
        xt_SL: Tensor,
        t: Tensor | float | None,
        attention_mask: Tensor | None,
        log_mu_S: Tensor,
        row_S: Tensor,
    ) -> Tensor:
        """Energies (S,) float32, as `plain` has them; the candidates of a row are those of one state."""
        given, L = (x_SL, xt_SL, attention_mask), x_SL.shape[1]
        where_SL = self.counted(xt_SL)
        where_SL = torch.ones_like(x_SL, dtype=torch.bool) if where_SL is None else where_SL
        length_S = torch.full_like(row_S, L)
        if attention_mask is not None:
            length_S = attention_mask.sum(-1)
            order_SL, where_SL = text_first(attention_mask), where_SL & attention_mask.bool()
            x_SL = x_SL.masked_fill(attention_mask == 0, self.bos)  # it may hold masks, which the model may lack
            x_SL, xt_SL, where_SL = (z.gather(1, order_SL) for z in (x_SL, xt_SL, where_SL))
        is_open_SL = xt_SL == self.mask_token_id
        first_S = torch.where(is_open_SL.any(-1), is_open_SL.byte().argmax(-1), L).masked_fill(
            row_S >= self.num_rows, 0
        )
        is_kept_SL = self.x_BL[row_S.clamp(max=self.num_rows - 1)] == xt_SL
        kept_S = torch.minimum(is_kept_SL.long().cumprod(-1).sum(-1), first_S)
        first, kept, length, row = torch.stack((first_S, kept_S, length_S, row_S)).cpu()  # the one wait
        energy_S = torch.empty_like(log_mu_S)
        for on_cpu, start in self._groups(torch.where(first < LEAST, 0, first), L):
            on = on_cpu.to(x_SL.device)
            now_row = row_S[on]
            if start == 0:
                parts = (z if z is None else z[on] for z in given)
                x, xt, mask = parts
                now_t = t[on] if isinstance(t, Tensor) and t.ndim else t
                energy_S[on] = self.plain(x, xt, now_t, mask, log_mu_S[on])
                self.tokens_B.index_add_(0, now_row, torch.full_like(now_row, L))
                continue
            one = list({int(row[i]): int(i) for i in on_cpu if kept[i] < start}.values())  # of each row
            for part, begin in self._groups(kept[one], start):
                of_part = torch.tensor(one, device="cpu")[part].to(x_SL.device)
                self._extend(row_S[of_part], xt_SL[of_part, :start], begin)
            log_p_S = self.log_p_BL[now_row, :start].where(where_SL[on, :start], 0.0).sum(-1)
            end = max(start, int(length[on_cpu].max()))  # what comes later is padding
            if start < end:
                inputs_SL, cache = behind_bos(x_SL[on], self.bos)[:, start:end], self._cache(now_row, start)
                later = inputs_SL, x_SL[on, start:end], where_SL[on, start:end], self.mask_token_id
                log_p_S = log_p_S + token_log_probs(self.network, *later, cache).sum(-1)
            energy_S[on] = log_mu_S[on] - log_p_S
            self.tokens_B.index_add_(0, now_row, torch.full_like(now_row, end - start))
        return energy_S

    def _groups(self, start_S: Tensor, end: int) -> Iterator[tuple[Tensor, int]]:
        """Indices that go into one pass, from where on it computes: what it computes in vain costs no more than a pass
        of their own would."""
        start_S, order_S = (start_S // WIDTH * WIDTH).sort(stable=True)
        while len(start_S):
            start = int(start_S[0])
            size = int(((start_S - start).cumsum(0) <= self.tokens_of_pass).sum())
            size = min(size, rows_at_once(self.network, max(end - start, 1)))
            if self.network.config.model_type != "edlm":  # it gives the logits of whole rows
                size = max(1, min(size, CHUNK // (end * self.network.config.get_text_config().vocab_size)))
            yield order_S[:size], start
            start_S, order_S = start_S[size:], order_S[size:]

    def _cache(self, row_R: Tensor, start: int) -> dict[str, DynamicCache]:
        """What is kept of some rows before a position."""
        cache = DynamicCache(config=self.network.config)
        for i, (keys, values) in enumerate(self.layers if start else ()):
            cache.update(keys[row_R, :, :start], values[row_R, :, :start], i)
        return {self.name: cache}

    def _extend(self, row_R: Tensor, x_RL: Tensor, start: int) -> None:
        """Keep these first tokens of some rows, which are kept already up to a place."""
        end = x_RL.shape[1]
        cache, inputs_RL = self._cache(row_R, start), behind_bos(x_RL, self.bos)[:, start:]
        log_p_RL = token_log_probs(self.network, inputs_RL, x_RL[:, start:], None, self.mask_token_id, cache)
        for i, layer in enumerate(cache[self.name].layers):
            new: tuple[Tensor, Tensor] = layer.keys, layer.values  # type: ignore[assignment,union-attr]
            if len(self.layers) == i:
                shape = self.num_rows, new[0].shape[1], self.x_BL.shape[1]
                self.layers.append(
                    (new[0].new_empty(*shape, new[0].shape[-1]), new[1].new_empty(*shape, new[1].shape[-1]))
                )
            for store, now in zip(self.layers[i], new, strict=True):
                store[row_R, :, start:end] = now[:, :, start:]
        self.x_BL[row_R], self.log_p_BL[row_R, start:end] = -1, log_p_RL
        self.x_BL[row_R, :end] = x_RL
        self.tokens_B.index_add_(0, row_R, torch.full_like(row_R, end - start))
