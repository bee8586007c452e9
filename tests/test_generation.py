"""The law of generate() against enumeration. Each chi-square test rejects a right sampler once in 10,000 seeds."""

import copy
import itertools

import pytest
import torch
from toy import (
    MASK,
    chain_law,
    completions,
    exact_energy,
    law_p_k,
    log_mu,
    make_broad_toy,
    make_toy,
    p_value,
    total_variation,
)

from modeling_edlm import EDLMForMaskedLM, EDLMGenerationConfig, EDLMModel

ALPHA = 1e-4
ROWS = 40_000
FREE = (MASK, MASK, MASK)


def sample(model, start=FREE, rows=ROWS, seed=0, **kwargs):
    prompt = torch.tensor([start]).expand(rows, -1)
    return model.generate(prompt, seed=seed, max_length=len(start), **kwargs)


@pytest.mark.parametrize("k", [2, 3])
def test_the_enumerated_law_is_right(k):
    """The quadrature of toy.law_p_k against the plain sum over all tuples of rivals."""
    torch.manual_seed(0)
    log_mu_C, energy_C = torch.randn(5, dtype=torch.float64).log_softmax(0), 2 * torch.randn(5, dtype=torch.float64)
    mu, w = log_mu_C.exp(), torch.exp(-energy_C)
    brute = torch.zeros(5, dtype=torch.float64)
    for rivals in itertools.product(range(5), repeat=k - 1):
        rivals = list(rivals)
        brute += k * mu * mu[rivals].prod() * w / (w + w[rivals].sum())
    torch.testing.assert_close(law_p_k(log_mu_C, energy_C, k), brute, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("energy", ["ar", "coar", "nce", "step"])
@pytest.mark.parametrize("k", [1, 2, 3, 8])
def test_law_for_every_energy_and_k(energy, k):
    model = make_toy("nce" if energy == "step" else energy, "xs" if energy == "step" else "x0")
    law = chain_law(model, FREE, num_steps=3, k=k)
    assert sum(law.values()) == pytest.approx(1, abs=1e-6)
    sequences = sample(model, num_steps=3, num_candidates=k, energy_window=(1.0, 0.0))
    assert p_value(sequences, law) > ALPHA
    if k == 8:  # the test can tell: plain masked diffusion is something else
        assert p_value(sequences, chain_law(model, FREE, num_steps=3, k=1)) < 1e-12


@pytest.mark.parametrize("energy", ["coar", "nce", "step"])
@pytest.mark.parametrize("window", [(1.0, 0.0), (1.0, 0.6), (0.7, 0.3), (0.45, 0.4)], ids=str)
def test_law_for_every_window(window, energy):
    """Full, early, middle and empty: with T=4 the last one holds no step."""
    model = make_toy("nce" if energy == "step" else energy, "xs" if energy == "step" else "x0")
    law = chain_law(model, FREE, num_steps=4, k=3, window=window)
    assert p_value(sample(model, num_steps=4, num_candidates=3, energy_window=window), law) > ALPHA
    others = {(1.0, 0.0), (1.0, 0.6), (0.7, 0.3), (0.45, 0.4)} - {window}
    assert all(total_variation(law, chain_law(model, FREE, 4, 3, other)) > 0.01 for other in others)


@pytest.mark.parametrize("energy_type", ["coar", "nce"])
def test_law_in_a_batch_of_mixed_prompts(energy_type):
    """Prompts, infilling and free rows side by side: each kind follows the law of its own start."""
    model = make_toy(energy_type, length=4)
    starts = [(1, MASK, MASK, MASK), (MASK, 2, MASK, 0), (MASK, MASK, MASK, MASK), (2, 0, 1, MASK), (0, 1, 2, 2)]
    prompts = torch.tensor(starts).repeat(20_000, 1)
    output = model.generate(
        prompts, num_steps=2, num_candidates=3, energy_window=(1.0, 0.0), seed=1, return_dict_in_generate=True
    )
    given = prompts != MASK
    assert torch.equal(output.sequences[given], prompts[given])
    for i, start in enumerate(starts):
        law = chain_law(model, start, num_steps=2, k=3)
        assert p_value(output.sequences[i :: len(starts)], law) > ALPHA, start
    assert output.nfe[4::5].max() == 0  # nothing to fill, nothing spent


def test_more_candidates_approach_the_edlm_posterior():
    """One step from all mask: p_k goes to mu exp(-E) / Z, in the enumerated law and in the samples."""
    model = make_toy("nce")
    log_mu_C = log_mu(model, FREE, 1.0, (0, 1, 2))
    energy_C = exact_energy(model, completions(FREE, (0, 1, 2)), FREE, 1.0, 0.0)
    posterior = (log_mu_C - energy_C.double()).softmax(0)
    distance = [float((law_p_k(log_mu_C, energy_C, k) - posterior).abs().sum() / 2) for k in (1, 2, 8, 64, 512)]
    assert distance == sorted(distance, reverse=True) and distance[-1] < 0.01 < 0.1 < distance[0]
    sequences = sample(model, num_steps=1, num_candidates=512, rows=4000)
    law = dict(zip(completions(FREE, (0, 1, 2)), law_p_k(log_mu_C, energy_C, 512).tolist(), strict=True))
    assert p_value(sequences, law) > ALPHA


@pytest.mark.parametrize("energy_type", ["nce", "ar", "coar"])
def test_shared_completions(energy_type):
    """The candidates differ only in what is revealed: the law is the mean over completions of the law given one."""
    model = make_broad_toy(energy_type)
    options = {"num_steps": 2, "num_candidates": 3, "energy_window": (1, 0)}
    sequences = sample(model, shared_completion=True, **options)
    assert p_value(sequences, chain_law(model, FREE, 2, 3, shared=True)) > ALPHA
    assert p_value(sequences, chain_law(model, FREE, 2, 3)) < ALPHA


def test_temperature_of_the_proposal():
    """The proposal's logits are divided, and what results is the mu that the energy corrects."""
    model, tempered = make_toy("ar"), make_toy("ar")
    for parameter in tempered.denoiser.head.linear.parameters():
        parameter.data /= 0.6
    for k in (1, 3):
        sequences = sample(model, num_steps=2, num_candidates=k, energy_window=(1, 0), temperature=0.6)
        assert p_value(sequences, chain_law(tempered, FREE, 2, k)) > ALPHA
        assert p_value(sequences, chain_law(model, FREE, 2, k)) < ALPHA


def test_energy_temperature():
    """tau divides the energy: the law is that of E / tau."""
    model = make_toy("nce")
    law = chain_law(model, FREE, 2, 3, law=lambda mu, energy, k: law_p_k(mu, energy / 0.5, k))
    sequences = sample(model, num_steps=2, num_candidates=3, energy_window=(1, 0), energy_temperature=0.5)
    assert p_value(sequences, law) > ALPHA
    assert p_value(sequences, chain_law(model, FREE, 2, 3)) < ALPHA


def test_one_candidate_is_plain_masked_diffusion():
    """For a given seed k=1, no energy, and the denoiser alone give the same tokens."""
    model = make_toy("nce", length=12)
    one = model.generate(batch_size=50, num_steps=5, num_candidates=1, seed=3)
    model.config.energy_type = "none"
    assert torch.equal(model.generate(batch_size=50, num_steps=5, num_candidates=8, seed=3), one)
    denoiser: EDLMForMaskedLM = model.denoiser
    assert torch.equal(denoiser.generate(batch_size=50, num_steps=5, seed=3), one)


def test_left_padding_changes_nothing_but_the_place():
    """A padded prompt gives the law of the same prompt alone, for the energy as for the denoiser."""
    for energy_type in ("coar", "nce"):
        model = make_toy(energy_type, length=5)
        prompts = torch.tensor([[0, 0, 1], [2, 0, 1]]).repeat(ROWS, 1)
        attention_mask = torch.tensor([[0, 0, 1], [1, 1, 1]]).repeat(ROWS, 1)
        kwargs = {"num_steps": 2, "num_candidates": 3, "energy_window": (1.0, 0.0), "max_new_tokens": 2, "seed": 5}
        sequences = model.generate(prompts, attention_mask, **kwargs)
        assert p_value(sequences[::2, 2:], chain_law(model, (1, MASK, MASK), 2, 3)) > ALPHA
        assert p_value(sequences[1::2], chain_law(model, (2, 0, 1, MASK, MASK), 2, 3)) > ALPHA


@pytest.mark.parametrize("energy_type", ["coar", "nce"])
def test_padding_may_be_the_mask_token(energy_type):
    """As with a tokenizer that has no other special token: padding is neither a gap to fill nor scored."""
    model = make_toy(energy_type, length=6)
    mask = torch.tensor([[0, 0, 1], [1, 1, 1]])
    kwargs = {"attention_mask": mask, "num_steps": 3, "num_candidates": 3, "energy_window": (1.0, 0.0), "seed": 0}
    outputs = [model.generate(torch.tensor([[pad, pad, 1], [0, 2, 1]]), **kwargs) for pad in (MASK, 0)]
    assert outputs[0].shape == (2, 6) and torch.equal(outputs[0][:, 2:], outputs[1][:, 2:])
    xt = torch.tensor([[MASK, MASK, 1, MASK]])
    x = torch.tensor([[MASK, MASK, 1, 2]])
    alone = model.energy(x[:, 2:], xt[:, 2:], t=0.5)
    torch.testing.assert_close(model.energy(x, xt, 0.5, torch.tensor([[0, 0, 1, 1]])), alone, atol=1e-5, rtol=1e-4)


def test_a_row_does_not_depend_on_its_batch():
    model = make_toy("nce", length=16)
    kwargs = {"num_steps": 6, "num_candidates": 4, "energy_window": (1.0, 0.0), "seed": 11}
    many = model.generate(batch_size=20, **kwargs)
    few = model.generate(batch_size=7, **kwargs)
    assert torch.equal(many[:7], few)
    assert torch.equal(model.generate(batch_size=13, first_row=7, **kwargs), many[7:])
    assert torch.equal(model.generate(batch_size=20, energy_batch_size=3, **kwargs), many)
    prompt = torch.tensor([[1, 2], [0, 0]])
    twice = model.generate(prompt, num_return_sequences=3, **kwargs)
    assert torch.equal(twice, model.generate(prompt.repeat_interleave(3, 0), **kwargs))


def test_seed_and_generator():
    model = make_toy("nce", length=16)
    assert torch.equal(model.generate(seed=4), model.generate(seed=4))
    assert not torch.equal(model.generate(seed=4), model.generate(seed=5))
    first, second = (model.generate(generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, second)
    torch.manual_seed(0)
    assert not torch.equal(model.generate(), model.generate())


def test_output_fields():
    model = make_toy("nce", length=12)
    output = model.generate(
        torch.tensor([[1, 2], [0, 2]]),
        num_steps=5,
        num_candidates=4,
        energy_window=(1.0, 0.55),
        max_new_tokens=10,
        num_return_sequences=2,
        seed=0,
        output_history=True,
        return_dict_in_generate=True,
    )
    assert output.sequences.shape == (4, 12) and output.sequences.dtype == torch.int64
    assert len(output.history) == 6 and torch.equal(output.history[-1], output.sequences)
    masked = torch.stack([(state == MASK).sum(-1) for state in output.history])
    assert (masked[0] == 10).all() and (masked[-1] == 0).all() and (masked.diff(dim=0) <= 0).all()
    changed = masked.diff(dim=0).T != 0
    assert torch.equal(output.nfe, changed.sum(-1))
    acting = changed[:, :3].sum(-1)  # t = 1, 0.8, 0.6
    assert (output.energy_nfe <= 4 * acting).all() and (output.energy_nfe >= acting).all()
    acted = torch.zeros(4, 5, dtype=torch.bool)
    acted[:, :3] = changed[:, :3]
    assert torch.equal(~output.energies.isnan(), acted) and torch.equal(~output.ess.isnan(), acted)
    assert ((output.ess >= 1) & (output.ess <= 4))[acted].all()


def test_energies_are_those_of_the_kept_candidates():
    model = make_toy("nce")
    output = model.generate(
        batch_size=200, num_steps=1, num_candidates=4, seed=0, energy_window=(1, 0), return_dict_in_generate=True
    )
    expected = model.energy(output.sequences, torch.full_like(output.sequences, MASK), t=1.0)
    torch.testing.assert_close(output.energies[:, 0], expected)


def test_callback_sees_every_step():
    model, seen = make_toy("none", length=8), []
    model.generate(num_steps=4, seed=0, callback_on_step_end=lambda m, i, t, state: seen.append((i, t, state)))
    assert [(i, t) for i, t, _ in seen] == [(0, 1.0), (1, 0.75), (2, 0.5), (3, 0.25)]
    assert (seen[-1][2]["sequences"] != MASK).all()


def test_training_mode_is_restored_and_does_not_matter():
    model = make_toy("nce", length=16)
    expected = model.generate(seed=2)
    model.train()
    model.denoiser.eval()
    flags = [module.training for module in model.modules()]
    assert torch.equal(model.generate(seed=2), expected)
    assert [module.training for module in model.modules()] == flags


PROMPT = torch.tensor([[0, 1]])
BAD_INPUT = {
    "unknown argument": (dict(num_stepz=3), "num_stepz"),
    "autoregressive argument": (dict(num_beams=3), "num_beams"),
    "empty prompt": (dict(input_ids=torch.empty(1, 0, dtype=torch.int64)), "input_ids is empty"),
    "no batch axis": (dict(input_ids=torch.tensor([1, 2])), r"input_ids must be .* \(2,\)"),
    "probabilities": (dict(input_ids=torch.rand(1, 2)), "input_ids must be an integer"),
    "negative id": (dict(input_ids=torch.tensor([[0, -1]])), "input_ids .* -1"),
    "id outside": (dict(input_ids=torch.tensor([[0, 4]])), "input_ids .*vocab_size=4.* 4"),
    "prompt too long": (dict(input_ids=torch.zeros(1, 9, dtype=torch.int64)), "input_ids has 9 tokens"),
    "too many new tokens": (dict(input_ids=PROMPT, max_new_tokens=7), "max_new_tokens=7.*max_position_embeddings=8"),
    "too long": (dict(max_length=9), "max_length=9"),
    "shorter than the prompt": (dict(input_ids=PROMPT, max_length=1), "input_ids has 2 .*max_length=1"),
    "end of text outside": (dict(eos_token_id=4), "eos_token_id .*got 4"),
    "end of text that is the mask": (dict(eos_token_id=[1, MASK]), "eos_token_id .*got 3"),
    "negative padding": (dict(pad_token_id=-1), "pad_token_id .*got -1"),
    "top_k of a half": (dict(top_k=0.5), "top_k .*got 0.5"),
    "top_p above 1": (dict(top_p=1.5), "top_p .*got 1.5"),
    "do_sample as a number": (dict(do_sample=1), "do_sample .*got 1"),
    "no rows at a time": (dict(denoiser_batch_size=0), "denoiser_batch_size .*got 0"),
    "half a seed": (dict(seed=1.5), "seed .*1.5"),
    "two lengths": (dict(input_ids=PROMPT, max_length=4, max_new_tokens=2), "not both: 4, 2"),
    "no candidates": (dict(num_candidates=0), "num_candidates .* 0"),
    "half a step": (dict(num_steps=2.5), "num_steps .* 2.5"),
    "no rows": (dict(batch_size=0), "batch_size .* 0"),
    "window above 1": (dict(energy_window=(1.2, 0.5)), r"energy_window .*1\.2"),
    "window upside down": (dict(energy_window=(0.5, 0.8)), r"energy_window .*\(0\.5, 0\.8\)"),
    "a number as window": (dict(energy_window=0.8), "energy_window .*got 0.8"),
    "batch size of prompts": (dict(input_ids=PROMPT, batch_size=2), "batch_size .*got 2"),
    "window of one": (dict(energy_window=(0.5,)), "energy_window"),
    "cold energy": (dict(energy_temperature=0.0), "energy_temperature .* 0"),
    "seed and generator": (dict(seed=1, generator=torch.Generator()), "seed or generator"),
    "mask without prompt": (dict(attention_mask=torch.ones(1, 2)), "attention_mask needs input_ids"),
    "mask of another shape": (dict(input_ids=PROMPT, attention_mask=torch.ones(1, 3)), "attention_mask has shape"),
    "a hole in the mask": (
        dict(input_ids=PROMPT[:, [0, 1, 1]], attention_mask=torch.tensor([[1, 0, 1]])),
        "attention_mask .*row 0",
    ),
    "half a token": (dict(input_ids=PROMPT, attention_mask=torch.tensor([[2, 1]])), "attention_mask must be 0"),
    "all padding": (dict(input_ids=PROMPT, attention_mask=torch.tensor([[0, 0]])), "empty prompt"),
    "another config": (dict(generation_config=object()), "generation_config must be"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_named(name):
    kwargs, message = BAD_INPUT[name]
    model = make_toy("nce", length=8)
    before = model.generation_config.to_dict()
    with pytest.raises(ValueError, match=message):
        model.generate(**kwargs)
    assert model.generation_config.to_dict() == before


def test_nan_is_an_error():
    model = make_toy("nce", length=8)
    bad = copy.deepcopy(model)
    bad.denoiser.head.linear.bias.data[1] = float("nan")
    with pytest.raises(FloatingPointError, match="logits .* step 0 of 4"):
        bad.generate(num_steps=4, seed=0)
    bad = copy.deepcopy(model)
    bad.energy_model.network.fc2.weight.data[:] = float("nan")
    with pytest.raises(FloatingPointError, match="energies .* step 0 of 4"):
        bad.generate(num_steps=4, seed=0)
    with pytest.raises(FloatingPointError, match="energies"):
        model.energy = lambda x, *_: torch.full((len(x),), float("inf"))
        model.generate(num_steps=4, seed=0)


def test_one_infinite_energy_is_a_candidate_never_kept():
    model = make_toy("nce")
    finite = model.energy
    model.energy = lambda x, *rest: torch.where(x[:, 0] == 1, float("inf"), finite(x, *rest))
    with_inf = sample(model, (MASK, MASK, 0), rows=500, num_steps=1, num_candidates=64, energy_window=(1, 0))
    assert (with_inf[:, 0] != 1).all()


def test_generation_config_keeps_its_fields(tmp_path):
    config = EDLMGenerationConfig(num_steps=7, energy_window=[0.9, 0.1], energy_temperature=2.0, max_new_tokens=5)
    config.save_pretrained(tmp_path)
    loaded = EDLMGenerationConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict() | {"transformers_version": loaded.transformers_version}
    assert loaded.energy_window == (0.9, 0.1)
    assert EDLMGenerationConfig().energy_window == (1.0, 0.8)
    make_toy("none").save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"num_steps": 7')
    with pytest.raises(OSError, match="JSON"):
        EDLMModel.from_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    assert EDLMModel.from_pretrained(tmp_path).generation_config.num_steps == 128
    with pytest.raises(ValueError, match="not both"):
        EDLMGenerationConfig(max_length=3, max_new_tokens=3)
    with pytest.raises(ValueError, match="num_stepz"):
        EDLMGenerationConfig(num_stepz=4)
