"""bench at a micro size: what it writes, what it counts, and what it leaves behind. No speed is asserted.

With EDLM_REF set the published code is tested too. Shapes: B batch, L length.
"""

import json
import os
import sys
import time
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.autograd import DeviceType
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import modeling_edlm.backbone
from bench import predictions, profile_step, published, report, roofline, stages
from bench.__main__ import main
from bench.arguments import OWN_SIZES, BenchArguments
from bench.measure import COMPILE_SECONDS, Bench, Budget, LeftOut, Ours, PeakMemory, Published, Runs
from bench.roofline import Work, share
from training.common.arguments import parse_arguments

SIZE = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "length": 12,
    "vocab_size": 8,
    "cond_dim": 4,
}
L, D, V, BLOCKS = (SIZE[name] for name in ("length", "hidden_size", "vocab_size", "num_hidden_layers"))
SMALL = [part for name, value in SIZE.items() for part in (f"--{name}", str(value))]
SMALL += "--device cpu --sizes characters --repeats 2".split()
MICRO = [*SMALL, *"--num_steps 4,2 --num_candidates 3,2 --energies none,ar,nce --batch_sizes 1,best".split()]
MICRO += "--trial_batch_sizes 1,2 --published_steps 4".split()
PROFILE = [*SMALL, *"--num_steps 8 --num_candidates 3 --energies ar,nce --steps 2".split()]
TOP = (
    "command sizes energies energy_windows dtype device device_name cpu_name threads versions git_commit seed date "
    "rows published left_out ceilings published_sha256 total_seconds"
)
ROW = (
    "part size energy num_candidates energy_window num_steps batch compile batch_size seconds all_seconds "
    "seconds_per_sequence tokens_per_second nfe energy_nfe warm_up_seconds peak_memory_bytes clocked_seconds "
    "stage_seconds estimated_seconds trial_tokens_per_second"
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


def make_bench(repeats: int = 1, minutes: float = 0.0) -> Bench:
    return Bench("cpu", torch.float32, repeats, Budget(minutes, time.perf_counter()))


def make_ours(energy: str, **changes) -> Ours:
    return Ours(energy, SIZE | changes, "cpu", torch.float32, 0)


def make_setting(energy: str, **changes):
    arguments = parse_arguments(BenchArguments, "", MICRO)
    return report.setting_of(vars(arguments.settings("characters", energy)[0]), **changes)


def test_results_have_every_field(out):
    results = json.loads(out.read_text())
    assert results.keys() >= set(TOP.split())
    assert results["versions"].keys() == {"python", "torch", "transformers"}
    assert results["command"].startswith("EDLM_REF=CHECKOUT python -m bench --hidden_size 16 ")
    for row in results["rows"] + results["published"]:
        extra = {"flops", "bytes", "roofline_share"} if row in results["rows"] else set()
        assert row.keys() - {"ratio", "ratio_to_batch_1", "ratio_to_best"} == set(ROW.split()) | extra
        assert 1 <= len(row["all_seconds"]) <= 2 and row["seconds"] == median(row["all_seconds"])
        assert row["tokens_per_second"] == pytest.approx(row["batch_size"] * L / row["seconds"])
        assert sum(row["stage_seconds"].values()) == row["clocked_seconds"] > 0
        assert min(row["stage_seconds"].values()) >= 0
        assert (row["stage_seconds"]["energy"] > 0) == (row["energy"] != "none")
        assert row["peak_memory_bytes"] is None or row["peak_memory_bytes"] > 4 * D * V
    assert all(row["roofline_share"] > 0 for row in results["rows"])


def test_grid_is_a_star(out):
    rows = json.loads(out.read_text())["rows"]
    keys = ("energy", "num_candidates", "energy_window", "num_steps", "batch")
    found = [tuple(map(str, (row[key] for key in keys))) for row in rows]
    low, all_times = "[1.0, 0.8]", "[1.0, 0.0]"
    expected = [("none", "1", all_times, *rest) for rest in (("4", "1"), ("2", "1"), ("4", "best"))]
    for energy in ("ar", "nce"):
        star = [("3", low, "4", "1"), ("2", low, "4", "1"), ("3", all_times, "4", "1")]
        expected += [(energy, *rest) for rest in [*star, ("3", low, "2", "1"), ("3", low, "4", "best")]]
    # and beside the published sampler
    expected += [("none", "1", all_times, "4", "8"), ("ar", "2", low, "4", "8"), ("ar", "2", all_times, "4", "8")]
    expected += [("ar", "2", all_times, "4", "1")]
    assert sorted(found) == sorted(expected)
    for row in rows:
        assert row["batch_size"] in (1, 2, 8) and (row["batch"] == "best") == bool(row["trial_tokens_per_second"])
    full = parse_arguments(BenchArguments, "", [*MICRO, "--grid", "full", "--compile", "both"])
    assert len(full.settings("characters", "none")) == 2 * (1 + 2)  # T, and batches of which 1 is compiled too
    assert len(full.settings("characters", "ar")) == 2 * 2 * 2 * (1 + 2)


def test_what_matters_most_comes_first():
    """With the options of a GPU."""
    options = [f"--{name}={value}" for name, value in BenchArguments.DEFAULTS["cuda"].items()]
    arguments = parse_arguments(BenchArguments, "", ["--device", "cpu", *options])
    groups = arguments.groups(with_published=True)
    energies = ["none", "ar", "coar", "nce"]
    for number, (part, group) in enumerate(groups):
        setting = group[0][1]
        is_usual = setting.num_steps == 128 and (setting.num_candidates, setting.energy_window) in (
            (8, (1.0, 0.8)),
            (1, (1.0, 0.0)),
        )
        assert is_usual == (number < 8) and part == "published"
        compiled = [setting.compile for name, setting in group if name == "rows"]
        assert compiled == ([False, True] if setting.batch == 1 else [False])
        assert (group[-1][0] == "published") == (number < 8 or setting.batch == 1)
        if number < 8:
            assert (setting.batch, setting.energy) == ((1, "best")[number // 4], energies[number % 4])
    times = [group[0][1].num_steps for _, group in groups]
    assert times == sorted(times)
    assert len(groups) == 2 * (2 + 3 * 5)  # batches; T without an energy, and the star of k, windows and T with each
    alone = arguments.groups(with_published=False)
    assert [part for part, _ in alone] == ["grid"] * len(groups)
    ours = [[(name, setting) for name, setting in group if name == "rows"] for _, group in groups]
    assert [group for _, group in alone] == ours


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
    batches = [(row["energy"], row["batch"]) for row, _, _ in compared]
    assert sorted(batches, key=str) == [("ar", 1)] * 2 + [("ar", 8)] * 2 + [("none", "best"), ("none", 1), ("none", 8)]
    for row, same, first in compared:
        speed = row["tokens_per_second"]
        assert (same is None) == (row["batch"] == "best") == (row["ratio"] is None)
        if same is not None:
            assert same["batch_size"] == row["batch_size"] and row["ratio"] == speed / same["tokens_per_second"]
        assert first["batch_size"] == 1 and row["ratio_to_batch_1"] == speed / first["tokens_per_second"]
        assert first["energy_window"] == row["energy_window"]
        others = [r for r in results["published"] if r["energy"] == row["energy"]]
        others = [r["tokens_per_second"] for r in others if r["energy_window"] == row["energy_window"]]
        assert len(others) == 2 and row["ratio_to_best"] == speed / max(others)
    results["published"] = [row for row in results["published"] if row["batch_size"] == 8]
    report.add_ratios(results)
    assert all(row["ratio_to_batch_1"] is None for row in results["rows"] if row["part"] == "published")
    assert report.published_table(results).count("\n") == 1 + 7


def test_table_and_chart_come_from_the_file(out, capsys):
    results = json.loads(out.read_text())
    out.with_suffix(".png").unlink()
    main(["--from_json", str(out)])
    assert capsys.readouterr().out == report.text(results) + "\n"
    assert "float32" in report.caption(results) and results["device_name"] in report.caption(results)
    for text, count in ((report.grid_table(results), 17), (report.published_table(results), 7)):
        lines = text.splitlines()
        assert len(lines) == 2 + count and len({line.count("|") for line in lines}) == 1
    assert lines[2].startswith("| characters | none |  |  | 4 | 1 |")
    twice = [row | {"part": part} for part in ("grid", "published") for row, *_ in report.compared(results)]
    assert report.grid_table({"rows": twice}).count("\n") == 1 + 7  # each setting once
    for row in twice:
        del row["ratio_to_best"]
    assert "its best" not in report.published_table(results | {"rows": twice})
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


def test_resume_measures_the_published_sampler_alone(out, tmp_path, monkeypatch, checkout):
    monkeypatch.setenv("EDLM_REF", str(checkout))
    results, copy = json.loads(out.read_text()), tmp_path / "bench.json"
    missing = [results["published"].pop() for _ in range(2)]
    copy.write_text(json.dumps(results))
    main([*MICRO, "--out", str(copy), "--resume", "true"])
    again = json.loads(copy.read_text())
    assert [report.setting_of(row) for row in again["rows"]] == [report.setting_of(row) for row in results["rows"]]
    assert {report.setting_of(row) for row in again["published"][-2:]} == {report.setting_of(row) for row in missing}


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
    assert reasons == ["out of memory", "out of memory at every batch size", "out of memory"]


def test_an_error_leaves_out_one_row(tmp_path, monkeypatch):
    monkeypatch.delenv("EDLM_REF", raising=False)
    run = Ours.run

    def breaks(self, setting, *args, **kwargs):
        if setting.num_steps == 4 and setting.batch == 1:
            raise RuntimeError("this does not compile\n  for a long reason")
        return run(self, setting, *args, **kwargs)

    monkeypatch.setattr(Ours, "run", breaks)
    main([*MICRO, "--energies", "none", "--out", str(tmp_path / "bench.json")])
    results = json.loads((tmp_path / "bench.json").read_text())
    assert [row["reason"] for row in results["left_out"]] == ["RuntimeError: this does not compile"]
    assert [(row["num_steps"], row["batch"]) for row in results["rows"]] == [(4, "best"), (2, 1)]


class Clock:
    """In place of the time: it moves when a sampler works."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def work(self, seconds: float) -> None:
        self.now += seconds


def test_nothing_is_begun_that_would_end_too_late(tmp_path, monkeypatch):
    monkeypatch.delenv("EDLM_REF", raising=False)
    clock, out, ends = Clock(monkeypatch), tmp_path / "bench.json", []

    def run(self, setting, batch_size, compile):
        clock.work(0.2 * setting.num_steps * self.steps(setting))
        ends.append(clock.now)
        return {"nfe": 1.0, "energy_nfe": 0.0}

    def run_steps(self, setting, batch_size, compile, in_window, step_end):
        for _ in range(setting.num_steps):
            clock.work(0.2)
            step_end()

    monkeypatch.setattr(Ours, "run", run)
    monkeypatch.setattr(Ours, "run_steps", run_steps)
    ceilings = {"flops_per_second": 1.0, "bytes_per_second": 1.0}
    monkeypatch.setattr(sys.modules[main.__module__], "ceilings", lambda *_: ceilings)
    options = [*MICRO, "--energies", "none,ar", "--num_steps", "40,20", "--out", str(out)]
    every = {setting for _, group in parse_arguments(BenchArguments, "", options).groups(False) for _, setting in group}
    main([*options, "--max_minutes", "0.3"])
    results = json.loads(out.read_text())
    measured = [report.setting_of(row) for row in results["rows"]]
    left_out = [report.setting_of(row) for row in results["left_out"]]
    assert max(ends) <= 18 and clock.now <= 18.2 and 0 < len(measured) < len(every)  # a trial ends with its step
    assert set(measured) | set(left_out) == every and len(measured) + len(left_out) == len(every)
    assert measured[0].num_steps == 40 and measured[0].batch == 1
    assert all("left" in row["reason"] for row in results["left_out"]) and "s are left" in report.text(results)
    clock.now = 1000.0
    main([*options, "--resume", "true"])  # the limit is of a run, and no part of what is measured
    again = json.loads(out.read_text())
    assert again["rows"][: len(measured)] == results["rows"] and not again["left_out"]
    assert {report.setting_of(row) for row in again["rows"]} == every


def test_what_a_row_takes_at_least():
    bench, setting = make_bench(), make_setting("ar")
    ours = make_ours("ar")
    assert bench.least_seconds(ours, setting, 1, 10.0) == 20  # its work is counted, and it is timed
    compiled = make_setting("ar", compile=True)
    assert bench.least_seconds(ours, compiled, 1, 10.0) == 40 + 2 * COMPILE_SECONDS
    ours.recorded[1, compiled.num_candidates, compiled.energy_window] = 0
    assert bench.least_seconds(ours, compiled, 1, 10.0) == 40
    late = Budget(1.0, time.perf_counter() - 50)
    late.check(5.0)
    with pytest.raises(LeftOut, match="it would take about 15 s, and (9|10) s are left"):
        late.check(15.0)
    with pytest.raises(LeftOut, match="no time is left"):
        Budget(1.0, time.perf_counter() - 100).check(0.0)


@pytest.mark.parametrize("kind", ["ours", "published"])
def test_set_up_is_no_part_of_a_step(kind, monkeypatch, checkout):
    """Nor are steps that reveal nothing."""
    clock = Clock(monkeypatch)
    if kind == "ours":
        sampler = make_ours("ar")
        canvas, encode = type(sampler.model)._canvas, sampler.model.denoiser.encode
        owners = (type(sampler.model), "_canvas", canvas), (sampler.model.denoiser, "encode", encode)
    else:
        sampler = Published(published.load(str(checkout)), "ar", SIZE, "cpu", 0)
        sample, forward = type(sampler.model)._sample, sampler.model.backbone.forward
        owners = (type(sampler.model), "_sample", sample), (sampler.model.backbone, "forward", forward)
    costs = {owners[0][1]: [5.0] * 99, owners[1][1]: [3.0] + [1.0] * 99}  # the first pass makes constants

    def costing(name, function):
        def call(*args, **kwargs):
            clock.work(costs[name].pop(0))
            return function(*args, **kwargs)

        return call

    for owner, name, function in owners:
        monkeypatch.setattr(owner, name, costing(name, function))
    bench, setting = make_bench(), make_setting("ar", num_steps=20)  # of 20 steps at most 12 reveal one of 12 tokens
    for in_window in (True, False):
        costs[owners[1][1]] = [3.0] + [1.0] * 99
        assert bench.trial(sampler, setting, 1, in_window) == (1.0, 5.0 + 2.0)
        costs[owners[1][1]] = [3.0] + [1.0] * 99
        one = make_setting("ar", num_steps=20, num_candidates=setting.num_candidates if in_window else 1)
        assert profile_step.time_steps(bench, sampler, one, 3) == (1.0, 7.0)
    costs[owners[1][1]] = [3.0] + [1.0] * 99
    hi_lo = make_setting("ar", num_steps=4, energy_window=(1.0, 0.0))
    assert bench.estimate(sampler, hi_lo, 1) == pytest.approx(7.0 + 4 * sampler.steps(hi_lo))
    with pytest.raises(LeftOut, match="of 4 reveal something, fewer than 7"):
        costs[owners[1][1]] = [1.0] * 99
        profile_step.time_steps(bench, sampler, hi_lo, 5)


@pytest.fixture(scope="module")
def profile_out(tmp_path_factory, checkout):
    out = tmp_path_factory.mktemp("profile") / "profile.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDLM_REF", str(checkout))
        profile_step.main([*PROFILE, "--out", str(out)])
    return out


def test_profile_has_every_field(profile_out, capsys):
    results = json.loads(profile_out.read_text())
    found = [(row["sampler"], row["energy"], row["num_candidates"]) for row in results["rows"]]
    assert found == [(name, e, k) for e, k in (("ar", 1), ("ar", 3), ("nce", 3)) for name in ("published", "ours")]
    assert not results["left_out"] and results["published_sha256"]
    for row in results["rows"]:
        assert row["ms"] == median(row["all_ms"]) > 0 and len(row["all_ms"]) == 2
        assert row["busy_ms"] > 0 and 0 <= row["idle_share"] < 1 and row["once_ms"] >= 0 and row["launches"] > 10
        times = [kernel["ms"] for kernel in row["top"]]
        assert times == sorted(times, reverse=True) and len(times) <= 10 and sum(times) <= row["busy_ms"] * 1.001
        assert (row["stage_ms"]["energy"] > 0) == (row["num_candidates"] > 1) and row["stage_ms"]["denoiser"] > 0
    assert results["rows"][3]["launches"] > results["rows"][1]["launches"]  # an energy is further work
    profile_out.with_suffix(".png").unlink()
    profile_step.main(["--from_json", str(profile_out)])
    assert capsys.readouterr().out == profile_step.text(results) + "\n"
    assert profile_out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert profile_step.table(results).count("\n") == 1 + 6


def test_profile_goes_on_where_time_ended(profile_out, tmp_path, monkeypatch):
    monkeypatch.delenv("EDLM_REF", raising=False)
    out, before = tmp_path / "profile.json", json.loads(profile_out.read_text())
    profile_step.main([*PROFILE, "--max_minutes", "1e-9", "--out", str(out)])
    results = json.loads(out.read_text())
    assert not results["rows"] and [row["reason"] for row in results["left_out"]] == ["no time is left"] * 3
    out.write_text(json.dumps(before | {"rows": before["rows"][:-1]}))
    profile_step.main([*PROFILE, "--resume", "true", "--out", str(out)])
    again = json.loads(out.read_text())
    assert again["rows"][:-1] == before["rows"][:-1] and again["rows"][-1]["sampler"] == "ours"
    assert report.setting_of(again["rows"][-1]) == report.setting_of(before["rows"][-1]) and not again["left_out"]


def test_kernels_and_launches_are_told_apart():
    def event(name, microseconds=0.0, device=False, annotation=False):
        kind = DeviceType.CUDA if device else DeviceType.CPU
        span = SimpleNamespace(elapsed_us=lambda: microseconds)
        about = {"is_user_annotation": annotation, "cpu_children": [], "self_cpu_time_total": microseconds}
        return SimpleNamespace(name=name, device_type=kind, time_range=span, **about)

    events = [event("gemm", 300.0, device=True)] * 4 + [event("Memcpy HtoD", 100.0, device=True)] * 2
    events += [event("range", 5000.0, device=True, annotation=True), event("aten::mm", 7000.0)]
    events += [event("cudaLaunchKernel")] * 3 + [event("cuLaunchKernelEx"), event("cudaGraphLaunch")]
    events += [event("cudaStreamSynchronize")] * 2 + [event("cudaDeviceSynchronize"), event("cudaMemcpyAsync")] * 2
    found = profile_step.summary(events, 2, on_cuda=True)
    assert found["busy_ms"] == pytest.approx(0.7) and found["launches"] == 2.5 and found["waits"] == 1
    assert found["host_calls"] == {"cudaStreamSynchronize": 1, "cudaMemcpyAsync": 1, "cudaGraphLaunch": 0.5}
    gemm, copy = found["top"]
    assert gemm == {"name": "gemm", "ms": pytest.approx(0.6), "calls": 2} and copy["calls"] == 1


def test_predictions_are_shown_for_the_full_size_alone():
    def row(batch, seconds, k=8, compile=False, T=128, window=(1.0, 0.8), energy="ar"):
        about = {"size": "subwords", "energy": energy, "num_candidates": k, "energy_window": list(window)}
        size = 16 if batch == "best" else batch
        about |= {"num_steps": T, "batch": batch, "batch_size": size, "compile": compile}
        return about | {"seconds_per_sequence": seconds}

    ours = [row(1, 0.512), row(1, 0.128, compile=True), row("best", 0.256), row(1, 9.0, T=32), row(8, 9.0)]
    results = {"device": "cuda", "sizes": "subwords", "rows": ours, "published": [row(1, 1.76, T=1024), row(8, 9.0)]}
    results |= dict.fromkeys(OWN_SIZES)
    found = [(what, predicted, measured) for what, _, predicted, measured in predictions.compared(results)]
    assert found == [
        ("ms per step: ours, batch 1", 4.64, 4.0),
        ("ms per step: ours, batch 1, compiled", 2.00, 1.0),
        ("ms per step: ours, best batch", 1.59, 2.0),
        ("s per sequence: ours, best batch", 0.203, 0.256),
        ("s per sequence: published, batch 1", 4.81, 1.76),
    ]
    assert report.predicted_table(results).splitlines()[2].endswith("| 4.64 | 4 | 0.86 |")
    assert predictions.compared(results | {"length": 1024, "vocab_size": 50258}) != []
    for change in ({"device": "cpu"}, {"length": 512}, {"sizes": "characters"}):
        assert predictions.compared(results | change) == []
    # both tables are of one estimate
    for what, place in (("published, batch 1", 0), ("ours, best batch", 1)):
        for which, pair in zip(predictions.COLUMNS[1:4], predictions.SECONDS_PER_SEQUENCE[128][1:4], strict=True):
            assert pair[place] == pytest.approx(0.128 * predictions.MS_PER_STEP[what][which[:2]], rel=0.02)


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
        bench = make_bench(repeats=2)
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
        make_bench(repeats=3).take_turns([Counted("ours", 1.0), Counted("theirs", 2.0)], most)
        assert order == ["ours", "theirs"] * turns


def test_best_batch_stops_before_it_takes_too_long(monkeypatch):
    tried = []

    def estimate(self, sampler, setting, batch_size):
        tried.append(batch_size)
        return 1 + 0.5 * batch_size

    monkeypatch.setattr(Bench, "estimate", estimate)
    bench, ours = make_bench(), make_ours("none")
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
    sampler._sample = lambda num_steps: (_ for _ in ()).throw(RuntimeError("CUDA out of memory. Tried to allocate"))
    with pytest.raises(torch.OutOfMemoryError):  # as TorchScript says it
        published.generate(sampler, 2, 3, 2, (1.0, 0.0))
    sampler._sample = lambda num_steps: (_ for _ in ()).throw(RuntimeError("another"))
    with pytest.raises(RuntimeError, match="another"):
        published.generate(sampler, 2, 3, 2, (1.0, 0.0))
    with pytest.raises(ValueError, match="EDLM_REF.*nowhere"):
        published.load("nowhere")


def test_rotation_stands_in_for_the_kernel():
    torch.manual_seed(0)
    qkv_BL3HD, (cos_LD, sin_LD) = torch.randn(2, 5, 3, 4, 6), torch.randn(2, 5, 3)
    first, second = qkv_BL3HD.clone().chunk(2, dim=-1)
    cos, sin = cos_LD[:, None, None], sin_LD[:, None, None]
    expected = torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)
    expected[:, :, 2] = qkv_BL3HD[:, :, 2]  # values are not turned
    assert published.rotate_in_place(qkv_BL3HD, cos_LD, sin_LD) is qkv_BL3HD
    torch.testing.assert_close(qkv_BL3HD, expected)


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
        ("max_minutes", "-1"),
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


@pytest.mark.parametrize(
    "option, value",
    [("num_steps", "8,16"), ("num_steps", "3"), ("steps", "0"), ("batch_sizes", "0"), ("energies", "lstm")],
)
def test_bad_options_of_the_profile_are_named(option, value):
    with pytest.raises(ValueError, match=option) as error:
        profile_step.main([*PROFILE, f"--{option}", value])
    assert value in str(error.value)
