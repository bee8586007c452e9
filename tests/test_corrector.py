"""The corrector against its enumerated kernel. Each chi-square test rejects a right one once in 10,000 seeds."""

import pytest
import torch

from modeling_edlm import EDLMForMaskedLM
from modeling_edlm.energies import causal_log_prob
from support.toy import MASK, chain_law, completions, make_toy, p_value, revision_kernel

ALPHA = 1e-4
TEXTS = completions((MASK,) * 3, (0, 1, 2))


@torch.no_grad()
def law_of_ar(model, texts=TEXTS) -> torch.Tensor:
    """p_AR of every text, float64."""
    config = model.energy_model.config
    log_p = causal_log_prob(model.energy_model, torch.tensor(texts), None, config.bos_token_id, MASK)
    return log_p.double().softmax(0)


def moves(model, texts=TEXTS, rows=1500, **kwargs) -> torch.Tensor:
    """(rows * len(texts), 2 L): texts, each beside what became of it."""
    before = torch.tensor(texts).repeat(rows, 1)
    return torch.cat((before, model.revise(before, **{"seed": 0, "corrector_steps": 1} | kwargs)), dim=1)


def law_of_moves(kernel: torch.Tensor, texts=TEXTS) -> dict:
    return {x + y: float(kernel[i, j]) / len(texts) for i, x in enumerate(texts) for j, y in enumerate(texts)}


@pytest.mark.parametrize(("k", "size"), [(2, 1), (2, 2), (3, 2), (8, 1), (8, 3)])
@pytest.mark.parametrize("energy", ["ar", "nce", "step"])
def test_law_of_a_round(energy, k, size):
    model = make_toy("nce" if energy == "step" else energy, "xs" if energy == "step" else "x0")
    kernel = revision_kernel(model, size, k, (0, 1, 2), TEXTS)
    if energy == "ar":  # whatever the proposal, the law of the AR model stays as it is
        law = law_of_ar(model)
        assert float((law @ kernel - law).abs().max()) < 1e-6
    settings = {"corrector_size": size, "corrector_candidates": k}
    assert p_value(moves(model, **settings), law_of_moves(kernel)) > ALPHA
    assert p_value(moves(model, **settings), law_of_moves(torch.eye(27))) < 1e-12  # the test can tell


class Tempered:
    """A toy under which mu exp(-E) has the temperature of the corrector."""

    def __init__(self, model, temperature: float):
        self.model, self.config, self.log_p_x0, self.temperature = model, model.config, model.log_p_x0, temperature

    def energy(self, x, xt, t):
        log_p_NL = self.log_p_x0(xt, t).gather(-1, x[..., None])[..., 0]
        log_mu_N = torch.where(xt == MASK, log_p_NL, 0.0).sum(-1)
        return log_mu_N + (self.model.energy(x, xt, t, None, log_mu_N) - log_mu_N) / self.temperature


@pytest.mark.parametrize("temperature", [0.5, 2.0])
@pytest.mark.parametrize("energy", ["ar", "coar", "nce", "none"])
def test_law_of_a_round_at_a_temperature(energy, temperature):
    """p_AR to the power of 1 / temperature stays as it is; and so it does over rounds, with the part carried over."""
    model = make_toy(energy)
    kernel = revision_kernel(Tempered(model, temperature), 2, 3, (0, 1, 2), TEXTS)
    if energy == "ar":
        law = law_of_ar(model) ** (1 / temperature)
        law /= law.sum()
        assert float((law @ kernel - law).abs().max()) < 1e-6
    settings = {"corrector_size": 2, "corrector_candidates": 3}
    moved = moves(model, corrector_temperature=temperature, **settings)
    assert p_value(moved, law_of_moves(kernel)) > ALPHA
    assert p_value(moves(model, **settings), law_of_moves(kernel)) < ALPHA  # the test can tell
    moved = moves(model, corrector_temperature=temperature, corrector_steps=2, **settings)
    assert p_value(moved, law_of_moves(kernel @ kernel)) > ALPHA
    with pytest.raises(ValueError, match="corrector_temperature must be positive, got 0"):
        model.generate(corrector_temperature=0)


def test_law_of_many_rounds():
    """The present text's energy is taken over from round to round; the text comes nearer to the AR model's law."""
    model = make_toy("ar")
    for head in (model.denoiser.head, model.energy_model.head):  # less sharp: it gets there in a hundred rounds
        head.linear.weight.data *= 0.3
        head.linear.bias.data *= 0.3
    kernel, settings = revision_kernel(model, 2, 3, (0, 1, 2), TEXTS), {"corrector_size": 2, "corrector_candidates": 3}
    assert p_value(moves(model, corrector_steps=3, **settings), law_of_moves(kernel @ kernel @ kernel)) > ALPHA
    law, uniform = law_of_ar(model), torch.full((27,), 1 / 27, dtype=torch.float64)
    far = [float((uniform @ kernel.matrix_power(n) - law).abs().sum()) / 2 for n in (0, 1, 10, 100)]
    assert far == sorted(far, reverse=True)
    assert far[-1] < 1e-3


def test_given_positions_and_padding_stay():
    """Each row has two free positions of its own text; padding on the left or the right is as if it were not there."""
    model = make_toy("ar", length=5)
    texts = completions((2, MASK, MASK), (1, 2))
    kernel = revision_kernel(model, 1, 2, (1, 2), texts)
    law = law_of_moves(kernel, texts)
    settings = {"corrector_size": 1, "corrector_candidates": 2}
    may_change = torch.tensor([False, True, True])
    rows = torch.tensor(texts).repeat(4000, 1)
    for left, right in ((0, 0), (2, 0), (0, 2), (1, 1)):
        padded, text = (torch.nn.functional.pad(x, (left, right)) for x in (rows, torch.ones_like(rows)))
        free = torch.nn.functional.pad(may_change, (left, right)).expand_as(padded)
        out = model.revise(padded, free, text, corrector_steps=1, seed=left, **settings)
        assert torch.equal(out[~free], padded[~free])
        now = out[:, left : left + 3]
        # times are shares of the text, positions count from its start: the law of the unpadded text
        assert p_value(torch.cat((rows, now), dim=1), law) > ALPHA


def test_generate_goes_on_with_rounds():
    """The law of both together, for prompts too; every round is seen, counted and reported."""
    model, seen = make_toy("ar"), []
    kernel = revision_kernel(model, 2, 2, (0, 1, 2), TEXTS)
    start = chain_law(model, (MASK,) * 3, num_steps=2, k=2, window=(0.5, 0.0))
    after = torch.tensor([start[x] for x in TEXTS], dtype=torch.float64) @ kernel @ kernel
    output = model.generate(
        torch.full((40_000, 3), MASK),
        num_steps=2,
        num_candidates=2,
        energy_window=(0.5, 0.0),
        corrector_steps=2,
        corrector_size=2,
        seed=0,
        return_dict_in_generate=True,
        output_history=True,
        callback_on_step_end=lambda model, step, t, state: seen.append((step, t, "kept" in state)),
    )
    assert p_value(output.sequences, dict(zip(TEXTS, after.tolist(), strict=True))) > ALPHA
    assert p_value(output.sequences, start) < 1e-12
    assert seen == [(0, 1.0, False), (1, 0.5, True), (2, 0.0, True), (3, 0.0, True)]
    assert len(output.history) == 5
    changed = sum((a != b).any(-1) for a, b in zip(output.history[2:], output.history[3:], strict=False))
    torch.testing.assert_close(output.acceptance, changed / 2)
    # the two positions take one step or two, and each round one pass; in the loop the energy has the step of t = 0.5
    assert set((output.nfe - 2).tolist()) == {1, 2}
    # of the first round at most two passes of the energy, of the second one: the present text's is known
    in_rounds = output.energy_nfe - torch.where(output.ess[:, 1].isnan(), 0, 2)
    assert int(in_rounds.max()) == 3


def test_nothing_changes_without_candidates():
    model = make_toy("ar")
    texts = torch.tensor(TEXTS)
    assert torch.equal(model.revise(texts, corrector_steps=5, corrector_candidates=1, seed=0), texts)
    nothing = torch.zeros_like(texts, dtype=torch.bool)
    output = model.revise(texts, nothing, corrector_steps=5, seed=0, return_dict_in_generate=True)
    assert torch.equal(output.sequences, texts)
    assert int(output.nfe.sum() + output.energy_nfe.sum()) == 0
    assert output.acceptance.isnan().all()
    plain = {"batch_size": 50, "num_steps": 3, "seed": 1}
    mdlm = model.generate(**plain, num_candidates=1, corrector_steps=7)
    assert torch.equal(mdlm, EDLMForMaskedLM.generate(model.denoiser, **plain))
    alone = model.denoiser.generate(**plain, num_candidates=2, corrector_steps=7, return_dict_in_generate=True)
    assert not torch.equal(mdlm, alone.sequences) and not alone.energy_nfe.any()  # by the denoiser alone


def test_the_same_rows_in_any_batch():
    model = make_toy("ar", length=6)
    settings = {"num_steps": 3, "corrector_steps": 4, "corrector_size": 2, "num_candidates": 3, "seed": 5}
    whole = model.generate(batch_size=30, **settings)
    parts = [model.generate(batch_size=10, first_row=i, energy_batch_size=7, **settings) for i in (0, 10, 20)]
    assert torch.equal(whole, torch.cat(parts))
    assert torch.equal(whole, model.generate(batch_size=30, denoiser_batch_size=4, **settings))
    revise = {"corrector_steps": 6, "corrector_candidates": 4, "seed": 5}
    whole_again = model.revise(whole, **revise)
    assert torch.equal(whole_again[12:], model.revise(whole[12:], first_row=12, denoiser_batch_size=5, **revise))
    assert not torch.equal(whole_again, model.revise(whole, **revise | {"seed": 6}))


def test_a_text_without_choice_stays():
    """What the proposal cannot give back, or the energy forbids altogether, is kept; NaN is an error."""
    model, texts = make_toy("ar"), torch.tensor(TEXTS)
    once = {"corrector_steps": 1, "corrector_size": 3, "corrector_candidates": 4, "return_dict_in_generate": True}
    cut = model.revise(texts, top_k=1, seed=0, **once)
    greedy = model.log_p_x0(torch.full((1, 3), MASK), 1.0)[0].argmax(-1)
    assert torch.equal(cut.sequences[(texts != greedy).any(-1)], texts[(texts != greedy).any(-1)])
    right = model.energy
    model.energy = lambda x, *args, **kwargs: torch.full((len(x),), torch.inf)
    assert torch.equal(model.revise(texts, seed=0, **once).sequences, texts)
    model.energy = lambda x, *args, **kwargs: right(x, *args, **kwargs) * torch.nan
    with pytest.raises(FloatingPointError, match="energies hold NaN"):
        model.revise(texts, seed=0, **once)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_ids": torch.tensor([[0, MASK, 1]])}, "input_ids hold mask tokens"),
        ({"mask": torch.ones(1, 3)}, "mask must be bool"),
        ({"mask": torch.ones(1, 2, dtype=torch.bool)}, "mask must be bool"),
        ({"corrector_steps": 0}, "corrector_steps must be an integer of at least 1, got 0"),
        ({"corrector_size": 0}, "corrector_size must be an integer of at least 1, got 0"),
        ({"corrector_candidates": 1.5}, "corrector_candidates must be an integer of at least 1, got 1.5"),
        ({"corrector_rounds": 3}, "no argument"),
    ],
)
def test_bad_input(changes, message):
    model = make_toy("ar")
    with pytest.raises(ValueError, match=message):
        model.revise(**{"input_ids": torch.tensor([[0, 2, 1]]), "corrector_steps": 2} | changes)
