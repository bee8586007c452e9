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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.utils import ModelOutput

from .backbone import rows_at_once
from .checks import check_attention_mask, check_count, check_mask, check_prompt, check_seed
from .draws import effective_sample_size, uniforms
from .generation_edlm import EDLMGenerationConfig, prepare_config
from .proposal import Columns, own_positions
from .sampler import LogitsProcess, State, in_eval_mode, propose, weigh
from .schedule import RevealPlan

ESTIMATORS = ("sampler", "paper", "mdlm")
NUM_SUBSETS = 64  # of the pool, averaged over: scalars only, and 64 leave little of their noise
SHIFT, REVEAL, PICK, SUBSET, PROPOSE = range(5)  # streams of uniforms; five counters, where generate() has four
GOLDEN = (math.sqrt(5) - 1) / 2
Settings = Sequence[tuple[int, float]]  # (num_candidates, energy_temperature)
Counters = tuple[int, Tensor, Tensor]  # the seed, and of each moment its row and its draw


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

    nll: Tensor
    stderr: Tensor | None = None
    num_tokens: Tensor | None = None
    gain: Tensor | None = None
    gain_stderr: Tensor | None = None
    nll_upper: Tensor | None = None
    ess: Tensor | None = None

    @property
    def bits_per_token(self) -> Tensor:
        """(B,) bits for each scored position."""
        return self.nll / math.log(2) / self.num_tokens  # type: ignore[operator]

    def bits_per_character(self, num_characters: Tensor | Sequence[int]) -> Tensor:
        """(B,) bits for each character of the scored text, given how many it has, (B,): the caller decodes it.

        Count Unicode characters for bits per character, UTF-8 bytes for bits per byte; the two differ.
        """
        num_characters = torch.as_tensor(num_characters, dtype=torch.float64, device=self.nll.device)
        if num_characters.shape != self.nll.shape or (num_characters <= 0).any():
            raise ValueError(f"num_characters must be positive, one for each of {len(self.nll)} rows: {num_characters}")
        return self.nll / math.log(2) / num_characters


class EDLMLikelihoodMixin:
    """`likelihood()` for a class with a `denoiser`, `energy()` and a `scorer`, see sampler.py."""

    def likelihood(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        estimator: str = "sampler",
        prompt_mask: Tensor | None = None,
        num_samples: int = 1,
        num_times: int = 32,
        seed: int = 0,
        first_row: int = 0,
        logits_processor: list[Callable] | None = None,
        **kwargs: Any,
    ) -> EDLMLikelihoodOutput:
        """Estimate the negative log-likelihood of texts, in nats, each with its standard error.

        Estimators (EDLM is arXiv 2410.21357, MDLM arXiv 2406.07524):
            "sampler": an upper bound on -log p(x0) of `generate()` with the same configuration and processors, valid
                for every number of steps and candidates; with one candidate, the bound of MDLM at that many steps.
            "mdlm": the denoiser's bound in continuous time, the limit of many steps without an energy.
            "paper": the published form, (1/t)(-log mu(x0|xt) + E(x0) + log Z). It is NOT an upper bound unless the law
                of the denoiser factorises, and for coAR energies it is the AR model's own NLL by construction.

        Args:
            input_ids: (B, L) texts without mask tokens. attention_mask: (B, L), 0 for padding around the text.
            generation_config: what `generate()` takes; keyword arguments change single fields. Default: for "sampler"
                the model's own, for the others one that leaves the proposal as it is.
            prompt_mask: (B, L), true for tokens that are given: they are not scored.
            num_samples: inner samples. For "sampler", completions of the data's candidate (a step energy needs none)
                and at least as many other candidates (with a shared completion, `num_candidates` for each of them):
                more tighten the bound. For "paper", at least 2 for log Z.
            num_times: draws of (t, xt) for each row, stratified over time.
            seed, first_row: fix the draws of each row by its number, whatever the batch.
            logits_processor: as in `generate()`. What forbids a token of the text makes its bound infinite.
        Raises:
            ValueError: an argument that does not fit, named with its value; a corrector, or greedy decoding, which have
                no bound.
            FloatingPointError: a result is NaN.
        """
        terms = likelihood_terms(
            self,
            input_ids,
            attention_mask,
            generation_config,
            estimator=estimator,
            settings=None,
            prompt_mask=prompt_mask,
            num_samples=num_samples,
            num_times=num_times,
            seed=seed,
            first_row=first_row,
            logits_processor=logits_processor,
            **kwargs,
        )
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

    t_BJ: Tensor
    mdlm_BJ: Tensor
    nll_BJC: Tensor
    ess_BJC: Tensor
    num_tokens_B: Tensor


@torch.no_grad()
def likelihood_terms(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    *,
    estimator: str = "sampler",
    settings: Settings | None = None,
    prompt_mask: Tensor | None = None,
    num_samples: int = 1,
    num_times: int = 32,
    seed: int = 0,
    first_row: int = 0,
    logits_processor: list[Callable] | None = None,
    **kwargs: Any,
) -> LikelihoodTerms:
    """What `EDLMLikelihoodMixin.likelihood` averages, for several (num_candidates, energy_temperature) at once.

    They share all draws, so that their differences are nearly free of noise, and the energies of the largest k are
    the cost of all. `settings` None: those of the configuration alone.
    """
    is_sampler = isinstance(estimator, str) and estimator == "sampler"
    if generation_config is None and not is_sampler:
        generation_config = EDLMGenerationConfig()
    config = prepare_config(model, generation_config, kwargs, "likelihood")
    settings = [(config.most_candidates, config.energy_temperature)] if settings is None else settings
    _check(model, estimator, config, settings)
    if (num_samples := check_count("num_samples", num_samples)) == 1 and estimator == "paper":
        raise ValueError("num_samples must be an integer of at least 2, got 1, for the log Z of estimator='paper'")
    num_times, first_row = check_count("num_times", num_times), check_count("first_row", first_row, least=0)
    seed = check_seed(seed)
    input_ids = check_prompt(input_ids, model.config.vocab_size)
    scored_BL, attention_mask = _scored(model, input_ids, attention_mask, prompt_mask)
    process = LogitsProcess.of(config, logits_processor, model.config.mask_token_id)
    J, T, largest = num_times, config.num_steps if is_sampler else None, max(k for k, _ in settings)
    is_plain = estimator == "mdlm" or model.scorer is None or (is_sampler and largest == 1)
    columns, data_G = _columns(model, estimator, config, largest, num_samples)
    states_at_a_time = config.denoiser_batch_size or min(32, rows_at_once(model.denoiser, input_ids.shape[1]))

    t, mdlm, nll, ess = [], [], [], []
    with in_eval_mode(model):
        for pair_N in torch.arange(len(scored_BL) * J, device="cpu").split(states_at_a_time):
            row_N, draw_N = pair_N // J, pair_N % J
            counters = seed, row_N + first_row, draw_N
            mask_NL = None if attention_mask is None else attention_mask[row_N.to(model.device)]
            place_NL = own_positions(scored_BL[row_N], mask_NL).cpu()
            t_N, s_N, hidden_NL, shown_NL, alike_NL = _moments(
                scored_BL[row_N], place_NL, counters, J, T, config.block_length
            )
            active_N = torch.full((len(t_N),), not is_plain, device="cpu")
            if is_sampler:
                k_now = [[config.candidates_at(t, k) for k, _ in settings] for t in t_N.tolist()]
                k_NC = torch.tensor(k_now, device="cpu")
                active_N &= (k_NC > 1).any(-1)
            log_mu_NL, log_v_NG, log_w_NHK = _weigh(
                model,
                input_ids[row_N.to(input_ids.device)].to(model.device),
                mask_NL,
                (t_N, s_N, hidden_NL, shown_NL, active_N, T),
                (columns, data_G),
                counters,
                config.energy_batch_size or 64,
                process,
            )
            F_N = scored_BL[row_N].sum(-1).float()
            scale_N = F_N / shown_NL.sum(-1)  # |F| / |S|: from what is shown at once to the whole text
            t.append(t_N)
            mdlm.append(-F_N * log_mu_NL.where(alike_NL, 0.0).sum(-1) / alike_NL.sum(-1))
            is_possible_N = mdlm[-1] < torch.inf  # else the energy cannot help
            if is_sampler:
                gain_NC = torch.zeros(k_NC.shape, dtype=torch.float64, device="cpu")
                ess_NC = torch.full_like(gain_NC, float("nan"))
                for c, (_, tau) in enumerate(settings):
                    for k in k_NC[active_N, c].unique().tolist():
                        now_N = active_N & (k_NC[:, c] == k)
                        weights = log_v_NG / tau, log_w_NHK / tau
                        gain_NC[now_N, c] = log_mean_ratio(*weights, k, counters)[now_N]
                        ess_NC[now_N, c] = effective_sample_size(weights[1][now_N, 0, :k])
                gain_NC = gain_NC.where(is_possible_N[:, None], 0.0)
                nll.append(mdlm[-1][:, None] - scale_N[:, None] * gain_NC)
                ess.append(ess_NC)
            elif estimator == "paper":
                log_z_CN = log_mean_exp(log_w_NHK[:, 0]) if log_w_NHK.shape[-1] else (0.0, 0.0)
                nll.append(torch.stack([mdlm[-1] + scale_N * (z - log_v_NG[:, 0]) for z in log_z_CN], -1))
            else:
                nll.append(mdlm[-1][:, None])
    nll_PC = torch.cat(nll)
    if (is_nan := nll_PC.isnan().any(-1)).any():
        after = ", with the given logits_processor" if logits_processor else ""
        raise FloatingPointError(f"logits or energies give NaN, first in row {int(is_nan.nonzero()[0]) // J}{after}")
    ess_PC = torch.cat(ess) if ess else torch.full_like(nll_PC, float("nan"))
    t_BJ, mdlm_BJ = torch.cat(t).view(-1, J), torch.cat(mdlm).view(-1, J)
    return LikelihoodTerms(t_BJ, mdlm_BJ, nll_PC.view(*t_BJ.shape, -1), ess_PC.view(*t_BJ.shape, -1), scored_BL.sum(-1))


def _columns(
    model: Any, estimator: str, config: EDLMGenerationConfig, largest: int, num_samples: int
) -> tuple[Columns, Tensor]:
    """The candidates that are scored at a moment, and which columns are the data's, (G,).

    The data's candidate has x0 where something is shown, and G draws of the rest; beside it there are K proposals, or
    with shared completions K for each of these draws, which differ only in what is shown.
    """
    is_x0 = model.scorer is None or model.scorer.target == "x0"
    K, G = max(num_samples, largest), num_samples if is_x0 else 1
    is_shared = config.shared_completion and is_x0 and estimator == "sampler"
    if is_shared:
        K = largest
    if estimator == "paper":  # nothing is drawn for a Z that is known
        K, G = 0 if model.scorer is not None and model.scorer.has_unit_z else num_samples, 1
    column_X = torch.arange(G * (K + 1) if is_shared else K + G, device="cpu")
    data_G = column_X[:: K + 1] if is_shared else column_X[K:]
    rest_X = column_X // (K + 1) * (K + 1) if is_shared else column_X
    columns = (column_X, rest_X, torch.isin(column_X, data_G))
    return Columns(*(x.to(model.device) for x in columns)), data_G


def log_mean_ratio(log_v_NG: Tensor, log_w_NHK: Tensor, k: int, counters: Counters) -> Tensor:
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
        return torch.zeros(len(log_v_NG), dtype=torch.float64, device="cpu")
    (seed, row_N, draw_N), (_, H, K) = counters, log_w_NHK.shape
    num_blocks = K // (k - 1)  # disjoint subsets of one permutation
    permutation_Q1 = torch.arange(-(-NUM_SUBSETS // num_blocks), device="cpu")[:, None]
    u_NQK = uniforms(
        seed, SUBSET, row_N[:, None, None], draw_N[:, None, None], permutation_Q1, torch.arange(K, device="cpu")
    )
    order_NX = u_NQK.argsort(-1)[..., : num_blocks * (k - 1)].flatten(1)
    log_w_NHX = log_w_NHK.gather(-1, order_NX[:, None].expand(-1, H, -1))
    log_sum_NHR = log_w_NHX.unflatten(-1, (-1, k - 1)).logsumexp(-1)
    log_v_NG1 = log_v_NG[..., None]
    log_ratio_NX = (math.log(k) + log_v_NG1 - torch.logaddexp(log_v_NG1, log_sum_NHR)).flatten(1)
    return log_ratio_NX.logsumexp(-1) - math.log(log_ratio_NX.shape[1])


def log_mean_exp(log_w_NK: Tensor) -> tuple[Tensor, Tensor]:
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


def mean_and_stderr(x_BJ: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over stratified draws and its standard error by successive differences (Wolter 2007), NaN for one draw.

    A draw differs from its neighbour by noise and by the step between their strata, so the error is on average not
    too small.
    """
    J = x_BJ.shape[1]
    if J == 1:
        return x_BJ[:, 0], torch.full_like(x_BJ[:, 0], float("nan"))
    return x_BJ.mean(-1), (x_BJ.diff(dim=-1).square().sum(-1) / (2 * J * (J - 1))).sqrt()


def _moments(
    scored_NL: Tensor,
    place_NL: Tensor,
    counters: Counters,
    num_draws: int,
    num_steps: int | None,
    block_length: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A moment of each row's plan, drawn as the sampler draws it: see `RevealPlan.moment`.

    Draw j of a row lies in the j-th of `num_draws` equal parts of time; from row to row it walks through that part by
    the golden ratio.
    """
    seed, row_N, draw_N = counters
    u_NL = uniforms(seed, REVEAL, row_N[:, None], draw_N[:, None], 0, place_NL)
    part_N = (uniforms(seed, SHIFT, 0, draw_N, 0, 0) + row_N * GOLDEN) % 1
    v_N1 = ((draw_N + part_N) / num_draws)[:, None]
    u_picked_N1 = uniforms(seed, PICK, row_N, draw_N, 0, 0)[:, None]
    return RevealPlan(u_NL, scored_NL, num_steps, block_length).moment(v_N1, u_picked_N1)


def _weigh(
    model: Any,
    x0_NL: Tensor,
    attention_mask: Tensor | None,
    moments: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int | None],
    candidates: tuple[Columns, Tensor],
    counters: Counters,
    energy_batch_size: int | None = None,
    process: LogitsProcess | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """log mu_i(x0_i | xt) where something is masked, (N, L); log weights of the data's candidate (N, G) and of
    proposals (N, H, K).

    H is 1, or G with shared completions: then each of the data's has K proposals of its own. The weights are those of
    temperature 1, and 1 for all candidates of the rows that are not active. Float64, on the CPU.
    """
    N, device, (seed, row_N, draw_N) = len(x0_NL), x0_NL.device, counters
    (t_N, s_N, hidden_NL, shown_NL, active_N, num_steps), (columns, data_G) = moments, candidates
    is_x0 = model.scorer is None or model.scorer.target == "x0"
    filled_NL = (hidden_NL if is_x0 else shown_NL) & active_N[:, None]
    xt_NL = x0_NL.masked_fill(hidden_NL.to(device), model.config.mask_token_id)
    step_N = None if num_steps is None else ((1 - t_N) * num_steps).round().long().to(device)
    now_N, next_N = (x.float().to(device) for x in (t_N, s_N))
    state = State(xt_NL, attention_mask, step_N, now_N, next_N, (seed, PROPOSE, row_N, draw_N), process)
    proposal = propose(model, state, filled_NL, columns, shown_NL, x0_NL, hidden_NL)
    log_w_NX = torch.zeros(N, len(columns.shown_K), dtype=torch.float64, device="cpu")
    if len(rows_A := active_N.nonzero()[:, 0]):
        on_A = rows_A.to(device)
        chosen = proposal.x_NKL[on_A], proposal.log_mu_NK[on_A]
        log_w_NX[rows_A] = -weigh(model, state.rows(rows_A), *chosen, energy_batch_size)[0].cpu().double()
    log_v_NG, is_data_X = log_w_NX[:, data_G], columns.given_K.cpu()  # type: ignore[union-attr]
    H = len(data_G) if bool((columns.shown_K != columns.rest_K).any()) else 1
    log_w_NHK = log_w_NX[:, ~is_data_X].reshape(N, H, int((~is_data_X).sum()) // H)
    return proposal.log_given_NL.double().cpu(), log_v_NG, log_w_NHK


def _scored(
    model: Any, input_ids: Tensor, attention_mask: Tensor | None, prompt_mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Which positions are scored, (B, L) bool on the CPU, and the attention mask, None where nothing is padded."""
    if (input_ids == model.config.mask_token_id).any():
        raise ValueError(f"input_ids must be a text without the mask token {model.config.mask_token_id}")
    if input_ids.shape[1] > model.config.max_position_embeddings:
        longest = model.config.max_position_embeddings
        raise ValueError(f"input_ids has {input_ids.shape[1]} tokens, more than max_position_embeddings={longest}")
    scored_BL = torch.ones(input_ids.shape, dtype=torch.bool, device="cpu")
    if attention_mask is not None:
        attention_mask = check_attention_mask(attention_mask, input_ids).to(model.device)
        scored_BL &= attention_mask.bool().cpu()
    if prompt_mask is not None:
        prompt_mask = check_mask("prompt_mask", prompt_mask, input_ids, "true or 1 for given tokens, and 0 for others")
        scored_BL &= ~prompt_mask.bool().cpu()
    if (empty_B := ~scored_BL.any(-1)).any():
        raise ValueError(f"prompt_mask leaves nothing to score in row {int(empty_B.nonzero()[0])}")
    return scored_BL, None if attention_mask is None or attention_mask.all() else attention_mask


def _check(model: Any, estimator: str, config: EDLMGenerationConfig, settings: Settings) -> None:
    if not isinstance(estimator, str) or estimator not in ESTIMATORS:
        raise ValueError(f"estimator must be one of {ESTIMATORS}, got {estimator!r}")
    if estimator == "paper" and model.config.energy_target != "x0":
        raise ValueError(f"estimator='paper' needs energy_target='x0', got {model.config.energy_target!r}")
    if estimator == "paper" and config.block_length is not None:
        raise ValueError(f"estimator='paper' has no blocks, got block_length={config.block_length}")
    if estimator == "sampler" and config.order != "random":
        raise ValueError(
            f"order={config.order!r} looks at token values, and the bound is of a plan that does not; give "
            "order='random', or blocks by block_length"
        )
    if estimator == "sampler" and config.corrector_steps and config.most_candidates > 1:
        raise ValueError(
            f"corrector_steps={config.corrector_steps}: a revised text has no bound, for its last round could have "
            "come from many others; give corrector_steps=0 for that of the text before it is revised"
        )
    if not config.do_sample:
        raise ValueError("do_sample=False gives one text and no others, which has no likelihood")
    if not settings:
        raise ValueError("settings must hold at least one (num_candidates, energy_temperature), got none")
    for k, tau in settings:
        EDLMGenerationConfig(num_candidates=k, energy_temperature=tau)  # checks the values
