"""hub_cards/publish/showcase.py on a tiny model: three samplers side by side, and how it was trained."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from hub_cards.demo import GAP, MARK
from hub_cards.publish import showcase
from modeling_edlm import EDLMConfig, EDLMForCausalLM, EDLMForMaskedLM, EDLMModel
from training import pretrain

ROOT = Path(__file__).resolve().parent.parent
TOKENIZER = ROOT / "training" / "tokenizers" / "stories"
SIZES = {"vocab_size": 2048, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "cond_dim": 0}
SIZES |= {"max_position_embeddings": 128, "bos_token_id": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("showcase") / "edlm-tiny"
    torch.manual_seed(0)
    denoiser, *causal = EDLMForMaskedLM(EDLMConfig(**SIZES)), *(EDLMForCausalLM(EDLMConfig(**SIZES)) for _ in range(2))
    for part in (denoiser, *causal):
        for parameter in part.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    model = EDLMModel.from_components(denoiser, causal[0], "ar")
    model.generation_config = type(model.generation_config)(
        num_steps=8, num_candidates=3, energy_window=(0.6, 0.0), shared_completion=True, eos_token_id=2, pad_token_id=0
    )
    model.generation_config.corrector_steps = 4
    model.save_pretrained(folder)
    causal[1].save_pretrained(folder / "judge")
    (folder / "judge" / "words.txt").write_text("the\ndog\n")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder)
    return folder


def test_three_samplers_side_by_side(folder, tmp_path):
    out, run = tmp_path / "edlm-tiny.json", tmp_path / "ar"
    (tmp_path / "texts").mkdir()
    for split in ("train", "validation"):
        (tmp_path / "texts" / f"{split}.txt").write_text("The dog ran to the park. " * 40)
    trained = {"objective": "ar", "data": tmp_path / "texts", "tokenizer": TOKENIZER, "output_dir": run, "length": 16}
    trained |= {"hidden_size": 16, "num_hidden_layers": 1, "max_steps": 2, "batch_size": 2, "report_to": "none"}
    pretrain.main([str(part) for name, value in trained.items() for part in (f"--{name}", value)])
    command = ["--model", str(folder), "--out", str(out), "--num_samples", "3", "--num_shown", "2"]
    for _ in range(2):  # the second time over its own results: a run is there once
        showcase.main([*command, "--runs", f"ar={run}"])
    results, tokenizer = json.loads(out.read_text()), AutoTokenizer.from_pretrained(folder)
    (ar,) = results["training"]["ar"]
    assert ar["steps"] == 2 and ar["curve"][-1]["validation_bits_per_character"] > 0
    assert results["command"].startswith("python -m hub_cards.publish.showcase --model")
    assert out.with_suffix(".png").stat().st_size > 1000
    rows = {}
    for row in results["texts"]:
        rows.setdefault((row["task"], row["row"]), {})[row["sampler"]] = row
    assert len(rows) == 2 + len(showcase.PROMPTS) + 1
    left, right = (part for i, part in enumerate(MARK.split(GAP)) if i != 1)
    for (task, _), samplers in rows.items():
        assert list(samplers) == ["AR", "MDLM", "EDLM"]
        assert samplers["MDLM"]["passes"] == pytest.approx(samplers["EDLM"]["passes"], rel=0.5)
        for row in samplers.values():
            given = (left, right) if task == GAP else ("" if task == "free" else task, "")
            text = row["text"]
            # an EOS that was drawn within a gap ends the text that is shown
            assert text.startswith(given[0]) and (text.endswith(given[1]) or row["sampler"] != "AR")
    gap = rows[GAP, 0]["AR"]
    blanks = int(MARK.search(GAP)[1])
    assert gap["passes"] == blanks
    for row in results["samplers"].values():
        assert 0 <= row["known_words"]["mean"] <= 1 and len(row["per_sample"]["bits"]) == 3
        assert row["judge"]["mean"] == pytest.approx(
            sum(row["per_sample"]["bits"]) / sum(row["per_sample"]["characters"])
        )
    assert list(results["samplers"]) == ["AR", "MDLM", "MDLM, revised", "EDLM"]
    assert results["samplers"]["MDLM, revised"]["passes"] == pytest.approx(8 + 4 * 3, abs=3)  # rounds for energy passes
    mdlm, edlm = (results["samplers"][sampler]["judge"] for sampler in ("MDLM", "EDLM"))
    assert results["lead"]["mean"] == pytest.approx(mdlm["mean"] - edlm["mean"])
    assert tokenizer.mask_token_id == 2047


def test_bad_arguments_are_named(folder, tmp_path):
    for wrong, message in (
        (["--num_shown", "1"], "num_shown must lie in"),
        (["--runs", f"ar={tmp_path}"], "metrics.jsonl"),
    ):
        with pytest.raises(ValueError, match=message):
            showcase.main(["--model", str(folder), "--out", str(tmp_path / "x.json"), *wrong])
