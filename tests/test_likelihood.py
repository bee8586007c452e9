"""The likelihood estimators against exact enumeration. Error rates are 1 in 10,000 or less, with fixed seeds."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from modeling_edlm import EDLMGenerationConfig, proposal
from modeling_edlm.draws import draw
from modeling_edlm.energies import Energy, causal_log_prob
from modeling_edlm.likelihood import (
    EDLMLikelihoodMixin,
    _columns,
    _weigh,
    likelihood_terms,
    log_mean_exp,
    log_mean_ratio,
    mean_and_stderr,
)
from modeling_edlm.proposal import ProposalMixin
from support.toy import (
    MASK,
    chain_law,
    completions,
    exact_energy,
    law_p_k,
    law_shared,
    log_mu,
    make_broad_toy,
    make_toy,
    path_bounds,
    subsets,
)

FREE = (MASK, MASK, MASK)
TEXTS = torch.tensor(completions(FREE, (0, 1, 2)))  # all 27
FAST = {"denoiser_batch_size": 512, "energy_batch_size": 8192, "energy_window": (1.0, 0.0), "seed": 1}
ENERGIES = [("nce", "x0"), ("nce", "xs"), ("ar", "x0"), ("coar", "x0")]


@torch.no_grad()
def exact_mdlm(model, x0: tuple, num_steps: int | None) -> float:
    """The bound of MDLM in nats by enumeration of the masks; continuous time by Gauss-Legendre quadrature."""
    if num_steps is None:
        nodes, weights = (torch.from_numpy(x) for x in np.polynomial.legendre.leggauss(24))
        grid = [(float(t), float(w) / float(t)) for t, w in zip((nodes + 1) / 2, weights / 2, strict=True)]
    else:
        grid = [(i / num_steps, 1 / i) for i in range(1, num_steps + 1)]
    total = 0.0
    for t, weight in grid:
        for masked in subsets(range(len(x0)))[1:]:
            state = tuple(MASK if j in masked else v for j, v in enumerate(x0))
            log_p_LV = model.log_p_x0(torch.tensor([state]), t=t)[0].double()
            nats = -sum(float(log_p_LV[j, x0[j]]) for j in masked)
            total += weight * t ** len(masked) * (1 - t) ** (len(x0) - len(masked)) * nats
    return total


def z_scores(estimate: torch.Tensor, stderr: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    return (estimate - exact) / (stderr + 1e-5)  # rounding, where nothing is left to chance


@torch.no_grad()
@pytest.mark.parametrize("num_steps", [1, 2, 5, None])
def test_without_an_energy_it_is_the_bound_of_mdlm(num_steps):
    """k = 1 is the T-step bound, which falls to the continuous one."""
    model = make_toy("nce")
    estimator = {"estimator": "mdlm"} if num_steps is None else {"num_steps": num_steps, "num_candidates": 1}
    output = model.likelihood(TEXTS, num_times=512, **estimator, **FAST)
    exact = torch.tensor([exact_mdlm(model, tuple(x), num_steps) for x in TEXTS.tolist()])
    assert z_scores(output.nll, output.stderr, exact).abs().max() < 4.5
    assert output.num_tokens.tolist() == [3] * 27
    if num_steps is not None:
        assert not output.gain.any() and output.ess.isnan().all()


def test_the_bound_of_mdlm_falls_with_the_number_of_steps():
    """Two identical fair bits and their exact denoiser: (T + 1) / T bits, which tends to the 1 bit of their entropy."""
    model, text = TwoBits(), torch.tensor([[0, 0], [1, 1]])
    for num_steps in (1, 2, 8, 64):
        output = model.likelihood(text, num_steps=num_steps, num_candidates=1, num_times=1024, **FAST)
        exact = torch.full((2,), (num_steps + 1) / num_steps * math.log(2), dtype=torch.float64)
        assert z_scores(output.nll, output.stderr, exact).abs().max() < 4.5
    output = model.likelihood(text, estimator="mdlm", num_times=1024, **FAST)
    assert output.nll.tolist() == pytest.approx([math.log(2)] * 2, abs=5 * float(output.stderr.max()))


@torch.no_grad()
@pytest.mark.parametrize("energy", ENERGIES)
@pytest.mark.parametrize(("num_steps", "k"), [(1, 4), (3, 2), (3, 8)])
def test_the_sampler_bound(energy, num_steps, k):
    """Above the exact NLL of the chain for every text, whatever the inner samples; with many, the exact path bound."""
    model = make_toy(*energy)
    law = chain_law(model, FREE, num_steps, k)
    exact = torch.tensor([-math.log(law[tuple(x)]) for x in TEXTS.tolist()], dtype=torch.float64)
    path = path_bounds(model, [tuple(x) for x in TEXTS.tolist()], num_steps, k)
    assert (path > exact - 1e-6).all()
    gaps = []
    for num_samples in (1, 64):
        settings = {"num_candidates": k, "num_times": 128, "num_samples": num_samples}
        output = model.likelihood(TEXTS, num_steps=num_steps, **settings, **FAST)
        assert (z_scores(output.nll, output.stderr, path) > -4.5).all()
        gaps.append(float((output.nll - path).mean()))
    assert -0.02 < gaps[1] < gaps[0] / 2


@torch.no_grad()
@pytest.mark.parametrize("energy", ENERGIES)
def test_more_inner_samples_tighten_the_bound(energy):
    model = make_toy(*energy)
    settings = {"settings": [(4, 1.0)], "num_steps": 2, "num_times": 256}
    terms = [likelihood_terms(model, TEXTS, num_samples=n, **settings, **FAST).nll_BJC for n in (1, 8, 64)]
    for loose, tight in zip(terms, terms[1:], strict=False):
        difference = (loose - tight).mean((1, 2))  # the same moments
        assert difference.mean() > 4 * difference.std() / math.sqrt(len(difference))


@torch.no_grad()
@pytest.mark.parametrize("energy", ENERGIES)
@pytest.mark.parametrize("k", [2, 3, 7])
@pytest.mark.parametrize("num_samples", [1, 9])
def test_the_inner_ratio_is_unbiased(energy, k, num_samples):
    """The mean of its exponential is p_k(x0_S | xt) / mu_S(x0_S | xt), for pools of any size."""
    model, x0, masked, now, N = make_toy(*energy), (2, 0, 1), (0, 1, 2), (0, 2), 10_000
    t, s = 0.75, 0.5
    row_N, is_x0 = torch.arange(N), energy[1] == "x0"
    filled = masked if is_x0 else now
    flags = [torch.tensor([[j in places for j in range(3)]]).expand(N, -1) for places in (masked, now)]
    times = torch.full((N,), t).double(), torch.full((N,), s).double()
    counters = 5, row_N, torch.zeros_like(row_N)
    pool = _columns(model, "sampler", EDLMGenerationConfig(), k, num_samples)
    x0_NL = torch.tensor([x0]).expand(N, -1).contiguous()
    moments = *times, *flags, torch.ones(N, dtype=torch.bool), 4
    _, log_v_NG, log_w_NHK = _weigh(model, x0_NL, None, moments, pool, counters)
    ratio_N = log_mean_ratio(log_v_NG, log_w_NHK, k, counters).exp()
    candidates = completions(FREE, filled)
    log_mu_C = log_mu(model, FREE, t, filled)
    hit_C = torch.tensor([all(x[j] == x0[j] for j in now) for x in candidates])
    p_k = law_p_k(log_mu_C, exact_energy(model, candidates, FREE, t, s), k)[hit_C].sum()
    exact = float(p_k / log_mu_C.exp()[hit_C].sum())
    assert abs(float(ratio_N.mean()) - exact) < 4.5 * float(ratio_N.std()) / math.sqrt(N)
    assert 0 <= ratio_N.min() and ratio_N.max() <= k + 1e-9


@torch.no_grad()
@pytest.mark.parametrize("energy_type", ["nce", "ar", "coar"])
@pytest.mark.parametrize(("k", "num_completions"), [(2, 1), (3, 2), (5, 3)])
def test_the_inner_ratio_of_shared_completions_is_unbiased(energy_type, k, num_completions):
    model, x0, now, t, N = make_broad_toy(energy_type), (2, 0, 1), (0, 2), 0.75, 10_000
    flags = [torch.tensor([[j in places for j in range(3)]]).expand(N, -1) for places in ((0, 1, 2), now)]
    times, row_N = torch.full((N,), t).double(), torch.arange(N)
    counters, active_N = (5, row_N, torch.zeros_like(row_N)), torch.ones(N, dtype=torch.bool)
    x0_NL = torch.tensor([x0]).expand(N, -1).contiguous()
    pool = _columns(model, "sampler", EDLMGenerationConfig(shared_completion=True), k, num_completions)
    _, *weights = _weigh(model, x0_NL, None, (times, times, *flags, active_N, 4), pool, counters)
    ratio_N = log_mean_ratio(*weights, k, counters).exp()
    candidates = completions(FREE, now)
    index = [tuple(x[j] for j in now) for x in candidates].index((2, 1))
    exact = float(law_shared(model, FREE, now, t, 0.5, k)[index] / log_mu(model, FREE, t, now)[index].exp())
    assert abs(float(ratio_N.mean()) - exact) < 4.5 * float(ratio_N.std()) / math.sqrt(N) + 1e-5


@torch.no_grad()
@pytest.mark.parametrize("energy_type", ["nce", "ar", "coar"])
def test_the_bound_with_shared_completions(energy_type):
    """Above the exact NLL of that chain for every text; with many inner samples, the exact path bound."""
    model, texts = make_broad_toy(energy_type), [tuple(x) for x in TEXTS.tolist()]
    law = chain_law(model, FREE, 3, 4, shared=True)
    path = path_bounds(model, texts, 3, 4, shared=True)
    assert (path > torch.tensor([-math.log(law[x]) for x in texts]) - 1e-6).all()
    settings = {"num_steps": 3, "num_candidates": 4, "num_times": 128, "shared_completion": True}
    loose, tight = (model.likelihood(TEXTS, num_samples=n, **settings, **FAST) for n in (1, 16))
    for output in (loose, tight):
        assert (z_scores(output.nll, output.stderr, path) > -4.5).all()
    gaps = [float((output.nll - path).mean()) for output in (loose, tight)]
    assert gaps[1] < gaps[0] / 2


@torch.no_grad()
def test_windows_and_temperatures_are_those_of_the_sampler():
    model = make_toy("nce")
    settings = {"num_steps": 3, "num_candidates": 4, "num_times": 128, "num_samples": 48}
    texts = [tuple(x) for x in TEXTS.tolist()]
    for change, expected in (
        ({"energy_window": (1.0, 0.5)}, {"window": (1.0, 0.5)}),
        ({"energy_window": (0.5, 0.0)}, {"window": (0.5, 0.0)}),
        ({"energy_temperature": 3.0}, {"tau": 3.0}),
    ):
        output = model.likelihood(TEXTS, **settings, **FAST | change)
        difference = output.nll - path_bounds(model, texts, 3, 4, **expected)
        assert (difference / output.stderr > -4.5).all()
        stderr = float(output.stderr.square().mean().sqrt()) / math.sqrt(len(TEXTS))
        assert abs(float(difference.mean())) < 4 * stderr + 0.05  # what 48 inner samples leave


class Changed:
    """A toy with another proposal: what its logits are changed to."""

    def __init__(self, model, change):
        self.model, self.config, self.change = model, model.config, change

    def log_p_x0(self, xt, t=None):
        return self.change(self.model.log_p_x0(xt, t)).log_softmax(-1)

    def energy(self, x, xt, t):
        log_p_NL = self.log_p_x0(xt, t).gather(-1, x[..., None])[..., 0]
        log_mu_N = torch.where(xt == MASK, log_p_NL, 0.0).sum(-1)
        return self.model.energy(x, xt, t, None, log_mu_N)


def nucleus(log_p, mass=0.75):
    p, order = log_p.softmax(-1).sort(-1, descending=True)
    keep = torch.zeros_like(log_p, dtype=torch.bool).scatter(-1, order, p.cumsum(-1) - p < mass)
    return log_p.masked_fill(~keep, -torch.inf)


BIAS = torch.tensor([0.8, 0.0, -0.8, 0.0])
CHANGES = {
    "temperature": ({"temperature": 0.6}, lambda log_p: log_p / 0.6),
    "top_p": ({"top_p": 0.75}, nucleus),
    "processor": ({"logits_processor": [lambda input_ids, scores: scores + BIAS]}, lambda log_p: log_p + BIAS),
    "all": (
        {"logits_processor": [lambda input_ids, scores: scores + BIAS], "temperature": 1.5, "top_p": 0.75},
        lambda log_p: nucleus((log_p + BIAS) / 1.5),
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("energy", [("nce", "xs"), ("ar", "x0")])
@pytest.mark.parametrize("change", CHANGES)
def test_the_bound_of_a_changed_proposal(energy, change):
    """Above the exact NLL of that chain for every text; with many inner samples, its path bound."""
    model, (options, function) = make_toy(*energy), CHANGES[change]
    model.denoiser.head.linear.weight.data *= 0.3
    T = 1 if "top_p" in options else 2  # in several states a nucleus hardly leaves a text whole
    changed, texts = Changed(model, function), [tuple(x) for x in TEXTS.tolist()]
    law = chain_law(changed, FREE, T, 3)
    path = path_bounds(changed, texts, T, 3)
    exact = torch.tensor([-math.log(law[x]) if law.get(x) else math.inf for x in texts])
    finite = path.isfinite()
    assert (path >= exact - 1e-6).all() and finite.sum() >= 4
    assert path[finite].sub(path_bounds(model, texts, T, 3)[finite]).abs().mean() > 0.1  # the test can tell
    output = model.likelihood(TEXTS, num_steps=T, num_candidates=3, num_times=256, num_samples=32, **options, **FAST)
    difference = (output.nll - path)[finite]
    assert (difference / (output.stderr[finite] + 1e-5) > -4.5).all()
    stderr = float(output.stderr[finite].square().sum().sqrt()) / int(finite.sum())
    assert abs(float(difference.mean())) < 4 * stderr + 0.05  # what 32 inner samples leave


@torch.no_grad()
def test_a_forbidden_token_has_an_infinite_bound():
    model = make_toy("nce")
    no_two = [lambda input_ids, scores: scores.index_fill(-1, torch.tensor([2]), -torch.inf)]
    for estimator in ("sampler", "mdlm"):
        output = model.likelihood(TEXTS, estimator=estimator, num_steps=2, logits_processor=no_two, **FAST)
        assert torch.equal(output.nll.isinf(), (TEXTS == 2).any(-1)) and not output.nll.isnan().any()


@torch.no_grad()
@pytest.mark.parametrize("num_steps", [2, 3])
def test_a_processor_is_given_the_step(num_steps):
    """The bound is that of the sampler whose proposal changes from step to step."""
    model, scale = make_toy("none"), [1.0, 0.3, 3.0]

    def by_step(input_ids, scores, cur_step):
        return scores * scale[cur_step]

    class Stepped(Changed):
        def log_p_x0(self, xt, t=None):
            return (self.model.log_p_x0(xt, t) * scale[round((1 - t) * num_steps)]).log_softmax(-1)

    path = path_bounds(Stepped(model, None), [tuple(x) for x in TEXTS.tolist()], num_steps, 1)
    settings = {"num_steps": num_steps, "num_candidates": 1, "num_times": 512}
    output = model.likelihood(TEXTS, logits_processor=[by_step], **settings, **FAST)
    assert z_scores(output.nll, output.stderr, path).abs().max() < 4.5


@torch.no_grad()
@pytest.mark.parametrize("energy", [("none", "x0"), ("nce", "xs"), ("coar", "x0")])
@pytest.mark.parametrize("num_steps", [2, 3])
def test_the_bound_of_blocks(energy, num_steps):
    """Two tokens, then one; with 2 steps one belongs to both blocks."""
    model, texts, k = make_toy(*energy), [tuple(x) for x in TEXTS.tolist()], 1 if energy[0] == "none" else 3
    law = chain_law(model, FREE, num_steps, k, block_length=2)
    path = path_bounds(model, texts, num_steps, k, block_length=2)
    assert (path >= torch.tensor([-math.log(law[x]) for x in texts]) - 1e-6).all()
    assert (path - path_bounds(model, texts, num_steps, k)).abs().mean() > 0.05  # the test can tell
    settings = {"num_steps": num_steps, "num_candidates": k, "num_times": 256, "num_samples": 32, "block_length": 2}
    output = model.likelihood(TEXTS, **settings, **FAST)
    difference = output.nll - path
    assert (difference / (output.stderr + 1e-5) > -4.5).all()
    assert abs(float(difference.mean())) < 4 * float(output.stderr.square().sum().sqrt()) / len(TEXTS) + 0.05
    if k == 1:  # in continuous time: the limit of many steps
        fine = model.likelihood(TEXTS, **settings | {"num_steps": 96}, **FAST)
        limit = model.likelihood(TEXTS, estimator="mdlm", num_times=256, block_length=2, **FAST)
        error = (fine.stderr.square() + limit.stderr.square()).sum().sqrt() / len(TEXTS)
        assert abs(float((fine.nll - limit.nll).mean())) < 4 * float(error) + 0.01


def test_what_has_no_bound_is_refused():
    model = make_toy("ar")
    for change, message in (
        ({"corrector_steps": 2}, "corrector_steps=2: a revised text has no bound"),
        ({"do_sample": False}, "do_sample=False gives one text"),
        ({"batch_size": 2}, r"likelihood\(\) has no argument \['batch_size'\]"),
        ({"estimator": "paper", "num_samples": 2, "block_length": 2}, "block_length=2"),
    ):
        with pytest.raises(ValueError, match=message):
            model.likelihood(TEXTS[:1], **change)
    model.generation_config.corrector_steps = 3  # of the model's own
    with pytest.raises(ValueError, match="corrector_steps=3"):
        model.likelihood(TEXTS[:1])
    assert model.likelihood(TEXTS[:1], num_candidates=1, num_times=2).nll.isfinite().all()  # nothing is revised
    with pytest.raises(ValueError, match="corrector_steps=2"):  # the denoiser alone revises too
        model.denoiser.likelihood(TEXTS[:1], num_candidates=2, corrector_steps=2)


@torch.no_grad()
@pytest.mark.parametrize("energy_type", ["nce", "ar", "coar"])
def test_the_published_form_has_its_own_expectation(energy_type):
    """(1/t)(-log mu + E + log Z) by enumeration; and for coAR energies the NLL of the AR model."""
    model = make_toy(energy_type)
    for head in (model.denoiser.head, getattr(model.energy_model, "head", None)):
        if head is not None:  # tame weights: log Z of few samples is then close
            head.linear.weight.data *= 0.5
    output = model.likelihood(TEXTS, estimator="paper", num_times=256, num_samples=64, **FAST)
    nodes, weights = np.polynomial.legendre.leggauss(8)
    exact = []
    for x0 in map(tuple, TEXTS.tolist()):
        total = 0.0
        for t, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
            for masked in subsets(range(3))[1:]:
                state = tuple(MASK if j in masked else v for j, v in enumerate(x0))
                candidates, log_mu_C = completions(state, masked), log_mu(model, state, t, masked)
                log_joint_C = log_mu_C - exact_energy(model, candidates, state, t, 0.0)
                nats = float(log_joint_C.logsumexp(0) - log_joint_C[candidates.index(x0)])
                total += weight / t * t ** len(masked) * (1 - t) ** (3 - len(masked)) * nats
        exact.append(total)
    exact = torch.tensor(exact, dtype=torch.float64)
    # log Z of a finite number of proposals is low on average, so the estimate is
    assert (z_scores(output.nll, output.stderr, exact) < 4.5).all()
    assert -0.4 < float((output.nll - exact).mean()) < 0.05
    if energy_type == "coar":
        where = torch.ones_like(TEXTS, dtype=torch.bool)
        ar = -causal_log_prob(model.energy_model, TEXTS, where, MASK, MASK).double()
        torch.testing.assert_close(exact, ar, rtol=1e-4, atol=1e-4)
        assert z_scores(output.nll, output.stderr, ar).abs().max() < 4.5
        assert torch.equal(output.nll, output.nll_upper)


class TwoBits(EDLMLikelihoodMixin, ProposalMixin):
    """Two identical fair bits, entropy 1 bit: the exact denoiser, and the energy that makes p(x0 | xt) exact."""

    device, generation_config = torch.device("cpu"), EDLMGenerationConfig()
    energy_type, scorer = "nce", Energy()
    config = SimpleNamespace(vocab_size=3, mask_token_id=2, max_position_embeddings=2, energy_target="x0")

    @property
    def denoiser(self):
        return self

    def modules(self):
        return []

    def logit_chunks(self, xt_NL, where_NL, t=None, attention_mask=None):
        flat_M = where_NL.flatten().nonzero()[:, 0]
        other_M = xt_NL.flip(1).flatten()[flat_M]
        p_MV = torch.nn.functional.one_hot(other_M, 3).float()
        p_MV[other_M == 2] = torch.tensor([0.5, 0.5, 0.0])
        yield flat_M, p_MV.log()

    def energy(self, x, xt, t, attention_mask, log_mu):
        return torch.where(x[:, 0] == x[:, 1], -math.log(2), 30.0).where((xt == 2).all(-1), 0.0)


def test_the_published_form_is_no_bound():
    """Two identical fair bits: it says 1/2 bit in continuous time ((T + 1) / 2T on a grid: 0.504 for T = 128)."""
    model, text = TwoBits(), torch.tensor([[0, 0], [1, 1]])
    paper = model.likelihood(text, estimator="paper", num_times=4096, num_samples=64, **FAST)
    assert (paper.nll / math.log(2) - 0.5).abs().max() < 4 * paper.stderr.max() + 0.01  # log Z of 64 samples
    assert (paper.nll + 5 * paper.stderr < math.log(2)).all()
    for num_steps, k in ((1, 2), (1, 64), (2, 8), (128, 8)):
        sampler = model.likelihood(text, num_steps=num_steps, num_candidates=k, num_times=1024, num_samples=64, **FAST)
        assert (sampler.nll + 4 * sampler.stderr > math.log(2)).all()
    # one step, all of it by the energy: with 64 candidates hardly any draw finds no pair of equal bits
    sampler = model.likelihood(text, num_steps=1, num_candidates=64, num_times=64, num_samples=512, **FAST)
    assert sampler.nll.tolist() == pytest.approx([math.log(2)] * 2, rel=0.02)


def expected_log_mean(p: float, w: float, n: int) -> float:
    """E[log mean of n weights] where a weight is w with probability p, else 1."""
    law = [math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(n + 1)]
    return sum(q * math.log((i * w + n - i) / n) for i, q in enumerate(law))


@pytest.mark.parametrize(
    ("p", "w", "n", "is_bound"), [(0.3, 5.0, 32, True), (0.01, 1e6, 2, False), (0.01, 1e6, 8, False)]
)
def test_the_forms_of_log_z(p, w, n, is_bound):
    """Both have their exact expectations; the "upper" one is above log Z for tame weights and many samples only."""
    log_z = math.log(p * w + 1 - p)
    lower = expected_log_mean(p, w, n)
    upper = (2 * n - 1) * lower - 2 * (n - 1) * expected_log_mean(p, w, n - 1)
    assert lower < log_z and (upper > log_z) == is_bound
    u_NK = torch.rand(200_000, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for form_N, exact in zip(log_mean_exp(torch.where(u_NK < p, math.log(w), 0.0)), (lower, upper), strict=True):
        assert abs(float(form_N.mean()) - exact) < 4 * float(form_N.std()) / math.sqrt(len(form_N))


def test_the_standard_error_covers():
    """Over many texts and seeds, 95% of the intervals of 1.96 standard errors hold the exact value."""
    model = make_toy("nce")
    exact = torch.tensor([exact_mdlm(model, tuple(x), 3) for x in TEXTS.tolist()])
    inside = []
    for seed in range(20):
        output = model.likelihood(TEXTS, num_steps=3, num_candidates=1, num_times=48, **FAST | {"seed": seed})
        inside.append(z_scores(output.nll, output.stderr, exact).abs() < 1.96)
    share = torch.stack(inside).double().mean()
    assert 0.93 < share < 0.995
    assert mean_and_stderr(torch.ones(2, 1))[1].isnan().all()


@torch.no_grad()
def test_prompts_are_given_and_not_scored():
    """With a prompt, the chain is the one that starts from it."""
    model = make_toy("nce")
    prompt_mask = torch.tensor([[False, True, False]]).expand(27, -1)
    settings = {"num_steps": 2, "num_candidates": 3, "num_times": 128, "num_samples": 64}
    output = model.likelihood(TEXTS, prompt_mask=prompt_mask, **settings, **FAST)
    assert output.num_tokens.tolist() == [2] * 27
    for x, nll, stderr in zip(TEXTS.tolist(), output.nll, output.stderr, strict=True):
        law = chain_law(model, (MASK, x[1], MASK), 2, 3)
        assert float(nll + 4.5 * stderr) > -math.log(law[tuple(x)])
    bound = model.likelihood(TEXTS, estimator="mdlm", prompt_mask=prompt_mask, num_times=512, **FAST)
    assert 0 < (bound.nll - output.nll).abs().max() < 20


@torch.no_grad()
def test_padding_changes_nothing():
    model = make_toy("ar", length=5)
    text = torch.tensor([[2, 0, 1]])
    settings = {"num_steps": 3, "num_candidates": 3, "num_times": 400, "num_samples": 4}
    plain = model.likelihood(text, **settings, **FAST)
    padded = torch.tensor([[1, 1, 2, 0, 1]])
    output = model.likelihood(padded, torch.tensor([[0, 0, 1, 1, 1]]), **settings, **FAST)
    assert output.num_tokens.tolist() == [3]
    torch.testing.assert_close(output.nll, plain.nll, rtol=1e-5, atol=1e-5)  # the very same draws


@torch.no_grad()
@pytest.mark.parametrize("estimator", ["sampler", "paper", "mdlm"])
def test_a_row_does_not_depend_on_its_batch(estimator):
    model = make_toy("nce")
    settings = {"estimator": estimator, "num_steps": 4, "num_candidates": 3, "num_samples": 3, "num_times": 6}
    whole = model.likelihood(TEXTS, **settings, **FAST).nll
    parts = [
        model.likelihood(
            TEXTS[i : i + 5], **settings, **FAST | {"first_row": i, "denoiser_batch_size": 4, "energy_batch_size": 7}
        ).nll
        for i in range(0, 27, 5)
    ]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-5)


def test_units():
    model = make_toy("none")
    output = model.likelihood(TEXTS[:2], num_times=4)
    torch.testing.assert_close(output.bits_per_token, output.nll / math.log(2) / 3)
    torch.testing.assert_close(output.bits_per_character([6, 12]), output.nll / math.log(2) / torch.tensor([6, 12]))
    for wrong in ([1, 2, 3], [1, 0]):
        with pytest.raises(ValueError, match="num_characters"):
            output.bits_per_character(wrong)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"estimator": "elbo"}, "estimator must be one of .* 'elbo'"),
        ({"num_steps": 0}, "num_steps must be an integer of at least 1, got 0"),
        ({"num_candidates": 0}, "num_candidates"),
        ({"energy_window": (0.2, 0.8)}, "energy_window"),
        ({"energy_temperature": 0.0}, "energy_temperature"),
        ({"num_samples": 0}, "num_samples must be an integer of at least 1, got 0"),
        ({"estimator": "paper", "num_samples": 1}, "num_samples must be an integer of at least 2, got 1"),
        ({"num_times": 0}, "num_times"),
        ({"denoiser_batch_size": 0}, "denoiser_batch_size"),
        ({"input_ids": torch.tensor([[0, MASK, 1]])}, "without the mask token 3"),
        ({"input_ids": torch.tensor([[0, 9, 1]])}, "got 9"),
        ({"input_ids": torch.zeros(1, 4, dtype=torch.int64)}, "max_position_embeddings=3"),
        ({"prompt_mask": torch.ones(1, 3, dtype=torch.bool)}, "nothing to score in row 0"),
        ({"prompt_mask": torch.ones(1, 2, dtype=torch.bool)}, "prompt_mask has shape"),
        ({"attention_mask": torch.tensor([[1, 0, 1]])}, "attention_mask .*row 0"),
    ],
)
def test_bad_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        make_toy("nce").likelihood(**{"input_ids": torch.tensor([[0, 1, 2]])} | change)


def test_the_published_form_needs_a_full_candidate():
    with pytest.raises(ValueError, match="energy_target"):
        make_toy("nce", "xs").likelihood(TEXTS, estimator="paper", num_samples=2)


def test_nan_is_named():
    model = make_toy("nce")
    model.energy_model.network.fc2.weight.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="row 0"):
        model.likelihood(TEXTS[:2], energy_window=(1, 0))


def test_the_draws_are_not_those_of_generate(monkeypatch):
    """A text sampled with a seed may be scored with the same seed: the uniforms have nothing in common."""
    seen, model = {}, make_toy("nce")

    def noted(name):
        seen[name] = []
        monkeypatch.setattr(proposal, "draw", lambda p, u: seen[name].append(u.flatten()) or draw(p, u))

    noted("generate")
    x = model.generate(batch_size=8, seed=3, num_steps=4, num_candidates=4, energy_window=(1, 0))
    noted("likelihood")
    model.likelihood(x, seed=3, num_steps=4, num_candidates=4, energy_window=(1, 0))
    sampled, scored = (set(torch.cat(u).tolist()) for u in seen.values())
    assert sampled and scored and not sampled & scored
