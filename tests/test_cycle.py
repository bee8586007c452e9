"""From text to a model that others load by its name: train, push, load where there is but torch and transformers.

python -m pytest tests/test_cycle.py -s    shows every command and what a user sees of it
"""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from support.fake_hub import INITIAL

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "tests" / "fixtures" / "wiki27-sample.parquet"
OLDEST = ROOT / ".venv-oldest" / "bin" / "python"
MODEL, ADAPTER, ROWS = (f"user/{name}" for name in ("edlm-mine", "edlm-mine-lora", "samples"))
METRIC, PAGE = "user/token_entropy", "user/page"
SIZES = "--tokenizer {0} --length 32 --hidden_size 16 --num_hidden_layers 1 --num_attention_heads 2".format
TRAIN = f"--data {DATA} --validation_data {DATA} --batch_size 4 --eval_blocks 4 --final_eval_blocks 4 --report_to none"
LOAD = """
import sys, torch
from importlib.metadata import distributions
from transformers import AutoModel, AutoTokenizer
model = AutoModel.from_pretrained({repo!r}, revision={revision!r}, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained({repo!r}, revision={revision!r}, trust_remote_code=True)
print(repr(tokenizer.decode(model.generate(max_length=32, num_steps=8, seed=0)[0])))
installed = {{d.name.lower() for d in distributions()}}
assert "modeling_edlm" not in sys.modules and not installed & {{"peft", "accelerate", "datasets", "gradio"}}
"""
LOAD_ADAPTER = """
import sys
from transformers import AutoModel
model = AutoModel.from_pretrained({repo!r}, trust_remote_code=True)
print(model.generate(max_length=32, num_steps=8, seed=0)[0].tolist(), model.config.energy_adapter)
assert "modeling_edlm" not in sys.modules
"""


def test_from_text_to_a_name_on_the_hub(hub, tmp_path):
    if not OLDEST.exists():
        pytest.fail(f"{OLDEST} is missing; `make test` makes that environment")
    environment = hub.environment(tmp_path / "home") | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    (tmp_path / "empty").mkdir()

    def run(*command, cwd=tmp_path, **changes):
        print(f"\n$ {shlex.join(map(str, command))}"[:400])
        options = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "cwd": cwd, "timeout": 300}
        done = subprocess.run([*map(str, command)], env=environment | changes, **options)
        print(done.stdout.strip())
        assert done.returncode == 0, done.stderr
        return done.stdout

    def train(module: str, arguments: str):
        return run(sys.executable, "-m", f"training.{module}", *shlex.split(arguments))

    def push(folder, repo, *more):
        run(sys.executable, "-m", "hub_cards.publish.push", "--folder", folder, "--repo", repo, *more)
        return hub.sha(repo if "--space" not in more else f"spaces/{repo}") if "--dataset" not in more else None

    # a denoiser of fifty steps, an energy over it by LoRA, and texts that it makes
    tokenizer = SIZES(ROOT / "hub_cards" / "edlm-wiki27")
    train("pretrain", f"--objective mdlm {tokenizer} {TRAIN} --max_steps 50 --eval_steps 25 --output_dir denoiser")
    lora = "--lora_r 2 --energy_target xs --max_steps 4 --eval_steps 4 --eval_sequences 0 --warmup_steps 1"
    train("train_energy", f"--base denoiser/model {lora} {TRAIN} --output_dir lora")
    train("generate", "--model denoiser/model --num_samples 3 --num_steps 4 --out rows/train.jsonl")

    first = push(tmp_path / "denoiser" / "model", MODEL, "--tag", "v1")
    push(tmp_path / "lora" / "model", ADAPTER, "--base", MODEL)
    push(ROOT / "hub_cards" / "metrics" / "token_entropy", METRIC, "--space")
    push(ROOT / "spaces_app", PAGE, "--space", "--base", MODEL)
    push(tmp_path / "rows", ROWS, "--dataset")
    card = hub.files(f"spaces/{PAGE}")["README.md"].decode()
    assert f"models:\n- {MODEL}\n" in card and f'Client("{PAGE}")' in card
    assert hub.files(f"datasets/{ROWS}").keys() > {"README.md", "train.jsonl"}

    clean, empty = {"PYTHONPATH": ""}, tmp_path / "empty"
    text = run(OLDEST, "-P", "-c", LOAD.format(repo=MODEL, revision=first), cwd=empty, **clean)
    run(sys.executable, "-P", "-c", LOAD_ADAPTER.format(repo=ADAPTER), cwd=empty, **clean)

    # another model under the same name: the tag and the hash still give the first one
    train("pretrain", f"--objective mdlm {tokenizer} {TRAIN} --max_steps 10 --eval_steps 10 --output_dir other")
    second = push(tmp_path / "other" / "model", MODEL)
    assert second != first and hub.sha(MODEL, "v1") == first and hub.sha(MODEL) == second
    assert run(OLDEST, "-P", "-c", LOAD.format(repo=MODEL, revision="v1"), cwd=empty, **clean) == text
    assert run(OLDEST, "-P", "-c", LOAD.format(repo=MODEL, revision="main"), cwd=empty, **clean) != text
    assert hub.files(MODEL).keys() >= {*INITIAL, "README.md", "custom_generate/generate.py", "generation_config.json"}
