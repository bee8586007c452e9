"""training/evaluate_likelihood.py and components.py on toy models: the whole command, and what its numbers must equal.

One run of three energies, the shared fixture, is compared with direct calls and with runs that were stopped, cut or
shared in other ways.
"""

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import GPT2Config, GPT2LMHeadModel

from modeling_edlm import EDLMModel
from modeling_edlm.likelihood import likelihood_terms
from support.toy import make_toy
from training import evaluate_likelihood
from training.common.components import body_parameters, load_variants, pass_cost
from training.common.data import character_tokenizer
from training.pretrain import ar_loss

LENGTH, NUM_SEQUENCES, NUM_STEPS, SETTINGS = 5, 6, (2, 4), ((2, 1.0), (2, 2.0), (3, 1.0), (3, 2.0))
PLAIN = 5  # draws without an energy
LIKELIHOOD_OPTIONS = {"num_samples": 4, "num_times": 3, "seed": 7}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model with an NCE energy, a coAR and a step energy, an AR model and two texts of some 50 characters."""
    root = tmp_path_factory.mktemp("toys")
    sizes = {"length": LENGTH, "dropout": 0.0}
    make_toy("nce", **sizes).save_pretrained(root / "model")
    character_tokenizer("abc", model_max_length=LENGTH).save_pretrained(root / "model")
    make_toy("coar", seed=1, **sizes).energy_model.save_pretrained(root / "lm")
    make_toy("nce", "xs", seed=2, **sizes).energy_model.save_pretrained(root / "step")
    make_toy("none", **sizes).denoiser.save_pretrained(root / "denoiser")
    character_tokenizer("abc", model_max_length=LENGTH).save_pretrained(root / "denoiser")
    rng = np.random.default_rng(0)
    for name in ("first", "second"):
        (root / f"{name}.txt").write_text("".join(rng.choice(list("abc"), 52)))
    return root


def options(root, out, **changes) -> list[str]:
    values = {
        "model": root / "model",
        "energies": f"coar={root / 'lm'},nce={root / 'step'}",
        "ar": root / "lm",
        "data": root / "first.txt",
        "num_sequences": NUM_SEQUENCES,
        "num_steps": ",".join(map(str, NUM_STEPS)),
        "num_candidates": "1,2,3",
        "energy_temperatures": "1,2",
        "chunk": 2,
        "batch_size": 4,
        "energy_batch_size": 8,
        "cache_dir": root / "tokens",
        "out": out,
        "num_threads": 1,
        "num_times_plain": PLAIN,
    } | LIKELIHOOD_OPTIONS
    return [part for k, v in (values | changes).items() for part in (f"--{k}", str(v))]


def results_of(out) -> dict:
    return json.loads(Path(out).read_text())


def numbers(results: dict) -> list[dict]:
    """All that must not depend on how the work was done."""

    def without_seconds(value):
        if isinstance(value, dict):
            return {k: without_seconds(v) for k, v in value.items() if k != "seconds_per_sequence"}
        return [without_seconds(v) for v in value] if isinstance(value, list) else value

    return without_seconds(results["data"])


def assert_close(a, b, tolerance=1e-5):
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_close(a[key], b[key], tolerance)
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_close(x, y, tolerance)
    else:
        assert a == (pytest.approx(b, abs=tolerance) if isinstance(b, float) else b)


@pytest.fixture(scope="module")
def whole(folders, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "new" / "toy.json"
    evaluate_likelihood.main(options(folders, out, data=f"{folders / 'first.txt'},{folders / 'second.txt'}"))
    AcceleratorState._reset_state(reset_partial_state=True)
    return out


@pytest.fixture(scope="module")
def variants(folders):
    return load_variants(str(folders / "model"), [f"coar={folders / 'lm'}", f"nce={folders / 'step'}"])


@pytest.fixture(scope="module")
def x0(folders) -> torch.Tensor:
    """The six blocks, of ten whole ones, that are scored of the first text."""
    text = (folders / "first.txt").read_text()
    starts = [i * (len(text) // LENGTH) // NUM_SEQUENCES * LENGTH for i in range(NUM_SEQUENCES)]
    return torch.tensor([["abc".index(c) for c in text[start : start + LENGTH]] for start in starts])


def summary(nats_B: torch.Tensor) -> dict:
    """Bits per token and standard error over sequences."""
    bits_B = nats_B / math.log(2) / LENGTH
    return {"mean": float(bits_B.mean()), "stderr": float(bits_B.std()) / math.sqrt(len(bits_B))}


# ---- the numbers


def test_sampler_rows_are_those_of_likelihood(whole, variants, x0):
    rows = [row for row in results_of(whole)["data"][0]["rows"] if row["estimator"] == "sampler"]
    assert len(rows) == len(NUM_STEPS) * (1 + len(variants) * len(SETTINGS))
    for row in rows:
        k, tau = row["num_candidates"], row["energy_temperature"] or 1.0
        model = variants[row["energy"] or "coar"]
        same = {"num_steps": row["num_steps"], "energy_window": (1.0, 0.0)} | LIKELIHOOD_OPTIONS
        output = model.likelihood(x0, num_candidates=k, energy_temperature=tau, **same)
        nll_B = model.likelihood(x0, num_candidates=1, **same | {"num_times": PLAIN}).nll - (k > 1) * output.gain
        assert_close(row["bits_per_token"], summary(nll_B))
        assert_close(row["bits_per_character"], summary(nll_B))  # a token is a character here, and a byte
        assert_close(row["bits_per_byte"], summary(nll_B))
        assert (row["energy"] is None) == (k == 1) == (row["gain"] is None)
        if row["energy"]:
            assert_close(row["gain"], summary(output.gain))
            assert row["ess"] == pytest.approx(float(output.ess.mean()), abs=1e-5)  # as many draws for each sequence


def test_gains_by_time_add_up(whole):
    for data in results_of(whole)["data"]:
        for row in data["rows"]:
            if row["gain"]:
                buckets = row["by_time"]
                assert sum(bucket["gain"]["mean"] for bucket in buckets) == pytest.approx(row["gain"]["mean"])
                assert sum(bucket["num_draws"] for bucket in buckets) == 3 * NUM_SEQUENCES
                weighted = [bucket["num_draws"] * bucket["ess"] for bucket in buckets if bucket["num_draws"]]
                assert sum(weighted) / (3 * NUM_SEQUENCES) == pytest.approx(row["ess"])


def test_buckets_hold_their_upper_end():
    t_BJ = np.array([[0.2, 0.6, 1.0], [0.01, 0.61, 0.8]])
    buckets = evaluate_likelihood.by_time(t_BJ, np.ones((2, 3)), np.full((2, 3), 2.0), np.array([4, 4]))
    assert [bucket["num_draws"] for bucket in buckets] == [2, 0, 1, 2, 1]
    assert [bucket["ess"] for bucket in buckets] == [2, None, 2, 2, 2]


def test_other_estimators(whole, variants, x0):
    rows = {
        (row["estimator"], row["energy"], row["log_z"]): row["bits_per_token"]
        for row in results_of(whole)["data"][0]["rows"]
        if row["estimator"] != "sampler"
    }
    coar, nce = variants["coar"], variants["nce"]
    with torch.no_grad():
        exact = ar_loss(coar.energy_model, x0, coar.energy_model.config.bos_token_id, 3).sum(-1)
    assert_close(rows.pop(("ar", None, None)), summary(exact))
    draws = {"num_times": 3, "seed": 7}
    plain = draws | {"num_times": PLAIN}
    assert_close(rows.pop(("mdlm", None, None)), summary(nce.likelihood(x0, estimator="mdlm", **plain).nll))
    for name in ("nce", "coar"):  # there is no published form for a step energy
        output = variants[name].likelihood(x0, estimator="paper", num_samples=4, **draws)
        assert_close(rows.pop(("paper", name, "lower")), summary(output.nll))
        assert_close(rows.pop(("paper", name, "upper")), summary(output.nll_upper))
    assert not rows


def test_shared_completions(folders, variants, x0, tmp_path):
    """Rows of their own, equal to a direct call; a step energy has no completion to share."""
    run = options(folders, tmp_path / "a.json", estimators="sampler", completions="shared", num_shared_samples=2)
    evaluate_likelihood.main(run)
    rows = [row for row in results_of(tmp_path / "a.json")["data"][0]["rows"] if row["energy"]]
    assert {row["energy"] for row in rows} == {"nce, shared", "coar, shared"}
    same = {"energy_window": (1.0, 0.0), "settings": SETTINGS, "shared_completion": True} | LIKELIHOOD_OPTIONS
    for row in rows:
        model = variants[row["energy"].removesuffix(", shared")]
        terms = likelihood_terms(model, x0, num_steps=row["num_steps"], **same | {"num_samples": 2})
        nll_BJ = terms.nll_BJC[..., SETTINGS.index((row["num_candidates"], row["energy_temperature"]))]
        assert_close(row["gain"], summary((terms.mdlm_BJ - nll_BJ).mean(-1)))
    evaluate_likelihood.main(options(folders, tmp_path / "b.json", estimators="sampler", only="step"))
    assert {row["energy"] for row in results_of(tmp_path / "b.json")["data"][0]["rows"]} == {None, "step"}
    with pytest.raises(ValueError, match="only must name energies"):
        evaluate_likelihood.main(options(folders, tmp_path / "c.json", only="ar"))


def test_exact_nll_in_pieces_is_whole(variants, x0, monkeypatch):
    """Few rows at a time, as with a large vocabulary."""
    whole = evaluate_likelihood.exact_nll(variants["coar"], x0, 6)
    monkeypatch.setattr("modeling_edlm.backbone.CHUNK", 2 * LENGTH * 4)
    torch.testing.assert_close(evaluate_likelihood.exact_nll(variants["coar"], x0, 5), whole)


def test_edlm_against_twice_the_steps(whole, variants, x0):
    double = results_of(whole)["data"][0]["versus_double"]
    assert len(double) == len(variants) * len(SETTINGS) and {row["num_steps"] for row in double} == {2}
    for row in double:
        name, setting = row["energy"], (row["num_candidates"], row["energy_temperature"])
        same = {"energy_window": (1.0, 0.0), "settings": [setting]} | LIKELIHOOD_OPTIONS
        plain = same | {"settings": [(1, 1.0)], "num_times": PLAIN}
        terms = likelihood_terms(variants[name], x0, num_steps=2, **same)
        gain = (terms.mdlm_BJ - terms.nll_BJC[..., 0]).mean(-1)
        at_t, at_2t = (likelihood_terms(variants[name], x0, num_steps=T, **plain).mdlm_BJ.mean(-1) for T in (2, 4))
        assert_close(row["difference"], summary(at_t - gain - at_2t))
        assert row["is_at_most_zero"] == (row["difference"]["mean"] <= 0)


def test_passes_are_those_of_generate(variants):
    """Expected forward passes against counted ones, over many samples."""
    for num_steps, low in ((3, 0.0), (8, 0.5)):
        expected = evaluate_likelihood.passes(num_steps, 2, low, LENGTH)
        output = variants["nce"].generate(
            batch_size=400, num_steps=num_steps, num_candidates=2, energy_window=(1.0, low), seed=0,
            return_dict_in_generate=True,
        )  # fmt: skip
        stderr = float(output.nfe.double().std()) / math.sqrt(400)
        assert abs(float(output.nfe.double().mean()) - expected["denoiser_passes"]) < 4 * stderr
        acted_B = (~output.energies.isnan()).sum(-1).double()
        stderr = 2 * float(acted_B.std()) / math.sqrt(400)
        assert abs(2 * float(acted_B.mean()) - expected["energy_passes"]) < 4 * stderr
        assert (output.energy_nfe <= 2 * acted_B).all()  # equal candidates are scored once
    assert evaluate_likelihood.passes(3, 1, 0.0, LENGTH)["energy_passes"] == 0


def test_standard_error_of_a_ratio():
    """Bits per unit where sequences have different numbers of units, against a simulation."""
    rng = np.random.default_rng(0)

    def sample(B):
        units_B = rng.integers(3, 9, B)
        return evaluate_likelihood.ratio(2.0 * units_B + rng.normal(0, 1, B), units_B)

    many = [sample(200) for _ in range(400)]
    spread = np.std([value["mean"] for value in many])
    assert np.mean([value["stderr"] for value in many]) == pytest.approx(spread, rel=0.15)
    assert sample(1)["stderr"] is None


# ---- how the work is done


def test_a_stopped_run_goes_on_to_the_same_numbers(folders, whole, tmp_path, monkeypatch, capsys):
    out, calls = tmp_path / "toy.json", []
    run = options(folders, out, data=f"{folders / 'first.txt'},{folders / 'second.txt'}")

    def stopping(*args, **kwargs):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return likelihood_terms(*args, **kwargs)

    monkeypatch.setattr(evaluate_likelihood, "likelihood_terms", stopping)
    with pytest.raises(KeyboardInterrupt):
        evaluate_likelihood.main(run)
    assert not out.exists()
    before = len(list(out.with_suffix(".parts").iterdir()))
    monkeypatch.setattr(evaluate_likelihood, "likelihood_terms", likelihood_terms)
    evaluate_likelihood.main(run)
    results, parts = results_of(out), sorted(out.with_suffix(".parts").iterdir())
    assert numbers(results) == numbers(results_of(whole))  # bit for bit
    assert len(parts) == 2 * 3 * (1 + 1 + 2 + (1 + 3) * 2) and 5 <= before < len(parts)
    assert all(path.suffix == ".npz" for path in parts)  # nothing temporary left

    for path in parts[::3]:
        path.unlink()
    kept = {path: path.stat().st_mtime_ns for path in parts[1::3]}
    evaluate_likelihood.main(run)
    assert numbers(results_of(out)) == numbers(results)
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    assert sorted(out.with_suffix(".parts").iterdir()) == parts

    parts[0].write_bytes(parts[0].read_bytes()[:100])
    with pytest.raises(ValueError, match=f"{parts[0].name} is corrupted"):
        evaluate_likelihood.main(run)


def test_parts_of_another_run_are_not_taken(folders, tmp_path, monkeypatch):
    out = tmp_path / "toy.json"
    small = {"num_steps": 2, "num_candidates": 2, "estimators": "sampler", "ar": "", "energies": "", "chunk": 3}

    def num_parts(**changes):
        evaluate_likelihood.main(options(folders, out, **small | changes))
        return len(list(out.with_suffix(".parts").glob("*-nce-*")))  # those with the energy

    total = num_parts()
    assert total == 2
    assert num_parts() == num_parts(batch_size=3, energy_batch_size=5) == total  # what has no part in the numbers
    changes = {"seed": 8, "num_samples": 3, "num_times": 2, "window_low": 0.5, "num_steps": 3, "num_candidates": 3}
    changes |= {"energy_temperatures": 2, "mixed_precision": "bf16", "model": folders / "other"}
    changes |= {"data": folders / "second.txt"}
    other = EDLMModel.from_pretrained(folders / "model")
    with torch.no_grad():
        other.energy_model.network.fc2.weight += 1e-3
    other.save_pretrained(folders / "other")
    character_tokenizer("abc", model_max_length=LENGTH).save_pretrained(folders / "other")
    for name, value in changes.items():
        assert num_parts(**{name: value}) == (total := total + 2), name
    monkeypatch.setattr(evaluate_likelihood, "code_fingerprint", lambda: "another estimator")
    assert num_parts() == total + 2


def test_chunks_and_batches_play_no_part(folders, whole, tmp_path):
    evaluate_likelihood.main(options(folders, tmp_path / "a.json", chunk=5, batch_size=100, energy_batch_size=3))
    assert_close(numbers(results_of(tmp_path / "a.json")), numbers(results_of(whole))[:1])


def test_two_processes_share_the_parts(folders, whole, tmp_path):
    """Each part is made once, and the numbers are those of one process."""
    out = tmp_path / "toy.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "training.evaluate_likelihood", *options(folders, out)]
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=Path(__file__).parents[1], env=env, check=True, capture_output=True, text=True)
    assert results_of(out)["num_processes"] == 2
    assert_close(numbers(results_of(out)), numbers(results_of(whole))[:1])
    assert done.stdout.count("| MDLM |") == 1  # one of them prints
    assert len(list(out.with_suffix(".parts").iterdir())) == 3 * (1 + 1 + 2 + (1 + 3) * 2)


def test_processes_that_do_not_know_of_each_other_are_refused(folders, tmp_path, monkeypatch):
    """Each would do all the work, and both would write the results."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="WORLD_SIZE is 2, .*ACCELERATE_USE_CPU"):
        evaluate_likelihood.main(options(folders, tmp_path / "a.json"))


# ---- what is written


def test_files_and_tables(whole, capsys):
    results = results_of(whole)
    assert results["command"].startswith("python -m training.evaluate_likelihood --model ")
    assert "--data data/first.txt,data/second.txt" in results["command"] and "--out toy.json" in results["command"]
    assert str(whole.parent) not in results["command"]
    assert results.keys() >= set("git_commit cpu_name threads versions date dtype precision seed device notes".split())
    assert (results["precision"], results["seed"]) == ("float32", 7)
    assert list(results["energies"]) == ["nce", "coar", "step"]
    for data, name in zip(results["data"], ("first", "second"), strict=True):
        assert (data["name"], data["num_sequences"], data["length"]) == (name, NUM_SEQUENCES, LENGTH)
        assert data["tokens"] == data["characters"] == data["bytes"] == NUM_SEQUENCES * LENGTH
    with open(whole.with_suffix(".csv"), newline="") as file:
        lines = list(csv.DictReader(file))
    rows = [row for data in results["data"] for row in data["rows"]]
    assert len(lines) == len(rows)
    for line, row in zip(lines, rows, strict=True):
        assert float(line["bits_per_character_stderr"]) == row["bits_per_character"]["stderr"]
        assert line["gain"] == ("" if row["gain"] is None else str(row["gain"]["mean"]))
    assert "t_at_most_0.2_ess" in lines[0]
    tex = whole.with_suffix(".tex").read_text()
    assert tex.count(r"\toprule") == 2 and r"$T$ & 2 & 4 & $\infty$ \\" in tex and r"AR & \multicolumn{3}{c}{" in tex
    assert len({line.count("&") for line in tex.splitlines() if line.startswith(("MDLM", "EDLM"))}) == 1
    assert whole.with_suffix(".png").read_bytes().startswith(b"\x89PNG")

    names = {path.name for path in whole.parent.iterdir()}
    assert names == {f"toy{suffix}" for suffix in (".json", ".csv", ".tex", ".png", ".parts")}
    evaluate_likelihood.main(["--from_json", str(whole)])
    printed = capsys.readouterr().out
    assert printed == evaluate_likelihood.table(results) + "\n"
    row = next(row for row in rows if row["energy"] == "step" and row["num_candidates"] == 3)
    for name, spec, sign in (("bits_per_character", ".3f", ""), ("gain", ".4f", "+")):
        cell = f"{row[name]['mean']:{sign}{spec}} +- {row[name]['stderr']:{spec}}"
        assert f"| EDLM step, k=3 | {cell} |" in printed
    assert "EDLM step, k=3, tau=2 |" in printed
    assert "| bits per character, T=4 | first | second |" in printed.split("\n\n")[-1]  # all data sets, in one table


def test_without_an_energy(folders, tmp_path, capsys):
    """A denoiser alone, one sequence of two, no standard error: MDLM only."""
    run = options(folders, tmp_path / "a.json", model=folders / "denoiser", energies="", ar="", num_sequences=1)
    evaluate_likelihood.main(run)
    (data,) = results_of(tmp_path / "a.json")["data"]
    assert [(row["estimator"], row["num_steps"]) for row in data["rows"]] == [
        ("mdlm", None), ("sampler", 2), ("sampler", 4)
    ]  # fmt: skip
    assert data["num_sequences"] == 1 and data["rows"][0]["bits_per_token"]["stderr"] is None
    assert data["versus_double"] == [] and "| MDLM |" in capsys.readouterr().out


@pytest.mark.parametrize("changes", [{"estimators": "paper", "ar": ""}, {"estimators": "mdlm"}, {"window_low": 0.9}])
@pytest.mark.filterwarnings("error::UserWarning:training")
def test_less_than_everything(folders, tmp_path, changes, capsys):
    """Some estimators only, or no draw in the energy window: files and tables of what there is."""
    evaluate_likelihood.main(options(folders, tmp_path / "a.json", num_steps=8, num_sequences=2, **changes))
    (data,) = results_of(tmp_path / "a.json")["data"]
    expected = set(changes.get("estimators", "sampler,mdlm,paper").split(",")) | ({"ar"} - set(changes))
    assert {row["estimator"] for row in data["rows"]} == expected
    for row in data["rows"]:
        if row["energy"] and row["estimator"] == "sampler":
            assert row["energy_passes"] < row["num_candidates"]  # one step of eight
    assert all((tmp_path / f"a{suffix}").stat().st_size for suffix in (".csv", ".tex", ".png"))
    assert "bits per character" in capsys.readouterr().out


def test_all_whole_blocks_and_bytes(folders, tmp_path):
    """num_sequences=0 takes every whole block; characters and bytes are those of the text."""
    text = evaluate_likelihood.load_text(
        str(folders / "first.txt"),
        character_tokenizer("ab\u00e9", model_max_length=LENGTH),
        LENGTH,
        evaluate_likelihood.LikelihoodArguments(model="m", data="d", out="o.json", cache_dir=str(tmp_path)),
    )
    kept = [c for c in (folders / "first.txt").read_text() if c in "ab"]
    assert len(text.x0_BL) == len(kept) // LENGTH
    assert text.characters_B.tolist() == [LENGTH] * len(text.x0_BL) == text.bytes_B.tolist()
    (tmp_path / "accents.txt").write_text("a\u00e9b" * 10, encoding="utf-8")
    arguments = evaluate_likelihood.LikelihoodArguments(model="m", data="d", out="o.json", cache_dir=str(tmp_path))
    tokenizer = character_tokenizer("ab\u00e9", model_max_length=3)
    text = evaluate_likelihood.load_text(str(tmp_path / "accents.txt"), tokenizer, 3, arguments)
    assert (text.characters_B == 3).all() and (text.bytes_B == 4).all()


# ---- components


def test_variants_share_the_denoiser(folders, variants):
    assert list(variants) == ["nce", "coar", "step"]
    assert len({id(model.denoiser) for model in variants.values()}) == 1
    alone = EDLMModel.from_pretrained(folders / "model")
    for name, value in variants["nce"].state_dict().items():
        torch.testing.assert_close(value, alone.state_dict()[name], rtol=0, atol=0)
    assert not any(module.training for model in variants.values() for module in model.modules())
    assert load_variants(str(folders / "denoiser"), []) == {}
    assert list(load_variants(str(folders / "denoiser"), [f"ar={folders / 'lm'}"])) == ["ar"]


def test_a_foreign_language_model_is_an_energy(folders, tmp_path, whole):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=4, n_embd=8, n_layer=1, n_head=1, n_positions=16, bos_token_id=3, eos_token_id=3)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    changes = {"energies": f"coar={tmp_path / 'gpt2'}", "ar": tmp_path / "gpt2", "num_steps": 2}
    evaluate_likelihood.main(options(folders, tmp_path / "a.json", mixed_precision="bf16", **changes))
    results = results_of(tmp_path / "a.json")
    assert results["precision"] == "bf16 autocast" and list(results["energies"]) == ["nce", "coar"]


def test_pass_cost_counts_the_blocks(variants):
    model = variants["nce"]
    denoiser, energy = model.denoiser, model.energy_model
    ends = [denoiser.backbone.embedding, denoiser.head.linear]
    assert body_parameters(denoiser) == denoiser.num_parameters() - sum(
        p.numel() for part in ends for p in part.parameters()
    )
    assert body_parameters(energy) == energy.num_parameters() - energy.network.backbone.embedding.weight.numel()
    assert pass_cost(model) == body_parameters(energy) / body_parameters(denoiser)
    assert pass_cost(make_toy("none")) == 0


# ---- wrong arguments


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model": ""}, "model must be given"),
        ({"data": ""}, "data must be given"),
        ({"out": "a.txt"}, r"out must end in \.json, got 'a.txt'"),
        ({"num_steps": "2,x"}, "num_steps must be numbers .*'2,x'"),
        ({"num_steps": "0"}, "num_steps.*0"),
        ({"num_candidates": "-1"}, "num_candidates.*-1"),
        ({"num_candidates": ","}, "num_candidates must be numbers .*','"),
        ({"energy_temperatures": "0"}, r"energy_temperature must be positive, got 0\.0"),
        ({"window_low": 1.5}, r"window_low must lie in \[0, 1\], got 1\.5"),
        ({"estimators": "sampler,exact"}, "estimators must be of .*'sampler,exact'"),
        ({"num_samples": 1}, "num_samples must be at least 2 for the estimator 'paper', got 1"),
        ({"num_times": 0}, "num_times must be at least 1, got 0"),
        ({"chunk": 0}, "chunk must be at least 1, got 0"),
        ({"num_sequences": -1}, "num_sequences must be at least 0, got -1"),
        ({"mixed_precision": "fp8"}, "mixed_precision must be no or bf16, got 'fp8'"),
        ({"energies": "gan=folder"}, "energies must be ar=, coar= or nce= and a folder, got 'gan=folder'"),
        ({"energies": "coar="}, "energies .*'coar='"),
        ({"energies": "nce=MODEL"}, "energies must have different names .*got a second 'nce' with 'nce=.*model'"),
        ({"energies": "coar=SMALL"}, "energies has 'coar=.*small', which does not fit: .*vocab_size 7"),
        ({"ar": "SMALL"}, "ar='.*small' does not fit the model: .*vocab_size 7"),
        ({"data": "missing.txt"}, "missing.txt: no such file"),
        ({"data": "a/text,b/text"}, "data must have different names, got 'a/text,b/text'"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(folders, tmp_path, changes, message):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=7, n_embd=8, n_layer=1, n_head=1, n_positions=16, bos_token_id=3, eos_token_id=3)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "small")
    paths = {"MODEL": folders / "model", "SMALL": tmp_path / "small"}
    for name, path in paths.items():
        changes = {k: v.replace(name, str(path)) if isinstance(v, str) else v for k, v in changes.items()}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        evaluate_likelihood.main(options(folders, **{"out": tmp_path / "a.json"} | changes))


def test_results_that_are_not_there_are_named(tmp_path):
    with pytest.raises(ValueError, match="from_json must be a file of results, got '.*none.json'"):
        evaluate_likelihood.main(["--from_json", str(tmp_path / "none.json")])


def test_mdlm_of_equal_cost_is_interpolated():
    """Linear in the logarithm of the passes, text by text; beyond the last number of steps nothing is made up."""
    points = [(2.0, np.array([4.0, 2.0])), (8.0, np.array([2.0, 2.0])), (16.0, np.array([1.0, 0.0]))]
    for spent, expected in ((2.0, [4, 2]), (4.0, [3, 2]), (8.0, [2, 2]), (16.0, [1, 0]), (99.0, [1, 0])):
        np.testing.assert_allclose(evaluate_likelihood.interpolated(spent, points), expected)
