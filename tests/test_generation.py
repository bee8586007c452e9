"""The law of generate() against enumeration. Each chi-square test rejects a right sampler once in 10,000 seeds."""

import copy
import itertools
import re
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from transformers import (
    GenerationConfig,
    MaxTimeCriteria,
    SuppressTokensLogitsProcessor,
    TextDiffusionStreamer,
    TextIteratorStreamer,
    TextStreamer,
)

from modeling_edlm import EDLMForMaskedLM, EDLMGenerationConfig, EDLMModel
from modeling_edlm.backbone import Backbone, fixed_weights
from modeling_edlm.energies import distinct
from support.toy import (
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


@pytest.mark.parametrize("energy", ["none", "coar", "step"])
@pytest.mark.parametrize(("num_steps", "block_length"), [(4, 2), (3, 2), (3, 1), (2, 5)])
def test_law_of_blocks(energy, num_steps, block_length):
    """From left to right, each in its part of time; with 3 steps for 2 blocks, one step belongs to both."""
    model = make_toy("nce" if energy == "step" else energy, "xs" if energy == "step" else "x0", length=4)
    options = {"num_steps": num_steps, "num_candidates": 1 if energy == "none" else 3, "energy_window": (1.0, 0.0)}
    start = (MASK, 1, MASK, MASK)
    law = chain_law(model, start, num_steps, options["num_candidates"], block_length=block_length)
    sequences = sample(model, start, block_length=block_length, **options)
    assert p_value(sequences, law) > ALPHA
    if block_length < 3:  # the test can tell
        assert p_value(sample(model, start, **options), law) < ALPHA
    given = torch.tensor([[0, MASK, 2, MASK, MASK, 1]]).repeat(50, 1)
    output = make_toy(length=6).generate(
        given, num_steps=6, block_length=2, seed=0, output_history=True, return_dict_in_generate=True
    )
    order = torch.stack([(state == MASK)[:, [1, 3, 4]].sum(0) for state in output.history])  # 3 and 1 share a block
    assert (order[4:, :2] == 0).all() and (order[:5, 2] == 50).all() and order[-1].sum() == 0


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


def test_training_mode_is_of_no_call_that_runs():
    """Switched on by a callback, or by a call in another thread that ends first: no dropout; the flags come back."""
    model = make_toy("nce", length=16, dropout=0.5)
    expected, nll = model.generate(seed=2, num_steps=8), model.likelihood(torch.zeros(1, 16).long(), num_times=4).nll
    callback = {"callback_on_step_end": lambda model, *_: model.train()}
    for _ in range(2):  # in eval mode, then in training mode
        assert torch.equal(model.generate(seed=2, num_steps=8, **callback), expected)
        assert all(module.training for module in model.modules())

    started, ended = threading.Event(), threading.Event()

    def wait(model, step, *_):
        if step == 2:
            started.set()
            assert ended.wait(20)

    first = {"seed": 2, "num_steps": 8, "callback_on_step_end": wait}
    with ThreadPoolExecutor() as pool:
        text = pool.submit(model.generate, **first)
        assert started.wait(20)
        assert torch.equal(model.likelihood(torch.zeros(1, 16).long(), num_times=4).nll, nll)
        assert not any(module.training for module in model.modules())  # the other call still runs
        model.train()
        ended.set()
        assert torch.equal(text.result(), expected)
    assert all(module.training for module in model.modules())
    x = torch.zeros(1, 16, dtype=torch.int64)
    assert not torch.equal(model(x, t=0.5).logits, model(x, t=0.5).logits)  # as training wants it


@contextmanager
def default_of(setting):
    (torch.set_default_dtype if isinstance(setting, torch.dtype) else torch.set_default_device)(setting)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


@torch.no_grad()
@pytest.mark.parametrize("energy_type", ["ar", "nce"])
@pytest.mark.parametrize("setting", [torch.float64, torch.bfloat16, torch.float16, "meta"], ids=str)
def test_the_default_of_torch_changes_nothing(setting, energy_type):
    """Neither type nor device of what is drawn, weighed and counted: those are of the model and the law."""
    model, x, text = make_toy(energy_type, length=6), torch.tensor([[0, 3, 1, 3]]), torch.zeros(1, 6, dtype=torch.int64)
    fast = {"num_steps": 3, "num_candidates": 3, "energy_window": (1.0, 0.0), "seed": 0}

    def results():
        made = model.generate(x, **fast, corrector_steps=2, max_length=6, return_dict_in_generate=True)
        revised = model.revise(text, corrector_steps=2, corrector_candidates=3, seed=0)
        free = model.generate(num_steps=2, generator=torch.Generator().manual_seed(0))
        bounds = [model.likelihood(text, estimator=e, num_times=3, num_samples=3) for e in ("mdlm", "paper", "sampler")]
        return [*made.values(), revised, free, *(b.nll for b in bounds), model.energy(text[:, :4], x, 0.5)]

    expected = results()
    with default_of(setting):
        found = results()
    for a, b in zip(found, expected, strict=True):
        assert a.device == b.device
        torch.testing.assert_close(a, b, atol=0, rtol=0, equal_nan=True)


@torch.no_grad()
@pytest.mark.parametrize("energy_type", ["ar", "coar", "nce"])
def test_ids_of_another_integer_type_give_the_same(energy_type):
    model, text = make_toy(energy_type, length=6), torch.tensor([[0, 1, 2, 0]])
    xt = torch.tensor([[0, 3, 3, 0]])

    def results(dtype):
        x, fast = xt.to(dtype), {"num_steps": 3, "seed": 0}
        made = [model.generate(x, **fast), model.revise(text.to(dtype), corrector_steps=2, seed=0)]
        bound = model.likelihood(text.to(dtype), num_times=3, **{"num_steps": 3}).nll
        return [*made, bound, model.energy(text.to(dtype), x, 0.5), model.log_p_x0(x, 0.5)]

    for found, expected in zip(results(torch.int32), results(torch.int64), strict=True):
        assert torch.equal(found, expected) and found.dtype == expected.dtype


def test_a_configuration_of_the_librarys_class_changes_what_it_names():
    """It knows no `num_steps`: that stays the model's own. Lengths are of the one who gives them last."""
    model, x = make_toy("nce", length=16), torch.tensor([[0, 1]])
    model.generation_config = EDLMGenerationConfig(max_length=9, num_steps=3, num_candidates=1)
    output = model.generate(x, generation_config=GenerationConfig(max_new_tokens=4), return_dict_in_generate=True)
    assert output.sequences.shape == (1, 6) and output.energies.shape == (1, 3)
    assert model.generate(x, generation_config=GenerationConfig(max_new_tokens=4), max_length=5).shape == (1, 5)
    assert model.generate(x, generation_config=GenerationConfig(temperature=0.5)).shape == (1, 9)
    assert model.generate(x, generation_config=EDLMGenerationConfig(num_steps=2)).shape == (1, 16)
    assert model.generation_config.max_length == 9


def test_arguments_of_the_librarys_sequence_trainer_pass():
    model, x = make_toy("none", length=8), torch.tensor([[0, MASK, 1]])
    options = {"labels": x, "synced_gpus": False, "num_beams": 1, "max_length": 5}
    assert torch.equal(model.generate(x, **options, seed=0), model.generate(x, max_length=5, seed=0))
    for name, value in (("synced_gpus", True), ("num_beams", 2)):
        with pytest.raises(ValueError, match=f"generate.. has no argument .'{name}'"):
            model.generate(x, **{name: value})


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


def test_padding_on_either_side_changes_nothing():
    """New tokens follow each prompt at once; a row is what it is alone, in its own place."""
    model = make_toy("coar", length=12)
    options = {"max_new_tokens": 5, "num_steps": 4, "energy_window": (1, 0), "seed": 0}
    alone = model.generate(torch.tensor([[1, 2, 0]]), **options)[0]
    prompts = torch.tensor([[MASK, MASK, 1, 2, 0], [0, 0, 0, 1, 2]])
    left = model.generate(prompts, torch.tensor([[0, 0, 1, 1, 1], [1] * 5]), **options)
    prompts = torch.tensor([[1, 2, 0, MASK, MASK], [0, 0, 0, 1, 2]])
    right = model.generate(prompts, torch.tensor([[1, 1, 1, 0, 0], [1] * 5]), **options)
    assert torch.equal(left[0], torch.cat((torch.tensor([MASK, MASK]), alone)))
    assert torch.equal(right[0], torch.cat((alone, torch.tensor([MASK, MASK]))))
    assert torch.equal(left[1], right[1]) and torch.equal(left[1, :5], prompts[1])


def eos_law(law: dict, eos: int, pad: int, start: int = 0) -> dict:
    """The law of texts in which what comes after the first EOS is padding."""
    padded = {}
    for x, p in law.items():
        end = next((i for i in range(start, len(x)) if x[i] == eos), len(x))
        x = tuple(pad if i > end else v for i, v in enumerate(x))
        padded[x] = padded.get(x, 0.0) + p
    return padded


@pytest.mark.parametrize("energy", ["coar", "step"])
def test_law_until_the_end_of_text(energy):
    """A row that stops at its EOS has the law of the whole chain, cut: stopping early changes no law, only the cost."""
    model = make_toy("nce" if energy == "step" else energy, "xs" if energy == "step" else "x0")
    law = eos_law(chain_law(model, FREE, 3, 3), eos=1, pad=2)
    options = {"num_steps": 3, "num_candidates": 3, "energy_window": (1.0, 0.0), "return_dict_in_generate": True}
    output = sample(model, eos_token_id=1, pad_token_id=2, **options)
    assert p_value(output.sequences, law) > ALPHA
    whole = sample(model, **options)
    assert (output.nfe <= whole.nfe).all() and output.nfe.sum() < whole.nfe.sum()
    prompted = sample(model, (1, MASK, MASK), eos_token_id=[1], pad_token_id=2, **options)  # a given EOS ends nothing
    law = eos_law(chain_law(model, (1, MASK, MASK), 3, 3), eos=1, pad=2, start=1)
    assert p_value(prompted.sequences, law) > ALPHA
    assert (sample(model, (MASK, MASK, 1), eos_token_id=1, pad_token_id=2, **options).sequences[:, 2] == 1).all()


def test_padding_after_the_end_defaults_to_the_end():
    sequences = make_toy("none", length=16).generate(batch_size=50, seed=0, eos_token_id=1)
    is_end = sequences == 1
    after = is_end.cumsum(-1) - is_end.long() > 0
    assert after.any() and (sequences[after] == 1).all()


@pytest.mark.parametrize("k", [1, 3])
def test_top_k_and_top_p(k):
    """What is left of the proposal is the mu that the energy corrects."""
    model = make_toy("ar")
    plain = model.denoiser.log_p_x0

    def cut(keep):
        def log_p_x0(xt, t=None, attention_mask=None):
            log_p = plain(xt, t, attention_mask)
            return log_p.masked_fill(~keep(log_p), -torch.inf).log_softmax(-1)

        return log_p_x0

    def nucleus(log_p):  # the fewest tokens with at least this mass
        p, order = log_p.exp().sort(-1, descending=True)
        return torch.zeros_like(log_p, dtype=torch.bool).scatter(-1, order, p.cumsum(-1) - p < 0.7)

    uncut = chain_law(model, FREE, 2, k)
    laws = {}
    for name, keep in {"top_k": lambda log_p: log_p >= log_p.topk(2, -1).values[..., 1:], "top_p": nucleus}.items():
        model.denoiser.log_p_x0 = cut(keep)
        laws[name] = chain_law(model, FREE, 2, k)
    model.denoiser.log_p_x0 = plain
    for name, value in (("top_k", 2), ("top_p", 0.7)):
        sequences = sample(model, num_steps=2, num_candidates=k, energy_window=(1, 0), **{name: value})
        assert p_value(sequences, laws[name]) > ALPHA and p_value(sequences, uncut) < ALPHA
    same = {"num_steps": 2, "num_candidates": k, "rows": 100}
    assert torch.equal(sample(model, top_k=0, top_p=1.0, **same), sample(model, **same))


def test_stock_and_own_logits_processors():
    model, seen = make_toy("none", length=10), []

    def own(input_ids, scores, positions, cur_step):  # token 1 in even places, any but 1 in odd ones
        seen.append(cur_step)
        assert input_ids.shape == (len(positions), 10) and scores.shape == (len(positions), MASK + 1)
        assert (input_ids[torch.arange(len(positions)), positions] == MASK).all()
        is_even = (positions % 2 == 0)[:, None] == (torch.arange(MASK + 1) == 1)
        return scores.masked_fill(~is_even, -torch.inf)

    sequences = model.generate(batch_size=20, num_steps=4, seed=0, logits_processor=[own])
    assert (sequences[:, ::2] == 1).all() and (sequences[:, 1::2] != 1).all() and set(seen) == {0, 1, 2, 3}
    assert (sequences != MASK).all()
    sequences = model.generate(batch_size=20, seed=0, logits_processor=[SuppressTokensLogitsProcessor([0, 2])])
    assert (sequences == 1).all()
    everything = [lambda input_ids, scores: torch.zeros_like(scores)]  # even the mask, which must not be drawn
    law = dict.fromkeys(itertools.product(range(3), repeat=3), 1 / 27)
    assert p_value(sample(make_toy("none"), num_steps=2, logits_processor=everything), law) > ALPHA
    nothing = [lambda input_ids, scores: torch.full_like(scores, -torch.inf)]
    with pytest.raises(FloatingPointError, match="logits"):
        model.generate(seed=0, logits_processor=nothing)


def test_do_sample_false_takes_the_likeliest():
    model = make_toy("nce", length=6)
    options = {"num_steps": 5, "do_sample": False, "return_dict_in_generate": True, "output_history": True}
    output = model.generate(batch_size=30, energy_window=(1, 0), **options)
    for i, (before, after) in enumerate(itertools.pairwise(output.history)):
        best = model.log_p_x0(before, t=1 - i / 5).argmax(-1)
        assert torch.equal(after, torch.where((before == MASK) & (after != MASK), best, before))
    assert output.energy_nfe.sum() == 0 and output.ess.isnan().all()
    assert torch.equal(model.generate(batch_size=30, **options).sequences, output.sequences)  # without a seed
    assert not torch.equal(model.generate(batch_size=30, seed=1, **options).history[1], output.history[1])


def test_stopping_criteria_leave_a_row_as_it_is():
    model = make_toy("coar", length=24)
    options = {"batch_size": 6, "num_steps": 12, "seed": 0, "return_dict_in_generate": True, "output_history": True}
    whole = model.generate(**options)

    def half(input_ids, scores, **kwargs):
        return ((input_ids == MASK).sum(-1) <= 12) | (torch.arange(6) == 2)

    output = model.generate(stopping_criteria=[half], **options)
    assert (output.sequences[2] == MASK).sum() > 12  # stopped after its first step
    for row in range(6):
        at = next(i for i, state in enumerate(whole.history[1:]) if half(state, None)[row])
        assert torch.equal(output.sequences[row], whole.history[at + 1][row])
    assert len(output.history) < len(whole.history)  # all rows stopped before the last step
    masked = output.sequences == MASK
    resumed = model.generate(output.sequences, seed=1)  # what is left can be filled
    assert (resumed != MASK).all() and torch.equal(resumed[~masked], output.sequences[~masked])
    timed = model.generate(stopping_criteria=[MaxTimeCriteria(0.0)], **options)
    assert (timed.sequences == MASK).any() and len(timed.history) == 2


class Recorder:
    def __init__(self):
        self.calls = []

    def put(self, value):
        self.calls.append(("put", value.clone()))

    def end(self):
        self.calls.append(("end", None))


class DraftRecorder(Recorder):
    def put_draft(self, value):
        self.calls.append(("draft", value))  # its own: the canvas goes on changing


@pytest.mark.parametrize("prompt", [[1, 2], [1, MASK, 0]], ids=["prompt", "gap"])
def test_streamers(prompt):
    """The prompt up to its first gap, every state, and the finished text; a plain streamer gets no states."""
    model, options = make_toy("nce", length=8), {"num_steps": 3, "seed": 0, "max_length": 8}
    output = model.generate(torch.tensor([prompt]), **options, output_history=True, return_dict_in_generate=True)
    expected, states = output.sequences, output.history[1:]
    start = (prompt + [MASK]).index(MASK)
    for kind in (Recorder, DraftRecorder):
        streamer = kind()
        assert torch.equal(model.generate(torch.tensor([prompt]), streamer=streamer, **options), expected)
        names = [name for name, _ in streamer.calls]
        assert names == ["put", *["draft"] * (3 if kind is DraftRecorder else 0), "put", "end"]
        (_, first), *drafts, (_, last), _ = streamer.calls
        assert first.tolist() == [prompt[:start]] and torch.equal(last, expected[:, start:])
        for (_, draft), state in zip(drafts, states if drafts else (), strict=True):
            assert torch.equal(draft, state[:, start:])


def test_the_librarys_streamers(capsys):
    class Letters:
        def decode(self, ids, **kwargs):
            return "".join("abc_"[i] for i in ids)

    model, options = make_toy("none", length=8), {"num_steps": 3, "seed": 0}
    prompt = torch.tensor([[1, 2]])
    text = Letters().decode(model.generate(prompt, **options)[0])
    for kind in (TextStreamer, TextDiffusionStreamer):
        model.generate(prompt, streamer=kind(Letters()), **options)
        # what a terminal shows in the end: from a saved cursor on, drafts are wiped out
        assert re.sub("\0337.*?\0338\033\\[J", "", capsys.readouterr().out, flags=re.DOTALL) == text + "\n"
    model.generate(prompt, streamer=TextStreamer(Letters(), skip_prompt=True), **options)
    assert capsys.readouterr().out == text[2:] + "\n"
    iterator = TextIteratorStreamer(Letters())
    model.generate(prompt, streamer=iterator, **options)
    assert "".join(iterator) == text
    with pytest.raises(ValueError, match="batch size 1"):
        model.generate(batch_size=2, streamer=TextStreamer(Letters()), **options)


def test_the_callback_is_shown_the_choice():
    model, seen = make_toy("nce", length=8), []

    def look(model, step, t, state):
        seen.append({name: value.clone() for name, value in state.items()})

    options = {"num_steps": 4, "num_candidates": 3, "energy_window": (1.0, 0.7), "denoiser_batch_size": 2, "seed": 0}
    output = model.generate(batch_size=5, callback_on_step_end=look, return_dict_in_generate=True, **options)
    assert ["kept" in state for state in seen] == [True, True, False, False]
    before = torch.full((5, 8), MASK)
    for i, state in enumerate(seen[:2]):
        rows, n = state["rows"], torch.arange(len(state["rows"]))
        assert torch.equal(state["energies"][n, state["kept"]], output.energies[rows, i])
        kept, now = state["candidates"][n, state["kept"]], state["sequences"][rows]
        assert torch.equal(torch.where((before[rows] == MASK) & (now != MASK), kept, before[rows]), now)
        torch.testing.assert_close(
            model.energy(state["candidates"][:, 1], before[rows], t=1 - i / 4), state["energies"][:, 1]
        )
        before = state["sequences"]


@pytest.mark.parametrize("energy", ["ar", "coar", "nce", "step"])
def test_the_same_seed_at_every_batch_and_chunk_size(energy):
    model = make_toy("nce" if energy == "step" else energy, "xs" if energy == "step" else "x0", length=16)
    options = {"num_steps": 6, "num_candidates": 4, "energy_window": (1.0, 0.0), "seed": 11}
    many = model.generate(batch_size=20, **options)
    for rows, candidates in ((1, 1), (3, 5), (7, 64), (20, 2), (None, None)):
        sizes = {"denoiser_batch_size": rows, "energy_batch_size": candidates}
        assert torch.equal(model.generate(batch_size=20, **options, **sizes), many)
    assert torch.equal(torch.cat([model.generate(first_row=i, **options) for i in range(20)]), many)


def test_equal_candidates_are_scored_once():
    model = make_toy("nce", "xs", length=3)
    scored, plain = [], model.energy

    def counted(x, *rest):
        scored.append(len(x))
        return plain(x, *rest)

    model.energy = counted
    options = {"num_steps": 3, "num_candidates": 16, "energy_window": (1, 0), "seed": 0}
    output = model.generate(batch_size=50, return_dict_in_generate=True, **options)
    acted = int((~output.energies.isnan()).sum())
    assert sum(scored) == int(output.energy_nfe.sum()) < 16 * acted  # a step has at most 3, 9 or 27 different ones
    x_NKL = torch.randint(0, 2, (7, 9, 2), generator=torch.Generator().manual_seed(0))
    first, which = distinct(x_NKL)
    assert torch.equal(x_NKL.flatten(0, 1)[first][which], x_NKL.flatten(0, 1))
    assert torch.equal(first[which] // 9, torch.arange(7).repeat_interleave(9))  # never one of another row
    assert len(first) == sum(len(row.unique(dim=0)) for row in x_NKL)


@pytest.mark.parametrize("backend", ["eager"] + ["inductor"] * bool(shutil.which("g++") or shutil.which("clang++")))
def test_compiled_gives_the_same_text(backend, monkeypatch):
    """The blocks go through torch.compile, whole, with rows padded to a power of two; only its code generator needs a
    C++ compiler."""
    calls, blocks = [], torch.compile(Backbone.run_blocks, dynamic=False, backend=backend, fullgraph=True)
    monkeypatch.setattr(
        "modeling_edlm.backbone._compiled_blocks", lambda: lambda *args: calls.append(len(args[1])) or blocks(*args)
    )
    for energy in ("ar", "nce"):
        model = make_toy(energy, length=16)
        options = {"num_steps": 4, "num_candidates": 3, "energy_window": (1, 0), "seed": 3, "batch_size": 5}
        plain, compiled = (model.generate(compile=c, return_dict_in_generate=True, **options) for c in (False, True))
        assert torch.equal(plain.sequences, compiled.sequences)
        torch.testing.assert_close(plain.energies, compiled.energies, equal_nan=True, atol=1e-4, rtol=1e-4)
    assert set(calls) <= {1, 2, 4, 8, 16} and len(calls) == 2 * 2 * 4  # denoiser and energy


def test_half_precision_weights_draw_the_same_candidates():
    """The uniforms are the same, so most tokens are: what differs is where rounding moved a logit across a draw."""
    model = make_toy("nce", length=64, seed=1)
    options = {"num_steps": 8, "num_candidates": 4, "batch_size": 32, "seed": 0}
    full = model.generate(**options)
    half = model.to(torch.bfloat16).generate(**options)
    assert (full[:, :] == half).float().mean() > 0.5  # three tokens: by chance it would be near 1/3


def test_aliases():
    model = make_toy("none", length=8)
    assert model.can_generate() and model.denoiser.can_generate()


def test_positions_that_are_not_needed_change_nothing():
    """The last block works at the needed positions only, and gives the same there."""
    model = make_toy("none", length=32, num_hidden_layers=2)
    xt = torch.full((5, 32), MASK)
    where = torch.zeros(5, 32, dtype=torch.bool)
    for row, columns in enumerate(([0], [3, 4, 31], [], [7], list(range(20)))):
        where[row, columns] = True
    all_hidden, _ = model.denoiser.encode(xt, t=0.5)
    some_hidden, _ = model.denoiser.encode(xt, t=0.5, where_NL=where)
    torch.testing.assert_close(some_hidden[where], all_hidden[where], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(some_hidden[~where], all_hidden[~where])  # the work was not done


def test_constants_are_made_once_and_only_where_they_are_constant():
    """Without time the modulation is a constant within one call, never across calls; with time it is none."""
    model, calls = make_toy("none", length=8, time_conditioning=False), []
    norm = model.denoiser.backbone.blocks[0].norm1
    norm.modulation.register_forward_hook(lambda *_: calls.append(1))
    before = model.generate(num_steps=8, seed=0, batch_size=3)
    assert len(calls) == 1
    norm.modulation.weight.data *= -3
    assert not torch.equal(model.generate(num_steps=8, seed=0, batch_size=3), before) and len(calls) == 2
    model.denoiser.encode(before)
    assert len(calls) == 3
    timed = make_toy("none", length=8)
    rows = [timed.generate(num_steps=8, seed=0, first_row=row) for row in range(3)]
    assert torch.equal(torch.cat(rows), timed.generate(num_steps=8, seed=0, batch_size=3))
    told = [timed.log_p_x0(torch.full((1, 8), MASK), t) for t in (0.9, 0.1)]
    with fixed_weights():
        again = [timed.log_p_x0(torch.full((1, 8), MASK), t) for t in (0.9, 0.1)]
    assert torch.equal(told[0], again[0]) and torch.equal(told[1], again[1]) and not torch.equal(*told)
