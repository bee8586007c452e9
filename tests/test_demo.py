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
from support.toy import make_toy
from training.tokenizer import train_tokenizer

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "hub_cards" / "demo.py"
TOKENIZER = ROOT / "hub_cards" / "edlm-wiki27"
PROMPT, GAP = "the city of ", "the city [MASK 9]  was [MASK] of the river"
NUM_STEPS, ROUNDS, SEED = 12, 3, 3
TASKS = ("story", "gap")
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
    edlm.generation_config.num_steps, edlm.generation_config.num_candidates = 64, 4
    edlm.generation_config.energy_window = (0.6, 0.1)
    edlm.generation_config.corrector_steps = ROUNDS
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
    assemble = load_script(ROOT / "hub_cards" / "publish" / "assemble.py")
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
    fixed = ["--prompt", PROMPT, "--gap", GAP, "--device", "cpu", "--seed", str(SEED)]
    return [sys.executable, str(DEMO), "--model", str(folder), *fixed, *options]


@pytest.fixture(scope="module")
def piped(folder, environment, tmp_path_factory) -> tuple[str, dict]:
    """Standard output and the JSON of a run that is not in a terminal."""
    target = tmp_path_factory.mktemp("json") / "demo.json"
    arguments = command(folder, "--steps", str(NUM_STEPS), "--json", str(target))
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
    """Texts and counts are those of generate() in this process, from the package; both samplers may spend as much."""
    _, result = piped
    model, tokenizer = EDLMModel.from_pretrained(folder), AutoTokenizer.from_pretrained(TOKENIZER)
    assert [(s["task"], s["sampler"]) for s in result["samples"]] == [(t, s) for t in TASKS for s in ("MDLM", "EDLM")]
    for s in result["samples"]:
        start = starts(tokenizer)[s["task"]]
        assert s["num_candidates"] == (4 if s["sampler"] == "EDLM" else 1) and s["seconds"] > 0
        settings = {name: s[name] for name in ("num_steps", "num_candidates")}
        expected = model.generate(start, seed=SEED, return_dict_in_generate=True, **settings)
        assert s["text"] == tokenizer.decode(expected.sequences[0])
        assert s["nfe"] == int(expected.nfe) and 0 < s["nfe"] <= s["num_steps"] + ROUNDS
        assert s["energy_nfe"] == int(expected.energy_nfe) and (s["energy_nfe"] > 0) == (s["sampler"] == "EDLM")
    assert result["samples"][1]["num_steps"] == result["samples"][3]["num_steps"] == NUM_STEPS
    for task, blanks in zip(TASKS, (56, 10), strict=True):
        passes = {name: sum(found["passes"]) / 16 for name, found in result["judged"][task].items()}
        assert passes["MDLM"] == pytest.approx(min(passes["EDLM"], blanks), rel=0.15)
    assert result["options"]["steps"] == NUM_STEPS and result["torch"] == torch.__version__
    assert result["dtype"] == "torch.float32" and result["device"].startswith("cpu")


def starts(tokenizer) -> dict[str, torch.Tensor]:
    ids = tokenizer(PROMPT).input_ids
    pieces = [tokenizer(text).input_ids for text in ("the city ", "  was ", " of the river")]
    gap = pieces[0] + [27] * 9 + pieces[1] + [27] + pieces[2]
    return {"story": torch.tensor([ids + [27] * 56]), "gap": torch.tensor([gap])}


def test_the_judge_reads_from_the_first_blank_on(piped, folder):
    """Character by character, for the first text of each kind: one forward pass for each prefix, over 27 characters."""
    ar, tokenizer = EDLMForCausalLM.from_pretrained(folder / "ar").eval(), AutoTokenizer.from_pretrained(TOKENIZER)
    alphabet = " abcdefghijklmnopqrstuvwxyz"
    for s in piped[1]["samples"]:
        first = starts(tokenizer)[s["task"]][0].tolist().index(27)
        ids, bits = [alphabet.index(character) for character in s["text"]], 0.0
        for i in range(first, len(ids)):
            with torch.no_grad():
                logits = ar(input_ids=torch.tensor([[27] + ids[:i]])).logits[0, -1, :27]
            bits -= math.log2(logits.double().softmax(-1)[ids[i]])
        judged = piped[1]["judged"][s["task"]][s["sampler"]]
        assert judged["bits"][0] == pytest.approx(bits, rel=1e-4) and judged["characters"][0] == len(ids) - first
        assert len(judged["bits"]) == 16 and "known_words" not in judged  # there is no list of words


def test_piped_output(piped):
    """Five snapshots of each text, no escape codes, and the numbers of the JSON in the table."""
    output, result = piped
    assert "\x1b" not in output
    quarters = [len({round(s["num_steps"] * quarter / 4) for quarter in range(5)}) for s in result["samples"]]
    assert len(re.findall(r"^-- (MDLM|EDLM) \d+/\d+ ", output, re.M)) == sum(quarters) > 16
    last = {"MDLM": "t=0.00", "EDLM": f"revision {ROUNDS}/{ROUNDS}"}
    for s in result["samples"]:
        frame = rf"^-- {s['sampler']} [^\n]*{last[s['sampler']]}\n(.*?)\n{s['sampler']}: "
        assert s["text"].split() == re.findall(frame, output, re.M | re.S)[TASKS.index(s["task"])].split()
        assert f"{s['sampler']}: {s['nfe']} + {s['energy_nfe']} passes" in output
    for task in TASKS:
        for sampler, found in result["judged"][task].items():
            row = next(line.split() for line in output.splitlines() if line.startswith(f"{task:<8}{sampler}"))
            assert float(row[3]) == pytest.approx(sum(found["bits"]) / sum(found["characters"]), abs=0.006)
        assert re.search(rf"^{task}: (EDLM is|no difference)", output, re.M)


def test_verdict_is_worded_by_the_numbers():
    demo = load_script(DEMO)

    def verdict(edlm):
        found = {"MDLM": [3.0, 2.0, 4.0], "EDLM": edlm}
        return demo.verdict({name: {"bits": bits, "characters": [1, 1, 1]} for name, bits in found.items()})

    assert verdict([2.0, 1.1, 2.9]) == "EDLM is better by 1.00 +- 0.06 bits per character"
    assert verdict([4.0, 2.9, 5.1]) == "EDLM is worse by 1.00 +- 0.06 bits per character"
    assert verdict([2.0, 3.0, 4.1]).startswith("no difference seen (-0.03 +- 0.58")
    assert demo.known_share("One day the wug didn't sit. End", {"the", "day", "sit"}) == 3 / 5


@pytest.mark.parametrize("rounds", [0, 10])
@pytest.mark.parametrize("blanks, T, k, window", [(96, 32, 4, (0.4, 0.0)), (24, 8, 2, (0, 0)), (10, 64, 8, (1, 0))])
def test_both_samplers_may_spend_as_much(blanks, T, k, window, rounds):
    """Against what generate() counts, on a model whose candidates are all different; MDLM has no use for more than one
    pass for each blank."""
    demo, model = load_script(DEMO), make_toy("ar", length=blanks, vocab_size=500)
    for parameter in model.denoiser.head.parameters():  # the same for each token: hardly two candidates are equal
        parameter.data.zero_()
    config = model.generation_config
    config.num_candidates, config.energy_window, config.corrector_steps, config.corrector_size = k, window, rounds, 8
    free = {"batch_size": 60, "num_steps": T, "seed": 0, "return_dict_in_generate": True}
    spent = model.generate(**free)
    passes = demo.expected_passes(blanks, T, config.candidates_at) + demo.revision_passes(model)
    assert float((spent.nfe + spent.energy_nfe).float().mean()) == pytest.approx(passes, rel=0.12)
    of_mdlm = demo.expected_passes(blanks, demo.steps_of_mdlm(model, blanks, T))
    assert of_mdlm == pytest.approx(min(passes, blanks), rel=0.1)


def test_terminal(piped, folder, environment, tmp_path):
    """Redrawn in place, cursor back, same texts; and without a judge there is a note in place of the verdict."""
    without_ar = shutil.copytree(folder, tmp_path / "toy", ignore=shutil.ignore_patterns("ar"))
    code, output = in_terminal(command(without_ar, "--steps", str(NUM_STEPS)), environment)
    assert code == 0, output
    assert output.count(HIDE_CURSOR) == output.count(SHOW_CURSOR) == 4
    assert "\x1b[2m . ." in output  # dim masks
    finals = [part.split(SHOW_CURSOR)[0] for part in output.split(HIDE_CURSOR)[1:]]
    for final, s in zip(finals, piped[1]["samples"], strict=True):
        *lines, bar, end = ESCAPE.sub("", re.split(r"\x1b\[\d+A", final)[-1]).replace("\r", "").split("\n")
        whole = f"revision {ROUNDS}/{ROUNDS}" if s["sampler"] == "EDLM" else f"{s['num_steps']}/{s['num_steps']}"
        assert " ".join(lines).split() == s["text"].split() and whole in bar
        assert end == "" and max(map(len, [*lines, bar])) <= 100
    assert "No verdict" in output and "better" not in output


def test_interrupt(folder, environment):
    """Ctrl-C in the middle of sampling: code 130, the cursor is back, no traceback."""
    arguments = command(folder, "--steps", "100000")
    code, output = in_terminal(arguments, environment, interrupt_at="\x1b[1;32m")
    assert code == 130 and "Traceback" not in output
    assert output.rindex(SHOW_CURSOR) > output.rindex(HIDE_CURSOR)
    assert output.count(" passes, ") < 4


def test_characters_of_several_tokens_are_drawn_whole(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    tokenizer = train_tokenizer(["the city of the old"] * 9, vocab_size=268)
    text, mask = "the naïve 世界 \U0001f642 end", tokenizer.mask_token_id
    ids = tokenizer(text).input_ids
    canvas = load_script(DEMO).Canvas(tokenizer, mask, [mask] * len(ids), 2, "EDLM", None)
    cut = len(tokenizer("the naïve 世").input_ids) - 1
    canvas.draw(ids[:cut] + [mask] + ids[cut + 1 :], 1)
    canvas.draw(ids, 2)
    lines = [line.removesuffix(" ") for line in capsys.readouterr().out.splitlines() if not line.startswith("--")]
    assert lines == ["the naïve \ufffd .界 \U0001f642 end", text]


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
    canvas.callback(None, 0, 1.0, {"sequences": torch.tensor([tokenizer("abc").input_ids + [27] * 2])})
    canvas.draw(tokenizer("abcde").input_ids, 2)
    canvas.close()
    frames = re.split(r"\x1b\[2A\r", capsys.readouterr().out)
    assert [ESCAPE.sub("", frame).split("\n")[0] for frame in frames] == ["ab . . .", "abc . .", "abcde"]
    bars = [ESCAPE.sub("", frame).split("\n")[1] for frame in frames]
    assert ["energy chooses" in bar for bar in bars] == [False, True, False]
    assert [bar.count("#") > 0 for bar in bars] == [False, True, True] and "-" not in bars[2]
    styles = [re.findall(r"\x1b\[([1-9;]+)m([^\x1b]*)", frame) for frame in frames]
    colored = [[("1", "ab"), ("2", " . . .")], [("1", "ab"), ("1;32", "c"), ("2", " . .")], [("1", "ab")]]
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


@pytest.mark.parametrize(
    "wrong, words",
    [
        (["--steps", "0"], "--steps.*'0'"),
        (["--seed", "x"], "--seed.*'x'"),
        (["--gap", "nothing is missing"], "--gap.*nothing is missing"),
        (["--prompt", " "], "--prompt is empty"),
        (["--colour"], "--colour"),
        (["--device", "nowhere"], "--device 'nowhere'"),
        (["--gap", "[MASK 900]"], "--gap.*at most 128 tokens, got 900"),
    ],
)
def test_a_wrong_value_is_one_line_that_names_it(folder, environment, wrong, words):
    """Besides what torchao, which only the tests install, says when it is imported."""
    done = subprocess.run(command(folder, *wrong), env=environment, capture_output=True, text=True)
    said = done.stderr.splitlines()  # nothing of other packages
    assert done.returncode and len(said) == 1 and re.match(f"demo: .*{words}", said[0]), done.stderr


def test_a_reader_who_has_seen_enough(folder, environment):
    """As `| head -3`: the pipe is closed while the texts are being written."""
    process = subprocess.Popen(
        command(folder, "--steps", str(NUM_STEPS)), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    for _ in range(3):
        process.stdout.readline()
    process.stdout.close()
    error = process.stderr.read().decode()
    assert process.wait() == 0 and "Traceback" not in error and "Broken" not in error
