"""pipeline("text-generation") and pipeline("fill-mask"): on objects, and on folders by their own code alone."""

import copy
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoTokenizer, PreTrainedTokenizerFast, TextGenerationPipeline, pipeline

from modeling_edlm import EDLMConfig, EDLMEnergyModel, EDLMForCausalLM, EDLMForMaskedLM, EDLMModel
from modeling_edlm.configuration_edlm import CUSTOM_PIPELINES
from modeling_edlm.energies import causal_log_prob
from modeling_edlm.pipeline_edlm import EDLMTextGenerationPipeline

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ROOT / "hub_cards" / "edlm-wiki27"
LENGTH, MASK = 24, 27
SIZES = {"vocab_size": 28, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "cond_dim": 0}
SIZES["max_position_embeddings"] = LENGTH
STEPS = {"num_steps": 4, "num_candidates": 3, "seed": 7}


def randomize(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.4)
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer():
    return PreTrainedTokenizerFast(tokenizer_file=str(SHIPPED / "tokenizer.json"), mask_token="[MASK]")


@pytest.fixture(scope="module")
def model():
    model = randomize(EDLMModel(EDLMConfig(**SIZES, energy_type="nce")))
    model.generation_config.num_steps = 5
    return model


@pytest.fixture
def pipe(model, tokenizer):
    return EDLMTextGenerationPipeline(model=model, tokenizer=copy.deepcopy(tokenizer), device="cpu")


def decoded(tokenizer, sequences) -> list[str]:
    return [tokenizer.decode(row) for row in sequences.tolist()]


def texts(records) -> list[str]:
    return [record["generated_text"] for record in records]


# ---- text-generation


def test_texts_are_those_of_generate(pipe, model, tokenizer):
    """As long as the model takes; the checkpoint's own numbers unless others are given."""
    ids = tokenizer("the city", return_tensors="pt").input_ids
    expected = decoded(tokenizer, model.generate(ids, seed=7))
    assert texts(pipe("the city", seed=7)) == expected
    assert len(expected[0]) == LENGTH and expected[0].startswith("the city")
    assert texts(pipe("the city", seed=7, return_full_text=False)) == [expected[0][len("the city") :]]
    expected = decoded(tokenizer, model.generate(ids, num_return_sequences=3, max_new_tokens=4, **STEPS))
    assert texts(pipe("the city", num_return_sequences=3, max_new_tokens=4, **STEPS)) == expected
    assert {len(text) for text in expected} == {12}
    tokens = pipe("the city", return_tensors=True, **STEPS)[0]["generated_token_ids"]
    assert tokens == model.generate(ids, **STEPS)[0].tolist()


def test_gaps_of_several_tokens(pipe):
    masks = "[MASK]" * 3
    expected = texts(pipe(f"the {masks} of [MASK][MASK]", **STEPS))
    assert texts(pipe("the [MASK 3] of [MASK:2]", **STEPS)) == expected
    with pytest.raises(ValueError, match=r"a gap must have at least one token, got \[MASK 0\]"):
        pipe("the [MASK 0] of", **STEPS)


@pytest.mark.parametrize("kind", ["ar", "nce", "none"])
def test_the_best_of_some(tokenizer, kind):
    """The likeliest ways to fill a gap, the best first, by log mu - E: with an AR energy by log p_AR of the text."""
    model = randomize(EDLMModel(EDLMConfig(**SIZES, energy_type=kind)))
    pipe = EDLMTextGenerationPipeline(model=model, tokenizer=copy.deepcopy(tokenizer), device="cpu")
    prompt, both = "the [MASK 3] of [MASK] a", {"num_return_sequences": 2, **STEPS}
    canvas = tokenizer("the [MASK][MASK][MASK] of [MASK] a", return_tensors="pt").input_ids
    x = model.generate(canvas, num_return_sequences=6, **STEPS)
    score = model.score(x, canvas.expand_as(x))
    if kind == "ar":
        energy = model.energy_model.config
        log_p = causal_log_prob(model.energy_model, x, None, energy.bos_token_id, MASK)
        torch.testing.assert_close(score, log_p, atol=1e-4, rtol=1e-5)
    records, best = pipe(prompt, best_of=6, **both), score.argsort(descending=True)[:2]
    assert texts(records) == decoded(tokenizer, x[best])
    assert [record["score"] for record in records] == pytest.approx(score[best].tolist(), abs=1e-4)
    for settings, message in (({"best_of": 1}, "best_of must be .* num_return_sequences=2, got 1"),):
        with pytest.raises(ValueError, match=message):
            pipe(prompt, **settings, **both)
    with pytest.raises(ValueError, match="best_of=6 compares ways to fill gaps"):
        pipe("the city", best_of=6, **both)


def test_the_best_of_some_at_the_end_of_a_text(pipe, model, tokenizer):
    """What was cut off behind an EOS is not scored."""
    canvas, x = torch.tensor([[1, MASK, MASK, MASK, MASK]]), torch.tensor([[[1, 2, 5, 5, 5], [1, 2, 3, 4, 6]]])
    model.generation_config.eos_token_id = 5
    try:
        found = pipe._scores(canvas, x, None)
    finally:
        model.generation_config.eos_token_id = None
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    torch.testing.assert_close(found[0, 0], model.score(x[0, :1], canvas, mask)[0])
    torch.testing.assert_close(found[0, 1], model.score(x[0, 1:], canvas)[0])


def test_a_pipeline_can_be_shown(pipe, model, tokenizer):
    filling = pipeline("fill-mask", model=model.denoiser, tokenizer=tokenizer)
    for shown, name in ((repr(pipe), "EDLMModel"), (repr(filling), "EDLMForMaskedLM")):
        assert f"'model': '{name}'" in shown and "'output_modalities': ('text',)" in shown


def test_arguments_of_the_pipeline_hold_for_its_calls(model, tokenizer):
    config = model.generation_config_class(num_steps=3, max_length=9)
    fixed = EDLMTextGenerationPipeline(
        model=model, tokenizer=tokenizer, device="cpu", generation_config=config, num_candidates=2, max_length=11
    )
    ids = tokenizer("ab", return_tensors="pt").input_ids
    expected = model.generate(ids, num_steps=3, num_candidates=2, max_length=11, seed=1)
    assert texts(fixed("ab", seed=1)) == decoded(tokenizer, expected)
    expected = model.generate(ids, num_steps=6, num_candidates=2, max_length=10, seed=1)
    assert texts(fixed("ab", seed=1, num_steps=6, max_length=10)) == decoded(tokenizer, expected)


def test_an_empty_prompt_is_a_free_sample(pipe, model, tokenizer):
    expected = decoded(tokenizer, model.generate(num_return_sequences=2, **STEPS))
    assert texts(pipe("", num_return_sequences=2, **STEPS)) == expected and len(expected[0]) == LENGTH
    assert [texts(records) for records in pipe(["", "a"], **STEPS)][0] == expected[:1]


def test_prompts_in_a_batch(pipe, model, tokenizer):
    """The shipped tokenizers have no padding token; the one of the caller stays as it is."""
    assert tokenizer.pad_token is None and pipe.tokenizer.padding_side == "left"
    prompts = ["the city of", "a", "music and"]
    one_by_one = pipe(prompts, max_new_tokens=6, **STEPS)
    rows = []
    for row, prompt in enumerate(prompts):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        assert texts(one_by_one[row]) == decoded(tokenizer, model.generate(ids, max_new_tokens=6, **STEPS))
        rows.append(decoded(tokenizer, model.generate(ids, max_new_tokens=6, first_row=row, **STEPS)))
    batch = pipe(prompts, batch_size=3, max_new_tokens=6, **STEPS)
    assert [texts(records) for records in batch] == rows
    several = pipe(prompts, batch_size=2, num_return_sequences=2, max_new_tokens=6, **STEPS)
    assert [len(records) for records in several] == [2, 2, 2]
    for prompt, records in zip(prompts, several, strict=True):
        assert all(t.startswith(prompt) and len(t) == len(prompt) + 6 for t in texts(records))


def test_a_tokenizer_with_padding(model):
    vocabulary = {chr(97 + i): i for i in range(25)} | {"[PAD]": 25, "[UNK]": 26, "[MASK]": MASK}
    words = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", mask_token="[MASK]")
    pipe = EDLMTextGenerationPipeline(model=model, tokenizer=tokenizer, device="cpu")
    prompts, greedy = ["a b c", "d"], {"do_sample": False, "max_new_tokens": 4, "num_steps": 4}
    batch = pipe(prompts, batch_size=2, return_full_text=False, skip_special_tokens=False, **greedy)
    for row, (prompt, records) in enumerate(zip(prompts, batch, strict=True)):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        expected = model.generate(ids, first_row=row, **greedy)[0, ids.shape[1] :]
        assert texts(records) == [tokenizer.decode(expected)]


def test_masks_in_a_prompt_are_filled_in(pipe, model, tokenizer):
    prompt = "the [MASK][MASK][MASK][MASK] of"
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    assert int((ids == MASK).sum()) == 4
    expected = decoded(tokenizer, model.generate(ids, **STEPS))
    assert texts(pipe(prompt, **STEPS)) == expected
    assert expected[0].startswith("the ") and expected[0].endswith(" of") and len(expected[0]) == 11
    longer = texts(pipe([prompt, "a"], batch_size=2, max_new_tokens=3, **STEPS)[0])[0]
    assert longer.startswith("the ") and len(longer) == 14


def test_what_generate_counts_comes_along(pipe, model, tokenizer):
    ids = tokenizer("ab", return_tensors="pt").input_ids
    wanted = {"return_dict_in_generate": True, "output_history": True, "num_return_sequences": 2, **STEPS}
    expected = model.generate(ids, **wanted)
    records = pipe("ab", **wanted)
    assert texts(records) == decoded(tokenizer, expected.sequences)
    assert [r["nfe"] for r in records] == expected.nfe.tolist()
    assert [r["history"] for r in records] == torch.stack(expected.history, dim=1).tolist()
    batch = pipe(["ab", "abcd"], batch_size=2, **wanted)
    assert all(len(r["history"]) == 5 and len(r["energies"]) == 4 for records in batch for r in records)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_stepz": 3}, "no argument .*num_stepz"),
        ({"stop_sequence": "x"}, "stop_sequence .*'x'"),
        ({"handle_long_generation": "hole"}, "handle_long_generation .*'hole'"),
        ({"assistant_model": "x"}, "no argument .*assistant_model"),
        ({"max_new_tokens": 200}, "more than max_position_embeddings=24"),
    ],
    ids=str,
)
def test_mistakes_are_named(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe("ab", **arguments)


def test_a_model_that_is_passed_as_an_object(model, tokenizer):
    """The library then looks at no configuration: its own class runs the same `generate()`, or ours where named."""
    ids = tokenizer("ab", return_tensors="pt").input_ids
    expected = decoded(tokenizer, model.generate(ids, max_new_tokens=5, **STEPS))
    tokenizer = copy.deepcopy(tokenizer)
    stock = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    assert type(stock) is TextGenerationPipeline
    assert texts(stock("ab", max_new_tokens=5, **STEPS)) == expected
    ours = {"pipeline_class": EDLMTextGenerationPipeline, "tokenizer": tokenizer, "device": "cpu"}
    assert texts(pipeline("text-generation", model=model, **ours)("ab", max_new_tokens=5, **STEPS)) == expected


# ---- the configuration


def saved(config) -> dict:
    return json.loads(config.to_json_string())


def test_only_samplers_name_the_pipeline(tmp_path):
    for cls, is_sampler in ((EDLMModel, 1), (EDLMForMaskedLM, 1), (EDLMForCausalLM, 0), (EDLMEnergyModel, 0)):
        folder = tmp_path / cls.__name__
        cls(EDLMConfig(**SIZES, energy_type="nce" if cls is EDLMEnergyModel else "none")).save_pretrained(folder)
        written = json.loads((folder / "config.json").read_text())
        assert written.get("custom_pipelines") == (CUSTOM_PIPELINES if is_sampler else None)
        assert (folder / "pipeline_edlm.py").is_file()
        loaded = EDLMConfig.from_pretrained(folder)
        assert loaded.custom_pipelines == (CUSTOM_PIPELINES if is_sampler else {})
        assert saved(loaded).get("custom_pipelines") == written.get("custom_pipelines")


def test_the_pipelines_of_one_configuration_are_its_own():
    """pipeline() puts classes in place of their names."""
    config = EDLMConfig(**SIZES)
    config.custom_pipelines["text-generation"]["pt"] = (AutoTokenizer,)
    assert EDLMConfig(**SIZES).custom_pipelines == CUSTOM_PIPELINES
    other = {"text-generation": {"impl": "mine.Mine", "pt": ["AutoModel"]}}
    assert saved(EDLMConfig(**SIZES, custom_pipelines=other))["custom_pipelines"] == other


def test_the_shipped_models_name_it():
    for path in (ROOT / "hub_cards").glob("edlm-*/config.json"):
        config = json.loads(path.read_text())
        is_sampler = config["architectures"] == ["EDLMModel"]
        assert config.get("custom_pipelines") == (CUSTOM_PIPELINES if is_sampler else None), path


# ---- fill-mask


def test_fill_mask(model, tokenizer):
    fill = pipeline("fill-mask", model=model.denoiser, tokenizer=tokenizer, device="cpu")
    ids = tokenizer("the c[MASK]ty", return_tensors="pt").input_ids
    answers = fill("the c[MASK]ty", top_k=3)
    with torch.no_grad():
        p = model.denoiser(ids).logits[0, 5].softmax(-1)
    assert [a["token"] for a in answers] == p.topk(3).indices.tolist()
    assert [a["score"] for a in answers] == pytest.approx(p.topk(3).values.tolist())
    assert answers[0]["sequence"] == tokenizer.decode(torch.where(ids == MASK, answers[0]["token"], ids)[0])
    several = fill(["t[MASK]e c[MASK]ty", "[MASK]"])
    assert [len(part) for part in several] == [2, 5] and len(several[0][0]) == 5


# ---- folders, by their own code alone

REMOTE = """
import json, sys
sys.modules["modeling_edlm"] = None  # an import of the package would fail
from transformers import pipeline

whole, denoiser, ar, out = sys.argv[1:]
fixed = {"trust_remote_code": True, "device": "cpu"}
steps = {"num_steps": 4, "num_candidates": 3, "seed": 7}
result, classes = {}, {}
for name, task, folder in (("whole", "text-generation", whole), ("untold", None, whole),
                           ("denoiser", "text-generation", denoiser)):
    pipe = pipeline(task, model=folder, **fixed)
    classes[name] = [type(pipe).__name__, type(pipe.model).__name__]
    result[name] = pipe("the city", **steps)[0]["generated_text"]
batch = pipeline(model=whole, **fixed)(["the city of", "a"], batch_size=2, max_new_tokens=6, **steps)
result["batch"] = [records[0]["generated_text"] for records in batch]
pipe.save_pretrained(out + "-again")
result["again"] = pipeline(model=out + "-again", **fixed)("the city", **steps)[0]["generated_text"]
pipe = pipeline("text-generation", model=ar, **fixed)
classes["ar"] = [type(pipe).__name__, type(pipe.model).__name__]
result["ar"] = pipe("the city", max_new_tokens=5, do_sample=False)[0]["generated_text"]
pipe = pipeline("fill-mask", model=whole, **fixed)
classes["fill-mask"] = [type(pipe).__name__, type(pipe.model).__name__]
result["fill-mask"] = [a["token"] for a in pipe("the c[MASK]ty")]
result["several"] = [[a["token"] for a in answers] for answers in pipe("t[MASK]e c[MASK]ty")]
json.dump([result, classes], open(out, "w"))
"""


def load_script(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_folders_work_without_the_package(tmp_path, model, tokenizer):
    """Whole model, denoiser alone, AR model alone: as saved, and the whole also with the code of a published folder."""
    assemble = load_script(ROOT / "hub_cards" / "publish" / "assemble.py")
    ar = randomize(EDLMForCausalLM(EDLMConfig(**SIZES)))
    parts = {"whole": model, "denoiser": model.denoiser, "ar": ar}
    for name, part in parts.items():
        part.save_pretrained(tmp_path / name)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(SHIPPED / file, tmp_path / name)
    assemble.assemble(tmp_path / "whole", assemble.model_code())
    assemble.assemble(tmp_path / "whole" / "custom_generate", assemble.generate_code())

    script, out = tmp_path / "remote.py", tmp_path / "result"
    script.write_text(REMOTE)
    env = os.environ | {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1"}
    env |= {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    env.pop("PYTHONPATH", None)
    command = [sys.executable, script, *(tmp_path / name for name in parts), out]
    done = subprocess.run(command, env=env, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "is not supported" not in done.stderr
    result, classes = json.loads(out.read_text())

    ids = tokenizer("the city", return_tensors="pt").input_ids
    whole, plain = (decoded(tokenizer, part.generate(ids, **STEPS))[0] for part in (model, model.denoiser))
    assert result["whole"] == result["untold"] == whole
    assert result["denoiser"] == result["again"] == plain != whole
    assert [len(text) for text in result["batch"]] == [17, 7]
    assert result["ar"] == decoded(tokenizer, ar.generate(ids, max_new_tokens=5, do_sample=False))[0]
    fill = pipeline("fill-mask", model=model.denoiser, tokenizer=tokenizer, device="cpu")
    assert result["fill-mask"] == [a["token"] for a in fill("the c[MASK]ty")]
    assert result["several"] == [[a["token"] for a in answers] for answers in fill("t[MASK]e c[MASK]ty")]
    ours, stock = "EDLMTextGenerationPipeline", "TextGenerationPipeline"
    assert classes == {
        "whole": [ours, "EDLMModel"],
        "untold": [ours, "EDLMModel"],
        "denoiser": [ours, "EDLMModel"],
        "ar": [stock, "EDLMForCausalLM"],
        "fill-mask": ["FillMaskPipeline", "EDLMForMaskedLM"],
    }
