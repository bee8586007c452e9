"""training/bench.py at a micro size: what it writes, and that the table comes from the file. No speed is asserted."""

import json
from statistics import median

import pytest
import torch

from training import bench

LENGTH, NUM_STEPS, NUM_CANDIDATES = 12, 4, 3
MICRO = f"--length {LENGTH} --num_steps {NUM_STEPS} --num_candidates {NUM_CANDIDATES} --hidden_size 16 --repeats 2"
MICRO = f"{MICRO} --num_hidden_layers 1 --num_attention_heads 2 --vocab_size 8 --num_threads 1 --device cpu".split()
TOP = "command size energies energy_window dtype device device_name cpu_name threads versions git_commit seed date rows"
ROW = (
    "energy num_candidates num_steps batch_size seconds all_seconds tokens_per_second nfe energy_nfe "
    "instrumented_seconds denoiser_seconds energy_seconds rest_seconds"
)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "new" / "bench.json"
    bench.main([*MICRO, "--batch_sizes", "1,2", "--out", str(out)])
    return out


def test_results_have_every_field(out):
    results = json.loads(out.read_text())
    assert results.keys() >= set(TOP.split())
    assert results["versions"].keys() == {"python", "torch", "transformers"}
    assert results["command"].startswith("python -m training.bench --length 12 ")
    assert results["hidden_size"] == 16 and results["cond_dim"] == 0  # one as asked, one of the size small
    pairs = [(row["energy"], row["batch_size"]) for row in results["rows"]]
    assert pairs == [(energy, size) for energy in ("none", "coar", "nce") for size in (1, 2)]
    for row in results["rows"]:
        assert row.keys() == set(ROW.split())  # on a CPU no peak memory
        assert len(row["all_seconds"]) == 2 and row["seconds"] == median(row["all_seconds"])
        assert row["tokens_per_second"] == pytest.approx(row["batch_size"] * LENGTH / row["seconds"])
        split = [row[f"{part}_seconds"] for part in ("denoiser", "energy", "rest")]
        assert sum(split) == pytest.approx(row["instrumented_seconds"]) and min(split) >= 0


def test_forward_passes_are_counted(out):
    for row in json.loads(out.read_text())["rows"]:
        assert 0 < row["nfe"] <= NUM_STEPS and row["denoiser_seconds"] > 0
        if row["energy"] == "none":
            assert (row["num_candidates"], row["energy_nfe"], row["energy_seconds"]) == (1, 0, 0)
        else:  # the window holds the first of the four steps
            assert row["num_candidates"] == NUM_CANDIDATES and row["energy_seconds"] > 0
            assert 0 < row["energy_nfe"] <= NUM_CANDIDATES


def test_table_and_chart_come_from_the_file(out, capsys):
    results = json.loads(out.read_text())
    bench.main(["--from_json", str(out)])
    assert capsys.readouterr().out == bench.table(results) + "\n"
    caption, _, *lines = bench.table(results).splitlines()
    assert "16 wide" in caption and "float32" in caption and results["device_name"] in caption
    assert len(lines) == 2 + 6 and len({line.count("|") for line in lines}) == 1
    assert lines[2].startswith(f"| none | 1 | {NUM_STEPS} | 1 |") and "peak" not in lines[0]
    for row in results["rows"]:
        row["peak_memory_gib"] = 1.5
    assert bench.table(results | {"device": "cuda"}).endswith("| 1.50 |")
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in out.parent.iterdir()} == {"bench.json", "bench.png"}  # nothing temporary left


def test_draws_are_not_degenerate_and_hooks_go():
    arguments = bench.parse_arguments(bench.BenchArguments, "", MICRO)
    for energy in ("coar", "nce"):
        model = bench.random_model(energy, arguments)
        config = arguments.generation_config(energy)
        with pytest.raises(KeyboardInterrupt), bench.clocks(model, lambda: None):
            raise KeyboardInterrupt
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        log_p_V = model.log_p_x0(torch.full((1, LENGTH), model.config.mask_token_id))[0, 0, :-1]
        assert log_p_V.std() > 1e-3  # not uniform
        ess_B1 = model.generate(batch_size=3, seed=0, generation_config=config).ess[:, 0]
        assert (ess_B1 < NUM_CANDIDATES).all()  # the energy tells candidates apart


@pytest.mark.parametrize(
    "option, value",
    [
        ("size", "huge"),
        ("energies", "none,lstm"),
        ("energies", ""),
        ("num_candidates", "0"),
        ("num_steps", "-1"),
        ("energy_window", "0.2,0.8"),
        ("energy_window", "1.0"),
        ("energy_window", "all"),
        ("energy_batch_size", "-2"),
        ("batch_sizes", "1,0"),
        ("batch_sizes", "1;16"),
        ("dtype", "float8"),
        ("device", "tpu"),
        ("repeats", "0"),
        ("num_threads", "-3"),
        ("hidden_size", "15"),
        ("num_hidden_layers", "0"),
        ("length", "-5"),
        ("vocab_size", "1"),
        ("cond_dim", "-1"),
        ("out", "bench.png"),
        ("from_json", "nowhere.json"),
    ],
)
def test_bad_options_are_named(option, value):
    with pytest.raises(ValueError, match=option) as error:
        bench.main([*MICRO, f"--{option}", value])
    assert all(part in str(error.value) for part in value.replace(";", ",").split(",")[-1:])
