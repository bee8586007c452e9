"""The shipped cards say what their results files say, and the shipped model is what its card says."""

import importlib.util
import json
import math
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from modeling_edlm import EDLMForCausalLM, EDLMModel
from modeling_edlm.schedule import antithetic_times
from training import adapt, evaluate_likelihood, evaluate_samples, memory
from training.contrast import accuracy, contrast, draw_contrast, energies
from training.data import PackedTokens, tokenize
from training.metrics import bits_per_character
from training.pretrain import mdlm_loss

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "hub_cards" / "results" / "edlm-wiki27.json"
FOLDER = ROOT / "hub_cards" / "edlm-wiki27"


def make_card():
    spec = importlib.util.spec_from_file_location("make_card", ROOT / "hub_cards" / "make_card.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_card_is_made_from_its_results():
    assert (FOLDER / "README.md").read_text() == make_card().render(RESULTS)


def test_the_readme_has_the_tables_of_the_results():
    """Every row of figures in README.md is, to the letter, one of the card or of what a results file prints."""
    printed = (FOLDER / "README.md").read_text()
    modules = {"likelihood": evaluate_likelihood, "samples": evaluate_samples, "adapt": adapt, "memory": memory}
    for results in (ROOT / "hub_cards" / "results").glob("*.json"):
        module = modules.get(results.name.partition("-")[0])
        if module is not None:
            printed += module.table(json.loads(results.read_text())) + "\n"
    names = r"data \||MDLM|EDLM|AR \||AR, exact|autoregressive \||denoiser \||NCE energy \||published form"
    names += r"|before|gain, |ESS, |other text|adapted|wiki|small \||full \|"
    rows = [row for row in (ROOT / "README.md").read_text().splitlines() if re.match(rf"\| ({names})", row)]
    assert len(rows) >= 30 and not [row for row in rows if row not in printed]


@pytest.mark.parametrize("name", ["step", "light"])
def test_the_cards_of_step_energies_say_what_their_metrics_say(name):
    card = (ROOT / "hub_cards" / f"edlm-wiki27-{name}" / "README.md").read_text()
    last = json.loads((ROOT / "hub_cards" / "results" / f"edlm-wiki27-{name}.jsonl").read_text().splitlines()[-1])
    assert f"held-out loss {last['validation_nce_loss']:.3f} (chance {last['chance']:.3f})" in card
    assert f"accuracy {last['validation_accuracy']:.3f}" in card and f"{last['seconds'] / 60:.0f} minutes" in card
    for name, value in last.items():
        if name.startswith("accuracy_t"):
            assert f"{name.removeprefix('accuracy_')}: {value:.3f}" in card


def test_the_card_of_the_adapter_says_what_was_measured():
    card = (ROOT / "hub_cards" / "edlm-wiki27-books" / "README.md").read_text()
    training = json.loads((ROOT / "hub_cards" / "results" / "adapt-books.json").read_text())["training"]
    overall = training["all"]
    assert f"NCE loss {overall['validation_nce_loss']:.3f} (chance {overall['chance']:.3f})" in card
    assert f"accuracy {overall['validation_accuracy']:.3f}" in card and f"weights {overall['ess']:.2f}" in card
    assert all(f"{gain['bits_per_token']:.4f} +- {gain['stderr']:.4f}" in card for gain in training["gains"])
    assert training["command"] in card


def test_the_shipped_folder_is_small_and_whole():
    files = [*FOLDER.glob("*.safetensors"), *FOLDER.glob("ar/*.safetensors")]
    assert 0 < sum(file.stat().st_size for file in files) <= 25e6
    assert not [file for file in FOLDER.rglob("*") if file.suffix in (".bin", ".pt", ".pkl", ".ckpt")]
    parameters = json.loads(RESULTS.read_text())["parameters"]
    model, scorer = EDLMModel.from_pretrained(FOLDER), EDLMForCausalLM.from_pretrained(FOLDER, subfolder="ar")
    assert parameters == {
        "denoiser": model.denoiser.num_parameters(),
        "energy": model.energy_model.num_parameters(),
        "ar": scorer.num_parameters(),
    }


@pytest.mark.parametrize("name", ["step", "light", "books"])
def test_shipped_energies_fit_the_shipped_model(name, held_out):
    """An adapter by its checksum; and each has something to say of the next state."""
    folder = ROOT / "hub_cards" / f"edlm-wiki27-{name}"
    model = EDLMModel.from_pretrained(FOLDER).load_energy(str(folder))
    assert (model.config.energy_adapter is not None) == (name == "books")
    positive, negatives, xt, t, s = draw_contrast(model.denoiser, held_out, torch.arange(16), 16, 0, "xs", 3)
    with torch.no_grad():
        energy = model.energy(torch.cat((positive, negatives[:, 0])), torch.cat((xt, xt)), torch.cat((s, s)))
    assert energy.isfinite().all() and energy.std() > 0.1
    assert f"edlm-wiki27-{name}" in (ROOT / "README.md").read_text()


def test_the_shipped_samples_come_again():
    """The first sample of the card, from its seed. Rounding differs between machines: most letters must agree."""
    results = json.loads(RESULTS.read_text())
    model, tokenizer = EDLMModel.from_pretrained(FOLDER), AutoTokenizer.from_pretrained(FOLDER)
    ids = model.generate(num_steps=results["samplers"][-1]["num_steps"], num_candidates=1, seed=results["seed"])
    expected = torch.tensor(tokenizer(results["samples"]["MDLM"][0]).input_ids)
    assert float((ids[0] == expected).float().mean()) > 0.9


@pytest.fixture(scope="module")
def held_out(tmp_path_factory) -> torch.Tensor:
    """(16, 256) characters of validation text."""
    source = str(ROOT / "tests" / "fixtures" / "wiki27-sample.parquet")
    tokens = tokenize(source, AutoTokenizer.from_pretrained(FOLDER), tmp_path_factory.mktemp("tokens"))
    blocks = PackedTokens(tokens, 256)
    return torch.stack([blocks[i * len(blocks) // 16]["input_ids"] for i in range(16)])


def test_the_trained_energy_tells_data_from_proposals(held_out):
    model = EDLMModel.from_pretrained(FOLDER)
    times, u = (torch.full((16,), 0.8), None), torch.rand(held_out.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        data, proposal = energies(model.energy_model, *contrast(model.denoiser, held_out, *times, u, 0), *times)
    assert float(accuracy(data, proposal, "nce").mean()) > 0.75
    assert float(data.mean()) < 0 < float(proposal.mean())


def test_bits_per_character_of_the_shipped_models(held_out):
    """Far below single letters (4.1 bits), and near what the card says; 4,096 characters are a small sample."""
    evaluation = {k: v["last_evaluation"] for k, v in json.loads(RESULTS.read_text())["training"].items()}
    model, scorer = EDLMModel.from_pretrained(FOLDER), EDLMForCausalLM.from_pretrained(FOLDER, subfolder="ar")
    bits = float(bits_per_character(scorer, held_out).mean())
    assert abs(bits - evaluation["ar"]["validation_bits_per_token"]) < 0.25
    torch.manual_seed(0)
    t = antithetic_times(torch.rand(()), 256)
    x0 = held_out.repeat(16, 1)
    with torch.no_grad():
        nats = mdlm_loss(model.denoiser, x0, t, torch.rand(x0.shape), model.config.mask_token_id)
    assert abs(float(nats.mean()) / 256 / math.log(2) - evaluation["denoiser"]["validation_bits_per_token"]) < 0.4
