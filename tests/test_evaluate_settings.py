"""training/evaluate_settings.py and common/judge.py on toys: bounds are likelihood()'s, samples are generate()'s."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from modeling_edlm import EDLMConfig, EDLMForCausalLM, EDLMModel
from modeling_edlm.likelihood import likelihood_terms
from support.toy import MASK, make_toy
from training import evaluate_settings
from training.common import settings
from training.common.components import pass_cost
from training.common.data import character_tokenizer
from training.common.judge import Judge, before_end

TOKENIZER = Path(__file__).parent.parent / "training" / "tokenizers" / "stories"
LENGTH, WINDOWS = 8, [(1.0, 0.0), (0.5, 0.0), (0.3, 0.2)]


def causal(seed: int, **sizes) -> EDLMForCausalLM:
    torch.manual_seed(seed)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "cond_dim": 0}
    model = EDLMForCausalLM(EDLMConfig(**small | {"vocab_size": MASK + 1, "max_position_embeddings": LENGTH} | sizes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("settings")
    energy = causal(0)
    EDLMModel.from_components(make_toy("none", length=LENGTH).denoiser, energy, "ar").save_pretrained(root / "edlm")
    character_tokenizer("ab ").save_pretrained(root / "edlm")
    for name, judge in (("judge", causal(1)), ("energy", energy)):
        judge.save_pretrained(root / name)
        (root / name / "words.txt").write_text("a\nab\nba\n")
    (root / "data").mkdir()
    letters = np.random.default_rng(0).choice(list("ab "), p=[0.5, 0.3, 0.2], size=400)
    (root / "data" / "validation.txt").write_text("".join(letters))
    return root


def command(root: Path, judge: str = "judge", **changes) -> list[str]:
    options = {"model": root / "edlm", "judge": root / judge, "data": root / "data", "out": root / "out" / "all.json"}
    options |= {"num_steps": "2,4", "num_candidates": "2,3", "windows": "1:0,0.5:0,0.3:0.2", "num_sequences": 5}
    options |= {"num_times": 2, "inner_samples": 2, "num_samples": 3, "passes": 6, "tolerance": 0.5}
    options |= {"correctors": "2:1:3:1,3:4:2:0.5", "temperatures": "1,0.5"}
    return [str(part) for k, v in (options | changes).items() for part in (f"--{k}", v)]


@pytest.fixture(scope="module")
def results(root) -> dict:
    evaluate_settings.main(command(root))
    return json.loads((root / "out" / "all.json").read_text())


def test_the_grid_is_whole(results, root):
    assert len(results["rows"]) == 2 * (1 + 2 * len(WINDOWS) + 2)
    assert [row["temperature"] for row in results["temperatures"]] == [1, 1, 0.5, 0.5]
    assert results["temperatures"][1] == results["chosen"]  # the same seeds
    for name in ("all.png", "all-frontier.png"):
        assert (root / "out" / name).stat().st_size > 1000
    assert results["command"].startswith("python -m training.evaluate_settings") and str(root) in results["command"]
    near = [row for row in results["rows"] if row["window"] and 3 <= row["samples"]["passes"] <= 9]
    assert results["chosen"] == min(near, key=lambda row: row["samples"]["judge"]["mean"])
    table = settings.table(results)
    assert len(table.splitlines()) == 2 + len(results["rows"]) + 3 + 2 + 4 + 1
    assert "MDLM" in table and "k=3, 2 rounds of 1" in table


def test_bounds_are_those_of_likelihood(results, root):
    """Of each window and k alone, though all of a T were measured at once."""
    model = EDLMModel.from_pretrained(root / "edlm").eval()
    tokenizer = AutoTokenizer.from_pretrained(root / "edlm")
    ids = tokenizer((root / "data" / "validation.txt").read_text()).input_ids
    starts = torch.arange(5) * math.ceil(len(ids) / LENGTH) // 5 * LENGTH
    x0_BL = torch.stack([torch.tensor(ids[i : i + LENGTH]) for i in starts.tolist()])
    for row in results["rows"]:
        if row["corrector"][0]:
            assert row["bound"] is None
            continue
        terms = likelihood_terms(
            model,
            x0_BL,
            settings=[(2, 1.0), (3, 1.0)],
            num_steps=row["num_steps"],
            energy_window=tuple(row["window"] or (1.0, 0.0)),
            shared_completion=True,
            num_samples=2,
            num_times=2,
        )
        nll_BJ = terms.nll_BJC[..., row["num_candidates"] - 2] if row["window"] else terms.mdlm_BJ
        per_character = math.log(2) * LENGTH
        assert row["bound"]["mean"] == pytest.approx(float(nll_BJ.mean()) / per_character, rel=1e-6)
        if row["window"]:
            assert row["gain"]["mean"] == pytest.approx(
                float((terms.mdlm_BJ - nll_BJ).mean()) / per_character, abs=1e-6
            )


def test_samples_are_those_of_generate(results, root):
    model, judge = EDLMModel.from_pretrained(root / "edlm").eval(), causal(1)
    for row in (results["rows"][0], results["rows"][-1], *results["temperatures"]):
        output = model.generate(
            batch_size=3,
            num_steps=row["num_steps"],
            num_candidates=row["num_candidates"],
            energy_window=tuple(row["window"] or (1.0, 0.0)),
            corrector_steps=row["corrector"][0],
            corrector_size=row["corrector"][1],
            corrector_temperature=row["corrector"][2],
            temperature=row["temperature"],
            shared_completion=True,
            seed=0,
            return_dict_in_generate=True,
        )
        bits = [bits_of(judge, text, MASK) for text in output.sequences]
        assert row["samples"]["per_sample"]["bits"] == pytest.approx(bits, rel=1e-4)
        assert row["samples"]["judge"]["mean"] == pytest.approx(sum(bits) / 3 / LENGTH, rel=1e-4)
        spent_B = output.nfe + pass_cost(model) * output.energy_nfe
        assert row["samples"]["passes"] == pytest.approx(float(spent_B.double().mean()))


def bits_of(judge: EDLMForCausalLM, text_L: torch.Tensor, mask: int) -> float:
    """Token by token, one forward pass for each prefix."""
    bits = 0.0
    for i, token in enumerate(text_L.tolist()):
        with torch.no_grad():
            logits = judge(torch.tensor([[judge.config.bos_token_id, *text_L[:i].tolist()]])).logits[0, -1]
        logits[mask] = float("-inf")
        bits -= math.log2(logits.double().softmax(-1)[token])
    return bits


def test_what_is_there_is_not_measured_again(results, root, monkeypatch):
    for name in ("bounds", "samples"):
        monkeypatch.setattr(evaluate_settings, name, None)
    evaluate_settings.main(command(root))
    again = json.loads((root / "out" / "all.json").read_text())
    assert again["rows"] == results["rows"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"judge": "energy"}, "judge=.* is the energy itself"),
        ({"judge": "edlm"}, "judge must have a list of words"),
        ({"windows": "0.4"}, "windows must be hi:lo .*0.4"),
        ({"windows": "x:0"}, "windows must be hi:lo .*'x:0'"),
        ({"num_candidates": "1,2"}, "num_candidates must be at least 2, got '1,2'"),
        ({"correctors": "4:0:2:1"}, "corrector_size must be an integer of at least 1, got 0"),
        ({"correctors": "4:8:2:0"}, "corrector_temperature must be positive"),
        ({"correctors": "4"}, "correctors must be rounds:size:k:temperature .*'4'"),
        ({"temperatures": "0"}, "temperature must be positive, got 0.0"),
        ({"sample_dtype": "float16"}, "sample_dtype must be float32 or bfloat16, got 'float16'"),
        ({"num_samples": 1}, "num_samples must be at least 2, got 1"),
        ({"out": "x.txt"}, "out must end in .json"),
    ],
)
def test_bad_arguments_are_named(root, changes, message):
    with pytest.raises(ValueError, match=message):
        evaluate_settings.main(command(root, **changes))


def test_the_judge_reads_up_to_the_end_of_a_text():
    """Bits token by token; what follows the EOS counts for nothing, and neither do positions that are left out."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    sizes = {"vocab_size": len(tokenizer), "bos_token_id": 1, "max_position_embeddings": 32}
    judge = Judge(causal(2, **sizes), tokenizer, {"the", "dog", "ran"})
    texts = ["The dog ran to the zorp. He", "A cat sat."]
    ids = [tokenizer(text).input_ids for text in texts]
    x_BL = torch.full((2, 20), 7)
    for row, text in zip(x_BL, ids, strict=True):
        row[: len(text) + 1] = torch.tensor([*text, tokenizer.eos_token_id])
    assert before_end(x_BL, tokenizer.eos_token_id).sum(-1).tolist() == [len(text) + 1 for text in ids]
    read = judge.read(x_BL)
    for b, text in enumerate(ids):
        bits = bits_of(judge.scorer, x_BL[b, : len(text) + 1], tokenizer.mask_token_id)
        assert read["bits"][b] == pytest.approx(bits, rel=1e-5) and read["characters"][b] == len(texts[b])
    assert read["known_words"].tolist() == [3 / 5, 0.0]  # dog ran to the zorp, and cat
    where_BL = torch.arange(20).expand(2, 20) >= 3
    late = judge.read(x_BL, where_BL)
    first = bits_of(judge.scorer, x_BL[0, :3], tokenizer.mask_token_id)
    assert late["bits"][0] == pytest.approx(read["bits"][0] - first, rel=1e-4)
    assert late["characters"][0] == len(tokenizer.decode(ids[0][3:]))
