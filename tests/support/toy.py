"""Tiny models and the exact law of their samplers, by enumeration: what every sampler test compares against."""

import itertools
import math
from collections import defaultdict
from functools import cache

import torch
from scipy.stats import chi2

from modeling_edlm import EDLMConfig, EDLMModel

MASK = 3  # vocabulary {0, 1, 2, mask}


def make_toy(energy_type="nce", energy_target="x0", length=3, seed=0, **changes) -> EDLMModel:
    """A small time-conditioned EDLM with random weights, far from flat in its outputs."""
    torch.manual_seed(seed)
    config = EDLMConfig(
        **{
            "vocab_size": MASK + 1,
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "cond_dim": 4,
            "time_conditioning": True,
            "max_position_embeddings": length,
            "dropout": 0.1,
            "energy_type": energy_type,
            "energy_target": energy_target,
            "energy_config": {"cond_dim": 0, "time_conditioning": False} if "ar" in energy_type else {},
        }
        | changes
    )
    model = EDLMModel(config)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if "norm.weight" in name else 0.0, 0.45)
    if energy_type == "nce":
        model.energy_model.network.fc2.weight.data *= 1.5
    return model.eval()


def make_broad_toy(energy_type: str) -> EDLMModel:
    """A toy with a broad proposal, where it matters whether candidates share the completion of what is not revealed."""
    model = make_toy(energy_type, seed=3 if energy_type == "nce" else 5)
    model.denoiser.head.linear.weight.data *= 0.3
    return model


def completions(state: tuple, positions: tuple) -> list[tuple]:
    """All ways to fill `positions` of a state."""
    filled = []
    for values in itertools.product(range(MASK), repeat=len(positions)):
        x = list(state)
        for position, value in zip(positions, values, strict=True):
            x[position] = value
        filled.append(tuple(x))
    return filled


@torch.no_grad()
def log_mu(model, state: tuple, t: float, positions: tuple) -> torch.Tensor:
    """log mu of every completion of `positions`, float64."""
    log_p_LV = model.log_p_x0(torch.tensor([state]), t=t)[0].double()
    candidates = torch.tensor(completions(state, positions))
    return sum(log_p_LV[p, candidates[:, p]] for p in positions)


def law_p_k(log_mu_C: torch.Tensor, energy_C: torch.Tensor, k: int) -> torch.Tensor:
    """p_k(x) = k mu(x) E[w(x) / (w(x) + w(x_2) + ... + w(x_k))] for every x, DESIGN: the law for finite k.

    1/S is the integral of exp(-a S) over a > 0, so the expectation factorises: E = w(x) integral exp(-a w(x)) phi^(k-1)
    with phi(a) = E_mu[exp(-a w)]. With a = exp(u) the trapezoid rule converges geometrically.
    """
    if (never_C := log_mu_C == -math.inf).any():  # the energies of these do not matter, and may be infinite
        return torch.zeros_like(log_mu_C).masked_scatter(~never_C, law_p_k(log_mu_C[~never_C], energy_C[~never_C], k))
    mu, w = log_mu_C.exp(), torch.exp(-energy_C.double() + energy_C.min())
    u = torch.arange(-60, 60 + float(energy_C.max() - energy_C.min()), 0.005, dtype=torch.float64)  # to the least w
    a = u.exp()
    decay = torch.exp(-a[:, None] * w)
    phi = decay @ mu
    integral = ((a * phi ** (k - 1))[:, None] * decay).sum(0) * (u[1] - u[0])
    p_C = k * mu * w * integral
    assert abs(float(p_C.sum()) - 1) < 1e-4
    return p_C


def law_shared(model, state: tuple, now: tuple, t: float, s: float, k: int, tau: float = 1.0) -> torch.Tensor:
    """Law of the completions of `now` where all candidates share one draw of the other masked positions."""
    rest = tuple(p for p, v in enumerate(state) if v == MASK and p not in now)
    log_mu_C, total = log_mu(model, state, t, now), 0.0
    rest_weights = log_mu(model, state, t, rest).exp().tolist() if rest else [1.0]
    for completion, p in zip(completions(state, rest), rest_weights, strict=True):
        candidates = completions(completion, now)
        total = total + p * law_p_k(log_mu_C, exact_energy(model, candidates, state, t, s) / tau, k)
    return total


def block_parts(free: tuple, block_length: int | None) -> dict[int, tuple[float, float]]:
    """The part of [0, 1) in which each free position is revealed."""
    F, b = len(free), block_length or max(len(free), 1)
    starts = [rank // b * b for rank in range(F)]
    return {p: (start / F, min(start + b, F) / F) for p, start in zip(free, starts, strict=True)}


def overlap(part: tuple, low: float, high: float) -> float:
    """The share of a part of time that lies between two times."""
    return max(0.0, min(part[1], high) - max(part[0], low)) / (part[1] - part[0])


def chain_law(
    model,
    start: tuple,
    num_steps: int,
    k: int,
    window=(1.0, 0.0),
    law=law_p_k,
    shared=False,
    block_length=None,
    shown=None,
    candidates_at=None,
) -> dict[tuple, float]:
    """Exact distribution of what the sampler returns from `start`, by dynamic programming over the states.

    `shown(state, i)` gives the one set that step i reveals, where that is no matter of chance; `candidates_at(t)` the
    number of candidates, where it is not k within the window.
    """
    dist, target = {start: 1.0}, model.config.energy_target
    parts = block_parts(tuple(p for p, v in enumerate(start) if v == MASK), block_length)
    for i in range(num_steps):
        t, s = 1 - i / num_steps, 1 - (i + 1) / num_steps
        if candidates_at is not None:
            k, window = candidates_at(t), (1.0, 0.0)
        active = k > 1 and window[1] - 1e-9 <= t <= window[0] + 1e-9
        reveal = {p: overlap(part, 1 - t, 1 - s) / (overlap(part, 1 - t, 1) or 1) for p, part in parts.items()}
        following = defaultdict(float)
        for state, p_state in dist.items():
            masked = tuple(p for p, v in enumerate(state) if v == MASK)
            for size in range(len(masked) + 1):
                for now in itertools.combinations(masked, size):
                    p_now = math.prod(reveal[p] if p in now else 1 - reveal[p] for p in masked)
                    if shown is not None:
                        p_now = float(now == shown(state, i))
                    if p_now < 1e-12:
                        continue
                    filled = masked if active and target == "x0" and not shared else now
                    log_mu_C = log_mu(model, state, t, filled) if filled else torch.zeros(1, dtype=torch.float64)
                    candidates = completions(state, filled)
                    p_C = log_mu_C.exp()
                    if active and now and shared:
                        p_C = law_shared(model, state, now, t, s, k)
                    elif active and now:
                        energy_C = exact_energy(model, candidates, state, t, s)
                        p_C = law(log_mu_C, energy_C, k)
                    for x, p in zip(candidates, p_C.tolist(), strict=True):
                        kept = tuple(x[j] if j in now else v for j, v in enumerate(state))
                        following[kept] += p_state * p_now * p
        dist = following
    return dict(dist)


@torch.no_grad()
def exact_energy(model, candidates: list[tuple], state: tuple, t: float, s: float) -> torch.Tensor:
    x_CL = torch.tensor(candidates)
    time = t if model.config.energy_target == "x0" else s
    return model.energy(x_CL, torch.tensor([state]).expand_as(x_CL), time)


def p_value(samples_NL: torch.Tensor, law: dict[tuple, float]) -> float:
    """Chi-square p-value of samples under a law; cells expecting fewer than 5 are pooled."""
    counts, n = defaultdict(int), len(samples_NL)
    for row, count in zip(*(x.tolist() for x in samples_NL.unique(dim=0, return_counts=True)), strict=True):
        counts[tuple(row)] = count
    impossible = [x for x in counts if law.get(x, 0.0) < 1e-12]
    if impossible:
        return 0.0
    cells, pooled = [], [0.0, 0.0]
    for x, p in law.items():
        if n * p >= 5:
            cells.append((counts[x], n * p))
        else:
            pooled = [pooled[0] + counts[x], pooled[1] + n * p]
    if pooled[1] > 0:
        cells.append(tuple(pooled))
    statistic = sum((observed - expected) ** 2 / expected for observed, expected in cells)
    return float(chi2.sf(statistic, len(cells) - 1)) if len(cells) > 1 else 1.0


def total_variation(p: dict, q: dict) -> float:
    return sum(abs(p.get(x, 0.0) - q.get(x, 0.0)) for x in p.keys() | q.keys()) / 2


def path_bounds(
    model,
    texts: list[tuple],
    num_steps: int,
    k: int,
    window=(1.0, 0.0),
    tau: float = 1.0,
    shared=False,
    block_length=None,
    candidates_at=None,
) -> torch.Tensor:
    """For each text, the sum over the steps of E[-log p_k(x0_S | xt)] in nats, xt and S as the sampler draws them: the
    bound on -log p(x0) that `likelihood` tends to as its inner samples grow."""

    @cache
    def law(state: tuple, filled: tuple, i: int, k: int, active: bool) -> torch.Tensor:
        t, s = 1 - i / num_steps, 1 - (i + 1) / num_steps
        log_mu_C = log_mu(model, state, t, filled)
        if not active:
            return log_mu_C.exp()
        if shared:
            return law_shared(model, state, filled, t, s, k, tau)
        return law_p_k(log_mu_C, exact_energy(model, completions(state, filled), state, t, s) / tau, k)

    totals = []
    for x0 in texts:
        total, parts = 0.0, block_parts(tuple(range(len(x0))), block_length)
        for i, masked in itertools.product(range(num_steps), subsets(range(len(x0)))):
            t, s = 1 - i / num_steps, 1 - (i + 1) / num_steps
            if candidates_at is not None:
                k, window = candidates_at(t), (1.0, 0.0)
            active = k > 1 and window[1] - 1e-9 <= t <= window[0] + 1e-9
            state = tuple(MASK if j in masked else v for j, v in enumerate(x0))
            for now in subsets(masked)[1:]:
                p = math.prod(
                    overlap(part, 1 - t, 1 - s)
                    if j in now
                    else overlap(part, *((1 - s, 1) if j in masked else (0, 1 - t)))
                    for j, part in parts.items()
                )
                if p > 1e-12:
                    filled = masked if active and model.config.energy_target == "x0" and not shared else now
                    hits = [all(x[j] == x0[j] for j in now) for x in completions(state, filled)]
                    p_hit = float(law(state, filled, i, k, active)[torch.tensor(hits)].sum())
                    total -= p * (math.log(p_hit) if p_hit else -math.inf)
        totals.append(total)
    return torch.tensor(totals, dtype=torch.float64)


def subsets(items) -> list[tuple]:
    items = tuple(items)
    return [c for size in range(len(items) + 1) for c in itertools.combinations(items, size)]


def revision_kernel(model, size: int, k: int, free: tuple, rows: list[tuple]) -> torch.Tensor:
    """(C, C) probabilities of one round of the corrector between texts, by the integral of `law_p_k`.

    From x the round goes to y by one of k - 1 draws, with its weight over the larger of its and x's and the k - 2
    others, or stays (Metropolised Gibbs sampling).
    """
    index = {x: i for i, x in enumerate(rows)}
    kernel = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    sets = list(itertools.combinations(free, min(size, len(free))))
    for x, now in itertools.product(rows, sets):
        state = tuple(MASK if j in now else v for j, v in enumerate(x))
        candidates, t = completions(state, now), len(now) / len(x)
        mu_C = log_mu(model, state, t, now).exp()
        energy_C = exact_energy(model, candidates, state, t, 0.0).double()
        w_C = torch.exp(-energy_C + energy_C.min())
        u = torch.arange(-60, 60 + float(energy_C.max() - energy_C.min()), 0.01, dtype=torch.float64)
        a, here = u.exp(), candidates.index(x)
        phi_A = torch.exp(-a[:, None] * w_C) @ mu_C
        larger_AC = torch.exp(-a[:, None] * w_C.clamp(min=float(w_C[here])))
        p_C = (k - 1) * mu_C * w_C * ((a * phi_A ** (k - 2))[:, None] * larger_AC).sum(0) * 0.01
        p_C[here] += 1 - p_C.sum()
        assert p_C[here] >= -1e-6
        for y, p in zip(candidates, p_C, strict=True):
            kernel[index[x], index[y]] += p / len(sets)
    return kernel


def shown_by_value(model, start: tuple, num_steps: int, order: str, threshold=None, block_length=None):
    """What an order by value shows of a state at a step, for `chain_law`."""
    free = tuple(p for p, v in enumerate(start) if v == MASK)
    block = {p: rank // (block_length or len(free)) for rank, p in enumerate(free)}
    slots = defaultdict(list)  # of each block, the steps that were planned for it
    for rank, p in enumerate(free):
        slots[block[p]].append(int((rank + 0.5) / len(free) * num_steps))

    @cache
    def shown(state: tuple, i: int) -> tuple:
        masked = [p for p in free if state[p] == MASK]
        left = {b: sum(block[p] == b for p in masked) for b in slots}
        planned = [b for b in slots for slot in slots[b][len(slots[b]) - left[b] :] if slot == i]
        if not planned:
            return ()
        p_LV = model.log_p_x0(torch.tensor([state]), t=1 - i / num_steps)[0].double().exp()
        measure = {
            "confidence": lambda p: float(p.max()),
            "margin": lambda p: float(p.sort().values[-1] - p.sort().values[-2]),
            "entropy": lambda p: float(sum(q * q.log() for q in p if q > 0)),
        }[order]
        certain = {p: measure(p_LV[p]) for p in masked if block[p] <= max(planned)}
        best = sorted(certain, key=lambda p: -certain[p])
        more = [p for p in best if threshold is not None and certain[p] >= threshold]
        return tuple(sorted({*best[: len(planned)], *more}))

    return shown
