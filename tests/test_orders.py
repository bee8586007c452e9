"""Orders by value, candidates by time, and the names that other samplers have, against enumerated laws.

Each chi-square test rejects a right one once in 10,000 seeds.
"""

import pytest
import torch

from modeling_edlm import EDLMGenerationConfig, ForeignModel
from support.toy import MASK, chain_law, completions, make_broad_toy, make_toy, p_value, path_bounds, shown_by_value

ALPHA, ROWS = 1e-4, 20_000
FREE = (MASK,) * 3
THRESHOLDS = (1e-6, 0.6, 0.8, 0.9, 0.95, 0.97, 1.0)
WINDOW = {"energy_window": (1.0, 0.0)}


def make_soft_toy(*args, **changes):
    """A toy whose denoiser is not sure of everything."""
    model = make_toy(*args, **changes)
    for parameter in model.denoiser.head.linear.parameters():
        parameter.data *= 0.2
    return model


@torch.no_grad()
@pytest.mark.parametrize(
    ("order", "num_steps", "k", "energy", "settings"),
    [
        ("confidence", 3, 1, "none", {}),
        ("margin", 2, 1, "none", {}),
        ("entropy", 2, 3, "ar", {}),
        ("confidence", 2, 3, "step", {}),
        ("margin", 2, 3, "nce", {"shared_completion": True}),
        ("confidence", 3, 2, "coar", {"confidence_threshold": 0.5}),
        ("confidence", 4, 1, "none", {"block_length": 2, "confidence_threshold": 0.6}),
        ("entropy", 3, 2, "ar", {"block_length": 2}),
    ],
)
def test_law_of_an_order(order, num_steps, k, energy, settings):
    target, kind = ("xs", "nce") if energy == "step" else ("x0", energy)
    model, start = make_soft_toy(kind, target, length=4), (MASK, 1, MASK, MASK)  # a token given: else all are alike
    by_value = shown_by_value(
        model, start, num_steps, order, settings.get("confidence_threshold"), settings.get("block_length")
    )
    law = chain_law(model, start, num_steps, k, shared=settings.get("shared_completion", False), shown=by_value)
    rows = torch.tensor([start]).repeat(ROWS, 1)
    common = {"num_steps": num_steps, "num_candidates": k, "seed": 0, **WINDOW, **settings}
    assert p_value(model.generate(rows, order=order, **common), law) > ALPHA
    common.pop("confidence_threshold", None)
    assert p_value(model.generate(rows, **common), law) < ALPHA  # the test can tell


@torch.no_grad()
def test_a_threshold_saves_passes():
    """Everything in one step where all is certain enough; at 1 nothing is, and each step reveals one position."""
    model, start = make_soft_toy("none", length=9), torch.tensor([[MASK] * 4 + [1] + [MASK] * 4]).repeat(30, 1)
    common = {"num_steps": 8, "order": "confidence", "seed": 0, "return_dict_in_generate": True}
    passes = [float(model.generate(start, **common, confidence_threshold=x).nfe.float().mean()) for x in THRESHOLDS]
    assert passes[0] == 1 and passes == sorted(passes) and passes[-1] == 8
    assert any(1 < x < 8 for x in passes)


@torch.no_grad()
def test_greedy_decoding_by_confidence():
    """Without sampling it is LLaDA's low-confidence remasking: the likeliest tokens, the surest first."""
    model, state = make_soft_toy("none", length=6), torch.tensor([[MASK, MASK, 1, MASK, MASK, MASK]])
    out = model.generate(state, num_steps=5, order="confidence", do_sample=False)
    for i in range(5):
        p_LV = model.log_p_x0(state, 1 - i / 5)[0].exp()
        best = torch.where(state[0] == MASK, p_LV.amax(-1), -1.0).argmax()
        state[0, best] = p_LV[best].argmax()
    assert torch.equal(out, state)


@torch.no_grad()
def test_a_processor_counts_for_the_order():
    """What may not be drawn makes no position certain."""
    model, state = make_soft_toy("none", length=4), torch.tensor([[MASK, 1, MASK, MASK]])
    forbidden = lambda ids, scores: scores.index_fill(-1, torch.tensor([0]), -torch.inf)  # noqa: E731
    p_LV = model.log_p_x0(state, 1.0)[0].index_fill(-1, torch.tensor([0]), -torch.inf).softmax(-1)
    first = int(torch.where(state[0] == MASK, p_LV.amax(-1), -1.0).argmax())
    output = model.generate(
        state,
        num_steps=3,
        order="confidence",
        logits_processor=[forbidden],
        seed=0,
        return_dict_in_generate=True,
        output_history=True,
    )
    assert (output.history[1] != state).nonzero()[:, 1].tolist() == [first]


@torch.no_grad()
@pytest.mark.parametrize(
    ("energy", "target", "shared"), [("ar", "x0", True), ("ar", "x0", False), ("nce", "xs", False)]
)
def test_candidates_by_time(energy, target, shared):
    """The law of the sampler, and the bound: above its exact NLL, and with many inner samples the path bound."""
    model = make_broad_toy(energy) if target == "x0" else make_toy(energy, target)
    schedule = [(0.7, 2), (0.4, 4)]
    candidates = {1.0: 1, 2 / 3: 2, 1 / 3: 4}

    def candidates_at(t):
        return next(k for time, k in candidates.items() if abs(time - t) < 1e-9)

    law = chain_law(model, FREE, 3, 1, shared=shared, candidates_at=candidates_at)
    settings = {"num_steps": 3, "num_candidates": schedule, "shared_completion": shared, "seed": 0}
    output = model.generate(batch_size=ROWS, **settings, return_dict_in_generate=True)
    assert p_value(output.sequences, law) > ALPHA
    assert output.ess[:, 0].isnan().all() and float(output.ess[:, 2].nan_to_num(1).max()) > 2.01
    texts = completions(FREE, (0, 1, 2))
    path = path_bounds(model, texts, 3, 1, shared=shared, candidates_at=candidates_at)
    assert (path >= torch.tensor([law[x] for x in texts]).log().neg() - 1e-6).all()
    found = model.likelihood(torch.tensor(texts), num_times=96, num_samples=16, **settings)
    assert abs(float((found.nll - path).mean())) < 4 * float(found.stderr.square().sum().sqrt()) / len(texts) + 0.02
    plain = model.likelihood(torch.tensor(texts), num_times=96, **settings | {"num_candidates": 1})
    assert float(plain.nll.mean()) > float(found.nll.mean())


def test_candidates_by_time_are_kept_in_files(tmp_path):
    config = EDLMGenerationConfig(num_candidates=[[0.4, 4], [0.15, 8]])
    config.save_pretrained(tmp_path)
    again = EDLMGenerationConfig.from_pretrained(tmp_path)
    assert again.num_candidates == ((0.4, 4), (0.15, 8)) and again.most_candidates == 8
    assert [again.candidates_at(t) for t in (1.0, 0.41, 0.4, 0.2, 0.15, 0.0)] == [1, 1, 4, 4, 8, 8]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_candidates": []}, "num_candidates must be an integer or pairs"),
        ({"num_candidates": [4, 8]}, "num_candidates must be an integer or pairs"),
        ({"num_candidates": [(0.4, 0)]}, "num_candidates at each time must be an integer of at least 1, got 0"),
        ({"num_candidates": [(0.1, 2), (0.4, 4)]}, r"must fall within \(0, 1\], got \[0.1, 0.4\]"),
        ({"num_candidates": [(1.5, 2)]}, "must fall within"),
        ({"order": "left"}, "order must be one of .* got 'left'"),
        ({"corrector_sets": "blocks"}, "corrector_sets must be one of .* got 'blocks'"),
        ({"confidence_threshold": 0.9}, "confidence_threshold=0.9 needs order='confidence'"),
        ({"order": "confidence", "confidence_threshold": 1.5}, r"confidence_threshold must lie in \(0, 1\], got 1.5"),
        ({"steps": 5}, "no argument .'steps'.; steps=5 is num_steps here"),
        ({"num_inference_steps": 5}, "is num_steps here"),
        ({"gen_length": 64}, "gen_length=64 is max_new_tokens here"),
        ({"remasking": "low_confidence"}, "is order, of random, confidence, margin, entropy here"),
        ({"alg": "maskgit_plus"}, "is order"),
        ({"threshold": 0.9}, "is confidence_threshold"),
        ({"cfg_scale": 2.0}, "cfg_scale=2.0 is not offered here"),
        ({"nonsense": 2.0}, r"generate\(\) has no argument .'nonsense'.$"),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    model = make_toy("ar")
    with pytest.raises(ValueError, match=message):
        model.generate(**changes)


def test_an_order_by_value_has_no_bound():
    model = make_toy("ar")
    with pytest.raises(ValueError, match="order='margin' looks at token values"):
        model.likelihood(torch.tensor([[0, 1, 2]]), order="margin")


@torch.no_grad()
@pytest.mark.parametrize("kind", ["shared", "step"])
def test_energies_of_an_order_are_those_of_its_candidates(kind):
    """log mu counts what a candidate adds to its state: a shared completion too, of a next state what is shown."""
    model, start = make_soft_toy("ar", length=4), torch.tensor([[MASK, 1, MASK, MASK]]).repeat(20, 1)
    if kind == "step":
        model = ForeignModel(model.denoiser, energy=lambda x, xt, t, mask, log_mu: log_mu, energy_target="xs")
    states, seen = [start.clone()], []

    def look(_, step, t, state):
        if "kept" in state:
            seen.append((t, states[-1][state["rows"]], state["candidates"], state["energies"]))
        states.append(state["sequences"].clone())

    settings = {"num_steps": 2, "num_candidates": 3, "shared_completion": kind == "shared", "seed": 0, **WINDOW}
    model.generate(start, order="margin", callback_on_step_end=look, **settings)
    assert len(seen) == 2
    for t, xt_NL, x_NKL, energy_NK in seen:
        expected = [model.energy(x_NL, xt_NL, t) for x_NL in x_NKL.unbind(1)]
        torch.testing.assert_close(energy_NK, torch.stack(expected, 1), atol=1e-4, rtol=1e-4)
