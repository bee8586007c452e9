"""The shipped stories: what the folder holds and loads as; README and defaults are what was measured."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, pipeline

import modeling_edlm  # noqa: F401, registers the classes

ROOT = Path(__file__).resolve().parent.parent
FOLDER, RESULTS = ROOT / "hub_cards" / "edlm-stories", ROOT / "hub_cards" / "results"
OPENING = "Once upon a time, there was a little dog"


@pytest.fixture(scope="module")
def model():
    return AutoModel.from_pretrained(FOLDER).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


def test_the_folder_is_small_and_loads_in_float32(model, tokenizer):
    files = [path for path in FOLDER.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    assert sum(path.stat().st_size for path in files) < 30e6
    ar = AutoModelForCausalLM.from_pretrained(FOLDER).eval()
    judge = AutoModelForCausalLM.from_pretrained(FOLDER, subfolder="judge").eval()
    denoiser = AutoModelForMaskedLM.from_pretrained(FOLDER).eval()
    for part in (model, ar, judge, denoiser):
        assert part.dtype == torch.float32
    for part, whole in ((ar, model.energy_model), (denoiser, model.denoiser)):
        assert all(torch.equal(a, b) for a, b in zip(part.parameters(), whole.parameters(), strict=True))
    assert judge.config.hidden_size < ar.config.hidden_size  # not the energy
    words = (FOLDER / "judge" / "words.txt").read_text().split()
    assert len(words) == len(set(words)) > 5000 and {"once", "upon", "didn't"} <= set(words)
    assert tokenizer.mask_token_id == model.config.mask_token_id and tokenizer.eos_token == "[EOS]"


def test_a_story_begins_at_its_beginning(model, tokenizer):
    """With every place masked, the first one expects a capital or a quote, and the others do not."""
    assert model.config.prepend_bos
    starts = torch.tensor([bool(re.match(r'"?[A-Z]|"', tokenizer.decode([i]))) for i in range(len(tokenizer))])
    with torch.no_grad():
        p_LV = model.log_p_x0(torch.full((1, 64), tokenizer.mask_token_id))[0].exp()
    assert p_LV[0, starts].sum() > 0.9 > 0.5 > p_LV[32, starts].sum()


def test_a_text_ends_at_its_end(model, tokenizer):
    """No special token stands before the EOS, and behind it there is padding alone."""
    with torch.no_grad():
        x_BL = model.generate(batch_size=4, num_steps=16, seed=0)
    eos, special = tokenizer.eos_token_id, set(tokenizer.all_special_ids)
    for ids in x_BL.tolist():
        end = ids.index(eos) if eos in ids else len(ids)
        assert not special & set(ids[:end]) and set(ids[end + 1 :]) <= {tokenizer.pad_token_id}


def test_the_step_energy_lies_beside_it(model, tokenizer):
    """An adapter over this very denoiser, which tells real stories from shuffled proposals."""
    edlm = AutoModel.from_pretrained(FOLDER).eval().load_energy(str(FOLDER), subfolder="step")
    assert edlm.energy_type == "nce" and edlm.config.energy_target == "xs"
    shared = edlm.energy_model.network.backbone.embedding.weight
    assert shared is edlm.denoiser.backbone.embedding.weight
    story = "Once upon a time, there was a little girl named Lily. She had a red ball. It rolled into the pond."
    x_1L = torch.tensor([tokenizer(story).input_ids])
    where_1L = torch.arange(x_1L.shape[1])[None] % 2 == 1
    xt_1L = x_1L.masked_fill(where_1L, tokenizer.mask_token_id)
    with torch.no_grad():
        drawn_KL = edlm.denoiser.propose(xt_1L, where_1L, 16, (0, torch.zeros(1).long(), 0), 0.5).x_NKL[0]
        real = edlm.energy(x_1L, xt_1L, 0.0)
        energies = edlm.energy(drawn_KL, xt_1L.expand_as(drawn_KL), 0.0)
    assert real < energies.median()


def test_pipelines(tokenizer):
    options = {"max_new_tokens": 12, "num_steps": 8, "seed": 0}
    written = pipeline("text-generation", str(FOLDER), trust_remote_code=True)(OPENING, **options)[0]["generated_text"]
    assert written.startswith(OPENING) and len(written) > len(OPENING) + 12
    best = pipeline("fill-mask", str(FOLDER), trust_remote_code=True)("Once upon a[MASK], there was a dog.")[0]
    assert best["token_str"] == " time"


def test_defaults_are_the_setting_that_was_measured_best(model):
    chosen = json.loads((RESULTS / "settings-stories.json").read_text())["chosen"]
    defaults = model.generation_config
    assert [defaults.num_steps, defaults.num_candidates] == [chosen["num_steps"], chosen["num_candidates"]]
    assert list(defaults.energy_window) == chosen["window"] and defaults.shared_completion
    corrector = [defaults.corrector_steps, defaults.corrector_size, defaults.corrector_temperature]
    assert corrector == chosen["corrector"] and defaults.temperature == chosen["temperature"]


def test_the_readme_shows_what_the_demo_prints():
    """Line by line of the form that the demo has; the numbers are of the day it was run."""
    spec = importlib.util.spec_from_file_location("demo", ROOT / "hub_cards" / "demo.py")
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    readme = (ROOT / "README.md").read_text()
    shown = re.search(r"```\n(Loading hub_cards/edlm-stories\n.*?)```", readme, re.DOTALL)[1].splitlines()
    names = {task: {name: {} for name in ("MDLM", "EDLM")} for task in ("story", "gap")}
    values = {"bits": [1.0, 2.0], "characters": [1, 1], "known_words": [1.0, 0.5], "passes": [1, 2]}
    made = demo.report({task: {name: values for name in samplers} for task, samplers in names.items()}).splitlines()

    def form(line):
        line = re.sub(
            r"(EDLM is (better|worse) by|no difference seen \() *[+-]?\d+\.\d+ \+- \d+\.\d+.*", "verdict", line
        )
        return re.sub(r" *\d+(\.\d+)?", " #", line)

    assert [form(line) for line in shown[-len(made) :]] == [form(line) for line in made]
    texts = [line for line in shown if re.match(r"(MDLM|EDLM): \d+ \+ \d+ passes, \d+\.\d s$", line)]
    assert [line[:4] for line in texts] == ["MDLM", "EDLM"] * 2
    assert f"The verdict of a judge that had no part in it, over {demo.SAMPLES} texts each:" in shown
