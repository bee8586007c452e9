"""A family is trained within its minutes, goes on where it was stopped, and its parts fit together."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from safetensors import safe_open

from modeling_edlm import EDLMModel
from training import family, pretrain, train_energy
from training.common import stages
from training.common.arguments import MODELS, parse_arguments
from training.common.data import character_tokenizer

ROOT = Path(__file__).parents[1]
DATA = str(Path(__file__).parent / "fixtures" / "wiki27-sample.parquet")
TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "length": 32, "batch_size": 4}
TINY |= {"log_steps": 1, "eval_blocks": 4, "final_eval_blocks": 4, "eval_sequences": 2, "eval_num_steps": "2"}
TINY |= {"validation_data": DATA, "report_to": "none", "num_threads": 1, "mixed_precision": "bf16"}
SCRIPTS = {"pretrain": pretrain.main, "train_energy": train_energy.main}


def stage(script, minutes=9.0, rates=(1e-3,), **options):
    return {"script": script, "minutes": minutes, "learning_rates": list(rates), "options": options}


def write(folder: Path, **changes) -> Path:
    character_tokenizer(model_max_length=32).save_pretrained(folder / "tokenizer")
    content = {
        "tokenizer": str(folder / "tokenizer"),
        "max_shard_size": "10KB",
        "trial_minutes": 0.03,
        "options": TINY,
        "stages": {
            "ar": stage("pretrain", objective="ar"),
            "denoiser": stage("pretrain", rates=(1e-3, 1e-4), init_from="{ar}"),
            "lora": stage("train_energy", base="{denoiser}", lora_r=2),
            "step": stage("train_energy", base="{denoiser}", energy_target="xs"),
        },
    }
    path = folder / "family.yaml"
    path.write_text(yaml.safe_dump(content | changes))
    return path


def run(path: Path, *more: str) -> None:
    family.main(["--family", str(path), "--data", DATA, "--out", str(path.parent / "out"), *more])


@pytest.fixture
def started(monkeypatch) -> list[dict]:
    """Scripts run in this process, runs no longer than six steps; a list of the options they were given."""
    calls = []

    def run_script(script, options):
        calls.append(options)
        AcceleratorState._reset_state(reset_partial_state=True)
        is_trial = "trials" in str(options["output_dir"])
        options = options | ({} if is_trial else {"max_steps": 6, "eval_steps": 3, "warmup_steps": 1})
        SCRIPTS[script]([str(part) for name, value in options.items() for part in (f"--{name}", value)])
        return 0

    monkeypatch.setattr(family, "run_script", run_script)
    return calls


def test_a_family_from_nothing_to_text(tmp_path, started):
    path = write(tmp_path)
    run(path)
    models, story = tmp_path / "out" / "models", json.loads((tmp_path / "out" / "family.json").read_text())
    assert list(story["stages"]) == ["ar", "denoiser", "lora", "step"] and not story["not_run"]
    assert (tmp_path / "out" / "family.png").stat().st_size > 10_000
    for name, told in story["stages"].items():
        plan, rows = told["plan"], [json.loads(x) for x in (tmp_path / "out" / name / "metrics.jsonl").open()]
        assert told["steps"] == 6 < plan["max_steps"]  # nine minutes have more
        assert told["last_evaluation"]["step"] == told["steps"] == rows[-1]["step"]
        assert len(plan["trials"]) == (2 if name == "denoiser" else 1)
        assert not list((tmp_path / "out" / name / "trials").glob("*/checkpoint*"))
    assert "validation_bits_per_token" in story["stages"]["ar"]["last_evaluation"]
    assert started[4]["init_from"] == str(models / "ar")
    assert len(list((models / "denoiser").glob("*.safetensors"))) > 1
    for file in (models / "denoiser").glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            assert all(weights.get_tensor(name).dtype == torch.bfloat16 for name in weights.keys())  # noqa: SIM118
    for name in ("lora", "step"):  # over what is kept, in its precision
        model = EDLMModel.from_pretrained(models / "denoiser", dtype=torch.float32).load_energy(str(models / name))
        assert model.generate(num_steps=2, num_candidates=2, seed=0).shape == (1, 32)

    done = len(started)
    shutil.rmtree(tmp_path / "out" / "ar")  # large, and not taken along
    run(path)
    assert len(started) == done  # all is there
    assert json.loads((tmp_path / "out" / "family.json").read_text())["stages"] == story["stages"]
    run(path, "--out", str(tmp_path / "more"), "--stages", "step", "--given", f"denoiser={models / 'denoiser'}")
    assert {options["base"] for options in started[done:]} == {str(models / "denoiser")}


def test_a_run_goes_on_with_its_plan_and_the_rest_of_its_minutes(tmp_path, started, monkeypatch):
    path = write(tmp_path, stages={"ar": stage("pretrain", objective="ar")})
    with monkeypatch.context() as patched:
        patched.setattr(family, "keep", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(SystemExit, match="stopped"):
            run(path)
    plan = json.loads((tmp_path / "out" / "ar" / "plan.json").read_text())
    run(path)
    trial, first, second = started
    assert "resume" not in first and second["resume"] == "true"
    for name in ("learning_rate", "max_steps", "warmup_steps", "eval_steps"):
        assert second[name] == first[name] == plan[name]
    assert second["max_minutes"] < first["max_minutes"] <= plan["minutes"]
    assert (tmp_path / "out" / "models" / "ar" / "config.json").exists()


def test_minutes_in_all(tmp_path, started):
    """A stage whose trials would not fit is not run, and the story says so."""
    run(write(tmp_path), "--stages", "ar", "--max_minutes", "0.01")
    assert not started and json.loads((tmp_path / "out" / "family.json").read_text())["not_run"] == ["ar"]


def trial(rate, losses, speed=2.0, startup=3.0, failed=False):
    curve = [[step, loss] for step, loss in enumerate(losses, 1)]
    return {"learning_rate": rate, "failed": failed, "steps_per_second": speed, "curve": curve,
            "other_seconds": startup, "evaluation_seconds": 0.5}  # fmt: skip


def test_the_plan():
    """The lowest loss at the same steps, though another trial went further; steps for the minutes, less the start."""
    trials = [trial(1.0, [9, 5, 3, 3, 1, 1]), trial(2.0, [9, 5, 2, 2]), trial(3.0, [], failed=True)]
    plan = family.planned(trials, 10.0, "x")
    assert plan["learning_rate"] == 2.0 and trials[0]["loss"] == 3 and trials[1]["loss"] == 2
    assert plan["max_steps"] == int(2.0 * (family.MARGIN * 600 - 3.0 - family.EVALUATIONS * 0.5))
    assert family.planned([trial(1.0, [1, 1])], 0.01, "x") is None
    with pytest.raises(SystemExit, match="x: every trial failed"):
        family.planned([trial(1.0, [], failed=True)], 1.0, "x")


@pytest.mark.parametrize(
    ("changes", "more", "message"),
    [
        ({"stagez": {}}, (), "stagez"),
        ({"dtype": "float8"}, (), "dtype must be .*'float8'"),
        ({"stages": {"a": stage("prestrain")}}, (), "script must be .*'prestrain'"),
        ({"stages": {"a": stage("pretrain", lora_r=2)}}, (), "no option .*lora_r"),
        ({"stages": {"a": stage("pretrain", minutes=0)}}, (), "minutes and learning_rates, got 0"),
        ({"stages": {"a": stage("pretrain", init_from="{b}")}}, (), "{b} is no stage"),
        ({}, ("--stages", "ar,b"), r"stages must be of .*\['b'\]"),
        ({}, ("--given", "ar"), "given must be name=FOLDER.*'ar'"),
        ({}, ("--options", "length"), "options must be --name value.*'length'"),
        ({}, ("--time_scale", "-1"), "time_scale must not be negative, got -1"),
    ],
)
def test_bad_input_is_named(tmp_path, started, changes, more, message):
    with pytest.raises(ValueError, match=message):
        run(write(tmp_path, **changes), *more)
    assert not started


@pytest.mark.parametrize("path", sorted((ROOT / "training" / "families").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_shipped_families_are_well_formed(path, tmp_path):
    """Every option is one that its script takes."""
    work = family.Work(family.FamilyArguments(family=str(path), data="data", out=str(tmp_path)))
    assert work.stages
    for each in work.stages:
        own = work.options(each) | {"output_dir": "out", "learning_rate": each.learning_rates[0]}
        for name in own.keys() & set(MODELS):  # what earlier stages will have made
            Path(own[name]).mkdir(parents=True, exist_ok=True)
        argv = [str(part) for name, value in own.items() for part in (f"--{name}", value)]
        arguments = parse_arguments(family.SCRIPTS[each.script], "", argv)
        on_gpu = path.stem != "stories"  # its minutes are those of two CPU cores
        assert (arguments.mixed_precision, arguments.compile) == (("bf16", True) if on_gpu else ("no", False))


def test_a_script_is_told_once_and_saves(tmp_path):
    """SIGINT for the one that runs it, as in a terminal: the script writes its checkpoint before both end."""
    character_tokenizer(model_max_length=32).save_pretrained(tmp_path / "tokenizer")
    options = {k: v for k, v in TINY.items() if k in pretrain.PretrainArguments.__dataclass_fields__}
    options |= {"data": DATA, "tokenizer": str(tmp_path / "tokenizer"), "output_dir": str(tmp_path / "run")}
    code = f"from training.common.stages import run_script\nrun_script('pretrain', {options | {'max_steps': 10**6}!r})"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") > 3):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in process.communicate(timeout=60)[1]
    assert (tmp_path / "run" / "checkpoint.safetensors").exists()


def test_the_exit_status_is_the_scripts(capfd):
    assert stages.run_script("pretrain", {"output_dir": ""}) != 0
