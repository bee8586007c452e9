"""tests/on_device at a small size: what it writes, and that it calls a wrong sampler wrong."""

import itertools
import json
import time

import pytest
import torch

from bench import on_device
from modeling_edlm import backbone, proposal, sampler
from modeling_edlm.backbone import Backbone
from modeling_edlm.draws import choose, draw
from support.toy import MASK

SMALL = "--device cpu --rows 2000 --dtypes float32 --modes eager --energies nce --num_candidates 1,8".split()
TOP = (
    "command options device_name torch_settings alpha alpha_of_a_row total_seconds rows "
    "cpu_name threads versions git_commit date"
)


def run(tmp_path, *argv) -> tuple[int, dict]:
    out = tmp_path / "laws.json"
    code = on_device.main([*SMALL, "--out", str(out), *argv])
    return code, json.loads(out.read_text())


def verdicts(results: dict, *kinds) -> dict[str, str]:
    return {row["what"]: row["verdict"] for row in results["rows"] if row["kind"] in (kinds or {row["kind"]})}


@pytest.fixture
def few_checks(monkeypatch):
    """Those whose names begin so, in one window."""

    def keep(*names):
        plan = on_device.Checks.plan
        monkeypatch.setattr(
            on_device.Checks, "plan", lambda self: [row for row in plan(self) if row.what.startswith(names)]
        )

    monkeypatch.setattr(on_device, "WINDOWS", on_device.WINDOWS[:1])
    return keep


def test_a_right_sampler(tmp_path, capsys):
    code, results = run(tmp_path)
    assert code == 0 and results.keys() == set(TOP.split())
    assert results["options"]["rows"] == 2000 and results["torch_settings"]["float32_matmul_precision"] == "highest"
    assert all(
        row.keys() == set("kind what dtype mode numbers verdict".split()) and row["numbers"] for row in results["rows"]
    )
    found = verdicts(results)
    assert len(found) == len(results["rows"]) and set(found.values()) == {"ok"}
    kinds = {row["kind"] for row in results["rows"]}
    assert kinds == {"primitives", "parity", "adapter", "law", "power"}
    with_p = [row["numbers"]["p"] for row in results["rows"] if "p" in row["numbers"]]
    assert results["alpha_of_a_row"] == pytest.approx(1e-4 / len(with_p)) and len(with_p) == 2 + 3
    printed = capsys.readouterr().out
    assert f"{len(found)} ok, 0 bad, 0 reported, 0 not run; " in printed
    picture = tmp_path / "laws.png"
    picture.unlink()
    assert on_device.main(["--from_json", str(tmp_path / "laws.json")]) == 0
    assert printed.startswith(capsys.readouterr().out) and picture.stat().st_size > 10_000


def test_a_wrong_sampler(tmp_path, monkeypatch, capsys, few_checks):
    """The sign of the energy: k = 1 has none, and all that has one is wrong, also when the file is read again."""
    few_checks("law", "same seed", "dtypes")
    monkeypatch.setattr(sampler, "choose", lambda energy_NK, *rest: choose(-energy_NK, *rest))
    code, results = run(tmp_path)
    found = verdicts(results)
    assert code == 1 and found == {
        "dtypes: draws, weights": "ok",
        "law: k=1": "ok",
        "law: nce, k=8, t in [0, 1]": "bad",
    }
    assert on_device.main(["--from_json", str(tmp_path / "laws.json")]) == 1
    assert ", 1 bad, " in capsys.readouterr().out


@pytest.mark.parametrize(
    "module, name, replacement, found",
    [
        (sampler, "choose", lambda energy_NK, *rest: choose(0 * energy_NK, *rest), {"power: nce, k=8": "bad"}),
        (proposal, "draw", lambda logits, u: draw(logits.bfloat16(), u), {"dtypes: draws, weights": "bad"}),
    ],
    ids=["no energy", "draws in bfloat16"],
)
def test_other_wrong_samplers(module, name, replacement, found, tmp_path, monkeypatch, few_checks):
    few_checks(*found)
    monkeypatch.setattr(module, name, replacement)
    code, results = run(tmp_path)
    assert code == 1 and verdicts(results) == found


@pytest.mark.parametrize("wrong", [0.0, -1.0])
def test_compiled_blocks(wrong, tmp_path, monkeypatch, few_checks):
    """Few sizes are compiled, and blocks that the compiler gets wrong are called so, in both dtypes."""
    few_checks("law", "same seed")
    sizes = set()

    def blocks(self, x_NLD, *rest):
        sizes.add(tuple(x_NLD.shape[:2]))
        return Backbone.run_blocks(self, x_NLD, *rest) + wrong * x_NLD

    monkeypatch.setattr(backbone, "_compiled_blocks", lambda: blocks)
    options = "--dtypes float32,bfloat16 --modes compiled --num_candidates 8 --rows 5000".split()
    code, results = run(tmp_path, *options)
    assert sizes == {(4096, 3), (8192, 3), (16384, 3), (256, 24), (512, 24)}
    judged = {(row["kind"], row["dtype"]): row for row in results["rows"]}
    expected = "bad" if wrong else "ok"
    assert code == bool(wrong) and judged["same seed", "bfloat16"]["verdict"] == "reported"
    for pair in (("law", "float32"), ("law", "bfloat16"), ("same seed", "float32")):
        assert judged[pair]["verdict"] == expected, pair
    numbers = judged["law", "bfloat16"]["numbers"]  # what it samples is what it computes, but that is no rounding
    assert numbers["p"] > 1e-4 and (numbers["tv_rounding"] > on_device.ROUNDING) == bool(wrong)


def test_no_time_is_left(tmp_path, monkeypatch, capsys):
    clock = itertools.count(0, 20)  # seconds
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    code, results = run(tmp_path, "--max_minutes", "1.5")
    states = [row["verdict"] for row in results["rows"]]
    begun = states.index("not run")
    assert code == 0 and 1 <= begun < 5 and set(states[:begun]) == {"ok"} and set(states[begun:]) == {"not run"}
    assert not any(row["numbers"] for row in results["rows"][begun:])
    assert f"{begun} ok, 0 bad, 0 reported, {len(states) - begun} not run; " in capsys.readouterr().out


def test_what_raises_is_bad(capsys):
    row = on_device.Row("law", "law", "float32", "compiled", lambda: 1 / 0)
    row.run()
    assert row.verdict == "bad" and row.numbers == {"error": "ZeroDivisionError: division by zero"}
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("energy", on_device.ENERGIES)
@torch.no_grad()
def test_the_tables_are_the_models(energy):
    model = on_device.make_model(energy)
    tables = on_device.Enumerated(model, False, 4096)
    xt_NL = torch.tensor([[MASK, MASK, 2], [MASK, MASK, MASK], [0, MASK, 1]])
    x_NL = torch.tensor([[0, 1, 2], [2, 2, 0], [0, 2, 1]])
    if model.config.energy_target == "xs":
        x_NL[0, 1] = x_NL[1, 2] = MASK
    for t in (1.0, 1 - 1 / 3):
        torch.testing.assert_close(tables.energy(x_NL, xt_NL, t), model.energy(x_NL, xt_NL, t), atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(tables.log_p_x0(xt_NL, t), model.log_p_x0(xt_NL, t), atol=1e-5, rtol=1e-5)
    few = on_device.Enumerated(model, False, 64)
    assert tables.equals(tables) and few.energy_at(1.0).shape == tables.energy_at(1.0).shape == (64 * 64,)


@pytest.mark.parametrize(
    "option, value",
    [
        ("device", "tpu"),
        ("device", "cuda"),
        ("dtypes", "float16"),
        ("modes", ""),
        ("energies", "ar,none"),
        ("compiled_energies", "mean"),
        ("num_candidates", "1,3"),
        ("num_candidates", "x"),
        ("rows", "0"),
        ("max_minutes", "-1"),
        ("from_json", "no.json"),
    ],
)
def test_bad_arguments_are_named(option, value, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=option):
        on_device.main([f"--{option}", value])
