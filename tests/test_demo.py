"""hub_cards/demo.py, run as a user runs it: on a model folder alone, to a file and in a terminal."""

import importlib.util
import json
import math
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from modeling_edlm import EDLMConfig, EDLMForCausalLM, EDLMModel

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "hub_cards" / "demo.py"
TOKENIZER = ROOT / "hub_cards" / "edlm-wiki27"
PROMPT = "the city of "
LENGTH, NUM_STEPS, NUM_CANDIDATES, SEED = 90, 12, 4, 3
AUTO_MAP = {
    "AutoConfig": "configuration_edlm.EDLMConfig",
    "AutoModel": "modeling_edlm.EDLMModel",
    "AutoModelForCausalLM": "modeling_edlm.EDLMForCausalLM",
}
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
SHOW_CURSOR, HIDE_CURSOR = "\x1b[?25h", "\x1b[?25l"


def load_script(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model folder as published, with random weights; code at the top and none in ar/."""
    folder = tmp_path_factory.mktemp("demo") / "toy"
    sizes = {"vocab_size": 28, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "cond_dim": 0}
    torch.manual_seed(0)
    edlm = EDLMModel(EDLMConfig(**sizes, max_position_embeddings=128, energy_type="nce"))
    ar = EDLMForCausalLM(EDLMConfig(**sizes, max_position_embeddings=128))
    for model, where in ((edlm, folder), (ar, folder / "ar")):
        with torch.no_grad():  # as initialised, the last layers are zero and no candidate differs from another
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
        model.config.auto_map = AUTO_MAP
        model.save_pretrained(where)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder)
    for copy in (folder / "ar").glob("*.py"):
        copy.unlink()
    assemble = load_script(ROOT / "hub_cards" / "assemble.py")
    code = {p.name: p.read_bytes() for p in assemble.SOURCE.glob("*.py") if p.name not in assemble.NOT_UPLOADED}
    assemble.assemble(folder, code)
    return folder


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """No network, no color settings of whoever runs the tests, and a `modeling_edlm` that must not be imported."""
    poison = tmp_path_factory.mktemp("poison")
    (poison / "modeling_edlm.py").write_text("raise RuntimeError('the installed package was imported')\n")
    environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS", "LINES")}
    return environment | {
        "PYTHONPATH": str(poison),
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(tmp_path_factory.mktemp("modules")),
        "TERM": "xterm",
    }


def command(folder: Path, *options: str) -> list[str]:
    fixed = ["--prompt", PROMPT, "--length", str(LENGTH), "--num_candidates", str(NUM_CANDIDATES)]
    return [sys.executable, str(DEMO), "--model", str(folder), "--device", "cpu", "--seed", str(SEED), *fixed, *options]


@pytest.fixture(scope="module")
def piped(folder, environment, tmp_path_factory) -> tuple[str, dict]:
    """Standard output and the JSON of a run that is not in a terminal."""
    target = tmp_path_factory.mktemp("json") / "demo.json"
    arguments = command(folder, "--num_steps", str(NUM_STEPS), "--json", str(target))
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in target.parent.iterdir()] == [target.name]  # no temporary file is left
    assert "custom code" not in done.stdout + done.stderr  # the library's question, which would wait for an answer
    return done.stdout, json.loads(target.read_text())


def in_terminal(arguments: list[str], environment: dict[str, str], interrupt_at: str | None = None) -> tuple[int, str]:
    """Exit code and output of a run in a pseudo-terminal; SIGINT once `interrupt_at` has been written."""
    ours, theirs = pty.openpty()

    def heed():  # where the tests run in the background, the shell has told all of them to ignore SIGINT
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    process = subprocess.Popen(arguments, env=environment, stdin=theirs, stdout=theirs, stderr=theirs, preexec_fn=heed)
    os.close(theirs)
    output, deadline = b"", time.monotonic() + 60
    try:
        while time.monotonic() < deadline:
            if not select.select([ours], [], [], 1)[0]:
                continue
            try:
                chunk = os.read(ours, 65536)
            except OSError:  # Linux: the other end is closed
                break
            if not chunk:
                break
            output += chunk
            if interrupt_at and interrupt_at.encode() in output:
                process.send_signal(signal.SIGINT)
                interrupt_at = None
        return process.wait(timeout=10), output.decode().replace("\r\n", "\n")
    finally:
        process.kill()
        os.close(ours)


def test_numbers(piped, folder):
    """Texts, energies and counts are those of generate() and energy() in this process, from the package."""
    _, result = piped
    model, tokenizer = EDLMModel.from_pretrained(folder), AutoTokenizer.from_pretrained(TOKENIZER)
    kinds = [(s["text_is"], s["sampler"]) for s in result["samples"]]
    assert kinds == [(text, sampler) for text in ("completion", "unconditional") for sampler in ("MDLM", "EDLM")]
    for s in result["samples"]:
        prompt = tokenizer(PROMPT, return_tensors="pt").input_ids if s["text_is"] == "completion" else None
        k = NUM_CANDIDATES if s["sampler"] == "EDLM" else 1
        expected = model.generate(
            prompt, max_length=LENGTH, num_steps=NUM_STEPS, num_candidates=k, seed=SEED, return_dict_in_generate=True
        )
        assert s["text"] == tokenizer.decode(expected.sequences[0])
        assert s["prompt"] == ("" if prompt is None else PROMPT)
        assert s["text"].startswith(s["prompt"]) and len(s["text"]) == LENGTH
        assert s["nfe"] == int(expected.nfe) and 0 < s["nfe"] <= NUM_STEPS
        assert s["energy_nfe"] == int(expected.energy_nfe) and (s["energy_nfe"] > 0) == (k > 1)
        assert s["seconds"] > 0
        start = torch.full((1, LENGTH), 27)
        start[:, : len(s["prompt"])] = expected.sequences[:, : len(s["prompt"])]
        assert s["energy"] == pytest.approx(model.energy(expected.sequences, start).item(), rel=1e-4)
    assert result["options"]["num_steps"] == NUM_STEPS and result["torch"] == torch.__version__
    assert result["dtype"] == "torch.float32" and result["device"].startswith("cpu")


def test_bits_per_character(piped, folder):
    """Character by character: one forward pass for each prefix, probabilities over the 27 characters."""
    ar = EDLMForCausalLM.from_pretrained(folder / "ar").eval()
    alphabet = " abcdefghijklmnopqrstuvwxyz"
    for s in piped[1]["samples"]:
        ids = [alphabet.index(character) for character in s["text"]]
        bits = 0.0
        for i in range(len(s["prompt"]), len(ids)):
            with torch.no_grad():
                logits = ar(input_ids=torch.tensor([[27] + ids[:i]])).logits[0, -1, :27]
            bits -= math.log2(logits.double().softmax(-1)[ids[i]])
        assert s["ar_bits_per_character"] == pytest.approx(bits / (len(ids) - len(s["prompt"])), rel=1e-4)


def test_piped_output(piped):
    """Five snapshots of each sample, no escape codes, and the numbers of the JSON in the table."""
    output, result = piped
    assert "\x1b" not in output
    assert len(re.findall(r"^-- (MDLM|EDLM) \d+/12 ", output, re.M)) == 5 * 4
    for s in result["samples"]:
        assert s["text"] in output
        row = next(line.split() for line in output.splitlines() if line.startswith(f"{s['text_is']:<15}{s['sampler']}"))
        assert [int(row[2]), int(row[3])] == [s["nfe"], s["energy_nfe"]]
        assert float(row[5]) == pytest.approx(s["energy"], abs=0.006)
        assert float(row[6]) == pytest.approx(s["ar_bits_per_character"], abs=0.0006)
    assert "README.md" in output and "anecdote" in output and "AR model only scores" in output


def test_terminal(piped, folder, environment, tmp_path):
    """Redrawn in place, cursor back, same texts; and without ar/ there is a note in place of the column."""
    without_ar = shutil.copytree(folder, tmp_path / "toy", ignore=shutil.ignore_patterns("ar"))
    code, output = in_terminal(command(without_ar, "--num_steps", str(NUM_STEPS)), environment)
    assert code == 0, output
    assert output.count(HIDE_CURSOR) == output.count(SHOW_CURSOR) == 4
    assert "\x1b[2m.." in output  # dim masks
    finals = [part.split(SHOW_CURSOR)[0] for part in output.split(HIDE_CURSOR)[1:]]
    for final, s in zip(finals, piped[1]["samples"], strict=True):
        *lines, bar, end = ESCAPE.sub("", re.split(r"\x1b\[\d+A", final)[-1]).replace("\r", "").split("\n")
        assert "".join(lines) == s["text"] and f"{NUM_STEPS}/{NUM_STEPS}" in bar and end == ""
        assert max(map(len, [*lines, bar])) < 100
    assert "AR bits/char" not in output and "No AR bits per character" in output


def test_interrupt(folder, environment):
    """Ctrl-C in the middle of sampling: code 130, the cursor is back, no traceback."""
    arguments = command(folder, "--num_steps", "100000")
    code, output = in_terminal(arguments, environment, interrupt_at="\x1b[1;32m")
    assert code == 130 and "Traceback" not in output and "interrupted" in output
    assert output.rindex(SHOW_CURSOR) > output.rindex(HIDE_CURSOR)
    assert "100000/100000" not in output


@pytest.mark.parametrize("no_color", ["", "1"])
def test_frames(monkeypatch, capsys, no_color):
    """Three frames: what is given, masked, new and old, and the energy's steps; NO_COLOR leaves only movements."""
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "41")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    start = tokenizer("ab").input_ids + [27] * 3
    canvas = load_script(DEMO).Canvas(tokenizer, 27, start, 2, "EDLM", (1.0, 0.8))
    canvas.draw(start, 0)
    canvas.last = -1e9  # long ago
    for step, (t, text) in enumerate(((1.0, "abc"), (0.5, "abcde"))):
        ids = tokenizer(text).input_ids
        canvas.callback(None, step, t, {"sequences": torch.tensor([ids + [27] * (5 - len(ids))])})
    canvas.close()
    frames = re.split(r"\x1b\[2A\r", capsys.readouterr().out)
    assert [ESCAPE.sub("", frame).split("\n")[0] for frame in frames] == ["ab...", "abc..", "abcde"]
    bars = [ESCAPE.sub("", frame).split("\n")[1] for frame in frames]
    assert ["energy chooses" in bar for bar in bars] == [False, True, False]
    assert [bar.count("#") > 0 for bar in bars] == [False, True, True] and "-" not in bars[2]
    styles = [re.findall(r"\x1b\[([1-9;]+)m([^\x1b]*)", frame) for frame in frames]
    colored = [[("1", "ab"), ("2", "...")], [("1", "ab"), ("1;32", "c"), ("2", "..")], [("1", "ab")]]
    assert styles == ([[], [], []] if no_color else colored)
    assert 0 < canvas.seconds < 1


@pytest.mark.parametrize("gone", ["all", "modeling_edlm.py"])
def test_incomplete_folder(folder, environment, tmp_path, gone):
    path = tmp_path / "toy"
    if gone != "all":
        shutil.copytree(folder, path, ignore=shutil.ignore_patterns(gone))
    done = subprocess.run(command(path), env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert str(path) in done.stderr and gone.replace("all", "config.json") in done.stderr
    assert "make model" in done.stderr
