"""What is installed: the wheel holds modeling_edlm alone; and commands of a clone answer before they import torch."""

import importlib
import importlib.util
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import modeling_edlm
import training

ROOT = Path(__file__).resolve().parent.parent
DIST = f"modeling_edlm-{modeling_edlm.__version__}"
BUILD = "import sys; from setuptools.build_meta import build_{0} as build; print(build(sys.argv[1]))"


def built(what: str, source: Path, out: Path) -> Path:
    command = [sys.executable, "-c", BUILD.format(what), out]
    done = subprocess.run(command, cwd=source, check=True, capture_output=True, text=True)
    return out / done.stdout.splitlines()[-1]


def test_what_is_installed(tmp_path):
    """The same from the clone and from the sdist; other packages' names are left alone."""
    clone = tmp_path / "clone"
    skip = shutil.ignore_patterns(
        ".*", "runs", "site", "*.safetensors", "__pycache__", "*.egg-info", "build", "fixtures"
    )
    shutil.copytree(ROOT, clone, ignore=skip)
    with tarfile.open(built("sdist", clone, tmp_path)) as file:
        file.extractall(tmp_path, filter="data")
    names = {path.name for path in (tmp_path / DIST).iterdir() if path.suffix != ".egg-info"}
    files = {"LICENSE", "MANIFEST.in", "PKG-INFO", "README.md", "modeling_edlm", "pyproject.toml", "setup.cfg"}
    assert names == files
    for source in (clone, tmp_path / DIST):
        out = tmp_path / f"from-{source.name}"
        out.mkdir()
        with zipfile.ZipFile(built("wheel", source, out)) as file:
            names = set(file.namelist())
            metadata = file.read(f"{DIST}.dist-info/METADATA").decode()
        code = {f"modeling_edlm/{path.name}" for path in (ROOT / "modeling_edlm").glob("*.py")}
        assert {name for name in names if ".dist-info/" not in name} == code | {"modeling_edlm/py.typed"}
        assert {name.split("/")[0] for name in names} == {"modeling_edlm", f"{DIST}.dist-info"}
        assert metadata.startswith("Metadata-Version") and "\nName: modeling-edlm\n" in metadata


def commands() -> list[str]:
    """The modules with a `main` that are run with -m."""
    folders = {"training": "*.py", "bench": "*.py", "hub_cards/publish": "*.py"}
    paths = [path for folder, form in folders.items() for path in sorted((ROOT / folder).glob(form))]
    runnable = [path for path in paths if '\nif __name__ == "__main__":' in path.read_text()]
    own = {"hub_cards/publish/try_folder.py", "hub_cards/publish/assemble.py", "bench/published.py"}  # without options
    names = [str(path.relative_to(ROOT)) for path in runnable if str(path.relative_to(ROOT)) not in own]
    return [name.removesuffix(".py").removesuffix("/__main__").replace("/", ".") for name in names]


def test_help_does_not_wait_for_torch():
    names = commands()
    assert {"training.pretrain", "training.generate", "hub_cards.publish.push", "bench"} <= set(names)
    code = f"import runpy, sys; sys.argv = ['x', '--help']\nfor name in {names}:\n"
    code += "    try:\n        runpy.run_module(name, run_name='__main__')\n    except SystemExit as end:\n"
    code += (
        "        assert end.code == 0\n    assert 'torch' not in sys.modules, name\n    print(name, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stderr.splitlines() == names and "--batch_size" in done.stdout


@pytest.mark.parametrize(
    "options, named",
    [
        (
            ["--data", "x", "--tokenizer", "x", "--output_dir", "x", "--batch_size", "0"],
            "batch_size must be at least 1",
        ),
        (["--data", "x", "--tokenizer", "x", "--output_dir", "x", "--btach_size", "2"], "--btach_size"),
        (["--data", "x", "--tokenizer", "x", "--output_dir", "x", "--config", "none.yaml"], "none.yaml"),
        (["--data", "x"], "--tokenizer"),
    ],
)
def test_a_wrong_option_is_one_line(options, named, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *options])
    with pytest.raises((SystemExit, ValueError)) as ended:
        runpy.run_module("training.pretrain", run_name="__main__")
    assert isinstance(ended.value, SystemExit) and ended.value.code == 2
    assert named in capsys.readouterr().err.splitlines()[-1]


def test_a_missing_extra_is_named(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("peft", "yaml") else find(name))
    with pytest.raises(ModuleNotFoundError, match=r"training needs peft, yaml: pip install -e '.\[train\]'"):
        importlib.reload(training)
