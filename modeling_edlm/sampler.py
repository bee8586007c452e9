"""The sampler of EDLM (arXiv 2410.21357, Algorithm 1): one step, the loop over a plan, and the corrector.

`model` has a `denoiser`, `energy()` and `scorer`, what is known of the energy (None: there is none). `config` is an
`EDLMGenerationConfig`. `watch` is told of each step, and says what is free and which rows are done.
Shapes: B rows of the output, N rows stepped now, K candidates, L length, T steps, V vocabulary, M selected positions
(flat in N * L).
"""

import inspect
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from .backbone import no_dropout, rows_at_once, suppress
from .draws import choose, uniforms
from .energies import candidate_energies
from .prefix_cache import PrefixCache
from .proposal import Columns, Proposal, own_positions
from .schedule import RevealPlan, revision_set, times

REVEAL, CHOICE, SET = -1, -2, -3  # counters of the draws that belong to no step, no position, no candidate


@dataclass
class State:
    """The rows stepped now: xt and attention mask (N, L), the step and its times t > s, each a number or (N,), and the
    counters of the uniforms; see `ProposalMixin.propose`."""

    xt_NL: Tensor
    attention_mask: Tensor | None
    step: int | Tensor | None
    t: float | Tensor
    s: float | Tensor
    counters: tuple[Tensor | int, ...]
    process: "LogitsProcess | None" = None
    on_N: Tensor = None  # type: ignore[assignment]  # their numbers in the run, and what it keeps of them for the energy
    prefix: PrefixCache | None = None

    def rows(self, on_A: Tensor) -> "State":
        """Some of these rows."""
        parts = (self.xt_NL, self.attention_mask, self.step, self.t, self.s)
        parts = [x[on_A.to(x.device)] if isinstance(x, Tensor) and x.ndim else x for x in parts]  # type: ignore[assignment]
        counters = tuple(c[on_A.to(c.device)] if isinstance(c, Tensor) else c for c in self.counters)
        return State(*parts, counters, self.process)


def propose(
    model: Any,
    state: State,
    where_NL: Tensor,
    columns: Columns,
    shown_NL: Tensor | None = None,
    given_NL: Tensor | None = None,
    scored_NL: Tensor | None = None,
    order: str = "random",
) -> Proposal:
    """The candidates of a step: see `ProposalMixin.propose`."""
    process, is_greedy = None, state.process is not None and not state.process.do_sample
    if state.process is not None:

        def process(row_M: Tensor, states_ML: Tensor, logits_MV: Tensor, positions_M: Tensor) -> Tensor:
            step = state.step[row_M] if isinstance(state.step, Tensor) else state.step
            return state.process(step, states_ML, logits_MV, positions_M)  # type: ignore[misc]

    rest = state.t, state.attention_mask, process, shown_NL, given_NL, scored_NL, order, is_greedy
    return model.denoiser.propose(state.xt_NL, where_NL, columns, state.counters, *rest)


def weigh(
    model: Any, state: State, x_NKL: Tensor, log_mu_NK: Tensor, batch_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Energies (N, K) of candidates, and how many of each row were scored, (N,): equal ones once."""
    if model.scorer is None:
        return torch.zeros_like(log_mu_NK), torch.zeros(len(x_NKL), dtype=torch.int64, device=x_NKL.device)
    time = model.scorer.time(state.t, state.s)
    what = x_NKL, state.xt_NL, time, log_mu_NK, state.attention_mask
    if state.prefix is not None:  # finds the rows of a pass itself
        return candidate_energies(state.prefix, *what, batch_size, state.on_N)
    return candidate_energies(model.energy, *what, batch_size or rows_at_once(model.scorer.network, x_NKL.shape[-1]))


class Run:
    """The canvas of one call, the counters of its draws, and what is counted while it is filled and revised."""

    def __init__(
        self,
        model: Any,
        xt_BL: Tensor,
        attention_mask: Tensor | None,
        seed: int,
        first_row: int,
        num_steps: int,
        use_cache: bool,
    ):
        (B, L), device = xt_BL.shape, xt_BL.device
        self.xt_BL, self.attention_mask, self.seed, self.first_row = xt_BL, attention_mask, seed, first_row
        self.row_B1 = torch.arange(first_row, first_row + B, device="cpu")[:, None]
        self.place_BL = own_positions(xt_BL, attention_mask).cpu()
        self.length_B = xt_BL.new_full((B,), L) if attention_mask is None else attention_mask.sum(-1)
        self.nfe_B, self.energy_nfe_B, self.energy_tokens_B, self.rounds_B, self.changed_B = xt_BL.new_zeros(5, B)
        self.prefix = None
        if use_cache and model.scorer is not None:
            self.prefix = model.scorer.prefix_cache(model.energy, self.energy_tokens_B, L)
        nan = torch.full((2, B, num_steps), float("nan"), dtype=torch.float32, device=device)
        self.energies_BT, self.ess_BT = nan
        self.health = Health(num_steps, device)

    def state(
        self,
        xt_NL: Tensor,
        rows_N: Tensor,
        step: int,
        t: Tensor | float,
        s: float,
        process: "LogitsProcess | None",
        hidden_NL: Tensor,
    ) -> State:
        """That of some rows, with what is masked in them: both are on the CPU."""
        on_N = rows_N.to(xt_NL.device, non_blocking=True)
        mask_NL = None if self.attention_mask is None else self.attention_mask[on_N]
        counters = self.seed, on_N + self.first_row, step
        first_N = self.place_BL[rows_N].masked_fill(~hidden_NL, hidden_NL.shape[1]).amin(-1)
        prefix = self.prefix if self.prefix is not None and self.prefix.pays(first_N) else None
        return State(xt_NL, mask_NL, step, t, s, counters, process, on_N, prefix)

    def keep(
        self,
        state: State,
        x_NKL: Tensor,
        energy_NK: Tensor,
        scored_N: Tensor,
        energy_temperature: float,
        watch: Any,
        is_move: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """One candidate (N, L) of each row by its energy, and which of the K it is (N,)."""
        on_N, step = state.on_N, cast(int, state.step)
        u_N = uniforms(self.seed, on_N + self.first_row, step, CHOICE, 0)
        kept_N, ess_N = choose(energy_NK, energy_temperature, u_N, is_move)
        if state.prefix is None:  # it counts its own
            self.energy_tokens_B[on_N] += scored_N * x_NKL.shape[-1]
        n = torch.arange(len(on_N), device=on_N.device)
        self.energies_BT[on_N, step], self.ess_BT[on_N, step] = energy_NK[n, kept_N], ess_N
        self.energy_nfe_B[on_N] += scored_N
        self.health.note("energies", energy_NK.isnan().any() | ess_N.isnan().any(), step)
        watch.choice(on_N, x_NKL, energy_NK, kept_N)
        return x_NKL[n, kept_N], kept_N


def denoise(model: Any, run: Run, config: Any, process: "LogitsProcess | None", watch: Any) -> None:
    """The sampling loop, over a plan that is drawn first, on the CPU."""
    xt_BL, T, device = run.xt_BL, config.num_steps, run.xt_BL.device
    u_BL = uniforms(run.seed, run.row_B1, REVEAL, run.place_BL, 0)
    is_random = config.order == "random"
    plan = RevealPlan(u_BL, watch.free_BL.cpu(), T, config.block_length, is_even=not is_random)
    has_energy = model.scorer is not None and config.do_sample
    is_step = has_energy and model.scorer.target == "xs"
    rows_at_a_time = config.denoiser_batch_size or rows_at_once(model.denoiser, xt_BL.shape[1])

    for step, (t, s) in enumerate(pairwise(times(T).tolist())):
        rows_E = (plan.sets(step)[2].any(-1) & ~watch.done_B).nonzero()[:, 0]  # others cost nothing
        for rows_N in rows_E.split(rows_at_a_time) if len(rows_E) else ():
            hidden_NL, _, shown_NL = plan.sets(step, rows_N)
            on_N = rows_N.to(device, non_blocking=True)
            state = run.state(xt_BL[on_N], rows_N, step, t, s, process, hidden_NL)
            k = config.candidates_at(t) if has_energy else 1
            columns = Columns.independent(k, device, shared=config.shared_completion and is_random)
            filled_NL = shown_NL if is_random and (k == 1 or is_step) else hidden_NL
            proposal = propose(model, state, filled_NL, columns, shown_NL, order=config.order)
            if not is_random:
                certainty_NL = cast(Tensor, proposal.certainty_NL).cpu()
                shown_NL = plan.prefer(step, rows_N, certainty_NL, config.confidence_threshold)
                if is_step or config.shared_completion:
                    rest_NL = state.xt_NL if is_step else proposal.x_NKL[:, 0]
                    proposal = proposal.showing(shown_NL.to(device), rest_NL, counts_rest=not is_step)
            x_NL = proposal.x_NKL[:, 0]
            if k > 1:
                energies = weigh(model, state, proposal.x_NKL, proposal.log_mu_NK, config.energy_batch_size)
                x_NL, _ = run.keep(state, proposal.x_NKL, *energies, config.energy_temperature, watch)
            run.health.note("logits", proposal.log_mu_NK.isnan().any(), step)
            xt_BL[on_N] = torch.where(shown_NL.to(device, non_blocking=True), x_NL, state.xt_NL)
            run.nfe_B[on_N] += 1
        if watch.step_end(step, t):
            break


def revise(model: Any, run: Run, config: Any, process: "LogitsProcess | None", watch: Any, rounds: range) -> None:
    """Rounds of the corrector: the present tokens of a random set against draws for it, chosen between by energy.

    Iterated sampling importance resampling (Andrieu, Lee and Vihola 2018, arXiv 1312.5301), which stays where it is
    less often by Liu's rule, see `choose`. The set depends on no token value; of an energy of the text the present
    one's part is known from the round before.
    """
    xt_BL, device = run.xt_BL, run.xt_BL.device
    free_BL, K = watch.free_BL.cpu(), config.corrector_candidates or config.most_candidates
    columns = Columns.independent(K, device, first_given=True)
    part_B = torch.full((len(xt_BL),), float("nan"), dtype=torch.float32, device=device)  # of the present texts
    rows_at_a_time = config.denoiser_batch_size or rows_at_once(model.denoiser, xt_BL.shape[1])
    is_of_text = model.scorer is not None and model.scorer.is_of_text

    for step in rounds:
        u_BL = uniforms(run.seed, run.row_B1, step, run.place_BL, SET)
        set_BL = revision_set(u_BL, free_BL, config.corrector_size, config.corrector_sets == "contiguous")
        rows_E = (set_BL.any(-1) & ~watch.done_B).nonzero()[:, 0]
        for rows_N in rows_E.split(rows_at_a_time) if len(rows_E) else ():
            set_NL, on_N = set_BL[rows_N], rows_N.to(device, non_blocking=True)
            present_NL, is_set_NL = xt_BL[on_N], set_NL.to(device, non_blocking=True)
            t_N = is_set_NL.sum(-1).float() / run.length_B[on_N]
            xt_NL = present_NL.masked_fill(is_set_NL, model.config.mask_token_id)
            state = run.state(xt_NL, rows_N, step, t_N, 0.0, process, set_NL)
            proposal = propose(model, state, set_NL, columns, given_NL=present_NL)
            run.health.note("logits", proposal.log_mu_NK.isnan().any(), step)
            x_NKL, log_mu_NK = proposal.x_NKL, proposal.log_mu_NK
            if is_of_text:
                known = 0 if step == rounds.start else 1
                nothing_NK = torch.zeros_like(log_mu_NK[:, known:])
                part_NK, scored_N = weigh(model, state, x_NKL[:, known:], nothing_NK, config.energy_batch_size)
                part_NK = torch.cat((part_B[on_N, None][:, :known], part_NK), dim=1)
                energy_NK = log_mu_NK + part_NK / config.corrector_temperature
            else:
                energy_NK, scored_N = weigh(model, state, x_NKL, log_mu_NK, config.energy_batch_size)
                energy_NK = tempered(energy_NK, log_mu_NK, config.corrector_temperature)
            energy_NK = stay_if_stuck(energy_NK)
            x_NL, kept_N = run.keep(state, x_NKL, energy_NK, scored_N, config.energy_temperature, watch, True)
            if is_of_text:
                part_B[on_N] = part_NK.gather(1, kept_N[:, None])[:, 0]
            xt_BL[on_N] = x_NL
            run.nfe_B[on_N] += 1
            run.rounds_B[on_N] += 1
            run.changed_B[on_N] += (x_NL != present_NL).any(-1)
        if watch.step_end(step, 0.0):
            break


def tempered(energy_NK: Tensor, log_mu_NK: Tensor, temperature: float) -> Tensor:
    """Energies under which mu exp(-E) becomes its power of 1 / temperature; -inf where the proposal gives nothing."""
    if temperature == 1:
        return energy_NK
    energy_NK = log_mu_NK + (energy_NK - log_mu_NK) / temperature
    return energy_NK.masked_fill(log_mu_NK == -torch.inf, -torch.inf)


def stay_if_stuck(energy_NK: Tensor) -> Tensor:
    """Energies by which a row keeps its present text, the first candidate, where there is no other choice: the proposal
    cannot give it (top_k or top_p cut it away, its weight is infinite), or no candidate has any weight.
    """
    is_stuck_N1 = (energy_NK[:, :1] == -torch.inf) | (energy_NK == torch.inf).all(-1, keepdim=True)
    stay_NK = torch.full_like(energy_NK, torch.inf)
    stay_NK[:, 0] = 0
    return torch.where(is_stuck_N1, stay_NK, energy_NK)


def functions(name: str, given: Any) -> list[Callable]:
    """The functions of an argument as a list: a single one is one, None is none; ValueError for anything else."""
    several = [] if given is None else given if isinstance(given, list | tuple) else [given]
    if not all(callable(function) and not isinstance(function, type) for function in several):
        raise ValueError(f"{name} must be a list of functions, got {given!r}")
    return list(several)


def argument_names(function: Callable) -> Collection[str]:
    try:
        return inspect.signature(function).parameters.keys()
    except ValueError:  # some functions that are written in C do not say
        return ()


class LogitsProcess:
    """Everything that changes the proposal's logits, in order; what it makes of them is the mu that an energy corrects,
    or without sampling the mu whose likeliest token is taken.

    `of(config, logits_processor)` is None where nothing does.
    """

    def __init__(self, processors: list[Callable], do_sample: bool, mask_token_id: int):
        self.processors, self.do_sample, self.mask_token_id = processors, do_sample, mask_token_id
        self.wanted = [argument_names(processor) for processor in processors]

    @classmethod
    def of(cls, config: Any, logits_processor: list[Callable] | None, mask_token_id: int) -> "LogitsProcess | None":
        processors = functions("logits_processor", logits_processor)
        if config.do_sample:
            processors += [TemperatureLogitsWarper(float(config.temperature))] if config.temperature != 1 else []
            processors += [TopKLogitsWarper(config.top_k)] if config.top_k else []
            processors += [TopPLogitsWarper(float(config.top_p))] if config.top_p not in (None, 1) else []
        return cls(processors, config.do_sample, mask_token_id) if processors or not config.do_sample else None

    def __call__(self, step: int | Tensor | None, states_ML: Tensor, logits_MV: Tensor, positions_M: Tensor) -> Tensor:
        """Logits (M, V) at a step, or each at its own, (M,)."""
        if isinstance(step, Tensor) and any("cur_step" in wanted for wanted in self.wanted):
            changed_MV = torch.empty_like(logits_MV)
            for now in step.unique().tolist():
                at_M = step == now
                changed_MV[at_M] = self(now, states_ML[at_M], logits_MV[at_M], positions_M[at_M])
            return changed_MV
        offered = {"cur_step": step, "positions": positions_M}
        for processor, wanted in zip(self.processors, self.wanted, strict=True):
            extra = {name: value for name, value in offered.items() if name in wanted}
            changed_MV = processor(states_ML, logits_MV, **extra)
            is_tensor = isinstance(changed_MV, Tensor) and changed_MV.is_floating_point()
            if not is_tensor or changed_MV.shape != logits_MV.shape:
                wanted = f"a floating-point tensor {tuple(logits_MV.shape)}"
                what = f"{changed_MV.dtype} {tuple(changed_MV.shape)}" if isinstance(changed_MV, Tensor) else changed_MV
                raise ValueError(f"logits_processor must return {wanted}; {processor!r} gave {what!r}")
            logits_MV = changed_MV.to(logits_MV)
        return suppress(logits_MV, self.mask_token_id)


class Health:
    """The first step at which something was NaN, kept on the device and read once, at the end."""

    def __init__(self, num_steps: int, device: torch.device):
        self.num_steps = num_steps
        self.first = {name: torch.full((), num_steps, device=device) for name in ("logits", "energies")}

    def note(self, name: str, is_bad: Tensor, step: int) -> None:
        self.first[name] = torch.where(is_bad, self.first[name].clamp(max=step), self.first[name])

    def check(self, logits_processor: Any = None) -> None:
        after = ", with the given logits_processor" if logits_processor else ""
        for name, first in self.first.items():
            if (step := int(first)) < self.num_steps:
                what = "NaN" if name == "logits" else "NaN, or no finite value for any candidate of a row"
                raise FloatingPointError(f"{name} hold {what}, first at step {step} of {self.num_steps}{after}")


_evaluating: WeakKeyDictionary[torch.nn.Module, int] = WeakKeyDictionary()  # calls that have switched a module off
_flags = threading.Lock()


@contextmanager
def in_eval_mode(model: Any) -> Iterator[None]:
    """Dropout off, and every module's own flag back when the last of the calls that run at once ends."""
    with _flags:
        switched = [module for module in model.modules() if module.training or module in _evaluating]
        for module in switched:
            _evaluating[module] = _evaluating.get(module, 0) + 1
            module.training = False
    try:
        with no_dropout():
            yield
    finally:
        with _flags:
            for module in switched:
                _evaluating[module] -= 1
                if not _evaluating[module]:
                    del _evaluating[module]
                    module.training = True
