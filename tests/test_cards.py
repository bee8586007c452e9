"""The shipped cards say what their results files say, and the shipped model is what its card says."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch

from modeling_edlm import EDLMForCausalLM, EDLMModel

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


def test_the_readme_has_the_tables_of_the_card():
    """Every row of figures that README.md has in common with the card is the card's, to the letter."""
    card, readme = (FOLDER / "README.md").read_text(), (ROOT / "README.md").read_text()
    rows = [
        row
        for row in readme.splitlines()
        if re.match(r"\| (data|MDLM|EDLM|autoregressive|denoiser|NCE energy) \|", row)
    ]
    assert len(rows) == 6 and all(row in card for row in rows)


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


def test_the_shipped_samples_come_again():
    """The first sample of the card, from its seed. Rounding differs between machines: most letters must agree."""
    results = json.loads(RESULTS.read_text())
    from transformers import AutoTokenizer

    model, tokenizer = EDLMModel.from_pretrained(FOLDER), AutoTokenizer.from_pretrained(FOLDER)
    ids = model.generate(num_steps=results["num_steps"], num_candidates=1, seed=results["seed"])
    expected = torch.tensor(tokenizer(results["samplers"]["MDLM"]["samples"][0]).input_ids)
    assert float((ids[0] == expected).float().mean()) > 0.9


def test_the_trained_energy_prefers_data(tmp_path):
    """On held-out text the shipped energy tells data from proposals, more often the more is masked."""
    evaluation = json.loads(RESULTS.read_text())["training"]["energy"]["last_evaluation"]
    assert evaluation["validation_nce_loss"] < evaluation["chance"]
    assert evaluation["validation_accuracy"] > 0.5
    assert evaluation["energy_of_data"] < evaluation["energy_of_proposals"]


@pytest.mark.parametrize("name", ["denoiser", "ar"])
def test_bits_per_character_beat_a_letter_frequency_model(name):
    evaluation = json.loads(RESULTS.read_text())["training"][name]["last_evaluation"]
    assert evaluation["validation_bits_per_token"] < 3.5  # single letters: 4.1
