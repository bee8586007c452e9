"""Draws, choices and schedule as pure functions. Error rates are 1 in 10,000 with fixed seeds."""

import math

import pytest
import torch
from scipy.stats import chi2, kstest

from modeling_edlm.backbone import linear, suppress
from modeling_edlm.draws import choose, draw, uniforms
from modeling_edlm.schedule import alpha, antithetic_times, conditioning, q_sample, reveal_steps, times
from modeling_edlm.vocabulary import BLOCK, GATHERED, draw_projected, log_prob_projected

ALPHA = 1e-4


def chi_square(counts: torch.Tensor, p: torch.Tensor) -> float:
    """p-value, cells that expect fewer than 5 pooled."""
    expected = p.double() * counts.sum()
    rare = expected < 5
    cells = torch.cat((counts[~rare].double(), counts[rare].sum()[None].double()))
    expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
    keep = expected > 0
    return float(chi2.sf(float(((cells - expected)[keep] ** 2 / expected[keep]).sum()), int(keep.sum()) - 1))


@pytest.mark.parametrize("axis", range(4))
def test_uniforms_are_uniform_along_every_counter(axis):
    counters = [torch.tensor(3), torch.tensor(17), torch.tensor(5), torch.tensor(2)]
    counters[axis] = torch.arange(100_000)
    u = uniforms(1, *counters)
    assert u.dtype == torch.float64 and u.min() >= 0 and u.max() < 1
    assert kstest(u.numpy(), "uniform").pvalue > ALPHA
    lagged = torch.corrcoef(torch.stack((u[:-1], u[1:])))[0, 1]
    assert abs(lagged) < 4 / math.sqrt(len(u))


def test_uniforms_differ_by_seed_and_by_the_place_of_a_counter():
    grid = [uniforms(seed, a, b) for seed in (0, 1, -1, 2**63, 2**64 - 2) for a in range(-2, 3) for b in range(-2, 3)]
    assert len({float(u) for u in grid}) == len(grid)
    assert float(uniforms(3, 4, 5)) == float(uniforms(3, torch.arange(9), 5)[4])
    assert float(uniforms(-1, 4)) == float(uniforms(2**64 - 1, 4))  # 64 bits, signed or not


def test_the_largest_uniform_stays_below_every_total():
    u = torch.tensor(1 - 2.0**-52, dtype=torch.float64)
    totals = torch.cat((torch.rand(10_000, dtype=torch.float64) * 10, 2.0 ** torch.arange(-5.0, 20)))
    assert (u * totals < totals).all()


def test_draw_follows_a_row_of_50k_tokens():
    torch.manual_seed(0)
    p = 1 / torch.arange(1, 50_001, dtype=torch.float64) ** 1.1
    p = (p / p.sum())[torch.randperm(50_000)]
    log_p_1V = p.log().float()[None]
    parts = [draw(log_p_1V, u_K[None]) for u_K in uniforms(0, 0, torch.arange(2_000_000)).split(100_000)]
    x_K, log_p_K = (torch.cat([part[0] for part in results]) for results in zip(*parts, strict=True))
    assert chi_square(torch.bincount(x_K, minlength=50_000), log_p_1V[0].softmax(0)) > ALPHA
    torch.testing.assert_close(log_p_K, log_p_1V[0, x_K], rtol=0, atol=2e-6)


def test_candidates_of_a_row_are_independent():
    p = torch.tensor([0.5, 0.3, 0.2])
    x_MK, _ = draw(p.log().expand(100_000, 3), uniforms(0, torch.arange(100_000)[:, None], torch.arange(2)))
    pairs = x_MK[:, 0] * 3 + x_MK[:, 1]
    assert chi_square(torch.bincount(pairs, minlength=9), (p[:, None] * p).flatten()) > ALPHA


def test_tokens_without_mass_are_never_drawn():
    log_p = torch.tensor([[-torch.inf, 0.3, -torch.inf, -torch.inf, -2.0, -torch.inf]])
    edges = torch.tensor([0.0, 1 - 2.0**-52], dtype=torch.float64)
    u = torch.cat((edges, uniforms(0, torch.arange(10_000))))[None]
    assert set(draw(log_p, u)[0].unique().tolist()) == {1, 4}
    assert draw(torch.tensor([[0.0, torch.nan]]), u)[1].isnan().any()


def test_choose_weighs_by_exp_of_minus_energy():
    energy = torch.tensor([1.0, -0.5, 3.0, 0.2])
    choice, ess = choose(energy.expand(100_000, 4), 0.7, uniforms(0, torch.arange(100_000)))
    w = torch.exp(-energy / 0.7)
    assert chi_square(torch.bincount(choice, minlength=4), w / w.sum()) > ALPHA
    torch.testing.assert_close(ess[0], w.sum() ** 2 / w.square().sum())
    huge = torch.tensor([[1e4, -1e4, 0.0], [torch.inf, 5.0, torch.inf]])
    choice, ess = choose(huge, 1.0, uniforms(0, torch.arange(2)))
    assert choice.tolist() == [1, 1] and ess.tolist() == [1, 1]
    assert choose(torch.full((1, 2), torch.inf), 1.0, uniforms(0, torch.arange(1)))[1].isnan()


def test_reveal_steps_have_the_posterior_of_the_schedule():
    u = uniforms(0, torch.arange(200_000))
    steps = reveal_steps(u, 5)
    assert chi_square(torch.bincount(steps, minlength=5), torch.full((5,), 0.2)) > ALPHA
    assert reveal_steps(torch.tensor([0.0, 1 - 2.0**-52], dtype=torch.float64), 5).tolist() == [0, 4]
    # still masked at step i: revealed there with probability (alpha(s) - alpha(t)) / (1 - alpha(t))
    grid = times(5)
    for i in range(5):
        t, s = grid[i], grid[i + 1]
        rate = float((steps == i).sum() / (steps >= i).sum())
        assert rate == pytest.approx(float((alpha(s) - alpha(t)) / (1 - alpha(t))), abs=0.01)
    assert torch.equal(reveal_steps(u[:9], 1), torch.zeros(9, dtype=torch.int64))


def test_q_sample_keeps_with_probability_alpha():
    x0 = torch.zeros(3, 100_000, dtype=torch.int64)
    t = torch.tensor([0.0, 0.3, 1.0])
    xt = q_sample(x0, t, uniforms(0, torch.arange(3)[:, None], torch.arange(100_000)), mask_token_id=9)
    assert (xt[0] == 0).all() and (xt[2] == 9).all()
    assert (xt[1] == 9).float().mean() == pytest.approx(0.3, abs=0.006)


def test_schedule_derivative_and_conditioning():
    t = torch.linspace(0, 1, 11, requires_grad=True)
    (gradient,) = torch.autograd.grad(alpha(t).sum(), t)
    assert (gradient == -1).all()
    assert conditioning(torch.ones(1)).isfinite() and conditioning(torch.zeros(1)) == 0


def test_antithetic_times_put_one_in_every_stratum():
    t = antithetic_times(torch.tensor(0.37), 8)
    assert ((t > 0) & (t <= 1)).all()
    assert sorted((t * 8).ceil().int().tolist()) == list(range(1, 9))


def test_draws_of_a_projection_have_the_law_of_its_softmax(monkeypatch):
    """Without the table of logits: the same law, and for the same uniforms nearly always the same token."""
    monkeypatch.setitem(BLOCK, "cpu", 1)  # the least: 1,024 tokens, so there are five blocks
    torch.manual_seed(0)
    V, D, banned = 5003, 16, 5002  # the last block and the last piece are not full
    hidden_MD, weight_VD, bias_V = torch.randn(3, D), torch.randn(V, D), torch.randn(V)
    hidden_MD[2] *= 40  # nearly all mass on few tokens
    logits_MV = suppress(linear(hidden_MD, weight_VD, bias_V), banned)  # by the same library, with the same rounding
    counts, equal = torch.zeros(3, V), 0
    for part in range(20):
        u_MK = uniforms(part, torch.arange(3)[:, None], torch.arange(20_000))
        x_MK, log_p_MK = draw_projected(hidden_MD, weight_VD, bias_V, banned, u_MK)
        torch.testing.assert_close(log_p_MK, logits_MV.log_softmax(-1).gather(-1, x_MK), atol=1e-4, rtol=1e-5)
        counts += torch.stack([torch.bincount(x_K, minlength=V) for x_K in x_MK])
        equal += int((x_MK == draw(logits_MV, u_MK)[0]).sum())
    for row in range(3):
        assert chi_square(counts[row], logits_MV[row].softmax(-1)) > ALPHA
        assert chi_square(counts[row], logits_MV[row - 1].softmax(-1)) < ALPHA
    assert equal > 0.9999 * counts.sum() and counts[:, banned].sum() == 0


@pytest.mark.parametrize("V", [1025, 4096, 5003])
def test_edges_of_a_projection(V, monkeypatch):
    """First and last uniform, a banned token alone in its block, pieces without mass, rows in several parts, NaN."""
    monkeypatch.setitem(BLOCK, "cpu", 1)
    torch.manual_seed(1)
    hidden_MD, weight_VD, bias_V = torch.randn(9, 4), torch.randn(V, 4), torch.randn(V)
    bias_V[torch.rand(V) < 0.5] = -torch.inf
    bias_V[64:2048] = -torch.inf
    edges_M2 = torch.tensor([0.0, 1 - 2.0**-52], dtype=torch.float64).expand(9, 2)
    u_MK = torch.cat((edges_M2, torch.rand(9, 50, dtype=torch.float64)), dim=1)
    for banned in (0, 1024, V - 1):
        logits_MV = suppress(torch.nn.functional.linear(hidden_MD, weight_VD, bias_V), banned)
        x_MK, log_p_MK = draw_projected(hidden_MD, weight_VD, bias_V, banned, u_MK)
        assert logits_MV.gather(-1, x_MK).isfinite().all() and log_p_MK.isfinite().all()
        with monkeypatch.context() as few_rows:
            few_rows.setattr("modeling_edlm.vocabulary.ROWS", 2)
            few_rows.setitem(GATHERED, "cpu", 1)
            parts = draw_projected(hidden_MD, weight_VD, bias_V, banned, u_MK)
        assert torch.equal(parts[0], x_MK)
        log_p_MV = logits_MV.log_softmax(-1)
        for x_M in (x_MK[:, 5], torch.full((9,), banned)):
            got_M = log_prob_projected(hidden_MD, weight_VD, bias_V, banned, x_M)
            torch.testing.assert_close(got_M, log_p_MV.gather(-1, x_M[:, None])[:, 0], atol=1e-5, rtol=1e-5)
    hidden_MD[3, 0] = torch.nan
    is_nan_M = draw_projected(hidden_MD, weight_VD, bias_V, 0, u_MK)[1].isnan()
    assert is_nan_M[3].all() and not is_nan_M[[0, 1, 2, 4, 5, 6, 7, 8]].any()
    assert log_prob_projected(hidden_MD, weight_VD, bias_V, 0, x_MK[:, 5])[3].isnan()
