"""Upper bounds on the negative log-likelihood of MDLM and of the EDLM sampler, and the published estimator.

All three estimators look at one random state of a text's reveal schedule: a scored position p is picked, and the
state xt just before p is revealed. With M the masked positions of xt, S those that are revealed together with p, and F
all that are scored, any sum over the T steps of a function f of (xt, S) with f = 0 for an empty S is

    sum over steps of E[f] = |F| E[f / |S|],   and over continuous time   integral of E[f] / t dt = |F| E[f / |M|]

which has neither the 1/t of the usual form nor a step in which nothing happens. The positions p are stratified by the
time at which they are revealed. It shares the sampler's draws and never calls generate().

Shapes: B rows, J draws for each row, N = rows times draws that are worked on now, K candidates, L length, M selected
positions (flat in N * L), V vocabulary, G completions of the data's candidate, H pools of K proposals (one, or one for
each completion), R random subsets, C settings.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput

from .energy import candidate_energies
from .generation_edlm import EDLMGenerationConfig, check_attention_mask, check_prompt, in_eval_mode
from .sampler import draw, effective_sample_size, uniforms
from .schedule import RevealPlan

ESTIMATORS = ("sampler", "paper", "mdlm")
NUM_SUBSETS = 64  # of the pool, averaged over: scalars only, and 64 leave little of their noise
SHIFT, REVEAL, PICK, SUBSET, PROPOSE = range(5)  # streams of uniforms; five counters, where generate() has four
GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass
class EDLMLikelihoodOutput(ModelOutput):
    """
    Args:
        nll: (B,) float64 nats for each sequence; what it estimates is said by the estimator.
        stderr: (B,) its standard error over the draws for this sequence, NaN for a single draw.
        num_tokens: (B,) int64 positions that were scored, prompts and padding not among them.
        gain, gain_stderr: (B,) nats by which the energy lowers the bound of the same draws without it; sampler only.
        nll_upper: (B,) with the asymptotic upper form of log Z; paper only.
        ess: (B,) mean effective sample size of the k weights, NaN where no energy acted; sampler only.
    """

    nll: torch.Tensor
    stderr: torch.Tensor | None = None
    num_tokens: torch.Tensor | None = None
    gain: torch.Tensor | None = None
    gain_stderr: torch.Tensor | None = None
    nll_upper: torch.Tensor | None = None
    ess: torch.Tensor | None = None

    @property
    def bits_per_token(self) -> torch.Tensor:
        """(B,) bits for each scored position."""
        return self.nll / math.log(2) / self.num_tokens

    def bits_per_character(self, num_characters) -> torch.Tensor:
        """(B,) bits for each character of the scored text, given how many it has, (B,): the caller decodes it.

        Count Unicode characters for bits per character, UTF-8 bytes for bits per byte; the two differ.
        """
        num_characters = torch.as_tensor(num_characters, dtype=torch.float64, device=self.nll.device)
        if num_characters.shape != self.nll.shape or (num_characters <= 0).any():
            raise ValueError(f"num_characters must be positive, one for each of {len(self.nll)} rows: {num_characters}")
        return self.nll / math.log(2) / num_characters


class EDLMLikelihoodMixin:
    """`likelihood()` for a class with a `denoiser`, an `energy_type` and, unless that is "none", an `energy`."""

    def likelihood(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        estimator: str = "sampler",
        *,
        prompt_mask: torch.Tensor | None = None,
        num_steps: int = 128,
        num_candidates: int = 8,
        energy_window: tuple[float, float] = (1.0, 0.8),
        energy_temperature: float = 1.0,
        shared_completion: bool = False,
        num_samples: int = 1,
        num_times: int = 32,
        seed: int = 0,
        first_row: int = 0,
        batch_size: int = 32,
        energy_batch_size: int = 64,
    ) -> EDLMLikelihoodOutput:
        """Estimate the negative log-likelihood of texts, in nats, each with its standard error.

        Estimators (EDLM is arXiv 2410.21357, MDLM arXiv 2406.07524):
            "sampler": an upper bound on -log p(x0) of `generate()` with these `num_steps`, `num_candidates`, window,
                energy temperature and completions, valid for all of them; with one candidate, the bound of MDLM at that
                many steps.
            "mdlm": the denoiser's bound in continuous time, the limit of many steps without an energy.
            "paper": the published form, (1/t)(-log mu(x0|xt) + E(x0) + log Z). It is NOT an upper bound unless the law
                of the denoiser factorises, and for coAR energies it is the AR model's own NLL by construction.

        Args:
            input_ids: (B, L) texts without mask tokens. attention_mask: (B, L), 0 for padding on the left.
            prompt_mask: (B, L), true for tokens that are given: they are not scored.
            num_samples: inner samples. For "sampler", completions of the data's candidate (a step energy needs none)
                and at least as many other candidates (with a shared completion, `num_candidates` for each of them):
                more tighten the bound. For "paper", at least 2 for log Z.
            num_times: draws of (t, xt) for each row, stratified over time.
            seed, first_row: fix the draws of each row by its number, whatever the batch.
            batch_size: states in one pass of the denoiser. energy_batch_size: candidates in one of the energy.
        Raises:
            ValueError: an argument that does not fit, named with its value.
            FloatingPointError: a result is NaN.
        """
        arguments = locals()
        del arguments["self"], arguments["input_ids"], arguments["num_candidates"], arguments["energy_temperature"]
        terms = likelihood_terms(self, input_ids, settings=[(num_candidates, energy_temperature)], **arguments)
        output = EDLMLikelihoodOutput(*mean_and_stderr(terms.nll_BJC[..., 0]), terms.num_tokens_B)
        if estimator == "sampler":
            output.gain, output.gain_stderr = mean_and_stderr(terms.mdlm_BJ - terms.nll_BJC[..., 0])
            output.ess = terms.ess_BJC[..., 0].nanmean(-1)
        if estimator == "paper":
            output.nll_upper = terms.nll_BJC[..., 1].mean(-1)
        return output


@dataclass
class LikelihoodTerms:
    """What each draw says; the mean over a row's draws estimates its value in nats. Float64, on the CPU.

    t_BJ: times. mdlm_BJ: the bound without energy (of T steps for "sampler", else in continuous time). nll_BJC: the
    estimate for each setting ("paper": with the two forms of log Z; "mdlm": mdlm_BJ again). ess_BJC: effective sample
    size of the k weights, NaN where no energy acts ("sampler" only). num_tokens_B: scored positions.
    """

    t_BJ: torch.Tensor
    mdlm_BJ: torch.Tensor
    nll_BJC: torch.Tensor
    ess_BJC: torch.Tensor
    num_tokens_B: torch.Tensor


@torch.no_grad()
def likelihood_terms(
    model,
    input_ids: torch.LongTensor,
    attention_mask: torch.Tensor | None = None,
    estimator: str = "sampler",
    *,
    settings: Sequence[tuple[int, float]] = ((8, 1.0),),
    prompt_mask: torch.Tensor | None = None,
    num_steps: int = 128,
    energy_window: tuple[float, float] = (1.0, 0.8),
    shared_completion: bool = False,
    num_samples: int = 1,
    num_times: int = 32,
    seed: int = 0,
    first_row: int = 0,
    batch_size: int = 32,
    energy_batch_size: int = 64,
) -> LikelihoodTerms:
    """What `EDLMLikelihoodMixin.likelihood` averages, for several (num_candidates, energy_temperature) at once.

    They share all draws, so that their differences are nearly free of noise, and the energies of the largest k are
    the cost of all.
    """
    _check(model, estimator, settings, num_steps, energy_window, num_samples, num_times, batch_size, energy_batch_size)
    scored_BL, attention_mask = _scored(model, input_ids, attention_mask, prompt_mask)
    J, is_x0 = num_times, model.config.energy_target == "x0"
    T, (hi, lo) = (num_steps, energy_window) if estimator == "sampler" else (None, (1.0, 0.0))
    largest = max(k for k, _ in settings)
    num_proposals, num_completions = max(num_samples, largest), num_samples if is_x0 else 1
    is_shared = shared_completion and is_x0 and estimator == "sampler"
    if is_shared:  # for each completion
        num_proposals = largest
    if estimator == "paper":  # Z of a coAR energy is 1 for any denoiser: nothing is drawn for it
        num_proposals, num_completions = 0 if model.energy_type == "coar" else num_samples, 1
    is_plain = estimator == "mdlm" or model.energy_type == "none" or (T and largest == 1)

    t, mdlm, nll, ess = [], [], [], []
    with in_eval_mode(model):
        for pair_N in torch.arange(len(scored_BL) * J).split(batch_size):
            row_N, draw_N = pair_N // J, pair_N % J
            counters = seed, row_N + first_row, draw_N
            t_N, s_N, masked_NL, shown_NL = _moments(scored_BL[row_N], counters, J, T)
            active_N = torch.zeros(len(t_N), dtype=torch.bool) if is_plain else (lo - 1e-9 <= t_N) & (t_N <= hi + 1e-9)
            mean_log_mu_N, log_v_NG, log_w_NHK = _weigh(
                model,
                input_ids[row_N.to(input_ids.device)].to(model.device),
                None if attention_mask is None else attention_mask[row_N.to(model.device)],
                (t_N, t_N if is_x0 else s_N, masked_NL, shown_NL, active_N),
                (num_proposals, num_completions, is_shared),
                counters,
                energy_batch_size,
            )
            F_N = scored_BL[row_N].sum(-1)
            scale_N = F_N / shown_NL.sum(-1)  # |F| / |S|: from what is shown at once to the whole text
            t.append(t_N)
            mdlm.append(-F_N * mean_log_mu_N)
            if estimator == "sampler":
                gain_CN = [log_mean_ratio(log_v_NG / tau, log_w_NHK / tau, k, counters) for k, tau in settings]
                ess_CN = [effective_sample_size(log_w_NHK[:, 0, :k] / tau) for k, tau in settings]
                nll.append(torch.stack([mdlm[-1] - scale_N * gain_N for gain_N in gain_CN], -1))
                ess.append(torch.stack(ess_CN, -1).where(active_N[:, None], float("nan")))
            elif estimator == "paper":
                log_z_CN = log_mean_exp(log_w_NHK[:, 0]) if num_proposals else (0.0, 0.0)
                nll.append(torch.stack([mdlm[-1] + scale_N * (z - log_v_NG[:, 0]) for z in log_z_CN], -1))
            else:
                nll.append(mdlm[-1][:, None])
    nll_PC = torch.cat(nll)
    if (is_nan := nll_PC.isnan().any(-1)).any():
        raise FloatingPointError(f"logits or energies give NaN, first in row {int(is_nan.nonzero()[0]) // J}")
    ess_PC = torch.cat(ess) if ess else torch.full_like(nll_PC, float("nan"))
    t_BJ, mdlm_BJ = torch.cat(t).view(-1, J), torch.cat(mdlm).view(-1, J)
    return LikelihoodTerms(t_BJ, mdlm_BJ, *(x.view(*t_BJ.shape, -1) for x in (nll_PC, ess_PC)), scored_BL.sum(-1))


def log_mean_ratio(log_v_NG: torch.Tensor, log_w_NHK: torch.Tensor, k: int, counters: tuple) -> torch.Tensor:
    """log of the mean of k v / (v + w_2 + ... + w_k), over the completions v and random subsets of the pool w.

    Each ratio is an unbiased estimate of p_k(x) / mu(x), so the mean is; its logarithm is on average too small.

    Args:
        log_v_NG: log weights of the data's candidate with each completion. log_w_NHK: of at least k - 1 proposals; H is
            1, or G where each completion has its own.
        counters: (seed, row_N, draw_N), of the subsets.
    Returns:
        (N,) float64, at most log k; zero for k = 1.
    """
    if k == 1:
        return torch.zeros(len(log_v_NG), dtype=torch.float64)
    (seed, row_N, draw_N), (_, H, K) = counters, log_w_NHK.shape
    num_blocks = K // (k - 1)  # disjoint subsets of one permutation
    permutation_Q1 = torch.arange(-(-NUM_SUBSETS // num_blocks))[:, None]
    u_NQK = uniforms(seed, SUBSET, row_N[:, None, None], draw_N[:, None, None], permutation_Q1, torch.arange(K))
    order_NX = u_NQK.argsort(-1)[..., : num_blocks * (k - 1)].flatten(1)
    log_w_NHX = log_w_NHK.gather(-1, order_NX[:, None].expand(-1, H, -1))
    log_sum_NHR = log_w_NHX.unflatten(-1, (-1, k - 1)).logsumexp(-1)
    log_v_NG1 = log_v_NG[..., None]
    log_ratio_NX = (math.log(k) + log_v_NG1 - torch.logaddexp(log_v_NG1, log_sum_NHR)).flatten(1)
    return log_ratio_NX.logsumexp(-1) - math.log(log_ratio_NX.shape[1])


def log_mean_exp(log_w_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """log Z from K >= 2 proposals, (N,) twice: T_K, which is biased low, and (2K - 1) T_K - 2 (K - 1) T_{K-1}.

    T_{K-1} is the mean over the leave-one-out estimates. The second form is an upper bound as K grows (Deng et al.
    2020, arXiv 2004.11714) and need not be one for a finite K.
    """
    K = log_w_NK.shape[1]
    lower_N = log_w_NK.logsumexp(-1) - math.log(K)
    empty_N1 = torch.full_like(log_w_NK[:, :1], float("-inf"))
    before_NK = torch.cat((empty_N1, log_w_NK.logcumsumexp(-1)[:, :-1]), dim=-1)
    after_NK = torch.cat((log_w_NK.flip(-1).logcumsumexp(-1).flip(-1)[:, 1:], empty_N1), dim=-1)
    without_one_N = (torch.logaddexp(before_NK, after_NK) - math.log(K - 1)).mean(-1)
    return lower_N, (2 * K - 1) * lower_N - 2 * (K - 1) * without_one_N


def mean_and_stderr(x_BJ: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean over stratified draws and its standard error by successive differences (Wolter 2007), NaN for one draw.

    A draw differs from its neighbour by noise and by the step between their strata, so the error is on average not
    too small.
    """
    J = x_BJ.shape[1]
    if J == 1:
        return x_BJ[:, 0], torch.full_like(x_BJ[:, 0], float("nan"))
    return x_BJ.mean(-1), (x_BJ.diff(dim=-1).square().sum(-1) / (2 * J * (J - 1))).sqrt()


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
        -candidate_energies(model.energy, x_NKL, xt_NL, t, log_mu_NK, batch_size=energy_batch_size)[0].cpu().double()
    )
    log_z_N, _ = log_mean_exp(log_w_NK)
    return log_z_N, (log_w_NK - log_z_N[:, None]).exp().std(-1) / math.sqrt(num_samples)


def _moments(scored_NL: torch.Tensor, counters: tuple, num_draws: int, num_steps: int | None, block_length: int | None):
    """A moment of each row's plan, drawn as the sampler draws it: see `RevealPlan.moment`.

    Draw j of a row lies in the j-th of `num_draws` equal parts of time; from row to row it walks through that part by
    the golden ratio.
    """
    seed, row_N, draw_N = counters
    u_NL = uniforms(seed, REVEAL, row_N[:, None], draw_N[:, None], 0, torch.arange(scored_NL.shape[1]))
    place_N = (uniforms(seed, SHIFT, 0, draw_N, 0, 0) + row_N * GOLDEN) % 1
    v_N1 = ((draw_N + place_N) / num_draws)[:, None]
    u_picked_N1 = uniforms(seed, PICK, row_N, draw_N, 0, 0)[:, None]
    return RevealPlan(u_NL, scored_NL, num_steps, block_length).moment(v_N1, u_picked_N1)


def _weigh(model, x0_NL, attention_mask, moments: tuple, counts: tuple, counters: tuple, energy_batch_size):
    """Mean over M of log mu_i(x0_i | xt), (N,); log weights of the data's candidate (N, G) and of proposals (N, H, K).

    The data's candidate has x0 where something is shown, and G draws of the rest. H is 1, or G with shared completions:
    then each of the draws goes with K proposals of its own, which differ only in what is shown. The weights are those
    of temperature 1, and 1 for all candidates of the rows that are not active. Float64, on the CPU.
    """
    (N, L), device, (seed, row_N, draw_N) = x0_NL.shape, x0_NL.device, counters
    t_N, time_N, masked_NL, shown_NL, active_N = moments
    K, G, is_shared = counts
    column_X = torch.arange(G * (K + 1) if is_shared else K + G)
    data_G = column_X[:: K + 1] if is_shared else column_X[K:]  # columns of the data's candidate
    shared_X = column_X // (K + 1) * (K + 1) if is_shared else column_X  # the columns of a group have one completion
    filled_NL = (masked_NL if model.config.energy_target == "x0" else shown_NL) & active_N[:, None]
    xt_NL = x0_NL.masked_fill(masked_NL.to(device), model.config.mask_token_id)
    log_mu_P, filled_P, shown_P = (
        torch.zeros(N * L, device=device),
        filled_NL.flatten(),
        shown_NL.flatten(),
    )  # P = N * L
    x_PX, log_mu_PX = (
        xt_NL.flatten()[:, None].repeat(1, len(column_X)),
        torch.zeros(N * L, len(column_X), device=device),
    )
    for chunk_M, logits_MV in model.denoiser.logit_chunks(xt_NL, masked_NL, t_N.float().to(device), attention_mask):
        log_mu_MV = logits_MV.log_softmax(-1)
        log_mu_P[chunk_M] = log_mu_MV.gather(-1, x0_NL.flatten()[chunk_M, None])[:, 0]
        is_filled_M = filled_P.to(device)[chunk_M]
        chunk_M = chunk_M[is_filled_M]
        here_M = chunk_M.cpu()
        place_M = row_N[here_M // L, None], draw_N[here_M // L, None], here_M[:, None] % L
        place_M += (torch.where(shown_P[here_M, None], column_X, shared_X),)
        u_MX = uniforms(seed, PROPOSE, *(place.to(device) for place in place_M))
        x_PX[chunk_M], log_mu_PX[chunk_M] = draw(log_mu_MV[is_filled_M], u_MX)
    is_data_P1, is_data_X = (filled_P & shown_P)[:, None].to(device), torch.isin(column_X, data_G).to(device)
    x_PX = torch.where(is_data_P1 & is_data_X, x0_NL.flatten()[:, None], x_PX)
    log_mu_PX = torch.where(is_data_P1 & is_data_X, log_mu_P[:, None], log_mu_PX)
    log_w_NX = torch.zeros(N, len(column_X), dtype=torch.float64)
    if len(rows_A := active_N.nonzero()[:, 0]):
        on_A = rows_A.to(device)
        energy_AX, _ = candidate_energies(
            model.energy,
            x_PX.view(N, L, -1)[on_A].transpose(1, 2),
            xt_NL[on_A],
            time_N[rows_A].float().to(device),
            log_mu_PX.view(N, L, -1)[on_A].sum(1),
            None if attention_mask is None else attention_mask[on_A],
            energy_batch_size,
        )
        log_w_NX[rows_A] = -energy_AX.cpu().double()
    mean_log_mu_N = log_mu_P.view(N, L).double().sum(-1).cpu() / masked_NL.sum(-1)
    proposals_NHK = log_w_NX.view(N, G, K + 1)[..., 1:] if is_shared else log_w_NX[:, None, :K]
    return mean_log_mu_N, log_w_NX[:, data_G], proposals_NHK


def _scored(model, input_ids, attention_mask, prompt_mask) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Which positions are scored, (B, L) bool on the CPU, and the attention mask, None where nothing is padded."""
    check_prompt(input_ids, model.config.vocab_size)
    if (input_ids == model.config.mask_token_id).any():
        raise ValueError(f"input_ids must be a text without the mask token {model.config.mask_token_id}")
    if input_ids.shape[1] > model.config.max_position_embeddings:
        longest = model.config.max_position_embeddings
        raise ValueError(f"input_ids has {input_ids.shape[1]} tokens, more than max_position_embeddings={longest}")
    scored_BL = torch.ones(input_ids.shape, dtype=torch.bool)
    if attention_mask is not None:
        attention_mask = check_attention_mask(attention_mask, input_ids).to(model.device)
        scored_BL &= attention_mask.bool().cpu()
    if prompt_mask is not None:
        if prompt_mask.shape != input_ids.shape:
            raise ValueError(
                f"prompt_mask has shape {tuple(prompt_mask.shape)}, input_ids has {tuple(input_ids.shape)}"
            )
        scored_BL &= ~prompt_mask.bool().cpu()
    if (empty_B := ~scored_BL.any(-1)).any():
        raise ValueError(f"prompt_mask leaves nothing to score in row {int(empty_B.nonzero()[0])}")
    return scored_BL, None if attention_mask is None or attention_mask.all() else attention_mask


def _check(model, estimator, settings, num_steps, energy_window, num_samples, num_times, batch_size, energy_batch_size):
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator must be one of {ESTIMATORS}, got {estimator!r}")
    if estimator == "paper" and model.config.energy_target != "x0":
        raise ValueError(f"estimator='paper' needs energy_target='x0', got {model.config.energy_target!r}")
    if not settings:
        raise ValueError("settings must hold at least one (num_candidates, energy_temperature), got none")
    for k, tau in settings:  # checks the values
        EDLMGenerationConfig(
            num_steps=num_steps, num_candidates=k, energy_window=energy_window, energy_temperature=tau,
            energy_batch_size=energy_batch_size,
        )  # fmt: skip
    counts = {"num_samples": num_samples, "num_times": num_times, "batch_size": batch_size}
    for name, value in counts.items():
        least = 2 if (name, estimator) == ("num_samples", "paper") else 1
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
