"""ForeignModel: bounds and revision of other people's masked models, shifted logits, padded vocabularies."""

import math
from types import SimpleNamespace

import pytest
import torch
from test_custom_generate import Exact, make_bert, make_gpt2, table_energy
from transformers import BertForMaskedLM

from modeling_edlm import ForeignModel
from support.toy import MASK, chain_law, completions, make_toy, p_value, path_bounds, revision_kernel

FREE = (MASK,) * 3
TEXTS = torch.tensor(completions(FREE, (0, 1, 2)))
FAST = {"denoiser_batch_size": 512, "energy_batch_size": 8192, "energy_window": (1.0, 0.0), "seed": 1}


class Shifted(BertForMaskedLM):
    """Its logits at a position are those of the next token, as in a model that was autoregressive once."""

    def forward(self, *args, **kwargs):
        return SimpleNamespace(logits=super().forward(*args, **kwargs).logits.roll(-1, dims=1))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["none", "ar", "coar", "step function"])
def test_the_bound_of_a_bert(kind):
    """Above the exact NLL of the sampler for every text; with many inner samples, its path bound."""
    bert, gpt2 = make_bert(std=0.4), make_gpt2()
    arguments = {"none": {}, "step function": {"energy": table_energy, "energy_target": "xs"}}
    arguments = arguments.get(kind, {"energy": gpt2, "energy_type": kind})
    exact = Exact(bert, gpt2, kind)
    if kind == "step function":
        exact = Exact(bert, function=table_energy, energy_target="xs")
    texts, k = [tuple(x) for x in TEXTS.tolist()], 1 if kind == "none" else 3
    law, path = chain_law(exact, FREE, 2, k), path_bounds(exact, texts, 2, k)
    assert (path >= torch.tensor([-math.log(law[x]) for x in texts]) - 1e-6).all()
    model = ForeignModel(bert, **arguments)
    output = model.likelihood(TEXTS, num_steps=2, num_candidates=k, num_times=256, num_samples=32, **FAST)
    difference = output.nll - path
    assert (difference / (output.stderr + 1e-5) > -4.5).all()
    assert abs(float(difference.mean())) < 4 * float(output.stderr.square().sum().sqrt()) / len(TEXTS) + 0.05
    assert (
        p_value(model.generate(batch_size=20_000, num_steps=2, num_candidates=k, energy_window=(1, 0), seed=0), law)
        > 1e-4
    )


@torch.no_grad()
@pytest.mark.parametrize("target", ["x0", "xs"])
def test_a_function_is_given_what_the_denoiser_says(target):
    """`energy()` itself finds log mu of the tokens that a candidate adds to its state."""
    seen = []

    def function(x, xt, t, attention_mask, log_mu):
        seen.append(log_mu)
        return table_energy(x, xt, t, attention_mask, log_mu)

    model = ForeignModel(make_bert(std=0.4), energy=function, energy_target=target)
    xt = torch.tensor([[MASK, 1, MASK]]).expand(2, -1)
    x = torch.tensor([[0, 1, 2], [2, 1, 0]] if target == "x0" else [[0, 1, MASK], [MASK, 1, 0]])
    t = torch.tensor(0.5)
    energy = model.energy(x, xt, t)
    log_p_NLV = model.log_p_x0(xt)
    added = [[(n, i, int(x[n, i])) for i in (0, 2) if x[n, i] != MASK] for n in range(2)]
    expected = torch.stack([sum(log_p_NLV[place] for place in places) for places in added])
    torch.testing.assert_close(seen[0], expected)
    torch.testing.assert_close(energy, table_energy(x, xt, t, None, expected))


@torch.no_grad()
@pytest.mark.parametrize(("energy_type", "target"), [("ar", "x0"), ("nce", "xs")])
def test_parts_of_an_edlm_have_its_bound(energy_type, target):
    toy = make_toy(energy_type, target)
    settings = {"num_steps": 3, "num_candidates": 4, "num_times": 16, "num_samples": 4, **FAST}
    expected = toy.likelihood(TEXTS, **settings)
    output = ForeignModel(toy.denoiser, toy.energy_model).likelihood(TEXTS, **settings)
    torch.testing.assert_close(output.nll, expected.nll)
    torch.testing.assert_close(output.gain, expected.gain)


def test_revision_leaves_the_law_of_the_causal_model():
    bert, gpt2 = make_bert(std=0.4), make_gpt2()
    exact, texts = Exact(bert, gpt2), [tuple(x) for x in TEXTS.tolist()]
    kernel = revision_kernel(exact, 2, 3, (0, 1, 2), texts)
    log_p = -exact.energy(TEXTS, TEXTS, None).double()  # nothing is masked: log p_AR alone
    torch.testing.assert_close(log_p.softmax(0) @ kernel, log_p.softmax(0), atol=1e-6, rtol=0)
    start = torch.tensor([[2, 0, 1]]).repeat(20_000, 1)
    revised = ForeignModel(bert, gpt2).revise(start, num_candidates=3, corrector_steps=1, corrector_size=2, seed=0)
    assert p_value(revised, dict(zip(texts, kernel[texts.index((2, 0, 1))].tolist(), strict=True))) > 1e-4


def test_shifted_logits_and_padded_vocabularies():
    """A model whose logits stand one place to the left gives, with logits_shift=1, what the straight one gives."""
    bert, shifted = make_bert(12, 10), make_bert(12, 10, cls=Shifted)
    prompt = torch.tensor([[3] + [11] * 9])
    mask = torch.tensor([[0] * 3 + [1] * 7, [1] * 7 + [0] * 3])
    padded = torch.tensor([[0, 0, 0, 3] + [11] * 6, [3] + [11] * 6 + [0] * 3])
    for ids, attention_mask in ((prompt, None), (padded, mask)):
        arguments = {"attention_mask": attention_mask, "num_steps": 4, "num_return_sequences": 50, "seed": 0}
        expected = ForeignModel(bert).generate(ids, **arguments)
        assert torch.equal(ForeignModel(shifted, logits_shift=1).generate(ids, **arguments), expected)
        assert not torch.equal(ForeignModel(shifted).generate(ids, **arguments), expected)
    assert (expected >= 7).any()
    few = ForeignModel(bert, num_tokens=7)
    assert (few.generate(prompt, num_return_sequences=50, num_steps=4, seed=0) < 7).all()
    assert (few.log_p_x0(prompt).exp().sum(-1) - 1).abs().max() < 1e-5
    assert torch.equal(
        few.likelihood(torch.tensor([[3, 8], [3, 4]]), num_times=8, num_steps=4).nll.isinf(),
        torch.tensor([True, False]),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits_shift": 2}, "logits_shift must be 0 or 1, got 2"),
        ({"num_tokens": 0}, "num_tokens must lie in .1, 12., got 0"),
        ({"num_tokens": 13}, "num_tokens .* 13"),
        ({"mask_token_id": 12}, "mask_token_id must lie in .0, 12., got 12"),
        ({"energy_type": "coar"}, "energy_type is ar or coar and for a causal"),
    ],
)
def test_bad_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        ForeignModel(make_bert(12, 8), **change)
