"""tests/bench at a micro size: what it writes, what it counts, and what it leaves behind. No speed is asserted.

With EDLM_REF set the published code is tested too. Shapes: B batch, L length.
"""

import json
import os
import sys
from pathlib import Path
from statistics import median

import pytest
import torch
from bench import published, report, roofline, stages
from bench.__main__ import main
from bench.arguments import BenchArguments
from bench.measure import Bench, Ours, PeakMemory, Runs
from bench.roofline import Work, share
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import modeling_edlm.backbone
from training.trainer import parse_arguments

SIZE = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "length": 12,
    "vocab_size": 8,
    "cond_dim": 4,
}
L, D, V, BLOCKS = (SIZE[name] for name in ("length", "hidden_size", "vocab_size", "num_hidden_layers"))
MICRO = [part for name, value in SIZE.items() for part in (f"--{name}", str(value))]
MICRO += "--device cpu --sizes characters --num_steps 4,2 --num_candidates 3,2 --energies none,ar,nce".split()
MICRO += "--batch_sizes 1,best --trial_batch_sizes 1,2 --repeats 2 --published_steps 4".split()
TOP = (
    "command sizes energies energy_windows dtype device device_name cpu_name threads versions git_commit seed date "
    "rows published left_out ceilings published_sha256 total_seconds"
)
ROW = (
    "part size energy num_candidates energy_window num_steps batch compile batch_size seconds all_seconds "
    "seconds_per_sequence tokens_per_second nfe energy_nfe peak_memory_bytes clocked_seconds stage_seconds "
    "estimated_seconds trial_tokens_per_second"
)
PUBLISHED_FILES = {  # what the bench needs of the published code, and no more
    "diffusion.py": """
import hydra.utils, lightning as L, torch, torchmetrics
from torch import Tensor
import dataloader, models, noise_schedule, utils

class NLL(torchmetrics.aggregation.MeanMetric): pass

def _sample_categorical(p, num_samples=1):
    p = p.repeat(num_samples, 1, 1)
    return torch.multinomial(p.flatten(0, 1), 1).view(p.shape[:2])

class Diffusion(L.LightningModule):
    def _subs_parameterization(self, logits, xt):
        logits[..., self.mask_index] = -1e6
        return logits.softmax(-1)
    def _ddpm_caching_update(self, x, t, dt, p_x0=None):
        p_x0 = self._subs_parameterization(self.backbone(x, t), x) if p_x0 is None else p_x0
        is_now = (x == self.mask_index) & (torch.rand(x.shape) < dt / t)
        return p_x0, torch.where(is_now, _sample_categorical(p_x0), x)
    @torch.no_grad()
    def _sample(self, num_steps):
        x = torch.full((self.config.loader.eval_batch_size, self.config.model.length), self.mask_index)
        for step in range(num_steps):
            t = 1 - step / num_steps
            p_x0, x_next = self._ddpm_caching_update(x, t, 1 / num_steps)
            if isinstance(self, EBM) and self.config.sampling.is_end <= t <= self.config.sampling.is_start:
                self.ebm_forward(x, t, _sample_categorical(p_x0, num_samples=self.config.sampling.is_size))
            x = x_next
        if self.config.sampling.noise_removal:
            x = self.backbone(x, 0).argmax(-1)
        return x.to(self.device)

class EBM(Diffusion):
    def ebm_forward(self, xt, sigma, x0):
        return self.ebm(x0, sigma).sum()
""",
    "noise_schedule.py": """
def get_noise(config):
    return config.noise.type
""",
    "models/__init__.py": "raise ImportError('imports backbones that sampling does not need')",
    "models/dit.py": """
import einops, flash_attn, flash_attn.layers.rotary, omegaconf, torch

class DDitFinalLayer(torch.nn.Linear):
    def __init__(self, hidden_size, out_channels, cond_dim):
        super().__init__(hidden_size, out_channels)

class DIT(torch.nn.Module):
    def __init__(self, config, vocab_size):
        super().__init__()
        self.embed = torch.nn.Embedding(vocab_size, config.model.hidden_size)
        self.output_layer = DDitFinalLayer(config.model.hidden_size, vocab_size, 0)
    def forward(self, x, sigma):
        return self.output_layer(self.embed(x))
""",
    "models/autoregressive.py": """
from models.dit import DIT

class AR(DIT):
    def __init__(self, config, vocab_size, mask_index):
        super().__init__(config, vocab_size)
""",
}


@pytest.fixture(scope="module", autouse=True)
def small_ceilings():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(roofline, "MATRIX_SIZES", {"cpu": (32, 64)})
        patch.setattr(roofline, "COPY_BYTES", {"cpu": 2**16})
        yield


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "models").mkdir()
    for name, text in PUBLISHED_FILES.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture(scope="module")
def out(tmp_path_factory, checkout):
    out = tmp_path_factory.mktemp("bench") / "new" / "bench.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDLM_REF", str(checkout))
        main([*MICRO, "--out", str(out)])
    return out


def make_ours(energy: str, **changes) -> Ours:
    return Ours(energy, SIZE | changes, "cpu", torch.float32, 0)


def make_setting(energy: str, **changes):
    arguments = parse_arguments(BenchArguments, "", MICRO)
    return report.setting_of(vars(arguments.settings("characters", energy)[0]), **changes)


def test_results_have_every_field(out):
    results = json.loads(out.read_text())
    assert results.keys() >= set(TOP.split())
    assert results["versions"].keys() == {"python", "torch", "transformers"}
    assert results["command"].startswith("EDLM_REF=CHECKOUT python -m tests.bench --hidden_size 16 ")
    for row in results["rows"] + results["published"]:
        extra = {"flops", "bytes", "roofline_share"} if row["part"] == "grid" else set()
        assert row.keys() - {"ratio", "ratio_to_batch_1"} == set(ROW.split()) | extra
        assert 1 <= len(row["all_seconds"]) <= 2 and row["seconds"] == median(row["all_seconds"])
        assert row["tokens_per_second"] == pytest.approx(row["batch_size"] * L / row["seconds"])
        assert sum(row["stage_seconds"].values()) == row["clocked_seconds"] > 0
        assert min(row["stage_seconds"].values()) >= 0
        assert (row["stage_seconds"]["energy"] > 0) == (row["energy"] != "none")
        assert row["peak_memory_bytes"] is None or row["peak_memory_bytes"] > 4 * D * V
    assert all(row["roofline_share"] > 0 for row in results["rows"] if row["part"] == "grid")


def test_grid_is_a_star(out):
    rows = [row for row in json.loads(out.read_text())["rows"] if row["part"] == "grid"]
    keys = ("energy", "num_candidates", "energy_window", "num_steps", "batch")
    found = [tuple(map(str, (row[key] for key in keys))) for row in rows]
    low, all_times = "[1.0, 0.8]", "[1.0, 0.0]"
    expected = [("none", "1", all_times, *rest) for rest in (("4", "1"), ("2", "1"), ("4", "best"))]
    for energy in ("ar", "nce"):
        star = [("3", low, "4", "1"), ("2", low, "4", "1"), ("3", all_times, "4", "1")]
        expected += [(energy, *rest) for rest in [*star, ("3", low, "2", "1"), ("3", low, "4", "best")]]
    assert found == expected
    for row in rows:
        assert row["batch_size"] in (1, 2) and (row["batch"] == "best") == bool(row["trial_tokens_per_second"])
    full = parse_arguments(BenchArguments, "", [*MICRO, "--grid", "full", "--compile", "both"])
    assert len(full.settings("characters", "none")) == 2 * (1 + 2)  # T, and batches of which 1 is compiled too
    assert len(full.settings("characters", "ar")) == 2 * 2 * 2 * (1 + 2)


def test_forward_passes_are_counted(out):
    results = json.loads(out.read_text())
    for row in results["rows"]:
        T, k, inside = row["num_steps"], row["num_candidates"], row["energy_window"][1] == 0.8
        assert 0 < row["nfe"] <= T
        most = 0 if row["energy"] == "none" else k * (1 if inside else T)  # 0.8 to 1 holds the first step alone
        assert 0 <= row["energy_nfe"] <= most and (row["energy_nfe"] > 0) == (most > 0)
    for row in results["published"]:
        k, T = row["num_candidates"], row["num_steps"]
        inside = 0 if row["energy"] == "none" else 1 if row["energy_window"][1] == 0.8 else T
        assert (row["nfe"], row["energy_nfe"]) == (T + 1, k * inside)


def test_published_rows_stand_beside_ours(out):
    results = json.loads(out.read_text())
    compared = report.compared(results)
    assert [row["batch_size"] for row, _, _ in compared] == [1, 8, 1, 1, 8, 8]
    for row, same, first in compared:
        assert same["batch_size"] == row["batch_size"] and first["batch_size"] == 1
        assert same["energy_window"] == first["energy_window"] == row["energy_window"]
        assert row["ratio"] == pytest.approx(row["tokens_per_second"] / same["tokens_per_second"])
        assert row["ratio_to_batch_1"] == pytest.approx(row["tokens_per_second"] / first["tokens_per_second"])
    results["published"] = [row for row in results["published"] if row["batch_size"] == 8]
    report.add_ratios(results)
    assert all(row["ratio_to_batch_1"] is None for row in results["rows"] if row["part"] == "published")
    assert report.published_table(results).count("\n") == 1 + 6


def test_table_and_chart_come_from_the_file(out, capsys):
    results = json.loads(out.read_text())
    out.with_suffix(".png").unlink()
    main(["--from_json", str(out)])
    assert capsys.readouterr().out == report.text(results) + "\n"
    assert "float32" in report.caption(results) and results["device_name"] in report.caption(results)
    for text, count in ((report.grid_table(results), 13), (report.published_table(results), 6)):
        lines = text.splitlines()
        assert len(lines) == 2 + count and len({line.count("|") for line in lines}) == 1
    assert lines[2].startswith("| characters | none |  |  | 4 | 1 |")
    assert "| best: " in report.grid_table(results)
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in out.parent.iterdir()} == {"bench.json", "bench.png"}  # nothing temporary left
    alone = results | {"published": [], "left_out": [{"label": "a row", "reason": "too long"}]}
    assert "published" not in report.text(alone) and "- a row: too long" in report.text(alone)
    report.plot(alone | {"rows": []}, out.parent / "empty.png")


def test_resume_keeps_rows(out, tmp_path, monkeypatch):
    monkeypatch.delenv("EDLM_REF", raising=False)
    results, copy = json.loads(out.read_text()), tmp_path / "bench.json"
    missing = results["rows"].pop(1)
    copy.write_text(json.dumps(results))
    main([*MICRO, "--out", str(copy), "--resume", "true"])
    again = json.loads(copy.read_text())
    assert again["rows"][:-1] == results["rows"] and again["published"] == results["published"]
    assert report.setting_of(again["rows"][-1]) == report.setting_of(missing)
    assert again["total_seconds"] > results["total_seconds"]
    with pytest.raises(ValueError, match="resume: .* has seed=0, not 1"):
        main([*MICRO, "--out", str(copy), "--resume", "true", "--seed", "1"])


def test_long_rows_are_left_out_with_a_reason(tmp_path, monkeypatch):
    monkeypatch.delenv("EDLM_REF", raising=False)
    monkeypatch.setattr(Bench, "estimate", lambda self, sampler, setting, size: 3.0 if setting.num_steps == 4 else 0.1)
    out = tmp_path / "bench.json"
    main([*MICRO, "--energies", "none", "--row_seconds", "2", "--out", str(out)])
    results = json.loads(out.read_text())
    assert [row["num_steps"] for row in results["rows"]] == [2]
    reasons = [(row["list"], row["batch"], row["reason"]) for row in results["left_out"]]
    assert reasons == [("rows", batch, "a run would take about 3 s, more than 2 s") for batch in (1, "best")]
    assert "Left out:\n- characters, none, T=4, batch 1: a run would" in report.text(results)


def test_out_of_memory_is_a_reason_too(tmp_path, monkeypatch):
    monkeypatch.delenv("EDLM_REF", raising=False)

    def full(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(Bench, "trial", full)
    main([*MICRO, "--energies", "none", "--out", str(tmp_path / "bench.json")])
    reasons = [row["reason"] for row in json.loads((tmp_path / "bench.json").read_text())["left_out"]]
    assert reasons == ["out of memory", "out of memory", "out of memory at every batch size"]


@pytest.mark.parametrize("energy", ["none", "ar", "nce"])
def test_flops_are_those_of_the_formula(energy):
    """One step from all masks: every position of every pass is needed."""
    k, setting = 3, make_setting(energy, num_steps=1)
    with Work() as work:
        counts = make_ours(energy, cond_dim=0).run(setting, 1, False)
    products, attention = BLOCKS * 24 * L * D**2, BLOCKS * 4 * L**2 * D
    expected = products + attention + 2 * L * D * V
    if energy == "ar":
        expected += k * (products + attention // 2 + 2 * L * D * V)
    if energy == "nce":  # projection of both embeddings, head, and two layers to the scalar
        expected += k * (products + attention + 4 * L * D**2 + 2 * L * D**2 + 2 * L * D**2 + 2 * L * D)
    assert counts == {"nfe": 1, "energy_nfe": 0 if energy == "none" else k}
    assert work.flops == expected
    weights = BLOCKS * 12 * D**2 + D * V
    assert work.bytes > 4 * weights * (1 + (energy == "ar"))


@pytest.mark.parametrize("energy", ["none", "ar", "nce"])
def test_flops_are_those_of_torch(energy, monkeypatch):
    """FlopCounterMode knows neither the attention of a CPU nor oneDNN's products, and counts all causal attention."""
    ours, setting = make_ours(energy), make_setting(energy, num_steps=4, energy_window=(1.0, 0.0))
    with Work() as work:
        counts = ours.run(setting, 3, False)
    mapping = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda *x, **_: sdpa_flop_count(*x[:3])}
    monkeypatch.setattr(modeling_edlm.backbone, "_has_onednn", lambda *_: False)
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        assert ours.run(setting, 3, False) == counts
    causal = BLOCKS * 4 * L**2 * D * 3 * counts["energy_nfe"] if energy == "ar" else 0
    assert counter.get_total_flops() == work.flops + causal / 2


def test_share_of_the_roofline():
    ceilings = {"flops_per_second": 100.0, "bytes_per_second": 10.0}
    assert share(200, 5, 4.0, ceilings) == 0.5  # bound by its products
    assert share(200, 30, 4.0, ceilings) == 0.75  # by its bytes


def test_clocks_count_a_stage_without_its_parts(monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr(stages.time, "perf_counter", lambda: next(now))

    class Sampler:
        def outer(self):
            return self.inner() + 1

        def inner(self):
            return 1

    sampler = Sampler()
    sampler.inner = lambda: 5  # an attribute of its own, as hooks of others may be
    own = sampler.inner
    with stages.clocks([(sampler, "outer", "denoiser"), (sampler, "inner", "projection")], lambda: None) as running:
        assert sampler.outer() == 6
    assert running.seconds == {"denoiser": 2, "projection": 1, "draw": 0, "energy": 0, "rest": 2}
    assert running.calls == {"denoiser": 1, "projection": 1}
    assert vars(sampler) == {"inner": own}


def test_draws_are_not_degenerate_and_clocks_go():
    for energy in ("ar", "nce"):
        ours = make_ours(energy)
        before = [vars(owner).get(name) for owner, name, _ in ours.targets]
        with pytest.raises(KeyboardInterrupt), stages.clocks(ours.targets, lambda: None):
            raise KeyboardInterrupt
        assert [vars(owner).get(name) for owner, name, _ in ours.targets] == before
        log_p_V = ours.model.log_p_x0(torch.full((1, L), ours.model.config.mask_token_id))[0, 0, :-1]
        assert log_p_V.std() > 1e-3  # not uniform
        options = {"num_steps": 4, "num_candidates": 3, "return_dict_in_generate": True}
        ess_B = ours.model.generate(batch_size=3, seed=0, **options).ess[:, 0]
        assert (ess_B < 3).all()  # the energy tells candidates apart


def test_what_is_compiled_is_warmed_up_but_not_counted(monkeypatch):
    asked = []
    monkeypatch.setattr(Ours, "run", lambda self, setting, batch_size, compile: asked.append(compile) or {"nfe": 1.0})
    ceilings = {"flops_per_second": 1.0, "bytes_per_second": 1.0}
    for compile, runs in ((False, [False, False, False]), (True, [False, True, True, True, True])):
        asked.clear()
        setting = make_setting("none", compile=compile)
        bench = Bench("cpu", torch.float32, 2)
        measured = Runs(bench, make_ours("none"), setting, 1, ceilings)
        bench.take_turns([measured], 100.0)
        row = measured.row()
        assert asked == runs and row["compile"] == compile and len(row["all_seconds"]) == 2


def test_samplers_take_turns(monkeypatch):
    """One run of each, until one has had its time or all their repeats."""
    order = []

    class Counted:
        def __init__(self, name, duration):
            self.name, self.duration, self.seconds = name, duration, []

        def once(self):
            order.append(self.name)
            self.seconds.append(self.duration)

    for most, turns in ((100.0, 3), (5.0, 2), (0.0, 1)):
        order.clear()
        Bench("cpu", torch.float32, 3).take_turns([Counted("ours", 1.0), Counted("theirs", 2.0)], most)
        assert order == ["ours", "theirs"] * turns


def test_best_batch_stops_before_it_takes_too_long(monkeypatch):
    tried = []

    def estimate(self, sampler, setting, batch_size):
        tried.append(batch_size)
        return 1 + 0.5 * batch_size

    monkeypatch.setattr(Bench, "estimate", estimate)
    bench, ours = Bench("cpu", torch.float32, 1), make_ours("none")
    speeds = bench.best(ours, make_setting("none"), [64, 1, 8, 16], 13.0)
    assert tried == [1, 8, 16] and speeds == {n: n * L / (1 + 0.5 * n) for n in tried}  # 64 of them: about 36 s


def test_peak_memory_is_of_the_run():
    before = torch.ones(2**24)
    with PeakMemory("cpu") as peak:
        torch.ones(2**23).sum()
    if sys.platform != "linux" or not os.access("/proc/self/clear_refs", os.W_OK):
        assert peak.bytes is None  # it is not known, and nothing is made up
        return
    assert 2**25 == pytest.approx(peak.bytes, rel=0.1) and before.nbytes == 2**26


def test_imports_of_the_published_code_are_undone(checkout):
    before, path = dict(sys.modules), list(sys.path)
    reference = published.load(str(checkout))
    names = {"diffusion", "noise_schedule", "models", "hydra", "lightning", "flash_attn", "einops", "utils"}
    assert {name: sys.modules.get(name) for name in names} == {name: before.get(name) for name in names}
    assert sys.path == path and not list(checkout.rglob("__pycache__"))
    for energy, classes in (("none", ("Diffusion",)), ("coar", ("EBM", "AR")), ("nce", ("EBM", "DIT"))):
        sampler = published.make_sampler(reference, energy, SIZE)
        assert type(sampler).__name__ == classes[0] and not sampler.training
        assert energy == "none" or type(sampler.ebm).__name__ == classes[1]
        assert published.generate(sampler, 2, 3, 2, (1.0, 0.0)).shape == (3, L)
    with pytest.raises(ValueError, match="EDLM_REF.*nowhere"):
        published.load("nowhere")


if os.environ.get("EDLM_REF"):  # a check of the stand-ins, for whoever has the published code to measure

    @pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # its way to ask for autocast
    def test_published_networks_give_the_published_numbers():
        """Stand-ins for packages and constructors change nothing: logits and energies are those of the fixtures."""
        fixtures = Path(__file__).parent / "fixtures" / "parity"
        config = json.loads((fixtures / "manifest.json").read_text())["config"]
        expected = load_file(fixtures / "expected.safetensors")
        names = {
            "hidden_size": "hidden",
            "num_hidden_layers": "blocks",
            "num_attention_heads": "heads",
            "length": "length",
        }
        size = {name: config[key] for name, key in (names | {"cond_dim": "cond_dim"}).items()}
        size["vocab_size"] = config["vocab_with_mask"]
        reference = published.load(os.environ["EDLM_REF"])
        for energy in ("nce", "ar", "coar"):
            sampler = published.make_sampler(reference, energy, size)
            for kind, network in (("denoiser", sampler.backbone), ("nce" if energy == "nce" else "ar", sampler.ebm)):
                weights = load_file(fixtures / f"{kind}.safetensors")
                network.load_state_dict(weights)
            xt_BL, sigma_B = expected["xt"], torch.zeros(len(expected["xt"]))
            with torch.no_grad():
                log_p_BLV = sampler(xt_BL, sigma_B)
                energies = [sampler.ebm_forward(xt_BL, sigma_B, x0_BL, log_p_BLV)[:, 0] for x0_BL in expected["cand"]]
            torch.testing.assert_close(log_p_BLV, expected["subs_log_probs"], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(torch.stack(energies), expected[f"energy_{energy}"], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "option, value",
    [
        ("device", "tpu"),
        ("sizes", "words"),
        ("sizes", ""),
        ("energies", "none,lstm"),
        ("energies", ""),
        ("published_energies", "gpt"),
        ("num_candidates", "0"),
        ("num_candidates", "2;8"),
        ("num_steps", "-1"),
        ("published_candidates", "0"),
        ("energy_windows", "0.2:0.8"),
        ("energy_windows", "1.0"),
        ("energy_windows", "all"),
        ("energy_windows", ""),
        ("batch_sizes", "1,0"),
        ("batch_sizes", "1;16"),
        ("batch_sizes", "worst"),
        ("published_batch_sizes", ""),
        ("trial_batch_sizes", "0"),
        ("grid", "moon"),
        ("compile", "yes"),
        ("dtype", "float8"),
        ("repeats", "0"),
        ("row_seconds", "-1"),
        ("published_steps", "-1"),
        ("published_row_seconds", "-2"),
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
        main([*MICRO, f"--{option}", value])
    assert all(part in str(error.value) for part in value.replace(";", ",").split(",")[-1:])
